//! The seeds of the fuzzer: valid input for every target.

use super::{exchange, persistent, persistent_server};
use bytes::Bytes;
use p2pd_protocol::command::{
    connmgr, control, dht, peerstore, pubsub, streams, unary, Reply, Request as _, Typed,
};
use p2pd_protocol::framing::encode_frame;
use p2pd_protocol::pb::p2pd;
use p2pd_protocol::{Event, Identity, Multiaddr, PeerId, PeerInfo, PublicKey, StreamInfo};
use prost::Message as _;

const PEERS: [&str; 3] = [
    "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7",
    "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
    "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe",
];

const ADDRS: [&str; 16] = [
    "/ip4/127.0.0.1/tcp/4001",
    "/ip6/::1/udp/4001/quic-v1/webtransport",
    "/dns4/example.org/tcp/443/wss",
    "/dnsaddr/bootstrap.libp2p.io/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7",
    "/ip4/1.2.3.4/tcp/1/p2p/bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe/p2p-circuit",
    "/unix/tmp/p2pd.sock",
    "/ip4/1.2.3.4/tcp/80/unix/a/tcp",
    "/ip6zone/eth0/ip6/fe80::1/tcp/0",
    "/ip4/10.0.0.0/ipcidr/8",
    "/onion/aaimaq4ygg2iegci:80",
    "/onion3/vww6ybal4bd7szmgncyruucpgfkqahzddi37ktceo3ah7ngmcopnpyyd:1234",
    "/ip4/1.2.3.4/udp/1/webrtc-direct/certhash/uEiDDq4_xNyDorZBH3TlGazyJdOWSwvo4PUo5YHFMrvDE8g",
    "/memory/1234/http-path/a%2Fb",
    "/ip4/1.2.3.4/tcp/5/tls/sni/example.org/ws",
    "/dns/a/tcp/0/x-parity-ws/a",
    "/ip4/1.2.3.4/sctp/5/utp/http",
];

/// Returns the seeds of every target.
pub fn seeds() -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let messages = persistent::samples();
    let all: Vec<&[u8]> = messages.iter().map(|message| &message[..]).collect();
    let mut scripts: Vec<_> = all
        .iter()
        .map(|message| persistent::script(&[message]))
        .collect();
    scripts.push(persistent::script(&all));
    // A large reply in pieces, among everything else.
    scripts.push(vec![
        40, 2, 0, 1, b'p', 9, 2, 2, b'h', b'i', 12, 3, 5, 250, 2, b'h', b'i', 6, 3, 4, 1, 13, 0, 1,
        255, 7, 2, 100, 8, 2, 3, b'w', b'h', b'y', 6, 60, 12, 6, 0, 0, 10, 5, 0, 14, 7, 2, 0, 9, 3,
        1, b'h',
    ]);
    let key = PublicKey {
        key_type: 1,
        data: Bytes::from_static(&[7; 32]),
    };
    vec![
        ("commands", commands()),
        ("exchange", exchanges()),
        (
            "framing",
            vec![
                vec![3, 10, 3, 1, 2, 3, 0, 200, 1],
                [&[255, 4, 200, 1][..], &[8; 210]].concat(),
            ],
        ),
        ("heads", heads()),
        (
            "multiaddr_bytes",
            addrs().map(|addr| addr.to_bytes().to_vec()).collect(),
        ),
        ("multiaddr_text", ADDRS.map(Into::into).to_vec()),
        (
            "peer_id",
            PEERS
                .into_iter()
                .flat_map(|text| {
                    [
                        text.into(),
                        parse(text).to_bytes().to_vec(),
                        parse(text).to_cid().into(),
                    ]
                })
                .collect(),
        ),
        ("persistent", scripts),
        ("persistent_server", persistent_servers()),
        ("public_key", vec![key.encode()]),
    ]
}

fn parse(text: &str) -> PeerId {
    text.parse().expect("a valid peer id")
}

fn addrs() -> impl Iterator<Item = Multiaddr> {
    ADDRS.into_iter().map(|text| {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    })
}

fn peer_info() -> PeerInfo {
    PeerInfo {
        peer_id: parse(PEERS[0]),
        addrs: addrs().take(3).collect(),
    }
}

fn stream_info() -> StreamInfo {
    StreamInfo {
        peer_id: parse(PEERS[1]),
        addr: peer_info().addrs.remove(0),
        protocol: "/echo/1".to_owned(),
    }
}

/// Every message of a client, and all of them in sequence.
fn persistent_servers() -> Vec<Vec<u8>> {
    let samples = persistent_server::samples();
    let (small, all) = (&samples[..samples.len() - 1], samples.concat());
    let seed = |bytes: &[u8]| [&[2, 2], bytes].concat();
    // A test changes each byte of a seed in turn, so the large seed is truncated.
    let mut seeds: Vec<_> = small.iter().map(|bytes| seed(bytes)).collect();
    seeds.push(seed(&all[..all.len() - 19_900]));
    seeds
}

/// Every kind of request, and all of them in sequence.
fn commands() -> Vec<Vec<u8>> {
    let frames: Vec<_> = (0..exchange::KINDS)
        .map(|kind| exchange::command(kind).encode())
        .chain([peerstore::Probe.encode()])
        .collect();
    let seed = |frames: &[Bytes]| [&[2, 60][..], &frames.concat()].concat();
    let mut seeds: Vec<_> = frames.chunks(1).map(seed).collect();
    seeds.push(seed(&frames));
    seeds
}

/// A valid answer to every kind of request, and a refusal.
fn exchanges() -> Vec<Vec<u8>> {
    let value = Bytes::from_static(b"value");
    let values =
        |value: Reply, count| [vec![Event::Value(value); count], vec![Event::End]].concat();
    let mut seeds = Vec::new();
    for kind in 0..exchange::KINDS {
        let reply = match kind {
            0 => control::Identify::into_reply(Identity::new(
                parse(PEERS[1]),
                addrs().take(2).collect(),
            )),
            1 => control::Connect::into_reply(()),
            2 => control::Disconnect::into_reply(()),
            3 => control::ListPeers::into_reply(vec![peer_info(), peer_info()]),
            4 => streams::StreamOpen::into_reply(stream_info()),
            5 => streams::StreamHandler::into_reply(()),
            6 => streams::RemoveStreamHandler::into_reply(()),
            7 => dht::FindPeer::into_reply(peer_info()),
            8 => dht::FindPeersConnectedToPeer::into_reply(peer_info()),
            9 => dht::FindProviders::into_reply(peer_info()),
            10 => dht::GetClosestPeers::into_reply(parse(PEERS[2])),
            11 => dht::GetPublicKey::into_reply(value.clone()),
            12 => dht::GetValue::into_reply(value.clone()),
            13 => dht::SearchValue::into_reply(value.clone()),
            14 => dht::PutValue::into_reply(()),
            15 => dht::Provide::into_reply(()),
            16 => connmgr::TagPeer::into_reply(()),
            17 => connmgr::UntagPeer::into_reply(()),
            18 => connmgr::Trim::into_reply(()),
            19 => pubsub::GetTopics::into_reply(vec!["topic".to_owned(), String::new()]),
            20 => pubsub::ListTopicPeers::into_reply(PEERS.map(parse).to_vec()),
            21 => pubsub::Publish::into_reply(()),
            22 => pubsub::Subscribe::into_reply(()),
            23 => peerstore::GetProtocols::into_reply(vec!["/a/1".to_owned()]),
            24 => peerstore::GetPeerInfo::into_reply(peer_info()),
            _ => unary::Upgrade::into_reply(()),
        };
        let events = match kind {
            7 | 11 | 12 => values(reply, 1),
            10 | 13 => values(reply, 2),
            8 | 9 => values(reply, 3),
            _ => vec![Event::Reply(reply)],
        };
        for events in [events, vec![Event::Refused("no such luck".to_owned())]] {
            let mut seed = vec![kind, 2, 60];
            seed.extend(exchange::answer(kind, &events));
            seeds.push(seed);
        }
    }
    seeds
}

fn heads() -> Vec<Vec<u8>> {
    let info = stream_info();
    let head = p2pd::StreamInfo {
        peer: Some(info.peer_id.to_bytes()),
        addr: Some(info.addr.to_bytes()),
        proto: Some(info.protocol),
    };
    let message = p2pd::PsMessage {
        from: Some(parse(PEERS[0]).to_bytes()),
        data: Some(Bytes::from_static(b"data")),
        seqno: Some(Bytes::from_static(&[0, 0, 0, 0, 0, 0, 0, 1])),
        topic_i_ds: vec!["topic".to_owned()],
        signature: Some(Bytes::from_static(b"signature")),
        key: Some(Bytes::from_static(b"key")),
    };
    vec![
        head.encode_to_vec(),
        message.encode_to_vec(),
        encode_frame(&head).to_vec(),
    ]
}
