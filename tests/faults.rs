//! The tokio client against a scripted fake daemon: faults of control connections, streams, queries
//! and subscriptions. (Faults of unary calls are in `unary.rs`.)
#![cfg(unix)]

use bytes::BytesMut;
use futures_util::StreamExt as _;
use p2pd_client::{Client, Error, IncomingStreams, Results, Subscription};
use p2pd_protocol::command::{dht::in_response as dht_response, refusal};
use p2pd_protocol::endpoint::Endpoint;
use p2pd_protocol::pb::p2pd::{self, dht_response::Type::*, request::Type};
use p2pd_protocol::{framing, Limits, Multiaddr};
use p2pd_test_support::fake_daemon::{
    addr, dht, identity, ok, peer, stream_info, Connection, FakeDaemon,
};
use p2pd_test_support::{begin, must, pattern, within, Limit};
use std::future::Future;
use std::pin::pin;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::{join, select};

const SOON: Duration = Duration::from_millis(50);

/// Asserts that a call succeeds on this connection.
async fn assert_usable(client: &Client, connection: &mut Connection) {
    let (identity, ()) = join!(client.identify(), connection.identifies());
    assert_eq!(identity.unwrap().peer_id, peer());
}

/// Asserts that a call succeeds on a new connection; returns the connection.
async fn assert_usable_anew(client: &Client, daemon: &FakeDaemon) -> Connection {
    let (identity, connection) = join!(client.identify(), async {
        let mut connection = daemon.accept().await;
        connection.identifies().await;
        connection
    });
    assert_eq!(identity.unwrap().peer_id, peer());
    connection
}

/// Accepts a connection and reads its first request.
async fn accept_request(daemon: &FakeDaemon) -> Connection {
    let mut connection = daemon.accept().await;
    connection.request().await;
    connection
}

fn frame(message: &impl prost::Message) -> Vec<u8> {
    framing::encode_frame(message).to_vec()
}

// --- the connection ---

#[tokio::test]
async fn missing_daemon_is_unreachable() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let control = daemon.control();
    drop(daemon);
    let error = client.identify().await.unwrap_err();
    assert!(matches!(&error, Error::Unreachable { addr, .. } if *addr == control));
    assert_eq!(
        error.to_string(),
        format!(
            "no connection to the daemon's control socket at {control}: No such file or directory \
             (os error 2) (request IDENTIFY)"
        )
    );
}

#[tokio::test]
async fn eof_instead_of_a_reply_is_a_lost_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let addrs = [addr()];
    let id = peer();
    let (outcome, ()) = join!(client.connect(&id, &addrs), async {
        drop(accept_request(&daemon).await);
    });
    let error = outcome.unwrap_err();
    assert!(matches!(
        error,
        Error::ConnectionLost {
            unexecuted: false,
            ..
        }
    ));
    assert_eq!(
        error.to_string(),
        format!(
            "the connection to the daemon was lost: the daemon closed the connection without \
             answering (request CONNECT, peer {id})"
        )
    );
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn eof_within_a_reply_is_a_lost_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let answer = frame(&identity());
    let (outcome, ()) = join!(client.identify(), async {
        accept_request(&daemon)
            .await
            .send(&answer[..answer.len() - 1])
            .await;
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::ConnectionLost { .. }));
    assert!(error.to_string().contains("in the middle of its answer"));
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn invalid_reply_is_a_protocol_error_and_closes_the_connection() {
    let with_identify = |identify| p2pd::Response {
        identify: Some(identify),
        ..ok()
    };
    let invalid_replies = [
        (b"HTTP/1.1 400 Bad Request\r\n".repeat(4), "malformed"),
        (vec![0xff; 11], "length prefix"),
        (
            vec![0xff, 0xff, 0xff, 0xff, 0x0f],
            "4294967295 bytes; the limit is 4259840",
        ),
        (vec![0x80, 0x00], "length prefix (not minimal)"),
        (vec![2, 8, 7], "unknown type 7"),
        (vec![0], "without `type`"),
        (frame(&ok()), "without `identify`"),
        (
            frame(&with_identify(p2pd::IdentifyResponse::default())),
            "without `id`",
        ),
        (
            frame(&dht_response(dht(End, ""))),
            "a Response without `identify`",
        ),
    ];
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    for (bytes, expected) in invalid_replies {
        let (outcome, mut connection) = join!(client.identify(), async {
            let mut connection = accept_request(&daemon).await;
            connection.send(&bytes).await;
            connection
        });
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.context().unwrap().request, "IDENTIFY");
        assert_eq!(connection.frame().await, None);
    }
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn unanswered_call_times_out_and_the_next_call_uses_a_new_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let hasty = client.with_timeout(SOON);
    let (outcome, connection) = join!(hasty.identify(), accept_request(&daemon));
    let error = outcome.unwrap_err();
    assert!(matches!(
        error,
        Error::Timeout {
            after: Some(SOON),
            ..
        }
    ));
    assert_eq!(
        error.to_string(),
        "no answer within 50ms (request IDENTIFY)"
    );
    connection.ended().await;
    assert_usable_anew(&hasty, &daemon).await;
}

#[tokio::test]
async fn timeout_is_sent_to_the_daemon_in_whole_seconds() {
    let daemon = FakeDaemon::new();
    let client = daemon.client().with_timeout(Duration::from_millis(1500));
    let id = peer();
    let mut connection = assert_usable_anew(&client, &daemon).await;
    begin_and_answer(client.connect(&id, &[]), &mut connection, |request| {
        assert_eq!(request.connect.unwrap().timeout, Some(2));
    })
    .await;
    begin_and_answer(client.dht_provide("cid"), &mut connection, |request| {
        assert_eq!(request.dht.unwrap().timeout, Some(2));
    })
    .await;
}

async fn begin_and_answer(
    call: impl Future<Output = Result<(), Error>>,
    connection: &mut Connection,
    check: impl FnOnce(p2pd::Request),
) {
    let (outcome, ()) = join!(call, async {
        check(connection.request().await);
        connection.answer(ok()).await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn reply_may_arrive_one_byte_at_a_time() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, mut connection) = join!(client.identify(), async {
        let mut connection = accept_request(&daemon).await;
        for byte in frame(&identity()) {
            connection.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
        connection
    });
    assert_eq!(outcome.unwrap().addrs, [addr()]);
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn connection_with_unsolicited_data_is_not_reused() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut first = assert_usable_anew(&client, &daemon).await;
    let mut another = identity();
    another.identify.as_mut().unwrap().id = Some("another".into());
    // Without a chance for the runtime to notice.
    first.push(&frame(&another));
    let mut second = assert_usable_anew(&client, &daemon).await;
    assert!(first.is_closed().await);
    assert_usable(&client, &mut second).await;
}

#[tokio::test]
async fn connection_with_bytes_after_the_reply_is_not_reused() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, first) = join!(client.identify(), async {
        let mut connection = accept_request(&daemon).await;
        let answer = frame(&identity());
        connection.send(&[&answer[..], &answer[..3]].concat()).await;
        connection
    });
    outcome.unwrap();
    first.ended().await;
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn restarted_daemon_is_used_transparently() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    drop(assert_usable_anew(&client, &daemon).await);
    let daemon = daemon.restart();
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn request_left_unread_by_the_daemon_is_retried() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let first = assert_usable_anew(&client, &daemon).await;
    let (outcome, ()) = join!(client.identify(), async {
        // The request arrives, and the daemon does not read it.
        within("a request", first.readable()).await;
        drop(first);
        daemon.accept().await.identifies().await;
    });
    outcome.unwrap();
}

#[tokio::test]
async fn request_read_by_the_daemon_is_not_retried() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut first = assert_usable_anew(&client, &daemon).await;
    let id = peer();
    let (outcome, ()) = join!(client.connect(&id, &[]), async {
        first.request().await;
        drop(first);
    });
    assert!(matches!(outcome, Err(Error::ConnectionLost { .. })));
    daemon.nobody_connects();
}

#[tokio::test]
async fn request_over_the_limit_is_not_sent_and_leaves_the_connection_usable() {
    let daemon = FakeDaemon::new();
    let limits = Limits::default().with_max_frame(1000);
    let client = Client::builder(daemon.control()).limits(limits).build();
    let client = client.unwrap();
    let mut connection = assert_usable_anew(&client, &daemon).await;
    let error = client.pubsub_publish("topic", vec![0; 1000]).await;
    let error = error.unwrap_err();
    assert!(
        matches!(
            error,
            Error::MessageTooLarge {
                size: 1019,
                limit: 1000,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(error.context().unwrap().request, "PUBSUB PUBLISH");
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn refusal_has_the_daemons_message_and_leaves_the_connection_usable() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut connection = assert_usable_anew(&client, &daemon).await;
    let id = peer();
    let refused = [
        (
            "no good addresses",
            "the daemon refused: no good addresses",
            (|error| matches!(error, Error::Refused { .. })) as fn(&Error) -> bool,
        ),
        (
            "DHT not enabled",
            "the daemon does not support this: DHT not enabled",
            |error| matches!(error, Error::NotSupported { .. }),
        ),
        (
            "failed to dial: context deadline exceeded",
            "the daemon gave up: failed to dial: context deadline exceeded",
            |error| matches!(error, Error::Timeout { after: None, .. }),
        ),
        ("", "the daemon refused: ", |error| {
            matches!(error, Error::Refused { .. })
        }),
    ];
    for (message, text, is_right) in refused {
        let (outcome, ()) = join!(client.stream_open(&id, ["/a", "/b"]), async {
            connection.request().await;
            connection.answer(refusal(message)).await;
        });
        let error = outcome.unwrap_err();
        assert!(is_right(&error), "{error:?}");
        assert_eq!(error.daemon_message(), Some(message));
        let about = format!(" (request STREAM_OPEN, peer {id}, protocol /a, /b)");
        assert_eq!(error.to_string(), format!("{text}{about}"));
    }
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn dropped_call_closes_its_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let answer = frame(&identity());
    let mut connection = tokio::select! {
        _ = client.identify() => unreachable!("it is not all there"),
        connection = async {
            let mut connection = accept_request(&daemon).await;
            connection.send(&answer[..3]).await;
            connection
        } => connection,
    };
    assert!(connection.is_closed().await);
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn remote_requests_do_not_delay_local_ones() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut slow = Vec::new();
    let mut connections = Vec::new();
    for _ in 0..64 {
        let client = client.clone();
        slow.push(tokio::spawn(
            async move { client.connect(&peer(), &[]).await },
        ));
        connections.push(accept_request(&daemon).await);
    }
    let mut quick = assert_usable_anew(&client, &daemon).await;
    let one_more = tokio::spawn({
        let client = client.clone();
        async move { client.connect(&peer(), &[]).await }
    });
    assert_usable(&client, &mut quick).await;
    daemon.nobody_connects();

    // Its turn comes when one of the others has ended.
    let mut first = connections.swap_remove(0);
    first.answer(ok()).await;
    first.request().await;
    first.answer(ok()).await;
    within("the 65th", one_more).await.unwrap().unwrap();
    for mut connection in connections {
        connection.answer(ok()).await;
    }
    for call in slow {
        within("the others", call).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn at_most_eight_idle_connections_are_kept() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut calls = Vec::new();
    let mut connections = Vec::new();
    for _ in 0..10 {
        let client = client.clone();
        calls.push(tokio::spawn(
            async move { client.connect(&peer(), &[]).await },
        ));
        connections.push(accept_request(&daemon).await);
    }
    for (call, connection) in calls.into_iter().zip(&mut connections) {
        connection.answer(ok()).await;
        call.await.unwrap().unwrap();
    }
    // The oldest connections were closed.
    let kept = connections.split_off(2);
    for connection in connections {
        connection.ended().await;
    }
    drop(client);
    for connection in kept {
        connection.ended().await;
    }
}

#[tokio::test]
async fn connect_waits_for_a_daemon_with_a_full_backlog() {
    let daemon = FakeDaemon::new();
    daemon.is_busy();
    let client = daemon.client();
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.identify().await })
        })
        .collect();
    tokio::task::yield_now().await; // lets all of them try to connect
    let serving = tokio::spawn(async move {
        loop {
            tokio::spawn(daemon.accept().await.oblige());
        }
    });
    for call in calls {
        within("the answer", call).await.unwrap().unwrap();
    }
    serving.abort();
}

#[test]
fn client_can_be_used_on_one_runtime_after_another() {
    let (sender, control) = std::sync::mpsc::channel();
    let (enough, ended) = tokio::sync::oneshot::channel();
    let daemon = std::thread::spawn(move || {
        Runtime::new().unwrap().block_on(async {
            let daemon = FakeDaemon::new();
            sender.send(daemon.control()).unwrap();
            let serve = async {
                loop {
                    tokio::spawn(daemon.accept().await.oblige());
                }
            };
            tokio::select! {
                () = serve => {},
                ended = ended => ended.unwrap(),
            }
        });
    });
    let client = Client::new(control.recv().unwrap()).unwrap();
    let first = Runtime::new().unwrap();
    let handler = first.block_on(async {
        client.identify().await.unwrap();
        client.stream_handler("/echo", false).await.unwrap()
    });
    let before = client.listen_maddr().unwrap();
    drop(first);
    // Its runtime is gone, so the handler cannot be removed from the daemon.
    drop(handler);

    let second = Runtime::new().unwrap();
    second.block_on(async {
        client.identify().await.unwrap();
        let again = within("the name", client.stream_handler("/echo", false)).await;
        let mut incoming = again.unwrap();
        let listen = client.listen_maddr().unwrap();
        assert_ne!(listen, before);
        let mut stream = dial(&listen).await;
        stream.answer(stream_info("/echo")).await;
        let stream = within("a stream", incoming.next()).await;
        assert_eq!(stream.unwrap().info().protocol, "/echo");
        within("the removal", incoming.close()).await.unwrap();
    });
    enough.send(()).unwrap();
    daemon.join().unwrap();
}

// --- streams ---

#[tokio::test]
async fn bytes_after_the_stream_open_response_belong_to_the_stream() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let opened = p2pd::Response {
        stream_info: Some(stream_info("/echo")),
        ..ok()
    };
    let ahead = pattern(5000, 1);
    let id = peer();
    let (stream, mut connection) = join!(client.stream_open(&id, ["/echo"]), async {
        let mut connection = accept_request(&daemon).await;
        connection
            .send(&[&frame(&opened)[..], &ahead].concat())
            .await;
        connection
    });
    let mut stream = stream.unwrap();
    assert_eq!(stream.info().peer_id, peer());
    assert_eq!(stream.info().addr, addr());
    connection.send(b"and more").await;
    let mut received = vec![0; ahead.len() + 8];
    stream.read_exact(&mut received).await.unwrap();
    assert_eq!(received, [&ahead[..], b"and more"].concat());
    stream.write_all(b"thanks").await.unwrap();
    assert_eq!(connection.bytes(6).await, "thanks");
    // The pool does not reuse the connection.
    assert_usable_anew(&client, &daemon).await;
    drop(stream);
    connection.ended().await;
}

#[tokio::test]
async fn dropped_stream_with_unread_input_delivers_its_output() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let opened = p2pd::Response {
        stream_info: Some(stream_info("/echo")),
        ..ok()
    };
    let id = peer();
    let (stream, mut connection) = join!(client.stream_open(&id, ["/echo"]), async {
        let mut connection = accept_request(&daemon).await;
        connection.answer(opened).await;
        connection
    });
    let mut stream = stream.unwrap();
    stream.write_all(b"last bytes").await.unwrap();
    connection.push(b"never read");
    drop(stream);
    assert_eq!(connection.bytes(10).await, "last bytes");
    connection.ended().await;
}

// --- inbound streams ---

/// A client with a handler for `/echo`.
struct Listening {
    client: Client,
    incoming: IncomingStreams,
    listen: Multiaddr,
    control: Connection,
    daemon: FakeDaemon,
}

async fn listening() -> Listening {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (incoming, (listen, control)) = join!(client.stream_handler("/echo", true), async {
        let mut control = daemon.accept().await;
        let request = control.request().await.stream_handler.unwrap();
        assert_eq!(request.proto, ["/echo"]);
        assert_eq!(request.balanced, Some(true));
        control.answer(ok()).await;
        (Multiaddr::from_bytes(request.addr.unwrap()), control)
    });
    assert_eq!(client.listen_maddr(), Some(listen.clone()));
    Listening {
        client,
        incoming: incoming.unwrap(),
        listen,
        control,
        daemon,
    }
}

/// Connects to the listener, as the daemon does for an inbound stream.
async fn dial(listen: &Multiaddr) -> Connection {
    let Ok(Endpoint::Unix(path)) = listen.endpoint() else {
        panic!("{listen} is no unix socket");
    };
    Connection::new(UnixStream::connect(path).await.unwrap())
}

/// Reads the request to remove the handler, and accepts it.
async fn accept_removal(control: &mut Connection) {
    let request = control.request().await;
    assert_eq!(request.r#type, Some(Type::RemoveStreamHandler as i32));
    let request = request.remove_stream_handler.unwrap();
    assert_eq!(request.proto, ["/echo"]);
    control.answer(ok()).await;
}

#[tokio::test]
async fn bytes_after_the_stream_info_belong_to_the_stream() {
    let mut listening = listening().await;
    let mut peer_end = dial(&listening.listen).await;
    let ahead = pattern(5000, 2);
    let header = frame(&stream_info("/echo"));
    peer_end.send(&[&header[..], &ahead].concat()).await;
    let stream = within("a stream", listening.incoming.next()).await;
    let mut stream = stream.unwrap();
    assert_eq!(stream.info().peer_id, peer());
    let mut received = vec![0; ahead.len()];
    stream.read_exact(&mut received).await.unwrap();
    assert_eq!(received, ahead);
    stream.write_all(b"thanks").await.unwrap();
    drop(stream);
    assert_eq!(peer_end.bytes(6).await, "thanks");
    peer_end.ended().await;
}

#[tokio::test]
async fn stream_info_may_arrive_one_byte_at_a_time() {
    let mut listening = listening().await;
    let mut peer_end = dial(&listening.listen).await;
    let (stream, ()) = join!(listening.incoming.next(), async {
        for byte in frame(&stream_info("/echo")) {
            peer_end.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
    });
    assert_eq!(stream.unwrap().info().protocol, "/echo");
}

#[tokio::test]
async fn invalid_inbound_streams_are_closed_and_affect_no_others() {
    let mut listening = listening().await;
    let mut no_peer = stream_info("/echo");
    no_peer.peer = None;
    for header in [
        frame(&stream_info("/unknown")),
        b"HTTP/1.1 400 Bad Request\r\n".repeat(4),
        vec![0xff; 11],
        vec![0xff, 0xff, 0xff, 0xff, 0x0f],
        frame(&no_peer),
        vec![0],
    ] {
        let mut peer_end = dial(&listening.listen).await;
        peer_end.send(&header).await;
        assert!(peer_end.is_closed().await, "{header:?}");
    }
    // Nor does a connection that sends nothing.
    let _silent = dial(&listening.listen).await;
    dial(&listening.listen)
        .await
        .answer(stream_info("/echo"))
        .await;
    let stream = within("a stream", listening.incoming.next()).await;
    assert_eq!(stream.unwrap().info().protocol, "/echo");
}

#[tokio::test]
async fn waiting_and_later_streams_are_closed_with_their_handler() {
    let Listening {
        client,
        mut incoming,
        listen,
        mut control,
        daemon: _daemon,
    } = listening().await;
    let mut waiting = Vec::new();
    for _ in 0..3 {
        let mut peer_end = dial(&listen).await;
        peer_end.answer(stream_info("/echo")).await;
        waiting.push(peer_end);
    }
    let taken = within("a stream", incoming.next()).await.unwrap();
    drop(incoming);
    let mut first = waiting.remove(0);
    for mut peer_end in waiting {
        assert!(peer_end.is_closed().await);
    }
    let mut late = dial(&listen).await;
    late.answer(stream_info("/echo")).await;
    assert!(late.is_closed().await);
    accept_removal(&mut control).await;
    // A stream already accepted stays open.
    first.push(b"still here");
    let mut received = [0; 10];
    let mut taken = taken;
    taken.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"still here");
    drop(client);
}

#[tokio::test]
async fn client_has_one_handler_per_protocol() {
    let listening = listening().await;
    let error = listening.client.stream_handler("/echo", true).await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::AlreadyRegistered { .. }));
    assert_eq!(
        error.to_string(),
        "there is a handler for this protocol already; drop or remove it first, or use another name (request STREAM_HANDLER, protocol /echo)"
    );
    listening.daemon.nobody_connects();
}

/// Replies to each request of a registration, which must be of these types.
async fn registration(control: &mut Connection, replies: [(Type, p2pd::Response); 3]) {
    for (kind, reply) in replies {
        assert_eq!(control.request().await.r#type, Some(kind as i32));
        control.answer(reply).await;
    }
}

#[tokio::test]
async fn replaced_handler_ends_and_its_successor_gets_the_streams() {
    let Listening {
        client,
        mut incoming,
        listen,
        mut control,
        daemon,
    } = listening().await;
    let replies = [
        (
            Type::StreamHandler,
            refusal("handler for /echo already set"),
        ),
        (Type::RemoveStreamHandler, ok()),
        (Type::StreamHandler, ok()),
    ];
    let (outcome, ()) = join!(
        client.replace_stream_handler("/echo", false),
        registration(&mut control, replies)
    );
    let mut successor = outcome.unwrap();
    assert!(within("the end", incoming.next()).await.is_none());
    drop(incoming);
    dial(&listen).await.answer(stream_info("/echo")).await;
    assert!(within("a stream", successor.next()).await.is_some());
    daemon.nobody_connects();
}

#[tokio::test]
async fn handler_stays_if_replacing_it_fails() {
    let Listening {
        client,
        mut incoming,
        listen,
        mut control,
        ..
    } = listening().await;
    // Other clients share the protocol, and this one goes on sharing it.
    let replies = [
        (
            Type::StreamHandler,
            refusal("handler for /echo already set"),
        ),
        (Type::RemoveStreamHandler, refusal("does not exist")),
        (Type::StreamHandler, ok()),
    ];
    let (outcome, ()) = join!(
        client.replace_stream_handler("/echo", false),
        registration(&mut control, replies)
    );
    assert!(matches!(outcome, Err(Error::Refused { .. })), "{outcome:?}");
    dial(&listen).await.answer(stream_info("/echo")).await;
    assert!(within("a stream", incoming.next()).await.is_some());
}

#[tokio::test]
async fn handler_dropped_while_replacing_it_fails_is_removed() {
    let Listening {
        client,
        incoming,
        mut control,
        ..
    } = listening().await;
    let (outcome, ()) = join!(client.replace_stream_handler("/echo", false), async {
        control.request().await;
        drop(incoming);
        tokio::task::yield_now().await; // to the task that would remove it
        control.answer(refusal("no")).await;
    });
    assert!(matches!(outcome, Err(Error::Refused { .. })), "{outcome:?}");
    accept_removal(&mut control).await;
    let (again, ()) = join!(client.stream_handler("/echo", false), async {
        control.request().await;
        control.answer(ok()).await;
    });
    let _again = again.unwrap();
}

#[tokio::test]
async fn protocol_of_a_dropped_handler_is_free_once_the_daemon_has_removed_it() {
    let Listening {
        client,
        incoming,
        listen,
        mut control,
        daemon,
    } = listening().await;
    drop(incoming);
    let again = tokio::spawn({
        let client = client.clone();
        async move { client.stream_handler("/echo", true).await }
    });
    accept_removal(&mut control).await;
    let request = control.request().await;
    assert_eq!(request.r#type, Some(Type::StreamHandler as i32));
    control.answer(ok()).await;
    let mut incoming = within("the name", again).await.unwrap().unwrap();
    dial(&listen).await.answer(stream_info("/echo")).await;
    assert!(within("a stream", incoming.next()).await.is_some());
    daemon.nobody_connects();
}

#[tokio::test]
async fn protocol_of_a_refused_or_timed_out_handler_is_free() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut control = assert_usable_anew(&client, &daemon).await;
    let (outcome, ()) = join!(client.stream_handler("/echo", false), async {
        control.request().await;
        control
            .answer(refusal("handler for protocol already set"))
            .await;
    });
    assert!(matches!(outcome, Err(Error::Refused { .. })));

    // A registration that succeeds after its timeout is undone.
    let hasty = client.with_timeout(SOON);
    let (outcome, _) = join!(hasty.stream_handler("/echo", false), control.request());
    assert!(matches!(outcome, Err(Error::Timeout { .. })));
    control.answer(ok()).await;
    accept_removal(&mut control).await;

    let (outcome, ()) = join!(client.stream_handler("/echo", false), async {
        control.request().await;
        control.answer(ok()).await;
    });
    let incoming = outcome.unwrap();
    join!(
        async { incoming.close().await.unwrap() },
        accept_removal(&mut control)
    );
}

#[tokio::test]
async fn removing_a_handler_can_be_not_supported() {
    let Listening {
        client: _client,
        incoming,
        control,
        daemon,
        ..
    } = listening().await;
    let (outcome, ()) = join!(incoming.close(), async {
        let mut control = control;
        control.request().await;
        drop(control);
        // As the daemon still runs, the request was the reason.
        daemon.accept().await.identifies().await;
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::NotSupported { .. }), "{error:?}");
    let context = error.context().unwrap();
    assert_eq!(context.request, "REMOVE_STREAM_HANDLER");
    assert_eq!(context.protocol.as_deref(), Some("/echo"));
}

#[tokio::test]
async fn listen_address_that_fails_is_named() {
    let daemon = FakeDaemon::new();
    let listen: Multiaddr = "/unix/no/such/directory/listen.sock".parse().unwrap();
    let builder = Client::builder(daemon.control()).listen_maddr(listen.clone());
    let client = builder.build().unwrap();
    let error = client.stream_handler("/echo", false).await.unwrap_err();
    assert!(matches!(&error, Error::Listen { addr, .. } if *addr == listen));
    assert!(error.to_string().contains("/no/such/directory"));
    daemon.nobody_connects();
}

#[tokio::test]
async fn socket_file_is_removed_with_the_client() {
    let Listening {
        client,
        incoming,
        listen,
        mut control,
        daemon: _daemon,
    } = listening().await;
    let Ok(Endpoint::Unix(path)) = listen.endpoint() else {
        panic!("{listen} is no unix socket");
    };
    assert!(std::fs::exists(&path).unwrap());
    join!(
        async { incoming.close().await.unwrap() },
        accept_removal(&mut control)
    );
    drop(client);
    p2pd_test_support::eventually(async || must(!std::fs::exists(&path)?, "it is there still"))
        .await;
}

// --- queries ---

/// Starts a query to which the daemon has answered BEGIN.
async fn querying(client: &Client, daemon: &FakeDaemon) -> (Results<bytes::Bytes>, Connection) {
    let mut results = client.dht_search_value("key");
    let mut connection = tokio::select! {
        _ = results.next() => unreachable!("nothing has come"),
        connection = accept_request(daemon) => connection,
    };
    connection.answer(dht_response(dht(Begin, ""))).await;
    (results, connection)
}

#[tokio::test]
async fn query_yields_results_as_they_arrive() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (mut results, mut connection) = querying(&client, &daemon).await;
    for value in ["good", "better", "best"] {
        connection.answer(dht(Value, value)).await;
        // The daemon has not sent the next one yet.
        let result = within("a result", results.next()).await;
        assert_eq!(result.unwrap().unwrap(), value);
    }
    begin(results.next()).await;
    connection.answer(dht(End, "")).await;
    assert!(within("the end", results.next()).await.is_none());
    assert!(results.next().await.is_none());
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn single_value_is_a_list_of_one() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let results = client.dht_search_value("key");
    let (results, mut connection) = join!(results.collect_all(), async {
        let mut connection = accept_request(&daemon).await;
        connection.answer(dht_response(dht(Value, "value"))).await;
        connection
    });
    assert_eq!(results.unwrap(), ["value"]);
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn query_dropped_midway_closes_its_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (mut results, mut connection) = querying(&client, &daemon).await;
    connection.answer(dht(Value, "good")).await;
    within("a result", results.next()).await.unwrap().unwrap();
    drop(results);
    connection.ended().await;
    assert_usable_anew(&client, &daemon).await;
}

#[tokio::test]
async fn query_that_is_never_polled_sends_nothing() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    drop(client.dht_search_value("key"));
    daemon.nobody_connects();
}

#[tokio::test]
async fn invalid_sequence_of_results_ends_in_an_error() {
    let no_value = dht(Value, "");
    for (message, expected) in [
        (dht(Begin, ""), "DHT BEGIN after BEGIN"),
        (no_value, "DHTResponse without `value`"),
        (p2pd::DhtResponse::default(), "DHTResponse without `type`"),
    ] {
        let daemon = FakeDaemon::new();
        let client = daemon.client();
        let (mut results, mut connection) = querying(&client, &daemon).await;
        connection.answer(dht(Value, "good")).await;
        connection.answer(message).await;
        assert!(results.next().await.unwrap().is_ok());
        let error = results.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }));
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(text.ends_with("(request DHT SEARCH_VALUE)"), "{text}");
        assert!(results.next().await.is_none());
        connection.ended().await;
    }
}

#[tokio::test]
async fn end_without_begin_is_a_protocol_error() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, connection) = join!(client.dht_search_value("key").collect_all(), async {
        let mut connection = accept_request(&daemon).await;
        connection.answer(dht_response(dht(End, ""))).await;
        connection
    });
    let error = outcome.unwrap_err();
    assert!(error.to_string().contains("DHT END before BEGIN"));
    connection.ended().await;
}

#[tokio::test]
async fn refused_query_leaves_its_connection_usable() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut connection = assert_usable_anew(&client, &daemon).await;
    let (outcome, ()) = join!(client.dht_search_value("key").collect_all(), async {
        connection.request().await;
        connection.answer(refusal("routing: not found")).await;
    });
    let error = outcome.unwrap_err();
    assert_eq!(error.daemon_message(), Some("routing: not found"));
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn timeout_of_a_query_covers_all_of_it() {
    let daemon = FakeDaemon::new();
    let client = daemon.client().with_timeout(SOON);
    let (mut results, mut connection) = querying(&client, &daemon).await;
    connection.answer(dht(Value, "good")).await;
    within("a result", results.next()).await.unwrap().unwrap();
    let error = within("the end", results.next()).await.unwrap();
    assert!(matches!(
        error,
        Err(Error::Timeout {
            after: Some(SOON),
            ..
        })
    ));
    connection.ended().await;
}

#[tokio::test]
async fn query_with_too_many_results_fails() {
    let daemon = FakeDaemon::new();
    let limits = Limits::default().with_max_answer(150);
    let client = Client::builder(daemon.control()).limits(limits).build();
    let (results, mut connection) = querying(&client.unwrap(), &daemon).await;
    for _ in 0..3 {
        connection.answer(dht(Value, "four")).await;
    }
    let error = results.collect_all().await.unwrap_err();
    assert!(error.to_string().contains("exceed 150 bytes"), "{error}");
    connection.ended().await;
}

// --- subscriptions ---

fn published(data: &'static str) -> p2pd::PsMessage {
    p2pd::PsMessage {
        from: Some(peer().to_bytes()),
        data: Some(data.into()),
        seqno: Some("1".into()),
        topic_i_ds: vec!["news".into()],
        ..Default::default()
    }
}

/// Subscribes, with these bytes directly after the response.
async fn subscribed(daemon: &FakeDaemon, ahead: &[u8]) -> (Subscription, Connection) {
    let client = daemon.client();
    let (subscription, connection) = join!(client.pubsub_subscribe("news"), async {
        let mut connection = accept_request(daemon).await;
        connection.send(&[&frame(&ok())[..], ahead].concat()).await;
        connection
    });
    (subscription.unwrap(), connection)
}

#[tokio::test]
async fn messages_directly_after_the_subscribe_response_are_not_lost() {
    let daemon = FakeDaemon::new();
    let (first, second) = (frame(&published("one")), frame(&published("two")));
    let (begin, rest) = second.split_at(4);
    let ahead = [&first[..], begin].concat();
    let (mut news, mut connection) = subscribed(&daemon, &ahead).await;
    let message = news.next().await.unwrap().unwrap();
    assert_eq!(message.data, "one");
    assert_eq!(message.from, Some(peer()));
    assert_eq!(message.topic_ids, ["news"]);
    connection.send(rest).await;
    assert_eq!(news.next().await.unwrap().unwrap().data, "two");
}

#[tokio::test]
async fn subscription_ended_by_the_daemon_reports_one_error() {
    let daemon = FakeDaemon::new();
    let (news, mut connection) = subscribed(&daemon, &[]).await;
    connection.answer(published("one")).await;
    drop(connection);
    let news: Vec<_> = within("the end", news.collect()).await;
    assert_eq!(news.len(), 2);
    assert_eq!(news[0].as_ref().unwrap().data, "one");
    let error = news[1].as_ref().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the connection to the daemon was lost: the daemon ended the subscription (request PUBSUB \
         SUBSCRIBE)"
    );
}

#[tokio::test]
async fn invalid_message_ends_a_subscription() {
    let daemon = FakeDaemon::new();
    for bytes in [vec![3, 0xff, 0xff, 0xff], vec![0xff; 11]] {
        let (mut news, connection) = subscribed(&daemon, &bytes).await;
        let error = news.next().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }));
        assert!(news.next().await.is_none());
        connection.ended().await;
    }
}

#[tokio::test]
async fn dropped_subscription_closes_its_connection() {
    let daemon = FakeDaemon::new();
    let (news, connection) = subscribed(&daemon, &[]).await;
    drop(news);
    connection.ended().await;
}

#[tokio::test]
async fn close_of_a_subscription_waits_until_the_daemon_has_ended_it() {
    let daemon = FakeDaemon::new();
    let (news, mut connection) = subscribed(&daemon, &[]).await;
    let mut closing = pin!(news.close());
    begin(closing.as_mut()).await;
    assert_eq!(connection.frame().await, None);
    connection.answer(published("late")).await;
    begin(closing.as_mut()).await;
    drop(connection);
    within("the end", closing).await;
}

// --- the peerstore, which only jsp2pd has ---

#[tokio::test]
async fn peerstore_requests_use_the_js_flavour() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut connection = assert_usable_anew(&client, &daemon).await;
    let answer = |store| p2pd::Response {
        peer_store: Some(store),
        ..ok()
    };
    let id = peer();
    // The client probes first, since hivemind's daemon would misread a PEERSTORE request.
    let answer_probe = async |connection: &mut p2pd_test_support::fake_daemon::Connection| {
        let request: p2pd::JsRequest = connection.message().await;
        assert_eq!(request.r#type, Some(i32::MAX));
        connection.answer(refusal("ERR_INVALID_REQUEST_TYPE")).await;
    };
    let (protocols, ()) = join!(client.peerstore_get_protocols(&id), async {
        answer_probe(&mut connection).await;
        let request: p2pd::JsRequest = connection.message().await;
        assert_eq!(request.r#type, Some(9));
        let request = request.peer_store.unwrap();
        assert_eq!((request.r#type, request.id), (Some(1), Some(id.to_bytes())));
        let protos = vec!["/a".to_owned(), "/b".to_owned()];
        let store = p2pd::PeerstoreResponse { protos, peer: None };
        connection.answer(answer(store)).await;
    });
    assert_eq!(protocols.unwrap(), ["/a", "/b"]);

    let (info, ()) = join!(client.peerstore_get_peer_info(&id), async {
        answer_probe(&mut connection).await;
        let request: p2pd::JsRequest = connection.message().await;
        assert_eq!(request.peer_store.unwrap().r#type, Some(2));
        let store = p2pd::PeerstoreResponse {
            peer: Some(p2pd_test_support::fake_daemon::peer_info()),
            protos: Vec::new(),
        };
        connection.answer(answer(store)).await;
    });
    let info = info.unwrap();
    assert_eq!((info.peer_id, info.addrs), (peer(), vec![addr()]));
}

// --- random input ---

/// Random bytes instead of a reply give an error, or by chance a reply, but never a panic or a
/// hang.
#[tokio::test]
async fn random_bytes_never_hang_or_break_the_client() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let answer = frame(&identity());
    for seed in 0..300 {
        let mut bytes = BytesMut::from(&answer[..]);
        let place = seed * 7919 % bytes.len();
        bytes[place] ^= pattern(1, seed * 8)[0] | 1;
        let (outcome, ()) = join!(within("an end", client.identify()), async {
            let mut connection = accept_request(&daemon).await;
            connection.send(&bytes).await;
            connection.end().await;
        });
        drop(outcome);
    }
    assert_usable_anew(&client, &daemon).await;
}

// --- futures dropped, and connections ended, at awkward times ---

#[tokio::test]
async fn running_query_does_not_block_requests_of_a_small_pool() {
    let daemon = FakeDaemon::new();
    let builder = Client::builder(daemon.control()).max_connections(1);
    let client = builder.build().unwrap();
    let (mut results, mut connection) = querying(&client, &daemon).await;
    connection.answer(dht(Value, "one")).await;
    results.next().await.unwrap().unwrap();
    // The query has not ended.
    let (id, addrs) = (peer(), [addr()]);
    let (outcome, ()) = join!(client.connect(&id, &addrs), async {
        let mut connection = daemon.accept().await;
        connection.request().await;
        connection.answer(ok()).await;
    });
    outcome.unwrap();
    drop(connection);
}

#[tokio::test]
async fn idle_tcp_connection_closed_by_the_daemon_is_not_reused() {
    let _limit = Limit::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // In a thread, so that the client's reactor may not have run yet.
    let daemon = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().unwrap();
            std::io::Read::read_exact(&mut socket, &mut [0; 3]).unwrap();
            std::io::Write::write_all(&mut socket, &frame(&identity())).unwrap();
        }
    });
    let client = Client::new(format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap()).unwrap();
    client.identify().await.unwrap();
    // The second connection is accepted after the first one is closed.
    client.identify().await.unwrap();
    daemon.join().unwrap();
}

#[tokio::test]
async fn registration_dropped_before_its_reply_is_undone_after_it() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut control = select! {
        _ = client.stream_handler("/echo", false) => panic!("it has ended"),
        control = async {
            let mut control = daemon.accept().await;
            control.request().await;
            control
        } => control,
    };
    // Not on another connection, where the removal could overtake the registration.
    tokio::task::yield_now().await;
    daemon.nobody_connects();
    control.answer(ok()).await;
    accept_removal(&mut control).await;
}

#[test]
fn inbound_streams_end_with_their_runtime() {
    let (sender, control) = std::sync::mpsc::channel();
    let daemon = std::thread::spawn(move || {
        Runtime::new().unwrap().block_on(async {
            let daemon = FakeDaemon::new();
            sender.send(daemon.control()).unwrap();
            daemon.accept().await.oblige().await;
        });
    });
    let client = Client::new(control.recv().unwrap()).unwrap();
    let first = Runtime::new().unwrap();
    let mut incoming = first
        .block_on(client.stream_handler("/echo", false))
        .unwrap();
    drop(first);
    let second = Runtime::new().unwrap();
    let none = second.block_on(async { within("the end", incoming.next()).await });
    assert!(none.is_none());
    drop((incoming, client));
    drop(second);
    daemon.join().unwrap();
}

#[tokio::test]
async fn listen_address_can_be_reused_at_once() {
    let daemon = FakeDaemon::new();
    let directory = tempfile::tempdir().unwrap();
    let listen = format!("/unix{}/l.sock", directory.path().display());
    for _ in 0..3 {
        let builder = Client::builder(daemon.control()).listen_maddr(listen.parse().unwrap());
        let client = builder.build().unwrap();
        let (incoming, mut control) = join!(client.stream_handler("/echo", false), async {
            let mut control = daemon.accept().await;
            control.request().await;
            control.answer(ok()).await;
            control
        });
        let (closed, ()) = join!(incoming.unwrap().close(), accept_removal(&mut control));
        closed.unwrap();
    }
}

#[tokio::test]
async fn client_of_a_daemon_with_a_host_name_listens_at_its_address() {
    let _limit = Limit::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let control = format!("/dns4/localhost/tcp/{port}");
    let client = Client::new(control.parse().unwrap()).unwrap();
    let (incoming, ()) = join!(client.stream_handler("/echo", false), async {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut socket, _) = listener.accept().await.unwrap();
        assert_ne!(socket.read(&mut [0; 256]).await.unwrap(), 0);
        socket.write_all(&frame(&ok())).await.unwrap();
    });
    let _incoming = incoming.unwrap();
    let listening = client.listen_maddr().unwrap().to_string();
    assert!(listening.starts_with("/ip4/127.0.0.1/tcp/"), "{listening}");
}
