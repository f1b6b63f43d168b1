//! Every call of the tokio client against every way in which a daemon can misbehave. Each call
//! assert_fails with the error that names the fault, in time, and does not affect the next one.
#![cfg(unix)]

use bytes::Bytes;
use futures_util::future::BoxFuture;
use p2pd_client::{Client, Error, UnaryCall};
use p2pd_protocol::command::{dht::in_response as dht_response, refusal};
use p2pd_protocol::pb::p2pd::{
    self, call_unary_response::Result as Reply, dht_response::Type::*,
    persistent_connection_request::Message, persistent_connection_response::Message as Answer,
    request::Type,
};
use p2pd_protocol::{framing, Multiaddr};
use p2pd_test_support::fake_daemon::{
    addr, dht, identity, ok, peer, peer_info, stream_info, Connection, FakeDaemon,
};
use p2pd_test_support::{eventually, must, within};
use prost::Message as _;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const SOON: Duration = Duration::from_millis(50);

/// Time limit of a call that assert_fails at once.
const AT_ONCE: Duration = Duration::from_secs(5);

// --- the daemon ---

/// Returns the bytes to send, given the call id if there is one.
type MakeAnswer = Box<dyn FnOnce(&[u8]) -> Vec<u8> + Send>;

/// The next message of a kind gets this answer.
struct Planned {
    kind: Kind,
    answer: MakeAnswer,
    end: bool,
    /// Sends one byte at a time.
    trickles: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A control request of this type.
    Request(Type),
    Call,
    AddHandler,
    RemoveHandler,
}

/// A daemon that behaves correctly except for what is planned.
struct Daemon {
    client: Client,
    plan: Arc<Mutex<Option<Planned>>>,
    open: Arc<AtomicUsize>,
    serving: JoinHandle<()>,
}

impl Daemon {
    fn new() -> Self {
        let fake = FakeDaemon::new();
        let client = fake.client();
        let plan = Arc::<Mutex<Option<Planned>>>::default();
        let open = Arc::<AtomicUsize>::default();
        let (planned, count) = (Arc::clone(&plan), Arc::clone(&open));
        let serving = tokio::spawn(async move {
            loop {
                let connection = fake.accept().await;
                count.fetch_add(1, Ordering::Relaxed);
                let (planned, count) = (Arc::clone(&planned), Arc::clone(&count));
                tokio::spawn(async move {
                    serve(connection, &planned).await;
                    count.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
        Self {
            client,
            plan,
            open,
            serving,
        }
    }

    fn plan(&self, kind: Kind, end: bool, answer: impl FnOnce(&[u8]) -> Vec<u8> + Send + 'static) {
        *self.plan.lock().unwrap() = Some(Planned {
            kind,
            answer: Box::new(answer),
            end,
            trickles: false,
        });
    }

    async fn assert_usable(&self) {
        let identity = within("the next call", self.client.identify()).await;
        assert_eq!(identity.unwrap().peer_id, peer());
    }

    /// Closes the client, and checks how many connections it leaves open.
    async fn assert_left_open(self, left: usize) {
        self.client.close().await;
        drop(self.client);
        eventually(async || must(self.open.load(Ordering::Relaxed) == left, "it leaves some"))
            .await;
        self.serving.abort();
    }
}

/// Sends the planned answer, if any. Returns whether the connection stays open.
async fn planned(
    connection: &mut Connection,
    plan: &Mutex<Option<Planned>>,
    kind: Kind,
    id: &[u8],
) -> Option<bool> {
    let planned = plan.lock().unwrap().take_if(|next| next.kind == kind)?;
    let bytes = (planned.answer)(id);
    let pieces = bytes.chunks(if planned.trickles { 1 } else { usize::MAX });
    for piece in pieces {
        connection.send(piece).await;
    }
    Some(!planned.end)
}

async fn serve(mut connection: Connection, plan: &Mutex<Option<Planned>>) {
    while let Some(frame) = connection.frame().await {
        // The client probes for a peerstore with an unknown request type; jsp2pd, which has one,
        // replies:
        if frame[..] == [8, 0xff, 0xff, 0xff, 0xff, 7] {
            connection.answer(refusal("ERR_INVALID_REQUEST_TYPE")).await;
            continue;
        }
        // Reads the type only: PEERSTORE requests use numbers that mean something else to other
        // daemons.
        let [8, number, ..] = frame[..] else {
            panic!("{frame:?} has no type");
        };
        let r#type = Type::try_from(i32::from(number)).unwrap();
        let upgrades = frame[..] == [8, 9, 74, 4, 10, 2, 0x78, 0];
        match planned(&mut connection, plan, Kind::Request(r#type), &[]).await {
            Some(false) => return,
            Some(true) => {}
            None if r#type == Type::Identify => connection.answer(identity()).await,
            None => connection.answer(ok()).await,
        }
        if upgrades {
            return serve_unary(connection, plan).await;
        }
    }
}

async fn serve_unary(mut connection: Connection, plan: &Mutex<Option<Planned>>) {
    while let Some(frame) = connection.frame().await {
        let request = p2pd::PersistentConnectionRequest::decode(frame).unwrap();
        let id = request.call_id.unwrap();
        let (kind, message) = match request.message.unwrap() {
            Message::CallUnary(call) => (Kind::Call, Some(reply(call.data.unwrap()))),
            Message::AddUnaryHandler(_) => (Kind::AddHandler, None),
            Message::RemoveUnaryHandler(_) => (Kind::RemoveHandler, None),
            Message::Cancel(_) | Message::UnaryResponse(_) => continue,
        };
        match planned(&mut connection, plan, kind, &id).await {
            Some(false) => return,
            Some(true) => {}
            None => connection.send(&response(&id, message)).await,
        }
    }
}

fn reply(data: Bytes) -> Answer {
    let result = Some(Reply::Response(data));
    Answer::CallUnaryResponse(p2pd::CallUnaryResponse { result })
}

fn response(id: &[u8], message: Option<Answer>) -> Vec<u8> {
    let call_id = Some(Bytes::copy_from_slice(id));
    frame(&p2pd::PersistentConnectionResponse { call_id, message })
}

fn frame(message: &impl prost::Message) -> Vec<u8> {
    framing::encode_frame(message).to_vec()
}

// --- the calls ---

/// A call, and the daemon's valid reply.
struct Call {
    name: &'static str,
    kind: Kind,
    make: fn(Client) -> BoxFuture<'static, Result<(), Error>>,
    answer: Vec<u8>,
}

impl Call {
    /// Whether closing the connection is how a daemon rejects this request as unknown.
    fn means_unknown(&self) -> bool {
        self.name == "PERSISTENT_CONN_UPGRADE"
    }
}

/// Makes a call and drops its result.
macro_rules! made {
    (|$client:ident| $call:expr) => {
        |$client| Box::pin(async move { $call.await.map(drop) })
    };
}

fn calls() -> Vec<Call> {
    let call = |name, r#type, make, answer| Call {
        name,
        kind: Kind::Request(r#type),
        make,
        answer,
    };
    let done = || frame(&ok());
    let many = |value: p2pd::DhtResponse| {
        let end = frame(&dht(End, ""));
        [frame(&dht_response(dht(Begin, ""))), frame(&value), end].concat()
    };
    let one = |value| frame(&dht_response(value));
    let a_peer = || p2pd::DhtResponse {
        peer: Some(peer_info()),
        ..dht(Value, "")
    };
    let pubsub = || {
        let body = p2pd::PsResponse {
            topics: vec!["news".to_owned()],
            peer_i_ds: vec![peer().to_bytes()],
        };
        frame(&p2pd::Response {
            pubsub: Some(body),
            ..ok()
        })
    };
    let peerstore = || {
        let body = p2pd::PeerstoreResponse {
            peer: Some(peer_info()),
            protos: vec!["/echo".to_owned()],
        };
        frame(&p2pd::Response {
            peer_store: Some(body),
            ..ok()
        })
    };
    let peers = p2pd::Response {
        peers: vec![peer_info()],
        ..ok()
    };
    let opened = p2pd::Response {
        stream_info: Some(stream_info("/echo")),
        ..ok()
    };
    vec![
        call(
            "IDENTIFY",
            Type::Identify,
            made!(|c| c.identify()),
            frame(&identity()),
        ),
        call(
            "CONNECT",
            Type::Connect,
            made!(|c| c.connect(&peer(), &[addr()])),
            done(),
        ),
        call(
            "DISCONNECT",
            Type::Disconnect,
            made!(|c| c.disconnect(&peer())),
            done(),
        ),
        call(
            "LIST_PEERS",
            Type::ListPeers,
            made!(|c| c.list_peers()),
            frame(&peers),
        ),
        call(
            "STREAM_OPEN",
            Type::StreamOpen,
            made!(|c| c.stream_open(&peer(), ["/echo"])),
            frame(&opened),
        ),
        call(
            "STREAM_HANDLER",
            Type::StreamHandler,
            made!(|c| c.stream_handler("/echo", false)),
            done(),
        ),
        call(
            "CONNMANAGER TAG_PEER",
            Type::Connmanager,
            made!(|c| c.connmgr_tag_peer(&peer(), "t", 1)),
            done(),
        ),
        call(
            "CONNMANAGER UNTAG_PEER",
            Type::Connmanager,
            made!(|c| c.connmgr_untag_peer(&peer(), "t")),
            done(),
        ),
        call(
            "CONNMANAGER TRIM",
            Type::Connmanager,
            made!(|c| c.connmgr_trim()),
            done(),
        ),
        call(
            "DHT FIND_PEER",
            Type::Dht,
            made!(|c| c.dht_find_peer(&peer())),
            one(a_peer()),
        ),
        call(
            "DHT FIND_PEERS_CONNECTED_TO_PEER",
            Type::Dht,
            made!(|c| c.dht_find_peers_connected_to_peer(&peer()).collect_all()),
            many(a_peer()),
        ),
        call(
            "DHT FIND_PROVIDERS",
            Type::Dht,
            made!(|c| c.dht_find_providers("cid", 2).collect_all()),
            many(a_peer()),
        ),
        call(
            "DHT GET_CLOSEST_PEERS",
            Type::Dht,
            made!(|c| c.dht_get_closest_peers("key").collect_all()),
            many(dht(Value, "peer")),
        ),
        call(
            "DHT GET_PUBLIC_KEY",
            Type::Dht,
            made!(|c| c.dht_get_public_key(&peer())),
            one(dht(Value, "\x08\x63\x12\x03key")),
        ),
        call(
            "DHT GET_VALUE",
            Type::Dht,
            made!(|c| c.dht_get_value("key")),
            many(dht(Value, "v")),
        ),
        call(
            "DHT SEARCH_VALUE",
            Type::Dht,
            made!(|c| c.dht_search_value("key").collect_all()),
            many(dht(Value, "v")),
        ),
        call(
            "DHT PUT_VALUE",
            Type::Dht,
            made!(|c| c.dht_put_value("/pk/k", "v")),
            done(),
        ),
        call(
            "DHT PROVIDE",
            Type::Dht,
            made!(|c| c.dht_provide("cid")),
            done(),
        ),
        call(
            "PUBSUB GET_TOPICS",
            Type::Pubsub,
            made!(|c| c.pubsub_get_topics()),
            pubsub(),
        ),
        call(
            "PUBSUB LIST_PEERS",
            Type::Pubsub,
            made!(|c| c.pubsub_list_peers("news")),
            pubsub(),
        ),
        call(
            "PUBSUB PUBLISH",
            Type::Pubsub,
            made!(|c| c.pubsub_publish("news", "v")),
            done(),
        ),
        call(
            "PUBSUB SUBSCRIBE",
            Type::Pubsub,
            made!(|c| c.pubsub_subscribe("news")),
            done(),
        ),
        call(
            "PEERSTORE GET_PROTOCOLS",
            Type::PersistentConnUpgrade,
            made!(|c| c.peerstore_get_protocols(&peer())),
            peerstore(),
        ),
        call(
            "PEERSTORE GET_PEER_INFO",
            Type::PersistentConnUpgrade,
            made!(|c| c.peerstore_get_peer_info(&peer())),
            peerstore(),
        ),
        call(
            "PERSISTENT_CONN_UPGRADE",
            Type::PersistentConnUpgrade,
            made!(|c| c.open_unary()),
            done(),
        ),
    ]
}

/// The calls on the persistent connection, with replies to this call id.
fn unary_calls(id: &[u8]) -> Vec<Call> {
    let call = |name, kind, make, answer| Call {
        name,
        kind,
        make,
        answer: response(id, answer),
    };
    vec![
        call(
            "CALL_UNARY",
            Kind::Call,
            made!(|c| c.call_unary(&peer(), "echo", "v")),
            Some(reply(Bytes::from_static(b"v"))),
        ),
        call(
            "ADD_UNARY_HANDLER",
            Kind::AddHandler,
            made!(|c| c.add_unary_handler("other", false, echo)),
            None,
        ),
        call(
            "REMOVE_UNARY_HANDLER",
            Kind::RemoveHandler,
            made!(|c| c.remove_unary_handler("echo")),
            None,
        ),
    ]
}

async fn echo(call: UnaryCall) -> Result<Bytes, Infallible> {
    Ok(call.payload)
}

// --- the faults ---

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Lost,
    Timeout,
    Protocol,
    NotSupported,
}

/// What a daemon sends instead of a reply, and whether it then closes the connection.
#[derive(Clone, Copy)]
struct Fault {
    data: fn(&[u8]) -> Vec<u8>,
    end: bool,
    expected: Expected,
    /// The error of calls on the persistent connection.
    unary: Expected,
}

/// Asserts that the call assert_fails with this error, in time.
async fn assert_fails(call: &Call, client: &Client, expected: Expected) {
    let client = match expected {
        Expected::Timeout => client.with_timeout(SOON),
        _ => client.clone(),
    };
    let begun = Instant::now();
    let outcome = within(call.name, (call.make)(client)).await;
    assert!(begun.elapsed() < AT_ONCE, "{}", call.name);
    let error = match outcome {
        Err(error) => error,
        // The daemon drops its handlers together with the connection.
        Ok(()) if call.kind == Kind::RemoveHandler && expected != Expected::Timeout => return,
        Ok(()) => panic!("{} succeeds", call.name),
    };
    let kind = match &error {
        Error::ConnectionLost { .. } => Expected::Lost,
        Error::Timeout { .. } => Expected::Timeout,
        Error::Protocol { .. } => Expected::Protocol,
        Error::NotSupported { .. } => Expected::NotSupported,
        other => panic!("{}: {other:?}", call.name),
    };
    assert_eq!(kind, expected, "{}: {error}", call.name);
    assert_eq!(error.context().unwrap().request, call.name, "{error}");
}

async fn assert_every_call_fails_on(fault: Fault) {
    let daemon = Daemon::new();
    for call in calls() {
        let answer = (fault.data)(&call.answer);
        let unknown = call.means_unknown() && fault.end && answer.is_empty();
        daemon.plan(call.kind, fault.end, move |_| answer);
        let expected = if unknown {
            Expected::NotSupported
        } else {
            fault.expected
        };
        assert_fails(&call, &daemon.client, expected).await;
        assert!(daemon.plan.lock().unwrap().is_none(), "{}", call.name);
        daemon.assert_usable().await;
        // A connection being opened is shared by all waiting calls, so start over.
        daemon.client.close().await;
    }
    for number in 0..unary_calls(&[]).len() {
        let client = &daemon.client;
        client.add_unary_handler("echo", false, echo).await.unwrap();
        let call = unary_calls(&[]).swap_remove(number);
        daemon.plan(call.kind, fault.end, move |id| {
            (fault.data)(&unary_calls(id).swap_remove(number).answer)
        });
        assert_fails(&call, client, fault.unary).await;
        if fault.unary == Expected::Timeout {
            // The connection still waits for the rest of the message.
            client.close().await;
        }
        let next = within("the next call", client.call_unary(&peer(), "echo", "next")).await;
        assert_eq!(next.unwrap(), "next", "{}", call.name);
        daemon.assert_usable().await;
        client.close().await;
    }
    // A STREAM_HANDLER request that timed out waits 30 s for its reply, since it may have to be
    // undone.
    daemon
        .assert_left_open(usize::from(fault.expected == Expected::Timeout))
        .await;
}

/// Defines a test for each fault.
macro_rules! every_call {
    ($(
        $name:ident: $data:expr $(, then $end:ident)? => $expected:ident $(, unary $unary:ident)?;
    )*) => {$(
        #[tokio::test]
        async fn $name() {
            assert_every_call_fails_on(Fault {
                data: $data,
                end: [$(stringify!($end) == "end",)? false][0],
                expected: Expected::$expected,
                unary: [$(Expected::$unary,)? Expected::$expected][0],
            })
            .await;
        }
    )*};
}

every_call! {
    fails_on_eof: |_| vec![], then end => Lost;
    fails_on_eof_within_a_length: |_| vec![0x80], then end => Lost;
    fails_on_eof_within_a_reply: |answer| answer[..answer.len() - 1].to_vec(), then end => Lost;
    times_out_on_silence: |_| vec![] => Timeout;
    times_out_on_an_incomplete_reply: |answer| answer[..answer.len() - 1].to_vec() => Timeout;
    fails_on_garbage: |answer| [b"\x05hello", answer].concat() => Protocol;
    fails_on_text: |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(9) => Protocol;
    fails_on_a_length_of_eleven_bytes: |_| [&[0x80; 10][..], &[1]].concat() => Protocol;
    fails_on_a_length_that_is_not_minimal: |_| vec![0x80, 0] => Protocol;
    fails_on_a_length_of_2_to_the_63: |_| [&[0x80; 9][..], &[1]].concat() => Protocol;
    fails_on_a_length_of_65_bits: |_| [&[0x80; 9][..], &[2]].concat() => Protocol;
    fails_on_the_largest_length: |_| [&[0xff; 9][..], &[1]].concat() => Protocol;
    // 4 MiB + 64 KiB + 1. A persistent connection skips a message of this size, so it waits for the
    // rest of it.
    fails_on_a_length_just_over_the_limit: |_| vec![0x81, 0x80, 0x84, 0x02] => Protocol, unary Timeout;
    fails_on_an_empty_message: |answer| [&[0], answer].concat() => Protocol;
    fails_on_a_message_of_another_type: |_| frame(&stream_info("/echo")) => Protocol;
    fails_on_a_field_that_ends_too_late: |_| vec![2, 0x0a, 0x7f] => Protocol;
    fails_on_a_field_number_of_0: |_| vec![2, 0x02, 0] => Protocol;
}

#[tokio::test]
async fn every_call_fails_on_a_reply_cut_off_anywhere() {
    let daemon = Daemon::new();
    for call in calls() {
        for size in 1..call.answer.len() {
            let answer = call.answer[..size].to_vec();
            daemon.plan(call.kind, true, move |_| answer);
            assert_fails(&call, &daemon.client, Expected::Lost).await;
        }
        daemon.assert_usable().await;
    }
    daemon.assert_left_open(0).await;
}

#[tokio::test]
async fn every_call_is_refused_with_the_daemons_message() {
    let daemon = Daemon::new();
    for call in calls().iter().filter(|call| !call.means_unknown()) {
        daemon.plan(call.kind, false, |_| frame(&refusal("no such luck")));
        let outcome = within(call.name, (call.make)(daemon.client.clone())).await;
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::Refused { message, .. } if message == "no such luck"));
        assert_eq!(error.context().unwrap().request, call.name);
        daemon.assert_usable().await;
    }
    daemon.assert_left_open(0).await;
}

/// Unknown fields of every wire type.
fn unknown() -> Vec<u8> {
    let mut bytes = vec![0xc0, 0x3e, 7]; // 1000: a varint
    bytes.extend([0xca, 0x3e, 3, b'n', b'e', b'w']); // 1001: bytes
    bytes.extend([0xd1, 0x3e, 0, 0, 0, 0, 0, 0, 0, 0]); // 1002: 64 bits
    bytes.extend([0xdd, 0x3e, 0, 0, 0, 0]); // 1003: 32 bits
    bytes.extend([0xe3, 0x3e, 8, 1, 0xe4, 0x3e]); // 1004: a group
    bytes
}

/// Appends unknown fields to each message.
fn with_unknown(mut messages: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some((prefix, len)) = framing::split_length(messages, usize::MAX).unwrap() {
        let (message, rest) = messages[prefix..].split_at(len);
        let message = [message, &unknown()].concat();
        prost::encode_length_delimiter(message.len(), &mut all).unwrap();
        all.extend(message);
        messages = rest;
    }
    all
}

#[tokio::test]
async fn unknown_fields_single_bytes_and_unknown_call_ids_are_accepted() {
    let daemon = Daemon::new();
    for trickles in [false, true] {
        let set = |kind, answer: MakeAnswer| {
            let planned = Planned {
                kind,
                answer,
                end: false,
                trickles,
            };
            *daemon.plan.lock().unwrap() = Some(planned);
        };
        for call in calls() {
            let answer = with_unknown(&call.answer);
            set(call.kind, Box::new(move |_| answer));
            let outcome = within(call.name, (call.make)(daemon.client.clone())).await;
            outcome.unwrap_or_else(|error| panic!("{}: {error}", call.name));
            daemon.assert_usable().await;
        }
        let client = &daemon.client;
        client.add_unary_handler("echo", false, echo).await.unwrap();
        for number in 0..3 {
            let call = unary_calls(&[]).swap_remove(number);
            set(
                call.kind,
                Box::new(move |id| {
                    let answer = with_unknown(&unary_calls(id).swap_remove(number).answer);
                    let unknown_id = response(&[9; 16], Some(reply(Bytes::from_static(b"?"))));
                    [&unknown_id[..], &answer, &answer].concat()
                }),
            );
            within(call.name, (call.make)(client.clone()))
                .await
                .unwrap();
            let next = client.call_unary(&peer(), "echo", "next").await;
            assert_eq!(next.unwrap(), "next");
        }
        client.close().await;
    }
    daemon.assert_left_open(0).await;
}

// --- invalid connections to the listener ---

#[tokio::test]
async fn silent_inbound_connections_do_not_block_a_stream() {
    let daemon = Daemon::new();
    let mut streams = daemon.client.stream_handler("/echo", false).await.unwrap();
    let listening: Multiaddr = daemon.client.listen_maddr().unwrap();
    let path = listening.to_string().replacen("/unix", "", 1);
    let mut silent = Vec::new();
    // More than the listener keeps without a header.
    for _ in 0..300 {
        let mut connection = within("room", UnixStream::connect(&path)).await.unwrap();
        connection
            .write_all(&frame(&stream_info("/echo"))[..5])
            .await
            .unwrap();
        silent.push(connection);
        tokio::task::yield_now().await;
    }
    let mut good = within("room", UnixStream::connect(&path)).await.unwrap();
    good.write_all(&frame(&stream_info("/echo"))).await.unwrap();
    let stream = within("the stream", streams.next()).await.unwrap();
    assert_eq!(stream.info().protocol, "/echo");
    assert_eq!(
        within("its end", silent[0].read(&mut [0])).await.unwrap(),
        0
    );
    drop((stream, streams, silent));
    daemon.assert_left_open(0).await;
}
