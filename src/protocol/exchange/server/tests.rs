//! The daemon's end of a control connection, fed by the client's end and with arbitrary bytes.

use super::*;
use crate::command::tests::{any_command, any_peer_info};
use crate::command::Typed;
use crate::command::{connmgr, control, dht, pubsub, streams, unary};
use crate::{ClientExchange, Event, Multiaddr, PeerId, StreamInfo};
use proptest::prelude::*;

fn server_with(command: &Command) -> ServerExchange {
    let mut server = ServerExchange::new(Limits::default());
    server.receive(&command.encode());
    assert_eq!(server.poll().unwrap().as_ref(), Some(command));
    server
}

#[test]
fn serves_pipelined_requests_one_after_another() {
    let mut server = ServerExchange::new(Limits::default());
    server.receive(&control::Identify.encode());
    server.receive(&control::ListPeers.encode());
    assert_eq!(server.poll(), Ok(Some(control::Identify.into())));
    assert_eq!(server.poll(), Ok(None), "the first is not answered yet");
    let identity = control::Identity::new(PeerId::from_bytes(vec![1]), Vec::new());
    server.reply::<control::Identify>(&identity).unwrap();
    assert_eq!(server.poll(), Ok(Some(control::ListPeers.into())));
}

#[test]
fn rejects_a_reply_to_another_request() {
    let mut server = server_with(&control::ListPeers.into());
    assert_eq!(
        server.reply::<connmgr::Trim>(&()),
        Err(Error::WrongReply {
            reply: "CONNMANAGER TRIM",
            request: "LIST_PEERS"
        })
    );
    assert!(server.end().is_err());
    assert_eq!(server.state(), State::Busy, "it can still be answered");
    server.refuse("no").unwrap();
    assert_eq!(server.state(), State::Ready);
    assert!(server.refuse("no").is_err(), "nothing is being served");
}

#[test]
fn success_consumes_the_connection_and_refusal_does_not() {
    let subscribe = pubsub::Subscribe {
        topic: "t".to_owned(),
    };
    for command in [unary::Upgrade.into(), Command::from(subscribe)] {
        let mut server = server_with(&command);
        server.refuse("no").unwrap();
        assert_eq!(server.state(), State::Ready);
    }
    let mut server = server_with(&unary::Upgrade.into());
    server.receive(b"first bytes");
    server.reply::<unary::Upgrade>(&()).unwrap();
    assert_eq!(server.state(), State::Consumed);
    assert!(!server.wants_input());
    assert_eq!(server.poll(), Ok(None));
    assert_eq!(server.into_remainder()[..], *b"first bytes");
}

#[test]
fn refuses_a_request_of_unknown_type_and_goes_on() {
    let mut server = ServerExchange::new(Limits::default());
    server.receive(&[3, 8, 0xd0, 0x0f]);
    server.receive(&control::Identify.encode());
    assert_eq!(server.poll(), Err(Error::UnknownRequest(2000)));
    server.refuse("unknown request").unwrap();
    assert_eq!(server.poll(), Ok(Some(control::Identify.into())));
}

#[test]
fn query_without_values_has_begin_and_end() {
    let query = dht::SearchValue {
        key: Bytes::from_static(b"k"),
        timeout: None,
    };
    let mut server = server_with(&query.into());
    assert_eq!(
        server.end().unwrap()[..],
        [6, 8, 0, 42, 2, 8, 0, 2, 8, 2],
        "BEGIN in a Response, END on its own"
    );
    assert_eq!(server.state(), State::Ready);
}

#[test]
fn does_not_refuse_after_a_value() {
    let query = dht::SearchValue {
        key: Bytes::from_static(b"k"),
        timeout: None,
    };
    let mut server = server_with(&query.into());
    server.value::<dht::SearchValue>(&Bytes::new()).unwrap();
    assert!(server.refuse("no").is_err());
    server.end().unwrap();
}

#[test]
fn stops_wanting_input_while_a_client_sends_and_does_not_read() {
    let mut server = server_with(&control::Identify.into());
    while server.wants_input() {
        server.receive(&[0; 64 << 10]);
    }
    assert!(server.decoder.len() < Limits::default().max_frame + (128 << 10));
}

#[test]
fn fails_on_bytes_that_are_not_a_request() {
    for bytes in [
        &[0x80; 11][..],
        &[1, 0xff],
        &[2, 0x10, 0],
        &[4, 8, 1, 0x12, 0],
    ] {
        let mut server = ServerExchange::new(Limits::default());
        server.receive(bytes);
        assert!(server.poll().is_err(), "{bytes:?}");
        assert_eq!(server.state(), State::Failed);
        assert!(!server.wants_input());
    }
}

proptest! {
    #[test]
    fn decodes_any_sequence_of_commands_however_it_is_split(
        commands in prop::collection::vec(any_command(), 1..8),
        sizes in prop::collection::vec(1usize..40, 1..20),
    ) {
        let bytes: Vec<u8> = commands.iter().flat_map(Command::encode).collect();
        let mut server = ServerExchange::new(Limits::default());
        let mut decoded = Vec::new();
        let mut rest = &bytes[..];
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, tail) = rest.split_at((*size).min(rest.len()));
            rest = tail;
            server.receive(piece);
            while let Some(command) = server.poll().unwrap() {
                decoded.push(command);
                server.refuse("next").unwrap();
            }
        }
        prop_assert_eq!(decoded, commands);
        prop_assert_eq!(server.state(), State::Ready);
    }

    #[test]
    fn arbitrary_bytes_give_commands_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut server = ServerExchange::new(Limits::default());
        server.receive(&bytes);
        loop {
            match server.poll() {
                Ok(Some(_)) | Err(Error::UnknownRequest(_)) => {
                    server.refuse("next").unwrap();
                }
                Ok(None) => break,
                Err(_) => {
                    prop_assert_eq!(server.state(), State::Failed);
                    break;
                }
            }
        }
    }

    #[test]
    fn client_decodes_what_the_server_encodes(
        peers in prop::collection::vec(any_peer_info(), 0..5),
        addrs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..3),
        words in ".{0,40}".prop_map(String::from),
    ) {
        let client_of = |request: &Command| {
            let mut client = ClientExchange::new(Limits::default());
            client.send(&request.encoded()).unwrap();
            (client, server_with(request))
        };
        let (mut client, mut server) = client_of(&control::ListPeers.into());
        client.receive(&server.reply::<control::ListPeers>(&peers).unwrap());
        let reply = control::ListPeers::into_reply(peers.clone());
        prop_assert_eq!(client.poll(), Ok(Some(Event::Reply(reply))));

        let addrs: Vec<_> = addrs.into_iter().map(Multiaddr::from_bytes).collect();
        let identity = control::Identity::new(PeerId::from_bytes(vec![7]), addrs);
        let (mut client, mut server) = client_of(&control::Identify.into());
        client.receive(&server.reply::<control::Identify>(&identity).unwrap());
        let reply = control::Identify::into_reply(identity);
        prop_assert_eq!(client.poll(), Ok(Some(Event::Reply(reply))));

        let (mut client, mut server) = client_of(&control::ListPeers.into());
        client.receive(&server.refuse(&words).unwrap());
        prop_assert_eq!(client.poll(), Ok(Some(Event::Refused(words))));

        // A query with any number of values.
        let query = dht::FindProviders { cid: Bytes::new(), count: 3, timeout: None };
        let (mut client, mut server) = client_of(&query.into());
        for peer in &peers {
            client.receive(&server.value::<dht::FindProviders>(peer).unwrap());
            let value = dht::FindProviders::into_reply(peer.clone());
            prop_assert_eq!(client.poll(), Ok(Some(Event::Value(value))));
        }
        client.receive(&server.end().unwrap());
        prop_assert_eq!(client.poll(), Ok(Some(Event::End)));

        // A query with exactly one value, which is the whole answer.
        if let Some(peer) = peers.first() {
            let query = dht::FindPeer { peer: peer.peer_id.clone(), timeout: None };
            let (mut client, mut server) = client_of(&query.into());
            client.receive(&server.value::<dht::FindPeer>(peer).unwrap());
            let value = dht::FindPeer::into_reply(peer.clone());
            prop_assert_eq!(client.poll(), Ok(Some(Event::Value(value))));
            prop_assert_eq!(client.poll(), Ok(Some(Event::End)));
            prop_assert_eq!(server.state(), State::Ready);
        }

        // A takeover, followed by the first bytes of the stream.
        let info = StreamInfo {
            peer_id: PeerId::from_bytes(vec![7]),
            addr: Multiaddr::from_bytes(vec![4]),
            protocol: "p".to_owned(),
        };
        let open = streams::StreamOpen {
            peer: info.peer_id.clone(),
            protocols: vec!["p".to_owned()],
            timeout: None,
        };
        let (mut client, mut server) = client_of(&open.into());
        client.receive(&server.reply::<streams::StreamOpen>(&info).unwrap());
        client.receive(b"rest");
        prop_assert_eq!(client.poll(), Ok(Some(Event::Reply(streams::StreamOpen::into_reply(info)))));
        prop_assert_eq!(client.state(), State::Consumed);
        prop_assert_eq!(&client.into_remainder()[..], b"rest");
    }
}
