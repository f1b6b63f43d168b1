//! Both ends of a persistent connection, connected to each other, and arbitrary bytes.

use super::*;
use crate::framing::encode_frame;
use crate::{PersistentClient, UnaryEvent, UnaryLimits};
use p2pd::persistent_connection_request::Message as ToDaemon;
use proptest::prelude::*;
use std::time::{Duration, Instant};

type Server = PersistentServer<u32, Vec<u8>>;
type Client = PersistentClient<u32, Vec<u8>>;
type Event = ServerEvent<u32, Vec<u8>>;

fn server() -> Server {
    PersistentServer::new([1; 32], ServerLimits::default())
}

fn client() -> Client {
    PersistentClient::new([2; 32], UnaryLimits::default())
}

/// Feeds the server in pieces of these sizes, in turn, and reads payloads into their buffers as a driver does.
fn feed(server: &mut Server, bytes: &[u8], sizes: &[usize]) -> Result<Vec<Event>, Error> {
    let mut events = Vec::new();
    let (mut rest, mut sizes) = (bytes, sizes.iter().cycle());
    while !rest.is_empty() {
        let size = (*sizes.next().unwrap()).min(rest.len());
        let (mut piece, tail) = rest.split_at(size);
        rest = tail;
        if let Some(room) = server.payload_buffer() {
            let count = room.len().min(piece.len());
            room[..count].copy_from_slice(&piece[..count]);
            piece = &piece[count..];
            server.payload_filled(count);
        }
        while let Some(event) = server.poll(&mut piece)? {
            events.push(event);
        }
    }
    Ok(events)
}

fn request(id: CallId, message: Option<ToDaemon>) -> Vec<u8> {
    let request = p2pd::PersistentConnectionRequest {
        call_id: Some(Bytes::copy_from_slice(&id)),
        message,
    };
    encode_frame(&request).to_vec()
}

fn echo(payload: &[u8]) -> p2pd::CallUnaryRequest {
    p2pd::CallUnaryRequest {
        peer: Some(Bytes::from_static(b"peer")),
        proto: Some(Bytes::from_static(b"echo")),
        data: Some(Bytes::copy_from_slice(payload)),
    }
}

fn call(server: &mut Server, id: CallId, payload: &[u8]) -> Vec<Event> {
    feed(
        server,
        &request(id, Some(ToDaemon::CallUnary(echo(payload)))),
        &[usize::MAX],
    )
    .unwrap()
}

#[test]
fn adds_and_removes_handlers() {
    let (mut server, mut client) = (server(), client());
    let mut out = BytesMut::new();
    let add = client.add_handler("echo", true, 1, &mut out).unwrap();
    let remove = client.remove_handler("echo", 2, &mut out).unwrap();
    let protocol = || "echo".to_owned();
    assert_eq!(
        feed(&mut server, &out, &[1]).unwrap(),
        [
            Event::AddHandler {
                id: add,
                protocol: protocol(),
                balanced: true
            },
            Event::RemoveHandler {
                id: remove,
                protocol: protocol()
            },
        ]
    );
    let mut out = BytesMut::new();
    server.acknowledge(&add, &mut out);
    server.refuse(&remove, "no such handler", &mut out);
    let mut input = &out[..];
    assert_eq!(
        client.poll(&mut input),
        Ok(Some(UnaryEvent::Acknowledged { token: 1 }))
    );
    let error = "no such handler".to_owned();
    assert_eq!(
        client.poll(&mut input),
        Ok(Some(UnaryEvent::Refused { token: 2, error }))
    );
}

#[test]
fn answers_each_call_once() {
    let mut server = server();
    call(&mut server, [7; 16], b"1");
    let mut out = BytesMut::new();
    assert!(server.reply(&[7; 16], 1, &mut out));
    let sent = out.len();
    assert!(!server.reply(&[7; 16], 1, &mut out));
    server.reply_error(&[7; 16], "late", &mut out);
    assert_eq!(out.len(), sent);
    assert_eq!(server.calls(), 0);
}

#[test]
fn answers_offered_calls_in_place() {
    let (mut server, mut client, now) = (server(), client(), Instant::now());
    let mut calls = BytesMut::new();
    let mut call = |protocol, payload: &[u8], token| {
        let len = payload.len();
        let id = client.call(b"peer", protocol, len, token, now, &mut calls);
        calls.extend_from_slice(payload);
        id.unwrap()
    };
    call("echo", b"first", 1);
    let other = call("other", b"second", 2);
    call("echo", b"third", 3);
    let mut out = BytesMut::new();
    let mut input = &calls[..];
    let mut poll = || {
        server.poll_in_place(&mut input, &mut out, |offered| match offered {
            Offered::Call {
                peer: b"peer",
                protocol: "echo",
                payload,
            } => Some(payload),
            _ => None,
        })
    };
    assert!(matches!(poll(), Ok(Some(Event::Call { id, .. })) if id == other));
    assert_eq!(poll(), Ok(None));
    assert_eq!(server.calls(), 1);
    assert!(server.is_unanswered(&other));
    let mut input = &out[..];
    for (token, payload) in [(1, b"first"), (3, b"third")] {
        let payload = payload.to_vec();
        let reply = UnaryEvent::Reply { token, payload };
        assert_eq!(client.poll(&mut input), Ok(Some(reply)));
    }
    assert_eq!(client.poll(&mut input), Ok(None));
}

#[test]
fn copies_the_wanted_part_of_an_offered_reply() {
    let mut server = server();
    let mut replies = Vec::new();
    for token in [1, 2] {
        let id = server.handle(b"peer", "echo", 0, token, &mut BytesMut::new());
        let reply = p2pd::CallUnaryResponse {
            result: Some(p2pd::call_unary_response::Result::Response(
                b"reply".as_slice().into(),
            )),
        };
        replies.extend(request(id.unwrap(), Some(ToDaemon::UnaryResponse(reply))));
    }
    let mut input = &replies[..];
    for (token, payload) in [(10, &b"re"[..]), (2, b"reply")] {
        let event = server.poll_in_place(&mut input, &mut BytesMut::new(), |offered| {
            let Offered::Reply { token, payload } = offered else {
                panic!("it is no call")
            };
            if *token == 2 {
                return None;
            }
            *token = 10;
            Some(&payload[..2])
        });
        let payload = payload.to_vec();
        assert_eq!(event, Ok(Some(Event::Reply { token, payload })));
    }
}

#[test]
fn does_not_answer_in_place_another_call_or_with_too_much() {
    let limits = ServerLimits {
        max_message: 1000,
        ..ServerLimits::default()
    };
    let mut server = Server::new([1; 32], limits);
    call(&mut server, [1; 16], b"first");
    let mut repeated = request([1; 16], Some(ToDaemon::CallUnary(echo(b"again"))));
    repeated.extend(request([2; 16], Some(ToDaemon::CallUnary(echo(b"large")))));
    let (mut input, mut out) = (&repeated[..], BytesMut::new());
    let mut poll = || server.poll_in_place(&mut input, &mut out, |_| Some(&[0; 1000]));
    assert!(matches!(poll(), Ok(Some(Event::Skipped { .. }))));
    assert!(matches!(poll(), Ok(Some(Event::Call { id, .. })) if id == [2; 16]));
    assert!(out.is_empty());
}

#[test]
fn receives_a_payload_while_the_connection_is_used() {
    let payload = vec![7; 50_000];
    let bytes = request([1; 16], Some(ToDaemon::CallUnary(echo(&payload))));
    let (first, rest) = bytes.split_at(20_000);
    let mut server = server();
    assert!(server.take_receiving().is_none());
    assert_eq!(feed(&mut server, first, &[usize::MAX]), Ok(vec![]));
    let mut receiving = server.take_receiving().unwrap();
    server
        .handle(b"caller", "echo", 0, 5, &mut BytesMut::new())
        .unwrap();
    receiving.unfilled().copy_from_slice(rest);
    receiving.filled(rest.len());
    server.resume(receiving);
    assert!(matches!(
        server.poll(&mut &[][..]),
        Ok(Some(Event::Call { payload: received, .. })) if received == payload
    ));
}

#[test]
fn cancels_all_calls_with_unwanted_tokens() {
    let (mut server, mut client, mut out) = (server(), client(), BytesMut::new());
    let [first, _, third] =
        [1, 2, 3].map(|token| server.handle(b"peer", "echo", 0, token, &mut out).unwrap());
    server.cancel_all(|token| *token != 2, &mut out);
    assert_eq!(server.take_handled(), [2]);
    let mut cancelled = std::collections::BTreeSet::new();
    let mut input = &out[..];
    while let Some(event) = client.poll(&mut input).unwrap() {
        if let UnaryEvent::Cancelled { id } = event {
            cancelled.insert(id);
        }
    }
    assert_eq!(cancelled, [first, third].into());
}

#[test]
fn does_not_answer_a_cancelled_call() {
    let (mut server, mut client) = (server(), client());
    let mut out = BytesMut::new();
    let begun = Instant::now();
    let id = client.call(b"peer", "echo", 0, 1, begun, &mut out).unwrap();
    client.cancel(&id, begun + Duration::from_secs(1), &mut out);
    let events = feed(&mut server, &out, &[3]).unwrap();
    assert!(
        matches!(events[..], [Event::Call { .. }, Event::Cancelled { id: cancelled }] if cancelled == id)
    );
    assert!(!server.reply(&id, 1, &mut BytesMut::new()));
    assert_eq!(server.calls(), 0);

    assert!(client.has_unconfirmed_cancels());
    let mut out = BytesMut::new();
    server.confirm_cancel(&id, &mut out);
    assert_eq!(client.poll(&mut &out[..]), Ok(None));
    assert!(!client.has_unconfirmed_cancels());
}

#[test]
fn refuses_calls_over_the_limits() {
    let limits = ServerLimits {
        max_calls: 2,
        max_call_bytes: 100,
        ..ServerLimits::default()
    };
    let mut server = Server::new([1; 32], limits);
    assert!(matches!(
        call(&mut server, [1; 16], &[0; 60])[..],
        [Event::Call { .. }]
    ));
    assert!(matches!(
        call(&mut server, [2; 16], &[0; 60])[..],
        [Event::Rejected { .. }]
    ));
    assert!(matches!(
        call(&mut server, [3; 16], &[0; 40])[..],
        [Event::Call { .. }]
    ));
    assert!(matches!(
        call(&mut server, [4; 16], &[])[..],
        [Event::Rejected { .. }]
    ));
    server.reply_error(&[1; 16], "done", &mut BytesMut::new());
    assert!(matches!(
        call(&mut server, [4; 16], &[])[..],
        [Event::Call { .. }]
    ));
}

#[test]
fn repeated_id_does_not_answer_the_earlier_call() {
    let mut server = server();
    call(&mut server, [1; 16], b"first");
    assert!(matches!(
        call(&mut server, [1; 16], b"second")[..],
        [Event::Skipped { .. }]
    ));
    for message in [
        None,
        Some(ToDaemon::CallUnary(p2pd::CallUnaryRequest::default())),
    ] {
        let events = feed(&mut server, &request([1; 16], message), &[5]).unwrap();
        assert!(matches!(events[..], [Event::Skipped { .. }]), "{events:?}");
    }
    assert_eq!(server.calls(), 1);
    assert!(server.reply(&[1; 16], 0, &mut BytesMut::new()));
}

#[test]
fn message_over_the_limit_fails_its_call_only() {
    let limits = ServerLimits {
        max_message: 1000,
        ..ServerLimits::default()
    };
    let mut server = Server::new([1; 32], limits);
    let events = call(&mut server, [1; 16], &[0; 2000]);
    assert!(matches!(&events[..], [Event::Rejected { id, .. }] if *id == [1; 16]));
    // A reply, too, in either direction.
    let id = server
        .handle(b"caller", "echo", 3, 5, &mut BytesMut::new())
        .unwrap();
    let reply = p2pd::CallUnaryResponse {
        result: Some(p2pd::call_unary_response::Result::Response(
            vec![0; 2000].into(),
        )),
    };
    let bytes = request(id, Some(ToDaemon::UnaryResponse(reply)));
    let events = feed(&mut server, &bytes, &[100]).unwrap();
    assert!(matches!(events[..], [Event::InvalidReply { token: 5, .. }]));
    call(&mut server, [2; 16], b"");
    let mut out = BytesMut::new();
    assert!(!server.reply(&[2; 16], 2000, &mut out));
    assert!(!out.is_empty(), "the client is told");
    assert!(server.handle(b"caller", "echo", 1000, 6, &mut out).is_err());
    assert_eq!((server.calls(), server.handled()), (0, 0));
}

#[test]
fn returns_unanswered_calls_when_the_connection_ends() {
    let mut server = server();
    call(&mut server, [1; 16], b"x");
    server
        .handle(b"caller", "echo", 0, 5, &mut BytesMut::new())
        .unwrap();
    assert_eq!(server.take_calls(), [[1; 16]]);
    assert_eq!(server.take_handled(), [5]);
    assert_eq!((server.calls(), server.handled()), (0, 0));
}

#[test]
fn ids_of_handled_calls_differ_between_connections() {
    let id = |seed| {
        let mut server = Server::new([seed; 32], ServerLimits::default());
        server.handle(b"", "", 0, 1, &mut BytesMut::new()).unwrap()
    };
    assert_ne!(id(1), id(2));
}

/// Any message of a client.
#[derive(Debug, Clone)]
enum Said {
    Add(String, bool),
    Remove(String),
    Call(Vec<u8>, String, Vec<u8>),
}

fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..50),
        (0..60_000usize).prop_map(|len| vec![7; len]),
    ]
}

fn any_said() -> impl Strategy<Value = Said> {
    prop_oneof![
        (".{0,20}", any::<bool>()).prop_map(|(name, balanced)| Said::Add(name, balanced)),
        ".{0,20}".prop_map(Said::Remove),
        (
            prop::collection::vec(any::<u8>(), 0..40),
            ".{0,20}",
            any_payload()
        )
            .prop_map(|(peer, name, payload)| Said::Call(peer, name, payload)),
    ]
}

proptest! {
    #[test]
    fn decodes_any_sequence_however_it_is_split(
        said in prop::collection::vec(any_said(), 1..8),
        sizes in prop::collection::vec(1usize..40_000, 1..6),
    ) {
        let (mut client, mut out, mut expected) = (client(), BytesMut::new(), Vec::new());
        for said in said {
            expected.push(match said {
                Said::Add(protocol, balanced) => {
                    let id = client.add_handler(&protocol, balanced, 1, &mut out).unwrap();
                    Event::AddHandler { id, protocol, balanced }
                }
                Said::Remove(protocol) => {
                    let id = client.remove_handler(&protocol, 1, &mut out).unwrap();
                    Event::RemoveHandler { id, protocol }
                }
                Said::Call(peer, protocol, payload) => {
                    let (now, len) = (Instant::now(), payload.len());
                    let id = client.call(&peer, &protocol, len, 1, now, &mut out).unwrap();
                    out.extend_from_slice(&payload);
                    Event::Call { id, peer: peer.into(), protocol, payload }
                }
            });
        }
        prop_assert_eq!(feed(&mut server(), &out, &sizes), Ok(expected));
    }

    #[test]
    fn calls_and_replies_reach_the_other_end(
        payload in any_payload(), reply in any_payload(), error in ".{0,40}",
        sizes in prop::collection::vec(1usize..40_000, 1..6),
    ) {
        let (mut server, mut client) = (server(), client());
        // The client calls.
        let (mut out, now) = (BytesMut::new(), Instant::now());
        let id = client.call(b"peer", "echo", payload.len(), 1, now, &mut out).unwrap();
        out.extend_from_slice(&payload);
        client.call(b"peer", "echo", 0, 2, now, &mut out).unwrap();
        let events = feed(&mut server, &out, &sizes).unwrap();
        let [Event::Call { id: first, .. }, Event::Call { id: second, .. }] = &events[..] else {
            panic!("{events:?}")
        };
        prop_assert_eq!(first, &id);
        let mut out = BytesMut::new();
        prop_assert!(server.reply(first, reply.len(), &mut out));
        out.extend_from_slice(&reply);
        server.reply_error(second, &error, &mut out);
        let mut input = &out[..];
        let event = UnaryEvent::Reply { token: 1, payload: reply.clone() };
        prop_assert_eq!(client.poll(&mut input), Ok(Some(event)));
        let failed = UnaryEvent::HandlerFailed { token: 2, error: error.clone() };
        prop_assert_eq!(client.poll(&mut input), Ok(Some(failed)));

        // The client is called.
        let mut out = BytesMut::new();
        let given = server.handle(b"caller", "echo", payload.len(), 3, &mut out).unwrap();
        out.extend_from_slice(&payload);
        let other = server.handle(b"caller", "echo", 0, 4, &mut out).unwrap();
        let mut input = &out[..];
        let peer = Bytes::from_static(b"caller");
        let protocol = "echo".to_owned();
        let event = UnaryEvent::Call { id: given, peer, protocol, payload };
        prop_assert_eq!(client.poll(&mut input), Ok(Some(event)));
        client.poll(&mut input).unwrap();
        let mut out = BytesMut::new();
        prop_assert!(client.reply(&given, reply.len(), &mut out));
        out.extend_from_slice(&reply);
        client.reply_error(&other, &error, &mut out);
        let expected = [
            Event::Reply { token: 3, payload: reply },
            Event::HandlerFailed { token: 4, error },
        ];
        prop_assert_eq!(feed(&mut server, &out, &sizes).unwrap(), expected);
        prop_assert_eq!(server.handled(), 0);
    }

    #[test]
    fn cancel_reaches_the_handler_of_the_client(late in any::<bool>()) {
        let (mut server, mut client) = (server(), client());
        let mut out = BytesMut::new();
        let id = server.handle(b"caller", "echo", 0, 3, &mut out).unwrap();
        prop_assert_eq!(server.cancel(&id, &mut out), Some(3));
        prop_assert_eq!(server.cancel(&id, &mut out), None);
        let mut input = &out[..];
        client.poll(&mut input).unwrap();
        prop_assert_eq!(client.poll(&mut input), Ok(Some(UnaryEvent::Cancelled { id })));
        if late {
            // The late reply is dropped.
            let reply = p2pd::CallUnaryResponse { result: None };
            let bytes = request(id, Some(ToDaemon::UnaryResponse(reply)));
            prop_assert_eq!(feed(&mut server, &bytes, &[5]).unwrap(), []);
        }
    }

    #[test]
    fn arbitrary_bytes_give_events_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        sizes in prop::collection::vec(1usize..40, 1..5),
    ) {
        let whole = feed(&mut server(), &bytes, &[usize::MAX]);
        prop_assert_eq!(feed(&mut server(), &bytes, &sizes).is_ok(), whole.is_ok());
    }
}
