//! The client's end of a control connection, fed with byte strings.

use super::*;
use crate::command::{connmgr, control, dht, peerstore, pubsub, streams, unary, Typed};
use crate::framing::encode_frame;
use crate::{Multiaddr, PeerId};
use p2pd::{dht_response, response};
use proptest::prelude::*;

fn peer() -> PeerId {
    PeerId::from_bytes(vec![0, 2, 7, 7])
}

fn addr() -> Multiaddr {
    Multiaddr::from_bytes(vec![4])
}

fn stream_open() -> EncodedRequest {
    let open = streams::StreamOpen {
        peer: peer(),
        protocols: vec!["proto".to_owned()],
        timeout: None,
    };
    open.encoded()
}

fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

fn error(words: &'static [u8]) -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Error as i32),
        error: Some(p2pd::ErrorResponse {
            msg: Some(Bytes::from_static(words)),
        }),
        ..Default::default()
    }
}

fn dht_response(r#type: dht_response::Type, value: Option<&'static [u8]>) -> p2pd::DhtResponse {
    p2pd::DhtResponse {
        r#type: Some(r#type as i32),
        peer: value.map(|value| p2pd::PeerInfo {
            id: Some(Bytes::from_static(value)),
            addrs: vec![Bytes::from_static(b"\x04\x7f\0\0\x01")],
        }),
        value: value.map(Bytes::from_static),
    }
}

fn in_response(dht: p2pd::DhtResponse) -> p2pd::Response {
    p2pd::Response {
        dht: Some(dht),
        ..ok()
    }
}

fn stream_opened() -> p2pd::Response {
    p2pd::Response {
        stream_info: Some(p2pd::StreamInfo {
            peer: Some(Bytes::from_static(b"p")),
            addr: Some(Bytes::from_static(b"a")),
            proto: Some("proto".to_owned()),
        }),
        ..ok()
    }
}

/// Every kind of request, with a valid answer.
fn exchanges() -> Vec<(EncodedRequest, Vec<Bytes>)> {
    let values = || {
        vec![
            encode_frame(&in_response(dht_response(dht_response::Type::Begin, None))),
            encode_frame(&dht_response(dht_response::Type::Value, Some(b"one"))),
            encode_frame(&dht_response(dht_response::Type::Value, Some(b"two"))),
            encode_frame(&dht_response(dht_response::Type::End, None)),
        ]
    };
    let value = || {
        vec![encode_frame(&in_response(dht_response(
            dht_response::Type::Value,
            Some(b"one"),
        )))]
    };
    let done = || vec![encode_frame(&ok())];
    let with = |response: p2pd::Response| vec![encode_frame(&response)];
    let pubsub_body = p2pd::Response {
        pubsub: Some(p2pd::PsResponse {
            topics: vec!["t".to_owned()],
            peer_i_ds: vec![Bytes::from_static(b"p")],
        }),
        ..ok()
    };
    let peerstore_body = p2pd::Response {
        peer_store: Some(p2pd::PeerstoreResponse {
            peer: dht_response(dht_response::Type::Value, Some(b"one")).peer,
            protos: vec!["/a/1".to_owned()],
        }),
        ..ok()
    };
    let key = Bytes::from_static(b"/pk/key");
    vec![
        (
            control::Identify.encoded(),
            with(p2pd::Response {
                identify: Some(p2pd::IdentifyResponse {
                    id: Some(Bytes::from_static(b"me")),
                    addrs: vec![Bytes::from_static(b"a"), Bytes::from_static(b"b")],
                }),
                ..ok()
            }),
        ),
        (
            control::Connect {
                peer: peer(),
                addrs: vec![addr()],
                timeout: None,
            }
            .encoded(),
            done(),
        ),
        (control::Disconnect { peer: peer() }.encoded(), done()),
        (
            control::ListPeers.encoded(),
            with(p2pd::Response {
                peers: vec![p2pd::PeerInfo {
                    id: Some(Bytes::from_static(b"p")),
                    addrs: vec![],
                }],
                ..ok()
            }),
        ),
        (stream_open(), with(stream_opened())),
        (
            streams::StreamHandler {
                addr: addr(),
                protocols: vec!["p".to_owned()],
                balanced: false,
            }
            .encoded(),
            done(),
        ),
        (
            streams::RemoveStreamHandler {
                addr: addr(),
                protocols: vec!["p".to_owned()],
            }
            .encoded(),
            done(),
        ),
        (
            dht::FindPeer {
                peer: peer(),
                timeout: None,
            }
            .encoded(),
            value(),
        ),
        (
            dht::FindPeersConnectedToPeer {
                peer: peer(),
                timeout: None,
            }
            .encoded(),
            values(),
        ),
        (
            dht::FindProviders {
                cid: key.clone(),
                count: 5,
                timeout: None,
            }
            .encoded(),
            values(),
        ),
        (
            dht::GetClosestPeers {
                key: key.clone(),
                timeout: None,
            }
            .encoded(),
            values(),
        ),
        (
            dht::GetPublicKey {
                peer: peer(),
                timeout: None,
            }
            .encoded(),
            value(),
        ),
        (
            dht::GetValue {
                key: key.clone(),
                timeout: None,
            }
            .encoded(),
            value(),
        ),
        (
            dht::SearchValue {
                key: key.clone(),
                timeout: None,
            }
            .encoded(),
            values(),
        ),
        (
            dht::PutValue {
                key: key.clone(),
                value: key.clone(),
                timeout: None,
            }
            .encoded(),
            done(),
        ),
        (
            dht::Provide {
                cid: key.clone(),
                timeout: None,
            }
            .encoded(),
            done(),
        ),
        (
            connmgr::TagPeer {
                peer: peer(),
                tag: "t".to_owned(),
                weight: 3,
            }
            .encoded(),
            done(),
        ),
        (
            connmgr::UntagPeer {
                peer: peer(),
                tag: "t".to_owned(),
            }
            .encoded(),
            done(),
        ),
        (connmgr::Trim.encoded(), done()),
        (pubsub::GetTopics.encoded(), with(pubsub_body.clone())),
        (
            pubsub::ListTopicPeers {
                topic: "t".to_owned(),
            }
            .encoded(),
            with(pubsub_body),
        ),
        (
            pubsub::Publish {
                topic: "t".to_owned(),
                data: key,
            }
            .encoded(),
            done(),
        ),
        (
            pubsub::Subscribe {
                topic: "t".to_owned(),
            }
            .encoded(),
            done(),
        ),
        (
            peerstore::GetProtocols { peer: peer() }.encoded(),
            with(peerstore_body.clone()),
        ),
        (
            peerstore::GetPeerInfo { peer: peer() }.encoded(),
            with(peerstore_body),
        ),
        (unary::Upgrade.encoded(), done()),
        (unary::Upgrade.encoded(), done()),
    ]
}

/// Feeds `pieces` and collects events up to the end of the answer.
fn events<'a>(
    request: &EncodedRequest,
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (ClientExchange, Result<Vec<Event>, Error>) {
    let mut exchange = ClientExchange::new(Limits::default());
    exchange.send(request).unwrap();
    let mut events = Vec::new();
    for piece in pieces {
        exchange.receive(piece);
        while exchange.state() == State::Busy {
            match exchange.poll() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => return (exchange, Err(error)),
            }
        }
    }
    (exchange, Ok(events))
}

#[test]
fn valid_answer_ends_every_kind_of_request() {
    for (request, frames) in exchanges() {
        let bytes = frames.concat();
        let (exchange, events) = events(&request, [&bytes[..]]);
        let events = events.unwrap();
        assert!(
            matches!(events.last(), Some(Event::Reply(_) | Event::End)),
            "{request:?}: {events:?}"
        );
        let consumed = request.answered() == Answered::ByTakeover;
        let state = if consumed {
            State::Consumed
        } else {
            State::Ready
        };
        assert_eq!(exchange.state(), state, "{request:?}");
    }
}

#[test]
fn accepts_one_byte_at_a_time() {
    for (request, frames) in exchanges() {
        let bytes = frames.concat();
        let (_, whole) = events(&request, [&bytes[..]]);
        let (_, single) = events(&request, bytes.chunks(1));
        assert_eq!(whole, single);
    }
}

#[test]
fn query_returns_each_value_and_then_the_end() {
    let (request, frames) = &exchanges()[10];
    let (exchange, events) = events(request, [&frames.concat()[..]]);
    let id =
        |id: &'static [u8]| Event::Value(dht::GetClosestPeers::into_reply(PeerId::from_bytes(id)));
    assert_eq!(events.unwrap(), [id(b"one"), id(b"two"), Event::End]);
    assert!(exchange.is_reusable());
}

#[test]
fn query_with_one_value_fails_on_none_and_on_two() {
    let begin = encode_frame(&in_response(dht_response(dht_response::Type::Begin, None)));
    let value = encode_frame(&dht_response(dht_response::Type::Value, Some(b"x")));
    let end = encode_frame(&dht_response(dht_response::Type::End, None));
    let request = dht::GetValue {
        key: Bytes::from_static(b"k"),
        timeout: None,
    }
    .encoded();
    for (count, right) in [(0, false), (1, true), (2, false)] {
        let bytes = [
            vec![begin.clone()],
            vec![value.clone(); count],
            vec![end.clone()],
        ]
        .concat();
        let (_, events) = events(&request, [&bytes.concat()[..]]);
        assert_eq!(events.is_ok(), right, "{count} values");
    }
}

#[test]
fn refusal_has_the_daemons_message_and_leaves_the_connection_ready() {
    for (request, _) in exchanges() {
        let (exchange, events) = events(&request, [&encode_frame(&error(b"no \xff way"))[..]]);
        assert_eq!(
            events.unwrap(),
            [Event::Refused("no \u{fffd} way".to_owned())]
        );
        assert!(exchange.is_reusable());
    }
}

#[test]
fn bytes_behind_stream_open_belong_to_the_stream() {
    let request = stream_open();
    let mut bytes = encode_frame(&stream_opened()).to_vec();
    bytes.extend_from_slice(b"\x05the stream's first bytes");
    let (exchange, events) = events(&request, [&bytes[..]]);
    assert!(matches!(
        events.unwrap()[..],
        [Event::Reply(Reply::Streams(streams::Reply::StreamOpen(_)))]
    ));
    assert_eq!(exchange.state(), State::Consumed);
    assert_eq!(exchange.into_remainder(), "\x05the stream's first bytes");
}

#[test]
fn consumed_connection_accepts_no_request() {
    let request = pubsub::Subscribe {
        topic: "t".to_owned(),
    }
    .encoded();
    let (mut exchange, _) = events(&request, [&encode_frame(&ok())[..]]);
    assert_eq!(
        exchange.send(&control::Identify.encoded()),
        Err(Error::NotReady(State::Consumed))
    );
}

#[test]
fn busy_connection_accepts_no_request_and_goes_on() {
    let mut exchange = ClientExchange::new(Limits::default());
    exchange.send(&connmgr::Trim.encoded()).unwrap();
    assert_eq!(
        exchange.send(&control::Identify.encoded()),
        Err(Error::NotReady(State::Busy))
    );
    exchange.receive(&encode_frame(&ok()));
    assert_eq!(
        exchange.poll(),
        Ok(Some(Event::Reply(connmgr::Trim::into_reply(()))))
    );
}

#[test]
fn only_requests_answered_at_once_are_pipelined() {
    let mut exchange = ClientExchange::new(Limits::default());
    exchange.send(&control::Identify.encoded()).unwrap();
    exchange.send(&pubsub::GetTopics.encoded()).unwrap();
    for (request, _) in exchanges() {
        let mut exchange = ClientExchange::new(Limits::default());
        exchange.send(&control::ListPeers.encoded()).unwrap();
        let sent = exchange.send(&request);
        assert_eq!(
            sent.is_ok(),
            request.answered() == Answered::AtOnce,
            "{request:?}"
        );
        assert_eq!(exchange.state(), State::Busy);
    }
}

proptest! {
    #[test]
    fn pipelined_requests_are_answered_in_order(
        asked in prop::collection::vec((0..4usize, any::<bool>(), any::<bool>()), 1..30),
        size in 1..200usize,
    ) {
        let queries: Vec<_> = exchanges().into_iter().filter(|(r, _)| r.answered() == Answered::AtOnce).collect();
        prop_assert_eq!(queries.len(), 4);
        let mut exchange = ClientExchange::new(Limits::default());
        let (mut input, mut expected, mut got) = (Vec::new(), Vec::new(), Vec::new());
        for (which, refused, at_once) in asked {
            let (request, frames) = &queries[which];
            exchange.send(request).unwrap();
            let frame = if refused { encode_frame(&error(b"no")) } else { frames.concat().into() };
            let (_, alone) = events(request, [&frame[..]]);
            expected.extend(alone.unwrap());
            input.extend_from_slice(&frame);
            if at_once {
                // Each is answered before the next is sent, as far as the pieces allow.
                for piece in std::mem::take(&mut input).chunks(size) {
                    exchange.receive(piece);
                    got.extend(exchange.poll().unwrap());
                }
            }
        }
        for piece in input.chunks(size) {
            exchange.receive(piece);
        }
        while let Some(event) = exchange.poll().unwrap() {
            got.push(event);
        }
        prop_assert_eq!(got, expected);
        prop_assert!(exchange.is_reusable());
    }
}

#[test]
fn unexpected_bytes_make_a_connection_unusable() {
    let mut exchange = ClientExchange::new(Limits::default());
    exchange.receive(&encode_frame(&ok()));
    assert!(!exchange.is_reusable());
    assert!(matches!(exchange.poll(), Err(Error::Unexpected(_))));
    assert_eq!(exchange.state(), State::Failed);
}

#[test]
fn missing_type_is_not_ok() {
    let response = p2pd::Response {
        r#type: None,
        ..stream_opened()
    };
    let request = stream_open();
    let (_, events) = events(&request, [&encode_frame(&response)[..]]);
    assert_eq!(
        events,
        Err(Error::MissingField {
            message: "Response",
            field: "type"
        })
    );
}

#[test]
fn answer_to_another_request_is_a_missing_field() {
    for (request, frames) in exchanges() {
        if frames == [encode_frame(&ok())] || request.name() == "LIST_PEERS" {
            continue; // these replies may be OK alone
        }
        let (exchange, events) = events(&request, [&encode_frame(&ok())[..]]);
        assert!(matches!(events, Err(Error::MissingField { .. })));
        assert_eq!(exchange.state(), State::Failed);
    }
}

#[test]
fn end_of_file_tells_whether_an_answer_had_begun() {
    for (request, frames) in exchanges() {
        let bytes = frames.concat();
        for end in 0..bytes.len() {
            let (mut exchange, events) = events(&request, [&bytes[..end]]);
            events.unwrap();
            assert_eq!(exchange.state(), State::Busy);
            assert_eq!(
                exchange.end_of_file(),
                Error::Closed {
                    mid_message: end > 0
                }
            );
            assert_eq!(exchange.state(), State::Failed);
        }
    }
}

/// Returns how many of these values a query accepts before it fails.
fn kept_of(value: &p2pd::DhtResponse, max_answer: usize) -> usize {
    let mut exchange = ClientExchange::new(Limits {
        max_answer,
        ..Limits::default()
    });
    exchange
        .send(
            &dht::SearchValue {
                key: Bytes::from_static(b"k"),
                timeout: None,
            }
            .encoded(),
        )
        .unwrap();
    exchange.receive(&encode_frame(&in_response(dht_response(
        dht_response::Type::Begin,
        None,
    ))));
    let value = encode_frame(value);
    for kept in 0.. {
        exchange.receive(&value);
        match exchange.poll() {
            Ok(event) => assert!(matches!(event, Some(Event::Value(_)))),
            Err(error) => {
                assert_eq!(error, Error::AnswerTooLarge { limit: max_answer });
                return kept;
            }
        }
    }
    unreachable!()
}

#[test]
fn fails_on_a_dht_answer_over_the_limit() {
    let mut value = dht_response(dht_response::Type::Value, Some(&[7; 1000]));
    value.peer = None;
    assert_eq!(kept_of(&value, 10), 0);
    assert!((8..10).contains(&kept_of(&value, 10_000)));
}

#[test]
fn fails_on_endless_empty_dht_values() {
    let value = dht_response(dht_response::Type::Value, Some(b""));
    assert!((50..200).contains(&kept_of(&value, 10_000)));
}

#[test]
fn counts_the_whole_frame_of_a_dht_value() {
    let mut value = dht_response(dht_response::Type::Value, Some(b""));
    // Unused, but a part of the frame that the value keeps in memory.
    value.peer.as_mut().unwrap().id = Some(Bytes::from_static(&[7; 1000]));
    assert!((8..10).contains(&kept_of(&value, 10_000)));
}

#[test]
fn does_not_send_a_request_over_the_limit() {
    let mut exchange = ClientExchange::new(Limits {
        max_frame: 100,
        ..Limits::default()
    });
    let request = pubsub::Publish {
        topic: "t".to_owned(),
        data: Bytes::from(vec![0; 100]),
    }
    .encoded();
    assert!(matches!(
        exchange.send(&request),
        Err(Error::RequestTooLarge { .. })
    ));
    assert!(exchange.send(&control::Identify.encoded()).is_ok());
}

#[test]
fn registers_handlers_with_the_field_that_the_fork_requires() {
    let request = streams::StreamHandler {
        addr: addr(),
        protocols: vec![],
        balanced: false,
    }
    .encoded();
    // type = 3; streamHandler { addr = 04; balanced = false }
    assert_eq!(request.frame()[..], [9, 8, 3, 34, 5, 10, 1, 4, 24, 0]);
}

#[test]
fn fails_on_a_dht_response_of_unknown_type() {
    let response = p2pd::DhtResponse {
        r#type: Some(99),
        ..Default::default()
    };
    assert!(matches!(step(&response), Err(Error::Unexpected(_))));
}

proptest! {
    #[test]
    fn returns_the_same_events_however_an_answer_is_split(
        which in 0..26usize,
        sizes in prop::collection::vec(1usize..20, 1..10),
    ) {
        let (request, frames) = &exchanges()[which];
        let bytes = frames.concat();
        let mut pieces = Vec::new();
        let mut rest = &bytes[..];
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, tail) = rest.split_at((*size).min(rest.len()));
            pieces.push(piece);
            rest = tail;
        }
        let (_, whole) = events(request, [&bytes[..]]);
        let (_, split) = events(request, pieces);
        prop_assert_eq!(whole, split);
    }

    #[test]
    fn arbitrary_bytes_give_events_or_an_error(
        which in 0..26usize,
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        framed in any::<bool>(),
    ) {
        let (request, _) = &exchanges()[which];
        let mut bytes = bytes;
        if framed {
            bytes.insert(0, bytes.len() as u8 & 0x7f);
        }
        let (mut exchange, events) = events(request, bytes.chunks(7));
        if events.is_err() {
            prop_assert_eq!(exchange.state(), State::Failed);
        }
        exchange.end_of_file();
    }

    #[test]
    fn corrupted_answer_gives_events_or_an_error(
        which in 0..26usize,
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let (request, frames) = &exchanges()[which];
        let mut bytes = frames.concat();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let (mut exchange, _) = events(request, [&bytes[..]]);
        exchange.end_of_file();
    }

    #[test]
    fn arbitrary_headers_and_pubsub_messages_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let _ = streams::decode_stream_info(&bytes);
        let _ = pubsub::decode_message(&bytes);
    }
}
