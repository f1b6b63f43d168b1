//! Every request and reply, encoded and decoded again.

use super::message::{duration, whole_seconds};
use super::*;
use crate::{framing, Multiaddr, PeerId};
use crate::{PeerInfo, PubsubMessage, StreamInfo};
use proptest::prelude::*;
use std::time::Duration;

fn bytes() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
}

fn peer() -> impl Strategy<Value = PeerId> {
    bytes().prop_map(PeerId::from_bytes)
}

fn addr() -> impl Strategy<Value = Multiaddr> {
    bytes().prop_map(Multiaddr::from_bytes)
}

fn addrs() -> impl Strategy<Value = Vec<Multiaddr>> {
    prop::collection::vec(addr(), 0..4)
}

fn text() -> impl Strategy<Value = String> {
    ".{0,20}"
}

fn protocols() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(text(), 0..4)
}

/// Timeouts in whole seconds, as in the protocol.
fn timeout() -> impl Strategy<Value = Option<Duration>> {
    prop::option::of((1..3_000_000_000u64).prop_map(Duration::from_secs))
}

pub(crate) fn any_peer_info() -> impl Strategy<Value = PeerInfo> {
    (peer(), addrs()).prop_map(|(peer_id, addrs)| PeerInfo { peer_id, addrs })
}

/// Any request except [`peerstore::Probe`], which servers do not know.
pub(crate) fn any_command() -> impl Strategy<Value = Command> {
    let control = prop_oneof![
        Just(control::Identify.into()),
        Just(control::ListPeers.into()),
        (peer(), addrs(), timeout()).prop_map(|(peer, addrs, timeout)| control::Connect {
            peer,
            addrs,
            timeout
        }
        .into()),
        peer().prop_map(|peer| control::Disconnect { peer }.into()),
    ];
    let streams = prop_oneof![
        (peer(), protocols(), timeout()).prop_map(|(peer, protocols, timeout)| {
            streams::StreamOpen {
                peer,
                protocols,
                timeout,
            }
            .into()
        }),
        (addr(), protocols(), any::<bool>()).prop_map(|(addr, protocols, balanced)| {
            streams::StreamHandler {
                addr,
                protocols,
                balanced,
            }
            .into()
        }),
        (addr(), protocols()).prop_map(|(addr, protocols)| streams::RemoveStreamHandler {
            addr,
            protocols
        }
        .into()),
    ];
    let dht = prop_oneof![
        (peer(), timeout()).prop_map(|(peer, timeout)| dht::FindPeer { peer, timeout }.into()),
        (peer(), timeout()).prop_map(|(peer, timeout)| dht::FindPeersConnectedToPeer {
            peer,
            timeout
        }
        .into()),
        (bytes(), any::<i32>(), timeout()).prop_map(|(cid, count, timeout)| dht::FindProviders {
            cid,
            count,
            timeout
        }
        .into()),
        (bytes(), timeout())
            .prop_map(|(key, timeout)| dht::GetClosestPeers { key, timeout }.into()),
        (peer(), timeout()).prop_map(|(peer, timeout)| dht::GetPublicKey { peer, timeout }.into()),
        (bytes(), timeout()).prop_map(|(key, timeout)| dht::GetValue { key, timeout }.into()),
        (bytes(), timeout()).prop_map(|(key, timeout)| dht::SearchValue { key, timeout }.into()),
        (bytes(), bytes(), timeout()).prop_map(|(key, value, timeout)| dht::PutValue {
            key,
            value,
            timeout
        }
        .into()),
        (bytes(), timeout()).prop_map(|(cid, timeout)| dht::Provide { cid, timeout }.into()),
    ];
    let others = prop_oneof![
        (peer(), text(), any::<i64>()).prop_map(|(peer, tag, weight)| connmgr::TagPeer {
            peer,
            tag,
            weight
        }
        .into()),
        (peer(), text()).prop_map(|(peer, tag)| connmgr::UntagPeer { peer, tag }.into()),
        Just(connmgr::Trim.into()),
        Just(pubsub::GetTopics.into()),
        text().prop_map(|topic| pubsub::ListTopicPeers { topic }.into()),
        (text(), bytes()).prop_map(|(topic, data)| pubsub::Publish { topic, data }.into()),
        text().prop_map(|topic| pubsub::Subscribe { topic }.into()),
        peer().prop_map(|peer| peerstore::GetProtocols { peer }.into()),
        peer().prop_map(|peer| peerstore::GetPeerInfo { peer }.into()),
        Just(unary::Upgrade.into()),
    ];
    prop_oneof![control, streams, dht, others]
}

/// A request's message, without its length.
fn message(command: &Command) -> Bytes {
    let mut frame = bytes::BytesMut::from(&command.encode()[..]);
    let message = framing::split_frame(&mut frame, usize::MAX).unwrap();
    assert!(frame.is_empty());
    message.unwrap()
}

#[test]
fn rounds_timeouts_up_to_whole_seconds() {
    assert_eq!(whole_seconds(None), None);
    assert_eq!(whole_seconds(Some(Duration::ZERO)), Some(1));
    assert_eq!(whole_seconds(Some(Duration::from_millis(1))), Some(1));
    assert_eq!(whole_seconds(Some(Duration::from_millis(1500))), Some(2));
    assert_eq!(whole_seconds(Some(Duration::from_secs(2))), Some(2));
    assert!(whole_seconds(Some(Duration::MAX)).unwrap() < i64::MAX / 1_000_000_000);
}

#[test]
fn reads_timeouts_of_zero_or_less_as_the_default() {
    assert_eq!(duration(None), None);
    assert_eq!(duration(Some(0)), None);
    assert_eq!(duration(Some(-1)), None);
    assert_eq!(duration(Some(3)), Some(Duration::from_secs(3)));
}

#[test]
fn reads_type_9_as_peerstore_only_if_field_9_begins_with_a_varint() {
    let upgrade = Command::from(unary::Upgrade);
    // hivemind's own client sends the type alone; ours adds a field 9 for the JavaScript daemon.
    for message in [
        &[8, 9][..],
        &[8, 9, 0x4a, 4, 0x0a, 2, 0x78, 0],
        &[8, 9, 0x4a, 0],
    ] {
        assert_eq!(
            Command::decode(Bytes::copy_from_slice(message)),
            Ok(upgrade.clone())
        );
    }
    let peer = PeerId::from_bytes(vec![1]);
    let get = Bytes::from_static(&[8, 9, 0x4a, 5, 8, 1, 0x12, 1, 1]);
    assert_eq!(
        Command::decode(get),
        Ok(peerstore::GetProtocols { peer }.into())
    );
}

#[test]
fn peerstore_probe_is_an_unknown_request() {
    assert_eq!(
        Command::decode(message(&peerstore::Probe.into())),
        Err(Error::UnknownRequest(i32::MAX))
    );
}

#[test]
fn reads_handler_without_balanced_as_not_balanced() {
    // As p2pclient 0.3.0 sends it.
    let bytes = Bytes::from_static(&[8, 3, 0x22, 6, 0x0a, 1, 4, 0x12, 1, b'p']);
    let Ok(Command::Streams(streams::Command::StreamHandler(handler))) = Command::decode(bytes)
    else {
        panic!("it was not read")
    };
    assert!(!handler.balanced);
}

proptest! {
    #[test]
    fn every_command_round_trips(command in any_command()) {
        prop_assert_eq!(Command::decode(message(&command)), Ok(command));
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
        let _ = Command::decode(bytes.into());
    }

    #[test]
    fn every_reply_round_trips(
        peers in prop::collection::vec(any_peer_info(), 0..4),
        ids in prop::collection::vec(peer(), 0..4),
        names in protocols(),
        addrs in addrs(),
        info in any_peer_info(),
        value in bytes(),
    ) {
        fn again<R: Request>(reply: &R::Reply) -> R::Reply {
            R::decode_reply(R::encode_reply(reply)).unwrap()
        }
        fn value_again<Q: Query>(value: &Q::Value) -> Q::Value {
            Q::decode_value(Q::encode_value(value)).unwrap()
        }
        let identity = control::Identity::new(info.peer_id.clone(), addrs.clone());
        prop_assert_eq!(&again::<control::Identify>(&identity), &identity);
        prop_assert_eq!(&again::<control::ListPeers>(&peers), &peers);
        prop_assert_eq!(&again::<pubsub::GetTopics>(&names), &names);
        prop_assert_eq!(&again::<pubsub::ListTopicPeers>(&ids), &ids);
        prop_assert_eq!(&again::<peerstore::GetProtocols>(&names), &names);
        prop_assert_eq!(&again::<peerstore::GetPeerInfo>(&info), &info);
        prop_assert_eq!(&value_again::<dht::FindPeer>(&info), &info);
        prop_assert_eq!(&value_again::<dht::FindPeersConnectedToPeer>(&info), &info);
        prop_assert_eq!(&value_again::<dht::FindProviders>(&info), &info);
        prop_assert_eq!(&value_again::<dht::GetClosestPeers>(&info.peer_id), &info.peer_id);
        prop_assert_eq!(&value_again::<dht::GetPublicKey>(&value), &value);
        prop_assert_eq!(&value_again::<dht::GetValue>(&value), &value);
        prop_assert_eq!(&value_again::<dht::SearchValue>(&value), &value);
    }

    #[test]
    fn stream_headers_and_pubsub_messages_round_trip(
        peer_id in peer(), addr in addr(), protocol in text(),
        from in prop::option::of(prop::collection::vec(any::<u8>(), 34)),
        data in bytes(), seqno in bytes(), topic_ids in protocols(), key in bytes(),
    ) {
        let unframe = |frame: Bytes| {
            let mut frame = bytes::BytesMut::from(&frame[..]);
            framing::split_frame(&mut frame, usize::MAX).unwrap().unwrap()
        };
        let info = StreamInfo { peer_id, addr, protocol };
        let frame = unframe(streams::encode_stream_info(&info));
        prop_assert_eq!(streams::decode_stream_info(&frame), Ok(info));
        let from = from.map(|mut bytes| { bytes[0] = 0; PeerId::from_bytes(bytes) });
        let signature = key.clone();
        let message = PubsubMessage { from, data, seqno, topic_ids, signature, key };
        let frame = unframe(pubsub::encode_message(&message));
        prop_assert_eq!(pubsub::decode_message(&frame), Ok(message));
    }
}
