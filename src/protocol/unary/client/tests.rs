//! Two ends of a persistent connection, the daemon's written with prost.

use super::p2pd::{
    call_unary_response, persistent_connection_request as request,
    persistent_connection_response as response,
};
use super::*;
use crate::framing::encode_frame;
use crate::unary::encode::put_field;
use crate::unary::reader::{DIRECT, KEPT_BUFFER};
use crate::unary::scan::{scan, Scan};
use crate::unary::tuning::{CANCEL_DELAY, CANCEL_INTERVAL};
use crate::unary::{MAX_PROTOBUF, READ_SIZE};
use proptest::prelude::*;
use prost::encoding::{encode_varint, WireType};
use std::sync::OnceLock;

type Connection = PersistentClient<u32, Vec<u8>>;
type Event = UnaryEvent<u32, Vec<u8>>;

/// Time at which all calls are made.
fn now() -> Instant {
    static NOW: OnceLock<Instant> = OnceLock::new();
    *NOW.get_or_init(Instant::now)
}

/// Time at which they are old enough to be cancelled at once.
fn later() -> Instant {
    now() + CANCEL_DELAY
}

fn connection(limits: UnaryLimits) -> Connection {
    PersistentClient::new([1; 32], limits)
}

fn response(id: CallId, message: Option<response::Message>) -> Vec<u8> {
    encode_frame(&p2pd::PersistentConnectionResponse {
        call_id: Some(Bytes::copy_from_slice(&id)),
        message,
    })
    .to_vec()
}

fn reply(id: CallId, payload: &[u8]) -> Vec<u8> {
    let result = call_unary_response::Result::Response(Bytes::copy_from_slice(payload));
    let reply = p2pd::CallUnaryResponse {
        result: Some(result),
    };
    response(id, Some(response::Message::CallUnaryResponse(reply)))
}

fn call(id: CallId, payload: &[u8]) -> Vec<u8> {
    call_of(b"echo", id, payload)
}

fn call_of(proto: &'static [u8], id: CallId, payload: &[u8]) -> Vec<u8> {
    let call = p2pd::CallUnaryRequest {
        peer: Some(Bytes::from_static(b"peer")),
        proto: Some(Bytes::from_static(proto)),
        data: Some(Bytes::copy_from_slice(payload)),
    };
    response(id, Some(response::Message::RequestHandling(call)))
}

/// Returns all events of `bytes`, given in pieces. Large payloads are read into their buffers.
fn feed(connection: &mut Connection, bytes: &[u8], sizes: &[usize]) -> Result<Vec<Event>, Error> {
    let mut events = Vec::new();
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, tail) = rest.split_at((*size).min(rest.len()));
        rest = tail;
        let mut input = piece;
        if let Some(room) = connection.payload_buffer() {
            let count = room.len().min(input.len());
            room[..count].copy_from_slice(&input[..count]);
            connection.payload_filled(count);
            input = &input[count..];
        }
        while let Some(event) = connection.poll(&mut input)? {
            events.push(event);
        }
        assert!(input.is_empty());
    }
    Ok(events)
}

/// Decodes the messages in `out`.
fn sent(out: BytesMut) -> Vec<p2pd::PersistentConnectionRequest> {
    let mut out = out.freeze();
    let mut messages = Vec::new();
    while !out.is_empty() {
        messages
            .push(p2pd::PersistentConnectionRequest::decode_length_delimited(&mut out).unwrap());
    }
    messages
}

#[test]
fn encodes_a_call_by_the_schema() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let payload = vec![9; 300];
    let id = connection
        .call(b"peer", "echo", 300, 1, now(), &mut out)
        .unwrap();
    out.extend_from_slice(&payload);
    let call = p2pd::CallUnaryRequest {
        peer: Some(Bytes::from_static(b"peer")),
        proto: Some(Bytes::from_static(b"echo")),
        data: Some(payload.into()),
    };
    let expected = p2pd::PersistentConnectionRequest {
        call_id: Some(Bytes::copy_from_slice(&id)),
        message: Some(request::Message::CallUnary(call)),
    };
    assert_eq!(sent(out), [expected]);
}

#[test]
fn encodes_a_reply_by_the_schema() {
    let mut connection = connection(UnaryLimits::default());
    let events = feed(&mut connection, &call([5; 16], b"ping"), &[1000]).unwrap();
    assert_eq!(
        events,
        [UnaryEvent::Call {
            id: [5; 16],
            peer: Bytes::from_static(b"peer"),
            protocol: "echo".to_owned(),
            payload: b"ping".to_vec(),
        }]
    );
    let mut out = BytesMut::new();
    assert!(connection.reply(&[5; 16], 4, &mut out));
    out.extend_from_slice(b"pong");
    assert!(!connection.reply(&[5; 16], 4, &mut out), "only once");
    let result = call_unary_response::Result::Response(Bytes::from_static(b"pong"));
    let expected = p2pd::PersistentConnectionRequest {
        call_id: Some(Bytes::from_static(&[5; 16])),
        message: Some(request::Message::UnaryResponse(p2pd::CallUnaryResponse {
            result: Some(result),
        })),
    };
    assert_eq!(sent(out), [expected]);
    assert_eq!(connection.unanswered(), 0);
}

#[test]
fn does_not_send_messages_over_the_limit() {
    let limits = UnaryLimits {
        max_message: 1000,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    let mut out = BytesMut::new();
    // 18 for the call id, 3 for the call, 6 + 6 for peer and protocol, 3 before the data.
    let fits = 1000 - 18 - 3 - 6 - 6 - 3;
    connection
        .call(b"peer", "echo", fits, 1, now(), &mut out)
        .unwrap();
    let head = out.len();
    assert_eq!(head + fits, 1000 + 2);
    let refused = connection.call(b"peer", "echo", fits + 1, 2, now(), &mut out);
    assert_eq!(
        refused,
        Err(Error::RequestTooLarge {
            size: 1001,
            limit: 1000
        })
    );
    assert_eq!((out.len(), connection.pending()), (head, 1));
}

#[test]
fn sends_an_error_instead_of_a_reply_over_the_limit() {
    let limits = UnaryLimits {
        max_message: 1000,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    feed(&mut connection, &call([5; 16], b"ping"), &[1000]).unwrap();
    let mut out = BytesMut::new();
    assert!(!connection.reply(&[5; 16], 1000, &mut out));
    let message = sent(out).pop().unwrap().message;
    let Some(request::Message::UnaryResponse(response)) = message else {
        panic!("{message:?}")
    };
    let Some(call_unary_response::Result::Error(words)) = response.result else {
        panic!("{response:?}")
    };
    assert_eq!(
        words,
        "the reply of 1000 bytes exceeds the message size limit of 1000 bytes"
    );
}

#[test]
fn drops_replies_to_unknown_answered_and_cancelled_calls() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let first = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    let second = connection.call(b"p", "x", 0, 2, now(), &mut out).unwrap();
    out.clear();
    assert_eq!(connection.cancel(&second, later(), &mut out), Some(2));
    let message = sent(out).pop().unwrap();
    assert_eq!(message.call_id.unwrap(), second[..]);
    assert_eq!(
        message.message,
        Some(request::Message::Cancel(p2pd::Cancel {}))
    );
    let large = vec![0; 3 * DIRECT];
    let mut bytes = reply([9; 16], b"unknown");
    for id in [first, first, second] {
        bytes.extend(reply(id, b"yes"));
        bytes.extend(reply(id, &large));
    }
    let events = feed(&mut connection, &bytes, &[7000]).unwrap();
    let payload = b"yes".to_vec();
    assert_eq!(events, [UnaryEvent::Reply { token: 1, payload }]);
    assert_eq!(connection.pending(), 0);
    assert_eq!(
        connection.cancel(&first, later(), &mut BytesMut::new()),
        None
    );
}

#[test]
fn accepts_daemon_error_that_is_not_utf_8() {
    let mut connection = connection(UnaryLimits::default());
    let id = connection
        .call(b"p", "x", 0, 1, now(), &mut BytesMut::new())
        .unwrap();
    let error = p2pd::DaemonError {
        message: Some(Bytes::from_static(b"no \xff")),
    };
    let bytes = response(id, Some(response::Message::DaemonError(error)));
    let error = "no \u{fffd}".to_owned();
    assert_eq!(
        feed(&mut connection, &bytes, &[1000]).unwrap(),
        [UnaryEvent::Refused { token: 1, error }]
    );
}

#[test]
fn acknowledgement_of_a_call_fails_that_call_only() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let id = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    let added = connection.add_handler("y", true, 2, &mut out).unwrap();
    let mut bytes = response(id, None);
    bytes.extend(response(added, None));
    let events = feed(&mut connection, &bytes, &[1000]).unwrap();
    assert!(matches!(
        events[0],
        UnaryEvent::InvalidReply { token: 1, .. }
    ));
    assert_eq!(events[1], UnaryEvent::Acknowledged { token: 2 });
}

#[test]
fn does_not_reply_to_a_cancelled_call() {
    let mut connection = connection(UnaryLimits::default());
    let mut bytes = call([5; 16], b"ping");
    let cancel = response([5; 16], Some(response::Message::Cancel(p2pd::Cancel {})));
    bytes.extend(&cancel);
    bytes.extend(&cancel);
    let events = feed(&mut connection, &bytes, &[1000]).unwrap();
    assert_eq!(events[1..], [UnaryEvent::Cancelled { id: [5; 16] }]);
    let mut out = BytesMut::new();
    assert!(!connection.reply(&[5; 16], 4, &mut out));
    connection.reply_error(&[5; 16], "late", &mut out);
    assert!(out.is_empty());
}

#[test]
fn accepts_protocol_of_a_call_that_is_not_utf_8() {
    let mut connection = connection(UnaryLimits::default());
    for (id, len) in [([5; 16], 4), ([6; 16], 3 * DIRECT)] {
        let bytes = call_of(b"\xff", id, &vec![0; len]);
        let events = feed(&mut connection, &bytes, &[1000]).unwrap();
        assert!(
            matches!(&events[..], [UnaryEvent::Call { protocol, .. }] if protocol == "\u{fffd}")
        );
    }
}

#[test]
fn shutdown_answers_incoming_calls_and_cancels_own_calls() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let mine = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    connection.add_handler("x", false, 2, &mut out).unwrap();
    feed(&mut connection, &call([5; 16], b"ping"), &[1000]).unwrap();
    out.clear();
    connection.shut_down("gone", &mut out);
    let messages = sent(out);
    let ids: Vec<_> = messages.iter().map(|m| m.call_id.as_deref()).collect();
    assert_eq!(ids, [Some(&[5; 16][..]), Some(&mine[..])]);
    assert!(matches!(
        &messages[1].message,
        Some(request::Message::Cancel(_))
    ));
    assert_eq!((connection.unanswered(), connection.pending()), (0, 2));
}

#[test]
fn cancelled_call_counts_as_unanswered_until_its_handler_ends() {
    let limits = UnaryLimits {
        max_unanswered: 1,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    let cancel = response([5; 16], Some(response::Message::Cancel(p2pd::Cancel {})));
    let bytes = [call([5; 16], b"ping"), cancel, call([5; 16], b"again")].concat();
    let events = feed(&mut connection, &bytes, &[1000]).unwrap();
    assert!(matches!(events[2], UnaryEvent::Rejected { .. }));
    assert_eq!(connection.unanswered(), 1);
    assert!(!connection.wants_input());
    connection.reply_error(&[5; 16], "cancelled", &mut BytesMut::new());
    assert!(connection.wants_input());
}

#[test]
fn error_in_a_peers_message_fails_its_call_only() {
    // Endlessly nested groups, a key of more than 32 bits, a varint of 70 bits.
    let junk: [&[u8]; 3] = [
        &[0x3b; 200],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x00],
        &[
            0x38, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
        ],
    ];
    for junk in junk {
        let mut connection = connection(UnaryLimits::default());
        let mut out = BytesMut::new();
        let good = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
        let bad = connection.call(b"p", "x", 0, 2, now(), &mut out).unwrap();
        let mut inner = BytesMut::new();
        put_field(&mut inner, 1, b"reply");
        inner.extend_from_slice(junk);
        let mut empty = BytesMut::new();
        put_field(&mut empty, 9, b"?");
        empty.extend_from_slice(junk);
        let mut request = BytesMut::new();
        put_field(&mut request, 1, b"peer");
        put_field(&mut request, 2, b"\xff");
        put_field(&mut request, 3, b"data");
        request.extend_from_slice(junk);
        let mut bytes = BytesMut::new();
        for (id, number, content) in [
            (good, 2, &inner),
            (bad, 2, &empty),
            ([7; 16], 3, &request),
            ([8; 16], 3, &empty),
        ] {
            let mut message = BytesMut::new();
            put_field(&mut message, 1, &id);
            put_field(&mut message, number, content);
            encode_varint(message.len() as u64, &mut bytes);
            bytes.extend_from_slice(&message);
        }
        let events = feed(&mut connection, &bytes, &[1000]).unwrap();
        let payload = b"reply".to_vec();
        assert_eq!(events[0], UnaryEvent::Reply { token: 1, payload });
        assert!(matches!(
            events[1],
            UnaryEvent::InvalidReply { token: 2, .. }
        ));
        let UnaryEvent::Call {
            protocol, payload, ..
        } = &events[2]
        else {
            panic!("{:?}", events[2])
        };
        assert_eq!(
            (protocol.as_str(), &payload[..]),
            ("\u{fffd}", &b"data"[..])
        );
        assert!(matches!(events[3], UnaryEvent::Rejected { id, .. } if id == [8; 16]));
    }
}

#[test]
fn malformed_fields_of_a_message_fail_the_connection() {
    let mut message = BytesMut::new();
    put_field(&mut message, 1, &[5; 16]);
    message.extend_from_slice(&[0x3b; 3]);
    let mut bytes = BytesMut::new();
    encode_varint(message.len() as u64, &mut bytes);
    bytes.extend_from_slice(&message);
    let error = feed(&mut connection(UnaryLimits::default()), &bytes, &[1000]).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }));
}

#[test]
fn refuses_calls_over_the_limit_once_back_pressure_is_stopped() {
    let limits = UnaryLimits {
        max_unanswered: 1,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    connection.stop_back_pressure();
    let bytes = [call([1; 16], b""), call([2; 16], b"")].concat();
    feed(&mut connection, &bytes, &[1000]).unwrap();
    assert!(!connection.wants_input());
    connection.stop_back_pressure();
    assert!(connection.wants_input());
    let events = feed(&mut connection, &call([3; 16], b""), &[1000]).unwrap();
    assert!(matches!(events[..], [UnaryEvent::Rejected { .. }]));
    for id in 1..=2u8 {
        connection.reply_error(&[id; 16], "no", &mut BytesMut::new());
    }
    feed(&mut connection, &call([4; 16], b""), &[1000]).unwrap();
    assert!(!connection.wants_input(), "held back anew");
}

#[test]
fn repeats_unconfirmed_cancels_at_growing_intervals() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let lost = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    let known = connection.call(b"p", "x", 0, 2, now(), &mut out).unwrap();
    assert!(!connection.has_unconfirmed_cancels());
    connection.cancel(&lost, later(), &mut out);
    connection.cancel(&known, later(), &mut out);
    let cancelled = response(known, Some(response::Message::Cancel(p2pd::Cancel {})));
    assert_eq!(feed(&mut connection, &cancelled, &[1000]).unwrap(), []);
    out.clear();
    connection.repeat_cancels(later(), &mut out);
    assert!(out.is_empty(), "too soon");
    let mut when = Vec::new();
    let mut ticks = 0;
    while connection.has_unconfirmed_cancels() {
        ticks += 1;
        connection.repeat_cancels(later() + CANCEL_INTERVAL * ticks, &mut out);
        let reminders = sent(out.split());
        if let [reminder] = &reminders[..] {
            assert_eq!(reminder.call_id.as_deref(), Some(&lost[..]));
            when.push(ticks);
        } else {
            assert_eq!(reminders, []);
        }
    }
    assert_eq!(when, [1, 3, 7, 15, 31, 63]);
}

#[test]
fn delays_the_cancel_of_a_call_that_is_too_young() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let young = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    let answered = connection.call(b"p", "x", 0, 2, now(), &mut out).unwrap();
    out.clear();
    for (id, token) in [(young, 1), (answered, 2)] {
        assert_eq!(connection.cancel(&id, now(), &mut out), Some(token));
    }
    connection.repeat_cancels(now(), &mut out);
    assert!(out.is_empty(), "too soon");
    assert_eq!(
        feed(&mut connection, &reply(answered, b"yes"), &[1000]),
        Ok(vec![])
    );
    connection.repeat_cancels(later(), &mut out);
    let cancels = sent(out);
    assert_eq!(cancels.len(), 1);
    assert_eq!(cancels[0].call_id.as_deref(), Some(&young[..]));
}

#[test]
fn shutdown_sends_delayed_cancels() {
    let mut connection = connection(UnaryLimits::default());
    let mut out = BytesMut::new();
    let young = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    connection.cancel(&young, now(), &mut out);
    out.clear();
    connection.shut_down("gone", &mut out);
    let cancels = sent(out);
    assert_eq!(cancels.len(), 1);
    assert_eq!(cancels[0].call_id.as_deref(), Some(&young[..]));
    assert!(!connection.has_unconfirmed_cancels());
}

#[test]
fn large_late_reply_confirms_a_cancel_however_it_is_split() {
    for size in [DIRECT + 1000, 100] {
        let mut connection = connection(UnaryLimits::default());
        let mut out = BytesMut::new();
        let id = connection
            .call(b"peer", "echo", 0, 1, now(), &mut out)
            .unwrap();
        connection.cancel(&id, later(), &mut out);
        assert!(connection.has_unconfirmed_cancels());
        let events = feed(&mut connection, &reply(id, &[7; DIRECT]), &[size]).unwrap();
        assert_eq!(events, []);
        assert!(!connection.has_unconfirmed_cancels());
    }
}

#[test]
fn accepts_the_largest_length_without_a_limit() {
    let mut connection = connection(UnaryLimits {
        max_message: usize::MAX,
        ..UnaryLimits::default()
    });
    let mut length = vec![0xff; 9];
    length.push(1);
    assert_eq!(feed(&mut connection, &length, &[100]), Ok(vec![]));
    let call = call([5; 16], &[7; 100]);
    assert_eq!(feed(&mut connection, &call, &[100]), Ok(vec![]));
}

#[test]
fn reports_own_call_that_the_daemon_cancels_as_refused() {
    let mut connection = connection(UnaryLimits::default());
    let id = connection
        .call(b"p", "x", 0, 1, now(), &mut BytesMut::new())
        .unwrap();
    let cancel = response(id, Some(response::Message::Cancel(p2pd::Cancel {})));
    let events = feed(&mut connection, &cancel, &[1000]).unwrap();
    assert!(matches!(events[..], [UnaryEvent::Refused { token: 1, .. }]));
}

#[test]
fn cuts_an_error_to_the_message_limit() {
    let limits = UnaryLimits {
        max_message: 1000,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    feed(&mut connection, &call([5; 16], b"ping"), &[1000]).unwrap();
    let mut out = BytesMut::new();
    connection.reply_error(&[5; 16], &"\u{e9}".repeat(5000), &mut out);
    assert!(out.len() <= 1002, "{}", out.len());
}

#[test]
fn call_id_of_wrong_length_fails_the_connection() {
    let mut connection = connection(UnaryLimits::default());
    let bytes = encode_frame(&p2pd::PersistentConnectionResponse {
        call_id: Some(Bytes::from_static(b"short")),
        message: None,
    });
    let error = feed(&mut connection, &bytes, &[1000]).unwrap_err();
    assert_eq!(error, Error::Unexpected("a call id of 5 bytes".to_owned()));
}

#[test]
fn calls_over_the_limit_stop_reading_unless_an_answer_is_pending() {
    let limits = UnaryLimits {
        max_unanswered: 2,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    let mut out = BytesMut::new();
    for id in 0..8u8 {
        assert_eq!(connection.wants_input(), id < 2);
        let events = feed(&mut connection, &call([id; 16], b""), &[1000]).unwrap();
        assert!(matches!(events[..], [UnaryEvent::Call { .. }]));
    }
    let id = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    assert!(connection.wants_input(), "a reply is awaited");
    let events = feed(&mut connection, &call([9; 16], b""), &[1000]).unwrap();
    let reason = "busy: too many calls at once".into();
    let id9 = [9; 16];
    assert_eq!(events, [UnaryEvent::Rejected { id: id9, reason }]);
    connection.cancel(&id, later(), &mut out);
    for id in 0..7u8 {
        assert!(!connection.wants_input());
        connection.reply_error(&[id; 16], "no", &mut out);
    }
    assert!(connection.wants_input());
}

#[test]
fn limits_the_total_size_of_calls() {
    let limits = UnaryLimits {
        max_unanswered_bytes: 100,
        ..UnaryLimits::default()
    };
    let mut connection = connection(limits);
    feed(&mut connection, &call([1; 16], &[0; 99]), &[1000]).unwrap();
    assert!(connection.wants_input());
    feed(&mut connection, &call([2; 16], &[0; 1]), &[1000]).unwrap();
    assert!(!connection.wants_input());
    connection.reply_error(&[1; 16], "no", &mut BytesMut::new());
    assert!(connection.wants_input());
}

#[test]
fn rejects_a_second_call_with_the_id_of_an_unanswered_one() {
    let mut connection = connection(UnaryLimits::default());
    let bytes = [call([1; 16], b"a"), call([1; 16], b"b")].concat();
    let events = feed(&mut connection, &bytes, &[1000]).unwrap();
    let reason = "a call with the same id is at work".into();
    assert_eq!(
        events[1],
        UnaryEvent::Rejected {
            id: [1; 16],
            reason
        }
    );
    assert_eq!(connection.unanswered(), 1);
}

/// Limits under which a message of 1000 bytes can be sent and received.
fn small() -> UnaryLimits {
    UnaryLimits {
        max_message: 1000,
        max_incoming: Some(1000),
        ..UnaryLimits::default()
    }
}

fn too_large(size: usize) -> Error {
    Error::ReplyTooLarge { size, limit: 1000 }
}

fn daemon_error(id: CallId, message: &[u8]) -> Vec<u8> {
    let error = p2pd::DaemonError {
        message: Some(Bytes::copy_from_slice(message)),
    };
    response(id, Some(response::Message::DaemonError(error)))
}

fn handler_error(id: CallId, words: &[u8]) -> Vec<u8> {
    let result = call_unary_response::Result::Error(Bytes::copy_from_slice(words));
    let reply = p2pd::CallUnaryResponse {
        result: Some(result),
    };
    response(id, Some(response::Message::CallUnaryResponse(reply)))
}

/// A frame with these fields, in this order.
fn frame_of(fields: &[(u32, &[u8])]) -> Vec<u8> {
    let mut message = BytesMut::new();
    for (number, value) in fields {
        prost::encoding::encode_key(*number, WireType::LengthDelimited, &mut message);
        encode_varint(value.len() as u64, &mut message);
        message.extend_from_slice(value);
    }
    let mut frame = BytesMut::new();
    encode_varint(message.len() as u64, &mut frame);
    frame.extend_from_slice(&message);
    frame.to_vec()
}

/// Size of the message in a frame that has a length prefix of `prefix` bytes.
fn size_of(frame: &[u8], prefix: usize) -> usize {
    frame.len() - prefix
}

#[test]
fn answers_over_the_limit_fail_their_calls_only() {
    let large = vec![b'x'; 5000];
    for answer in [reply, handler_error, daemon_error] {
        for sizes in [&[1][..], &[7, 300], &[100_000]] {
            let mut connection = connection(small());
            let mut out = BytesMut::new();
            let mut call = |token| {
                connection
                    .call(b"p", "x", 0, token, now(), &mut out)
                    .unwrap()
            };
            let (first, second) = (call(1), call(2));
            let oversized = answer(first, &large);
            let error = too_large(size_of(&oversized, 2));
            let bytes = [oversized, reply(second, b"yes")].concat();
            let events = feed(&mut connection, &bytes, sizes).unwrap();
            let payload = b"yes".to_vec();
            assert_eq!(
                events,
                [
                    UnaryEvent::Oversized { token: 1, error },
                    UnaryEvent::Reply { token: 2, payload }
                ]
            );
            assert_eq!(connection.pending(), 0);
        }
    }
}

#[test]
fn refuses_a_call_over_the_limit_with_its_size_and_the_limit() {
    let mut connection = connection(small());
    let oversized = call([5; 16], &[7; 5000]);
    let size = size_of(&oversized, 2);
    let bytes = [oversized, call([6; 16], b"ping")].concat();
    let events = feed(&mut connection, &bytes, &[300]).unwrap();
    let [UnaryEvent::Rejected { id, reason }, UnaryEvent::Call { .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!(*id, [5; 16]);
    assert!(
        reason.contains(&size.to_string()) && reason.contains("1000"),
        "{reason}"
    );
    assert_eq!(connection.unanswered(), 1);
}

#[test]
fn finds_the_call_id_wherever_it_stands_in_a_frame_over_the_limit() {
    let big = vec![0x12; 3000]; // would be a field itself
    let mut connection = connection(small());
    let id = connection
        .call(b"p", "x", 0, 1, now(), &mut BytesMut::new())
        .unwrap();
    let inner = frame_of(&[(1, &big)]);
    let content = &inner[2..];
    for fields in [
        &[(15, &big[..]), (1, &id[..]), (2, content)][..],
        &[(2, content), (1, &id[..])],
        &[(2, content), (9, b""), (1, &id[..]), (700, b"?")],
        &[(1, &[3; 16][..]), (2, content), (1, &id[..])],
    ] {
        for size in [1, 2, 17, 100_000] {
            let frame = frame_of(fields);
            let error = too_large(size_of(&frame, 2));
            let events = feed(&mut connection, &frame, &[size]).unwrap();
            assert_eq!(events, [UnaryEvent::Oversized { token: 1, error }]);
            // The next round needs a pending call of that id again.
            let pending = Pending {
                token: 1,
                called: Some(now()),
            };
            connection.pending.insert(id, pending);
        }
    }
}

#[test]
fn skips_unknown_fields_of_every_kind_before_the_call_id() {
    let mut connection = connection(small());
    let id = connection
        .call(b"p", "x", 0, 1, now(), &mut BytesMut::new())
        .unwrap();
    let mut message = vec![
        0x30, 0xff, 0x80, 0x00, // a varint that is not minimal
        0x39, 1, 2, 3, 4, 5, 6, 7, 8, // 64 bits
        0x45, 1, 2, 3, 4, // 32 bits
        0x4b, 0x0a, 16, // a group, with what looks like a call id
    ];
    message.extend([9; 16]);
    message.extend([0x53, 0x54, 0x4c]); // a group in it; both end
    message.extend([0x0a, 16]);
    message.extend(id);
    message.extend([0x12, 0xd0, 0x0f]); // a reply of 2000 bytes
    message.extend([0; 2000]);
    let frame = [
        &[
            0x80 | (message.len() & 0x7f) as u8,
            (message.len() >> 7) as u8,
        ],
        &message[..],
    ];
    let frame = frame.concat();
    for size in [1, 5, 10_000] {
        let events = feed(&mut connection, &frame, &[size]).unwrap();
        let error = too_large(message.len());
        assert_eq!(events, [UnaryEvent::Oversized { token: 1, error }]);
        let pending = Pending {
            token: 1,
            called: Some(now()),
        };
        connection.pending.insert(id, pending);
    }
}

#[test]
fn skips_frames_over_the_limit_without_a_call_id() {
    let junk = vec![0xff; 3000];
    let mut connection = connection(small());
    for message in [
        &frame_of(&[(2, &junk)])[..],
        &frame_of(&[(1, b"short"), (2, &junk)]),
        &[&[0xb8, 0x17], &junk[..]].concat(), // no fields at all
        &[&[0xb8, 0x17, 0x12, 0xff, 0xff, 0x7f], &junk[4..]].concat(), // ends beyond the message
        &[&[0xb8, 0x17, 0x0c], &junk[1..]].concat(), // ends a group that did not begin
    ] {
        let bytes = [message, &call([6; 16], b"ping")].concat();
        let error = too_large(size_of(message, 2));
        let events = feed(&mut connection, &bytes, &[700]).unwrap();
        let [skipped, UnaryEvent::Call { id, .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert_eq!(*skipped, UnaryEvent::Skipped { error });
        assert!(!connection.reply(id, 2000, &mut BytesMut::new()));
    }
}

#[test]
fn late_answer_over_the_limit_confirms_a_cancel() {
    let mut connection = connection(small());
    let mut out = BytesMut::new();
    let id = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    connection.cancel(&id, later(), &mut out);
    let events = feed(&mut connection, &reply(id, &[0; 5000]), &[999]).unwrap();
    assert_eq!(events, []);
    assert!(!connection.has_unconfirmed_cancels());
}

#[test]
fn acts_on_an_acknowledgement_or_cancel_over_the_limit() {
    let mut connection = connection(small());
    let mut out = BytesMut::new();
    let id = connection.add_handler("x", false, 1, &mut out).unwrap();
    let junk = vec![0; 3000];
    let events = feed(&mut connection, &frame_of(&[(1, &id), (99, &junk)]), &[50]).unwrap();
    assert_eq!(events, [UnaryEvent::Acknowledged { token: 1 }]);
    let refused = connection.add_handler("x", false, 2, &mut out).unwrap();
    let events = feed(&mut connection, &daemon_error(refused, &junk), &[50]).unwrap();
    assert!(matches!(
        events[..],
        [UnaryEvent::Oversized { token: 2, .. }]
    ));
    feed(&mut connection, &call([5; 16], b"ping"), &[50]).unwrap();
    let cancel = frame_of(&[(1, &[5; 16]), (5, b""), (99, &junk)]);
    let events = feed(&mut connection, &cancel, &[50]).unwrap();
    assert_eq!(events, [UnaryEvent::Cancelled { id: [5; 16] }]);
}

#[test]
fn does_not_store_a_frame_over_the_limit() {
    let mut connection = connection(small());
    let size = 64 << 20;
    let mut input = &[0x80, 0x80, 0x80, 0x20][..];
    assert_eq!(connection.poll(&mut input), Ok(None));
    let megabyte = vec![0x12; 1 << 20];
    for _ in 1..64 {
        assert_eq!(connection.poll(&mut &megabyte[..]), Ok(None));
        assert!(connection.payload_buffer().is_none());
        assert!(connection.reader.buffer.capacity() < KEPT_BUFFER);
    }
    assert_eq!(
        connection.end_of_file(),
        Error::Closed { mid_message: true }
    );
    let error = too_large(size);
    let events = feed(&mut connection, &megabyte, &[1 << 20]).unwrap();
    assert_eq!(events, [UnaryEvent::Skipped { error }]);
    feed(&mut connection, &call([6; 16], b"ping"), &[50]).unwrap();
    assert_eq!(connection.unanswered(), 1);
}

#[test]
fn does_not_keep_the_buffer_of_a_large_frame() {
    let mut connection = connection(UnaryLimits {
        max_incoming: Some(MAX_PROTOBUF),
        ..UnaryLimits::default()
    });
    let payload = vec![7; 16 << 20];
    // The second has another layout, so that all of it is buffered.
    let unusual = frame_of(&[(2, b""), (99, &payload), (1, &[5; 16])]);
    for frame in [call([5; 16], &payload), unusual] {
        feed(&mut connection, &frame, &[READ_SIZE]).unwrap();
        assert!(connection.reader.buffer.is_empty());
        assert!(connection.reader.buffer.capacity() <= 2 * KEPT_BUFFER);
    }
    assert_eq!(connection.unanswered(), 1);
}

#[test]
fn fails_the_connection_on_a_length_beyond_protobuf() {
    for length in [
        &[0x80, 0x80, 0x80, 0x80, 0x08][..], // 2^31
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01], // 2^64 - 1
        &[0x80; 11],
    ] {
        let error = feed(&mut connection(small()), length, &[1]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::FrameTooLarge { .. } | Error::MalformedLength(_)
            ),
            "{error:?}"
        );
    }
}

/// A payload whose allocation always fails.
#[derive(Debug, PartialEq, Eq)]
struct NoMemory(Vec<u8>);

impl Payload for NoMemory {
    fn with_len(_: usize) -> Option<Self> {
        None
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

#[test]
fn reply_without_memory_fails_its_call_only() {
    let mut connection = PersistentClient::<u32, NoMemory>::new([1; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let large = connection.call(b"p", "x", 0, 1, now(), &mut out).unwrap();
    let small = connection.call(b"p", "x", 0, 2, now(), &mut out).unwrap();
    let size = 3 * DIRECT;
    let bytes = [reply(large, &vec![0; size]), reply(small, b"yes")].concat();
    let mut events = Vec::new();
    for piece in bytes.chunks(5000) {
        let mut input = piece;
        while let Some(event) = connection.poll(&mut input).unwrap() {
            events.push(event);
        }
    }
    let payload = NoMemory(b"yes".to_vec());
    let error = Error::NoMemory { size };
    assert_eq!(
        events,
        [
            UnaryEvent::Oversized { token: 1, error },
            UnaryEvent::Reply { token: 2, payload }
        ]
    );
}

#[test]
fn applies_changed_limits_to_the_next_message() {
    let mut connection = connection(small());
    let mut out = BytesMut::new();
    assert!(connection
        .call(b"p", "x", 2000, 1, now(), &mut out)
        .is_err());
    let open = UnaryLimits {
        max_message: 1 << 20,
        max_unanswered: usize::MAX,
        max_unanswered_bytes: usize::MAX,
        ..UnaryLimits::default()
    };
    // Changed in the middle of a frame, which is skipped already.
    let oversized = call([5; 16], &[7; 5000]);
    assert_eq!(feed(&mut connection, &oversized[..50], &[50]), Ok(vec![]));
    connection.set_limits(open);
    let events = feed(&mut connection, &oversized[50..], &[50]).unwrap();
    assert!(matches!(events[..], [UnaryEvent::Rejected { .. }]));
    connection
        .call(b"p", "x", 2000, 2, now(), &mut out)
        .unwrap();
    connection.take_pending();
    let events = feed(&mut connection, &oversized, &[50]).unwrap();
    assert!(matches!(events[..], [UnaryEvent::Call { .. }]));
    assert!(connection.wants_input());
    connection.set_limits(UnaryLimits {
        max_unanswered: 1,
        ..open
    });
    assert!(!connection.wants_input());
    connection.stop_back_pressure();
    assert!(connection.wants_input());
    connection.set_limits(open);
    let events = feed(&mut connection, &call([6; 16], b""), &[50]).unwrap();
    assert!(matches!(events[..], [UnaryEvent::Call { .. }]));
}

#[test]
fn call_ids_do_not_repeat_and_differ_between_seeds() {
    let mut out = BytesMut::new();
    let mut seen = std::collections::HashSet::new();
    for seed in 0..4u8 {
        let mut connection = Connection::new([seed; 32], UnaryLimits::default());
        for token in 0..1000 {
            assert!(seen.insert(
                connection
                    .call(b"p", "x", 0, token, now(), &mut out)
                    .unwrap()
            ));
        }
    }
}

/// A message of any shape, canonical or not.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..50),
        (0..3 * DIRECT).prop_map(|len| (0..len).map(|i| i as u8).collect()),
    ]
}

proptest! {
    #[test]
    fn returns_the_same_events_however_the_bytes_are_split(
        payloads in prop::collection::vec((any::<bool>(), any_payload()), 0..8),
        sizes in prop::collection::vec(prop_oneof![1usize..40, 1usize..40_000], 1..20),
    ) {
        let mut connection = connection(UnaryLimits::default());
        let mut bytes = Vec::new();
        let mut expected = Vec::new();
        for (token, (is_reply, payload)) in payloads.into_iter().enumerate() {
            let token = token as u32;
            if is_reply {
                let id = connection.call(b"p", "x", 0, token, now(), &mut BytesMut::new()).unwrap();
                bytes.extend(reply(id, &payload));
                expected.push(UnaryEvent::Reply { token, payload });
            } else {
                let id = [token as u8; 16];
                bytes.extend(call(id, &payload));
                let peer = Bytes::from_static(b"peer");
                let protocol = "echo".to_owned();
                expected.push(UnaryEvent::Call { id, peer, protocol, payload });
            }
        }
        prop_assert_eq!(feed(&mut connection, &bytes, &sizes).unwrap(), expected);
        prop_assert_eq!(connection.end_of_file(), Error::Closed { mid_message: false });
    }

    #[test]
    fn returns_the_same_events_however_frames_over_the_limit_are_split(
        frames in prop::collection::vec((0..6u8, 0usize..5000), 1..8),
        sizes in prop::collection::vec(prop_oneof![1usize..40, 1usize..40_000], 1..20),
    ) {
        let bytes_of = |connection: &mut Connection| {
            let mut bytes = Vec::new();
            for (token, (kind, len)) in frames.iter().enumerate() {
                let payload = vec![b'x'; *len];
                let mut out = BytesMut::new();
                let id = connection.call(b"p", "x", 0, token as u32, now(), &mut out).unwrap();
                bytes.extend(match kind {
                    0 => reply(id, &payload),
                    1 => handler_error(id, &payload),
                    2 => daemon_error(id, &payload),
                    3 => call([token as u8; 16], &payload),
                    4 => frame_of(&[(2, &payload), (1, &id)]),
                    _ => frame_of(&[(77, &payload), (1, &id), (4, b"")]),
                });
            }
            bytes
        };
        let (mut whole, mut pieces) = (connection(small()), connection(small()));
        let bytes = bytes_of(&mut whole);
        prop_assert_eq!(bytes_of(&mut pieces), bytes.clone());
        let events = feed(&mut whole, &bytes, &[bytes.len()]).unwrap();
        prop_assert_eq!(events.len(), frames.len());
        prop_assert_eq!(feed(&mut pieces, &bytes, &sizes).unwrap(), events);
        prop_assert_eq!(pieces.end_of_file(), Error::Closed { mid_message: false });
    }

    #[test]
    fn arbitrary_bytes_in_a_frame_over_the_limit_affect_that_frame_only(
        junk in prop::collection::vec(any::<u8>(), 1001..1300),
        sizes in prop::collection::vec(1usize..400, 1..5),
    ) {
        let mut connection = connection(small());
        let mut bytes = vec![0x80 | (junk.len() & 0x7f) as u8, (junk.len() >> 7) as u8];
        bytes.extend(&junk);
        bytes.extend(call([5; 16], b"ping"));
        let events = feed(&mut connection, &bytes, &sizes).unwrap();
        prop_assert!(events.len() <= 2);
        let served = matches!(events.last(), Some(UnaryEvent::Call { .. }));
        prop_assert!(served);
    }

    #[test]
    fn arbitrary_bytes_give_events_or_an_error(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        sizes in prop::collection::vec(1usize..40, 1..5),
    ) {
        let _ = feed(&mut connection(UnaryLimits::default()), &bytes, &sizes);
    }

    #[test]
    fn reads_a_frame_with_fields_in_another_order(
        payload in any_payload(),
        sizes in prop::collection::vec(1usize..40_000, 1..5),
    ) {
        // The data before the peer and the protocol, the call before its id, an unknown field.
        let mut inner = BytesMut::new();
        put_field(&mut inner, 3, &payload);
        put_field(&mut inner, 15, b"?");
        put_field(&mut inner, 2, b"echo");
        put_field(&mut inner, 1, b"peer");
        let mut message = BytesMut::new();
        put_field(&mut message, 3, &inner);
        put_field(&mut message, 1, &[5; 16]);
        let mut bytes = BytesMut::new();
        encode_varint(message.len() as u64, &mut bytes);
        bytes.extend_from_slice(&message);
        let events = feed(&mut connection(UnaryLimits::default()), &bytes, &sizes).unwrap();
        let peer = Bytes::from_static(b"peer");
        let protocol = "echo".to_owned();
        prop_assert_eq!(events, [UnaryEvent::Call { id: [5; 16], peer, protocol, payload }]);
    }

    #[test]
    fn fast_path_agrees_with_prost(
        bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(10), Just(18), Just(26), Just(16), Just(1)], 0..60),
    ) {
        if let Scan::Payload(head, offset) = scan(&bytes, bytes.len(), Direction::ToClient) {
            let message = p2pd::PersistentConnectionResponse::decode(&bytes[..]).unwrap();
            let payload = Bytes::copy_from_slice(&bytes[offset..]);
            let expected = match head {
                Head::Reply { id } => {
                    prop_assert_eq!(message.call_id.as_deref(), Some(&id[..]));
                    response::Message::CallUnaryResponse(p2pd::CallUnaryResponse {
                        result: Some(call_unary_response::Result::Response(payload)),
                    })
                }
                Head::Call { id, peer, protocol } => {
                    prop_assert_eq!(message.call_id.as_deref(), Some(&id[..]));
                    response::Message::RequestHandling(p2pd::CallUnaryRequest {
                        peer: Some(Bytes::copy_from_slice(peer)),
                        proto: Some(Bytes::copy_from_slice(protocol.as_bytes())),
                        data: Some(payload),
                    })
                }
            };
            prop_assert_eq!(message.message, Some(expected));
        }
    }
}
