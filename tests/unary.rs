//! Unary calls of the tokio client: between hivemind's real p2pds, named by P2PD_PATH, and against
//! a scripted fake daemon.
#![cfg(unix)]

use bytes::Bytes;
use futures_util::future::join_all;
use p2pd_client::{Client, Error, UnaryCall};
use p2pd_protocol::command::refusal;
use p2pd_protocol::pb::p2pd::{
    self, call_unary_response::Result as Reply, persistent_connection_request::Message,
    persistent_connection_response::Message as Answer, request::Type,
};
use p2pd_protocol::{framing, Multiaddr, UnaryLimits};
use p2pd_test_support::fake_daemon::{ok, peer, Connection, FakeDaemon};
use p2pd_test_support::{
    bare_daemon, begin, endless, eventually, must, pair, pattern, stranger, within, Limit,
};
use std::convert::Infallible;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::{join, select};

const SOON: Duration = Duration::from_millis(50);

async fn echo(call: UnaryCall) -> Result<Bytes, Infallible> {
    Ok(call.payload)
}

async fn next(events: &mut UnboundedReceiver<&'static str>) -> &'static str {
    within("the handler", events.recv()).await.unwrap()
}

fn handler_failed<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    match outcome {
        Err(Error::HandlerFailed { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

// --- real daemons ---

#[tokio::test]
async fn calls_in_both_directions_pass_the_callers_peer_id() {
    let pair = pair().await;
    for (server, caller, callee, from) in [
        (&pair.bob, &pair.alice, pair.bob_daemon, pair.alice_daemon),
        (&pair.alice, &pair.bob, pair.alice_daemon, pair.bob_daemon),
    ] {
        let name = async |call: UnaryCall| Ok::<_, Infallible>(call.peer.to_string());
        server.add_unary_handler("who", false, name).await.unwrap();
        let reply = caller.call_unary(callee.peer_id(), "who", "").await;
        assert_eq!(reply.unwrap(), from.peer_id().to_string());
    }
}

#[tokio::test]
async fn payloads_of_any_size_arrive_intact() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    pair.bob
        .add_unary_handler("sizes", false, echo)
        .await
        .unwrap();
    for size in [0, 1, 100, 16_383, 16_384, 65_536, 1 << 20, 3 << 20] {
        let payload = Bytes::from(pattern(size, size));
        let reply = pair.alice.call_unary(bob, "sizes", payload.clone()).await;
        assert!(reply.unwrap() == payload, "{size}");
    }
}

#[tokio::test]
async fn thousand_concurrent_calls_each_way_get_their_own_replies() {
    let pair = pair().await;
    pair.alice
        .add_unary_handler("many", false, echo)
        .await
        .unwrap();
    pair.bob
        .add_unary_handler("many", false, echo)
        .await
        .unwrap();
    let calls = (0..2000).map(|number| {
        let (client, callee) = match number % 2 {
            0 => (pair.alice.clone(), pair.bob_daemon.peer_id()),
            _ => (pair.bob.clone(), pair.alice_daemon.peer_id()),
        };
        tokio::spawn(async move {
            let payload = pattern(number * 97 % 20_000, number * 8);
            loop {
                match client.call_unary(callee, "many", payload.clone()).await {
                    // The daemons limit how many streams are opened between them at once.
                    Err(Error::Refused { message, .. }) if message == "stream reset" => continue,
                    reply => break assert!(reply.unwrap() == payload),
                }
            }
        })
    });
    for call in join_all(calls).await {
        call.unwrap();
    }
}

#[tokio::test]
async fn replies_arrive_as_soon_as_they_are_ready() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let (release, released) = tokio::sync::watch::channel(false);
    let handler = move |call: UnaryCall| {
        let mut released = released.clone();
        async move {
            if call.payload == "slow" {
                released.wait_for(|released| *released).await.unwrap();
            }
            Ok::<_, Infallible>(call.payload)
        }
    };
    pair.bob
        .add_unary_handler("order", false, handler)
        .await
        .unwrap();
    let slow = pair.alice.call_unary(bob, "order", "slow");
    tokio::pin!(slow);
    select! {
        _ = &mut slow => panic!("it is held back"),
        quick = pair.alice.call_unary(bob, "order", "quick") => assert_eq!(quick.unwrap(), "quick"),
    }
    release.send(true).unwrap();
    assert_eq!(within("the other", slow).await.unwrap(), "slow");
}

#[tokio::test]
async fn handler_may_call_its_caller_recursively() {
    let pair = pair().await;
    for server in [&pair.alice, &pair.bob] {
        let own = server.clone();
        let handler = move |call: UnaryCall| {
            let own = own.clone();
            async move {
                if call.payload.is_empty() {
                    return Ok(Bytes::from("the end"));
                }
                let rest = call.payload.slice(1..);
                own.call_unary(&call.peer, "ping-pong", rest).await
            }
        };
        server
            .add_unary_handler("ping-pong", false, handler)
            .await
            .unwrap();
    }
    let bob = pair.bob_daemon.peer_id();
    let reply = pair.alice.call_unary(bob, "ping-pong", vec![0; 20]).await;
    assert_eq!(reply.unwrap(), "the end");
    // The handlers hold clones of the clients, which would keep them open.
    join!(pair.alice.close(), pair.bob.close());
}

#[tokio::test]
async fn handler_error_is_sent_to_the_caller() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let fail = async |call: UnaryCall| -> Result<Bytes, String> {
        assert_ne!(call.payload, "panic", "as asked");
        Err(format!("{:?} is no number – 数", call.payload))
    };
    pair.bob
        .add_unary_handler("failing", false, fail)
        .await
        .unwrap();
    let outcome = pair.alice.call_unary(bob, "failing", "x").await;
    assert_eq!(
        outcome.as_ref().unwrap_err().to_string(),
        format!(
            "the handler failed: b\"x\" is no number – 数 (request CALL_UNARY, peer {bob}, protocol \
             failing)"
        )
    );
    assert_eq!(handler_failed(outcome), "b\"x\" is no number – 数");
    let outcome = pair.alice.call_unary(bob, "failing", "panic").await;
    assert_eq!(handler_failed(outcome), "the handler panicked");
    pair.alice
        .call_unary(bob, "failing", "x")
        .await
        .unwrap_err();
}

#[tokio::test]
async fn unknown_protocol_or_peer_is_refused_at_once() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let error = pair.alice.call_unary(bob, "unknown", "").await.unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }), "{error:?}");
    let message = error.daemon_message().unwrap();
    assert!(message.contains("protocols not supported"), "{message}");
    assert_eq!(
        error.context().unwrap().protocol.as_deref(),
        Some("unknown")
    );

    let (unknown, _) = stranger();
    let error = pair
        .alice
        .call_unary(&unknown, "echo", "")
        .await
        .unwrap_err();
    assert!(matches!(&error, Error::Refused { .. }), "{error:?}");
    assert_eq!(error.context().unwrap().peer, Some(unknown));
}

#[tokio::test]
async fn message_over_the_limit_fails_only_its_call() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let grow = async |call: UnaryCall| Ok::<_, Infallible>(call.payload.repeat(4));
    pair.bob
        .add_unary_handler("growing", false, grow)
        .await
        .unwrap();
    let too_large = pair
        .alice
        .call_unary(bob, "growing", vec![0; 4 << 20])
        .await;
    let error = too_large.unwrap_err();
    assert!(matches!(error, Error::MessageTooLarge { limit, size, .. } if size > limit));
    assert_eq!(error.context().unwrap().request, "CALL_UNARY");
    let outcome = pair
        .alice
        .call_unary(bob, "growing", vec![0; 1 << 20])
        .await;
    let message = handler_failed(outcome);
    assert!(message.contains("bytes"), "{message}");
    let reply = pair.alice.call_unary(bob, "growing", "ab").await;
    assert_eq!(reply.unwrap(), "abababab");
}

#[tokio::test]
async fn dropped_and_timed_out_calls_cancel_their_handlers() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let (handler, mut events) = endless();
    pair.bob
        .add_unary_handler("endless", false, handler)
        .await
        .unwrap();
    select! {
        _ = pair.alice.call_unary(bob, "endless", "") => panic!("it has ended"),
        begun = next(&mut events) => assert_eq!(begun, "begun"),
    }
    assert_eq!(next(&mut events).await, "given up");

    let limit = Duration::from_millis(300);
    let hasty = pair.alice.with_timeout(limit);
    let outcome = hasty.call_unary(bob, "endless", "").await;
    assert!(matches!(outcome, Err(Error::Timeout { after: Some(after), .. }) if after == limit));
    assert_eq!(next(&mut events).await, "begun");
    assert_eq!(next(&mut events).await, "given up");
}

#[tokio::test]
async fn balanced_handlers_of_two_clients_are_served_round_robin() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let other = pair.bob_daemon.client().await.unwrap();
    let served = [&pair.bob, &other].map(|_| Arc::new(AtomicUsize::new(0)));
    for (client, count) in [&pair.bob, &other].into_iter().zip(&served) {
        let count = Arc::clone(count);
        let handler = move |call: UnaryCall| {
            count.fetch_add(1, Ordering::Relaxed);
            echo(call)
        };
        client
            .add_unary_handler("balanced", true, handler)
            .await
            .unwrap();
    }
    for _ in 0..10 {
        pair.alice.call_unary(bob, "balanced", "").await.unwrap();
    }
    assert_eq!(served.map(|count| count.load(Ordering::Relaxed)), [5, 5]);
}

#[tokio::test]
async fn protocol_has_one_handler_until_it_is_removed() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let other = pair.bob_daemon.client().await.unwrap();
    let add = |client: &Client| {
        let client = client.clone();
        async move { client.add_unary_handler("passing", false, echo).await }
    };
    add(&pair.bob).await.unwrap();
    assert!(matches!(
        add(&pair.bob).await,
        Err(Error::AlreadyRegistered { .. })
    ));
    let error = add(&other).await.unwrap_err();
    assert!(matches!(error, Error::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains("use another name"), "{error}");
    assert_eq!(other.unary_handlers(), [""; 0]);
    pair.alice.call_unary(bob, "passing", "").await.unwrap();

    pair.bob.remove_unary_handler("passing").await.unwrap();
    let error = pair.bob.remove_unary_handler("passing").await.unwrap_err();
    assert!(matches!(error, Error::NotRegistered { .. }));
    // Until alice's daemon learns of the removal, it forwards calls without asking.
    eventually(async || {
        let error = pair.alice.call_unary(bob, "passing", "").await.unwrap_err();
        must(matches!(error, Error::Refused { .. }), &error.to_string())
    })
    .await;
    add(&other).await.unwrap();
    eventually(async || Ok(pair.alice.call_unary(bob, "passing", "").await?)).await;
}

#[tokio::test]
async fn close_fails_pending_calls_and_sends_errors_to_callers_of_handlers() {
    let pair = pair().await;
    let (alice, bob) = (pair.alice_daemon.peer_id(), pair.bob_daemon.peer_id());
    let (handler, mut events) = endless();
    pair.bob
        .add_unary_handler("closing", false, handler)
        .await
        .unwrap();
    let (handler, mut more_events) = endless();
    pair.alice
        .add_unary_handler("closing", false, handler)
        .await
        .unwrap();
    let (from_alice, from_bob, ()) = join!(
        pair.alice.call_unary(bob, "closing", ""),
        pair.bob.call_unary(alice, "closing", ""),
        async {
            assert_eq!(next(&mut events).await, "begun");
            assert_eq!(next(&mut more_events).await, "begun");
            pair.bob.close().await;
        }
    );
    assert_eq!(
        handler_failed(from_alice),
        "the handler's client was closed"
    );
    let error = from_bob.unwrap_err();
    assert!(matches!(error, Error::ConnectionLost { .. }), "{error:?}");
    assert_eq!(next(&mut events).await, "given up");
    assert_eq!(next(&mut more_events).await, "given up");
    assert_eq!(pair.bob.unary_handlers(), [""; 0]);
    // The client reopens its connection; the daemon may be slow to notice that the first has ended.
    eventually(async || Ok(pair.bob.add_unary_handler("closing", false, echo).await?)).await;
    eventually(async || Ok(pair.alice.call_unary(bob, "closing", "").await?)).await;
}

#[tokio::test]
async fn daemon_death_fails_all_pending_calls_and_a_restart_brings_the_handlers_back() {
    let _limit = Limit::new();
    // In a directory that is not removed with the first daemon.
    let directory = tempfile::Builder::new().prefix("p2p-").tempdir().unwrap();
    let socket = directory.path().join("control.sock");
    let control: Multiaddr = format!("/unix{}", socket.display()).parse().unwrap();
    let daemon = bare_daemon()
        .control_maddr(control.clone())
        .spawn()
        .await
        .unwrap();
    let far_daemon = bare_daemon().spawn().await.unwrap();
    let far = far_daemon.client().await.unwrap();
    let (handler, mut events) = endless();
    far.add_unary_handler("endless", false, handler)
        .await
        .unwrap();

    let client = daemon.client().await.unwrap();
    client
        .connect(far_daemon.peer_id(), far_daemon.addrs())
        .await
        .unwrap();
    client.add_unary_handler("echo", false, echo).await.unwrap();
    let calls = join_all((0..100).map(|_| client.call_unary(far_daemon.peer_id(), "endless", "")));
    let (outcomes, ()) = join!(within("the end", calls), async {
        for _ in 0..100 {
            assert_eq!(next(&mut events).await, "begun");
        }
        drop(daemon); // killed, so it closes nothing in an orderly way
    });
    for outcome in outcomes {
        assert!(matches!(outcome, Err(Error::ConnectionLost { .. })));
    }
    for _ in 0..100 {
        assert_eq!(next(&mut events).await, "given up");
    }
    let error = client.call_unary(far_daemon.peer_id(), "endless", "").await;
    assert!(matches!(error, Err(Error::Unreachable { .. })));

    // Restart at the same address.
    let _ = std::fs::remove_file(&socket);
    let daemon = bare_daemon()
        .control_maddr(control.clone())
        .spawn()
        .await
        .unwrap();
    client
        .connect(far_daemon.peer_id(), far_daemon.addrs())
        .await
        .unwrap();
    // The client reconnects without making a call itself.
    let again = async || Ok(far.call_unary(daemon.peer_id(), "echo", "again").await?);
    assert_eq!(eventually(again).await, "again");
    daemon.shutdown().await;
}

#[test]
fn client_can_be_used_on_one_runtime_after_another() {
    let first = Runtime::new().unwrap();
    let (pair, caller) = first.block_on(async {
        let pair = pair().await;
        pair.bob
            .add_unary_handler("lasting", false, echo)
            .await
            .unwrap();
        let caller = pair.alice.clone();
        let bob = pair.bob_daemon.peer_id();
        assert_eq!(
            caller.call_unary(bob, "lasting", "one").await.unwrap(),
            "one"
        );
        (pair, caller)
    });
    drop(first);
    Runtime::new().unwrap().block_on(async {
        let bob = pair.bob_daemon.peer_id();
        // The next use of each client reopens its connection and registers its handlers again.
        eventually(async || Ok(pair.bob.add_unary_handler("second", false, echo).await?)).await;
        let two = eventually(async || Ok(caller.call_unary(bob, "lasting", "two").await?)).await;
        assert_eq!(two, "two");
    });
}

// --- the fake daemon ---

/// A persistent connection of a client, from the daemon's side.
struct Persistent(Connection);

impl Persistent {
    async fn accept(daemon: &FakeDaemon) -> Self {
        let mut connection = daemon.accept().await;
        upgrade(&mut connection, ok()).await;
        Self(connection)
    }

    async fn message(&mut self) -> (Bytes, Message) {
        let message: p2pd::PersistentConnectionRequest = self.0.message().await;
        let id = message.call_id.unwrap();
        assert_eq!(id.len(), 16);
        (id, message.message.unwrap())
    }

    /// Reads the next message, which must be a call; returns its id and payload.
    async fn call(&mut self) -> (Bytes, Bytes) {
        match self.message().await {
            (id, Message::CallUnary(call)) => (id, call.data.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    /// Reads the next message, which must add a handler; returns its id and protocol.
    async fn addition(&mut self) -> (Bytes, String) {
        match self.message().await {
            (id, Message::AddUnaryHandler(add)) => (id, add.proto.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    /// Reads the next message, which must be the response to a call.
    async fn response(&mut self) -> (Bytes, Reply) {
        match self.message().await {
            (id, Message::UnaryResponse(response)) => (id, response.result.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    async fn answer(&mut self, id: &Bytes, message: impl Into<Option<Answer>>) {
        self.0.answer(answer(id, message.into())).await;
    }

    async fn reply(&mut self, id: &Bytes, data: impl Into<Bytes>) {
        self.answer(id, reply(data)).await;
    }

    /// Answers the next call with its payload.
    async fn echoes(&mut self) {
        let (id, data) = self.call().await;
        self.reply(&id, data).await;
    }
}

async fn upgrade(connection: &mut Connection, answer: p2pd::Response) {
    let request = connection.request().await;
    assert_eq!(request.r#type, Some(Type::PersistentConnUpgrade as i32));
    connection.answer(answer).await;
}

fn answer(id: &Bytes, message: Option<Answer>) -> p2pd::PersistentConnectionResponse {
    p2pd::PersistentConnectionResponse {
        call_id: Some(id.clone()),
        message,
    }
}

fn reply(data: impl Into<Bytes>) -> Answer {
    Answer::CallUnaryResponse(p2pd::CallUnaryResponse {
        result: Some(Reply::Response(data.into())),
    })
}

fn daemon_error(message: &str) -> Answer {
    Answer::DaemonError(p2pd::DaemonError {
        message: Some(message.to_owned().into()),
    })
}

/// A call of a peer.
fn incoming(protocol: &'static str, data: &'static str) -> Answer {
    Answer::RequestHandling(p2pd::CallUnaryRequest {
        peer: Some(peer().to_bytes()),
        proto: Some(protocol.into()),
        data: Some(data.into()),
    })
}

fn id(number: u8) -> Bytes {
    Bytes::from(vec![number; 16])
}

async fn call(client: &Client, payload: &'static str) -> Result<Bytes, Error> {
    client.call_unary(&peer(), "echo", payload).await
}

/// Returns a client with a handler for `name`, and its persistent connection.
async fn serving<F, R>(
    daemon: &FakeDaemon,
    name: &str,
    handler: impl Fn(UnaryCall) -> F + Send + Sync + 'static,
) -> (Client, Persistent)
where
    F: Future<Output = Result<R, String>> + Send + 'static,
    R: Into<Bytes>,
{
    serve(daemon.client(), daemon, name, handler).await
}

/// Like `serving`, for a given client.
async fn serve<F, R>(
    client: Client,
    daemon: &FakeDaemon,
    name: &str,
    handler: impl Fn(UnaryCall) -> F + Send + Sync + 'static,
) -> (Client, Persistent)
where
    F: Future<Output = Result<R, String>> + Send + 'static,
    R: Into<Bytes>,
{
    let (added, connection) = join!(client.add_unary_handler(name, true, handler), async {
        let mut connection = Persistent::accept(daemon).await;
        let (id, added) = connection.addition().await;
        assert_eq!(added, name);
        connection.answer(&id, None).await;
        connection
    });
    added.unwrap();
    (client, connection)
}

async fn assert_usable(client: &Client, connection: &mut Persistent) {
    let (reply, ()) = join!(call(client, "hello"), connection.echoes());
    assert_eq!(reply.unwrap(), "hello");
}

#[tokio::test]
async fn daemon_without_persistent_connections_is_not_supported() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, mut connection) = join!(call(&client, ""), async {
        let mut connection = daemon.accept().await;
        upgrade(&mut connection, refusal("ERR_INVALID_REQUEST_TYPE")).await;
        connection
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::NotSupported { .. }), "{error:?}");
    // Upstream's daemon closes the connection. As the daemon still runs, the request was the
    // reason.
    let (outcome, ()) = join!(call(&client, ""), async {
        connection.request().await;
        drop(connection);
        daemon.accept().await.identifies().await;
    });
    let error = outcome.unwrap_err();
    assert!(matches!(error, Error::NotSupported { .. }), "{error:?}");
    assert_eq!(error.context().unwrap().peer, Some(peer()));
}

#[tokio::test]
async fn upgrade_of_a_timed_out_call_is_used_by_the_next() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let hasty = client.with_timeout(SOON);
    let (outcome, mut connection) = join!(call(&hasty, ""), async {
        let mut connection = daemon.accept().await;
        connection.request().await;
        connection
    });
    assert!(matches!(outcome, Err(Error::Timeout { .. })));
    let (reply, _) = join!(call(&client, "hello"), async {
        connection.answer(ok()).await;
        let mut connection = Persistent(connection);
        connection.echoes().await;
        connection
    });
    assert_eq!(reply.unwrap(), "hello");
}

#[tokio::test]
async fn close_during_the_upgrade_fails_waiting_calls() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let adding = client.add_unary_handler("echo", false, |call| async {
        Ok::<_, String>(call.payload)
    });
    let (called, added, mut connection) = join!(call(&client, ""), adding, async {
        let mut connection = daemon.accept().await;
        connection.request().await;
        client.close().await;
        connection
    });
    assert!(connection.is_closed().await);
    for outcome in [called.map(drop), added] {
        let error = outcome.unwrap_err();
        assert!(
            error.to_string().contains("the client was closed"),
            "{error}"
        );
    }
    assert!(client.unary_handlers().is_empty());
    let (reply, _) = join!(call(&client, "hello"), async {
        let mut connection = Persistent::accept(&daemon).await;
        connection.echoes().await;
        connection
    });
    assert_eq!(reply.unwrap(), "hello");
}

#[tokio::test]
async fn concurrent_calls_share_a_connection_and_replies_may_come_in_any_order() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let texts: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    let calls = join_all(texts.iter().map(|text| {
        let (client, text) = (client.clone(), text.clone());
        async move { client.call_unary(&peer(), "echo", text).await }
    }));
    let (replies, _connection) = join!(calls, async {
        let mut connection = Persistent::accept(&daemon).await;
        let mut calls = Vec::new();
        for _ in 0..50 {
            calls.push(connection.call().await);
        }
        for (id, data) in calls.into_iter().rev() {
            connection.reply(&id, data).await;
        }
        connection
    });
    let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
    assert_eq!(replies, texts);
    daemon.nobody_connects();
}

#[tokio::test]
async fn replies_may_arrive_one_byte_or_many_messages_at_a_time() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (replies, ()) = join!(
        async {
            join!(
                call(&client, "one"),
                call(&client, "two"),
                call(&client, "three")
            )
        },
        async {
            let mut connection = Persistent::accept(&daemon).await;
            let mut calls = Vec::new();
            for _ in 0..3 {
                calls.push(connection.call().await);
            }
            let frame = |(id, data): &(Bytes, Bytes)| {
                let data = data.repeat(10_000);
                let message = answer(id, Some(reply(data)));
                p2pd_protocol::framing::encode_frame(&message)
            };
            let frames: Vec<_> = calls.iter().map(frame).collect();
            for byte in frames[0].chunks(1).take(200) {
                connection.0.send(byte).await;
                tokio::task::yield_now().await;
            }
            let rest = [&frames[0][200..], &frames[1], &frames[2]].concat();
            connection.0.send(&rest).await;
        }
    );
    let replies = <[_; 3]>::from(replies).map(Result::unwrap);
    assert_eq!(
        replies,
        ["one", "two", "three"].map(|text| text.repeat(10_000))
    );
}

#[tokio::test]
async fn dropped_call_sends_cancel_and_ignores_its_late_reply() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (mut connection, id) = select! {
        _ = call(&client, "") => panic!("it has ended"),
        called = async {
            let mut connection = Persistent::accept(&daemon).await;
            let (id, _) = connection.call().await;
            (connection, id)
        } => called,
    };
    let (cancelled, message) = connection.message().await;
    assert!(matches!(message, Message::Cancel(_)));
    assert_eq!(cancelled, id);
    connection.reply(&id, "late").await;
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn unsent_registration_is_sent_again_on_the_next_connection() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (opened, connection) = join!(client.open_unary(), Persistent::accept(&daemon));
    opened.unwrap();
    drop(connection); // the client does not notice before it writes
    let (added, _connection) = join!(client.add_unary_handler("served", false, echo), async {
        let mut connection = Persistent::accept(&daemon).await;
        let (id, _) = connection.addition().await;
        connection.answer(&id, None).await;
        connection
    });
    added.unwrap();
    assert_eq!(client.unary_handlers(), ["served"]);
}

#[tokio::test]
async fn lost_connection_fails_all_pending_calls_and_the_next_call_reconnects() {
    let daemon = FakeDaemon::new();
    let (client, mut connection) =
        serving(&daemon, "served", async |call: UnaryCall| Ok(call.payload)).await;
    let calls = join_all((0..10).map(|_| call(&client, "")));
    let (outcomes, ()) = join!(within("the end", calls), async {
        for _ in 0..10 {
            connection.call().await;
        }
        drop(connection);
    });
    for outcome in outcomes {
        let error = outcome.unwrap_err();
        assert!(matches!(&error, Error::ConnectionLost { .. }), "{error:?}");
        assert_eq!(error.context().unwrap().request, "CALL_UNARY");
    }
    // Its handlers are registered before the call is sent.
    let (reply, mut connection) = join!(call(&client, "hello"), async {
        let mut connection = Persistent::accept(&daemon).await;
        let (id, name) = connection.addition().await;
        assert_eq!(name, "served");
        connection.answer(&id, None).await;
        connection.echoes().await;
        connection
    });
    assert_eq!(reply.unwrap(), "hello");
    connection.answer(&id(1), incoming("served", "hi")).await;
    let (answered, reply) = connection.response().await;
    assert_eq!((answered, reply), (id(1), Reply::Response("hi".into())));
}

#[tokio::test]
async fn reconnect_retries_handlers_until_the_daemon_drops_the_old_connection() {
    let daemon = FakeDaemon::new();
    let (client, connection) =
        serving(&daemon, "served", async |call: UnaryCall| Ok(call.payload)).await;
    drop(connection);
    let (reply, _connection) = join!(
        eventually(async || Ok(call(&client, "hello").await?)),
        async {
            let mut connection = Persistent::accept(&daemon).await;
            for _ in 0..3 {
                let (id, _) = connection.addition().await;
                connection.answer(&id, daemon_error(ALREADY_SET)).await;
            }
            let (id, _) = connection.addition().await;
            connection.answer(&id, None).await;
            connection.echoes().await;
            connection
        }
    );
    assert_eq!(reply, "hello");
    assert_eq!(client.unary_handlers(), ["served"]);
}

#[tokio::test]
async fn reconnect_drops_a_handler_whose_protocol_another_client_took() {
    let daemon = FakeDaemon::new();
    let (client, connection) =
        serving(&daemon, "served", async |call: UnaryCall| Ok(call.payload)).await;
    drop(connection);
    let (reply, _connection) = join!(
        eventually(async || Ok(call(&client, "hello").await?)),
        async {
            let mut connection = Persistent::accept(&daemon).await;
            loop {
                match connection.message().await {
                    (id, Message::AddUnaryHandler(_)) => {
                        connection.answer(&id, daemon_error(ALREADY_SET)).await;
                    }
                    (id, Message::CallUnary(call)) => {
                        connection.reply(&id, call.data.unwrap()).await;
                        return connection;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    );
    assert_eq!(reply, "hello");
    assert_eq!(client.unary_handlers(), [""; 0]);
}

const ALREADY_SET: &str = "handler for protocol served already set";

#[tokio::test]
async fn invalid_reply_fails_pending_calls_and_closes_the_connection() {
    let invalid_replies: [&[u8]; 4] = [
        &[0xff; 11],                    // invalid length
        &[0xff, 0xff, 0xff, 0xff, 0xf], // length over the limit
        &[3, 0xff, 0xff, 0xff],         // malformed message
        &[0],                           // no call id
    ];
    for bytes in invalid_replies {
        let daemon = FakeDaemon::new();
        let client = daemon.client();
        let (outcome, mut connection) = join!(within("an end", call(&client, "")), async {
            let mut connection = Persistent::accept(&daemon).await;
            connection.call().await;
            connection.0.send(bytes).await;
            connection
        });
        let error = outcome.unwrap_err();
        assert!(
            matches!(error, Error::Protocol { .. }),
            "{bytes:?}: {error:?}"
        );
        assert!(connection.0.is_closed().await);
    }
}

#[tokio::test]
async fn replies_with_unknown_call_ids_are_ignored_and_an_empty_reply_fails_only_its_call() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcomes, mut connection) = join!(
        async { join!(call(&client, "one"), call(&client, "two")) },
        async {
            let mut connection = Persistent::accept(&daemon).await;
            // Both calls wait for the connection, which sends them in no particular order.
            let (mut one, call) = connection.call().await;
            let (mut two, _) = connection.call().await;
            if call == "two" {
                std::mem::swap(&mut one, &mut two);
            }
            connection.reply(&id(9), "to unknown").await;
            connection.answer(&id(8), daemon_error("to unknown")).await;
            connection
                .answer(&id(7), Answer::Cancel(p2pd::Cancel {}))
                .await;
            let nothing = p2pd::CallUnaryResponse { result: None };
            connection
                .answer(&one, Answer::CallUnaryResponse(nothing))
                .await;
            connection.reply(&two, "2").await;
            connection
        }
    );
    assert!(
        matches!(outcomes.0, Err(Error::Protocol { .. })),
        "{outcomes:?}"
    );
    assert_eq!(outcomes.1.unwrap(), "2");
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn daemon_error_is_a_refusal_with_its_message() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (outcome, _) = join!(call(&client, ""), async {
        let mut connection = Persistent::accept(&daemon).await;
        let (id, _) = connection.call().await;
        connection.answer(&id, daemon_error("failed to dial")).await;
        connection
    });
    let error = outcome.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the daemon refused: failed to dial (request CALL_UNARY, peer {}, protocol echo)",
            peer()
        )
    );
}

#[tokio::test]
async fn call_without_a_handler_is_answered_with_an_error() {
    let daemon = FakeDaemon::new();
    let (client, mut connection) =
        serving(&daemon, "served", async |call: UnaryCall| Ok(call.payload)).await;
    connection.answer(&id(1), incoming("unserved", "")).await;
    let (answered, reply) = connection.response().await;
    let message = "no handler for the protocol \"unserved\"";
    assert_eq!((answered, reply), (id(1), Reply::Error(message.into())));
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn cancelled_handler_is_dropped_and_sends_nothing() {
    let daemon = FakeDaemon::new();
    let (handler, mut events) = endless();
    let (client, mut connection) = serving(&daemon, "endless", handler).await;
    connection.answer(&id(1), incoming("endless", "")).await;
    assert_eq!(next(&mut events).await, "begun");
    connection
        .answer(&id(1), Answer::Cancel(p2pd::Cancel {}))
        .await;
    assert_eq!(next(&mut events).await, "given up");
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn running_handlers_are_dropped_with_the_connection_or_the_client() {
    for by_daemon in [true, false] {
        let daemon = FakeDaemon::new();
        let (handler, mut events) = endless();
        let (client, mut connection) = serving(&daemon, "endless", handler).await;
        connection.answer(&id(1), incoming("endless", "")).await;
        assert_eq!(next(&mut events).await, "begun");
        if by_daemon {
            drop(connection);
            assert_eq!(next(&mut events).await, "given up");
        } else {
            drop(client);
            assert_eq!(next(&mut events).await, "given up");
            let (answered, reply) = connection.response().await;
            let message = "the handler's client was closed";
            assert_eq!((answered, reply), (id(1), Reply::Error(message.into())));
            connection.0.ended().await;
        }
    }
}

#[tokio::test]
async fn dropped_registration_is_undone_and_the_protocol_is_free() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let (mut connection, added) = select! {
        _ = client.add_unary_handler("served", false, echo) => panic!("it has ended"),
        asked = async {
            let mut connection = Persistent::accept(&daemon).await;
            let (id, _) = connection.addition().await;
            (connection, id)
        } => asked,
    };
    connection.answer(&added, None).await;
    let (removed, message) = connection.message().await;
    assert!(
        matches!(message, Message::RemoveUnaryHandler(_)),
        "{message:?}"
    );
    connection.answer(&removed, None).await;
    let (added, ()) = join!(client.add_unary_handler("served", false, echo), async {
        let (id, _) = connection.addition().await;
        connection.answer(&id, None).await;
    });
    added.unwrap();
}

#[tokio::test]
async fn request_over_the_limit_is_not_sent() {
    let daemon = FakeDaemon::new();
    let limits = UnaryLimits::default().with_max_message(1000);
    let client = Client::builder(daemon.control())
        .unary_limits(limits)
        .build();
    let client = client.unwrap();
    let callee = peer();
    let (outcome, mut connection) = join!(
        client.call_unary(&callee, "echo", vec![0; 1000]),
        Persistent::accept(&daemon)
    );
    assert!(matches!(
        outcome,
        Err(Error::MessageTooLarge { limit: 1000, .. })
    ));
    assert_usable(&client, &mut connection).await;
}

/// Returns a client with these limits.
fn limited(daemon: &FakeDaemon, limits: UnaryLimits) -> Client {
    let builder = Client::builder(daemon.control()).unary_limits(limits);
    builder.build().unwrap()
}

#[tokio::test]
async fn reply_over_the_limit_fails_only_its_call() {
    let large = Bytes::from(vec![7; 300_000]);
    let handler_error = Answer::CallUnaryResponse(p2pd::CallUnaryResponse {
        result: Some(Reply::Error(large.clone())),
    });
    let refusal = Answer::DaemonError(p2pd::DaemonError {
        message: Some(large.clone()),
    });
    for oversized in [reply(large), handler_error, refusal] {
        let daemon = FakeDaemon::new();
        let limits = UnaryLimits::default().with_max_incoming(1000);
        let client = limited(&daemon, limits);
        let (failed, replied, mut connection) =
            join!(call(&client, "first"), call(&client, "second"), async {
                let mut connection = Persistent::accept(&daemon).await;
                for _ in 0..2 {
                    let (id, data) = connection.call().await;
                    if data == "first" {
                        connection.answer(&id, oversized.clone()).await;
                    } else {
                        connection.reply(&id, data).await;
                    }
                }
                connection
            });
        assert_eq!(replied.unwrap(), "second");
        let error = failed.unwrap_err();
        let Error::MessageTooLarge {
            size,
            limit,
            received,
            ..
        } = error
        else {
            panic!("{error:?}")
        };
        assert!(size > 300_000 && limit == 1000 && received);
        assert_eq!(error.context().unwrap().request, "CALL_UNARY");
        assert_usable(&client, &mut connection).await;
        daemon.nobody_connects();
    }
}

#[tokio::test]
async fn call_over_the_limit_is_answered_with_its_size_and_the_limit() {
    let daemon = FakeDaemon::new();
    let limits = UnaryLimits::default().with_max_incoming(1000);
    let client = limited(&daemon, limits);
    let (client, mut connection) = serve(client, &daemon, "served", async |call: UnaryCall| {
        Ok(call.payload)
    })
    .await;
    let oversized = Answer::RequestHandling(p2pd::CallUnaryRequest {
        peer: Some(peer().to_bytes()),
        proto: Some("served".into()),
        data: Some(vec![0; 300_000].into()),
    });
    connection.answer(&id(1), oversized).await;
    connection.answer(&id(2), incoming("served", "ping")).await;
    let (refused, message) = connection.response().await;
    let Reply::Error(message) = message else {
        panic!("{message:?}")
    };
    let message = String::from_utf8(message.to_vec()).unwrap();
    assert_eq!(refused, id(1));
    assert!(
        message.contains("the call of 300") && message.contains("limit of 1000"),
        "{message}"
    );
    assert_eq!(
        connection.response().await,
        (id(2), Reply::Response("ping".into()))
    );
    assert_usable(&client, &mut connection).await;
}

#[tokio::test]
async fn message_over_the_limit_without_a_call_id_is_skipped() {
    let daemon = FakeDaemon::new();
    let limits = UnaryLimits::default().with_max_incoming(1000);
    let client = limited(&daemon, limits);
    let (replied, mut connection) = join!(call(&client, "hello"), async {
        let mut connection = Persistent::accept(&daemon).await;
        let (id, data) = connection.call().await;
        let mut junk = vec![0x80, 0x80, 0x04]; // 64 KiB of junk
        junk.resize(junk.len() + (64 << 10), 0xff);
        connection.0.send(&junk).await;
        connection.reply(&id, data).await;
        connection
    });
    assert_eq!(replied.unwrap(), "hello");
    assert_usable(&client, &mut connection).await;
}

/// Makes sixty calls of 2 MiB to a client with these limits. Returns how many are answered with an
/// error while all others are running.
async fn refused_of_sixty(limits: UnaryLimits) -> usize {
    let daemon = FakeDaemon::new();
    let client = limited(&daemon, limits);
    let (release, released) = tokio::sync::watch::channel(false);
    let entered = Arc::new(AtomicUsize::new(0));
    let counted = entered.clone();
    let handler = move |_: UnaryCall| {
        counted.fetch_add(1, Ordering::SeqCst);
        let mut released = released.clone();
        async move {
            released.wait_for(|released| *released).await.unwrap();
            Ok::<_, String>("done")
        }
    };
    let (_client, mut connection) = serve(client, &daemon, "served", handler).await;
    for number in 0..60 {
        let call = Answer::RequestHandling(p2pd::CallUnaryRequest {
            peer: Some(peer().to_bytes()),
            proto: Some("served".into()),
            data: Some(vec![0; 2 << 20].into()),
        });
        connection.answer(&id(number), call).await;
    }
    let mut refused = 0;
    while refused + entered.load(Ordering::SeqCst) < 60 {
        select! {
            biased;
            (_, answer) = connection.response() => {
                assert!(matches!(answer, Reply::Error(_)), "{answer:?}");
                refused += 1;
            }
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    release.send(true).unwrap();
    for _ in refused..60 {
        let (_, answer) = connection.response().await;
        assert_eq!(answer, Reply::Response("done".into()));
    }
    refused
}

#[tokio::test]
async fn without_bounds_all_calls_run_at_once() {
    let limits = UnaryLimits::default()
        .with_max_unanswered(usize::MAX)
        .with_max_unanswered_bytes(usize::MAX);
    assert_eq!(refused_of_sixty(limits).await, 0);
}

#[tokio::test]
async fn calls_over_the_bound_are_refused_after_the_hold() {
    let limits = UnaryLimits::default().with_hold(Duration::ZERO);
    // 32 calls fill the bound of 64 MiB.
    assert_eq!(refused_of_sixty(limits).await, 28);
}

#[tokio::test]
async fn daemon_that_dies_without_reading_fails_all_calls() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let calls: Vec<_> = (0..64)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.call_unary(&peer(), "echo", vec![0; 1 << 20]).await })
        })
        .collect();
    let connection = Persistent::accept(&daemon).await;
    connection.0.readable().await;
    drop((daemon, connection));
    for call in calls {
        let error = within("the end", call).await.unwrap().unwrap_err();
        // Calls that had not been sent have tried a new connection.
        assert!(
            matches!(
                error,
                Error::ConnectionLost { .. } | Error::Unreachable { .. }
            ),
            "{error:?}"
        );
    }
}

// --- futures dropped, and connections ended, at awkward times ---

#[tokio::test]
async fn dropping_the_first_call_does_not_end_hiveminds_daemon() {
    let _limit = Limit::new();
    let daemon = bare_daemon().spawn().await.unwrap();
    let client = daemon.client().await.unwrap();
    // Drops the call at various points of the upgrade.
    for polls in 1..20 {
        let mut calling = Box::pin(client.call_unary(daemon.peer_id(), "unknown", ""));
        for _ in 0..polls {
            select! {
                biased;
                _ = &mut calling => break,
                () = tokio::task::yield_now() => {}
            }
        }
    }
    client.open_unary().await.unwrap();
    assert_eq!(client.identify().await.unwrap().peer_id, *daemon.peer_id());
    let refused = client.call_unary(daemon.peer_id(), "unknown", "").await;
    assert!(refused.is_err());
    assert_eq!(client.identify().await.unwrap().peer_id, *daemon.peer_id());
}

#[tokio::test]
async fn registration_dropped_after_its_reply_arrived_is_undone() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut adding = Box::pin(client.add_unary_handler("served", false, echo));
    let mut connection = select! {
        _ = &mut adding => panic!("it has ended"),
        connection = async {
            let mut connection = Persistent::accept(&daemon).await;
            let (id, _) = connection.addition().await;
            connection.answer(&id, None).await;
            connection
        } => connection,
    };
    // The future has not been polled since the reply.
    until_eq(|| client.unary_handlers(), &["served".to_owned()]).await;
    drop(adding);
    let (removed, message) = connection.message().await;
    assert!(matches!(message, Message::RemoveUnaryHandler(_)));
    connection.answer(&removed, None).await;
    until_eq(|| client.unary_handlers(), &[]).await;
}

async fn echo_or_words(call: UnaryCall) -> Result<Bytes, String> {
    Ok(call.payload)
}

async fn until_eq(value: impl Fn() -> Vec<String>, expected: &[String]) {
    eventually(async || must(value() == expected, "it is another")).await;
}

#[tokio::test]
async fn reply_received_before_the_connection_was_lost_is_delivered() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut first = Box::pin(call(&client, "one"));
    let (mut connection, id) = select! {
        _ = &mut first => panic!("it has ended"),
        called = async {
            let mut connection = Persistent::accept(&daemon).await;
            let (id, _) = connection.call().await;
            (connection, id)
        } => called,
    };
    // Reply and EOF arrive while the client is not polled, and its next action is a write.
    let reply = answer(&id, Some(reply("1")));
    connection.0.push(&framing::encode_frame(&reply));
    drop(connection);
    let (second, ()) = join!(async { join!(call(&client, "two"), first) }, async {
        let mut connection = Persistent::accept(&daemon).await;
        connection.echoes().await;
    });
    assert_eq!(second.1.unwrap(), "1");
    assert_eq!(second.0.unwrap(), "two");
}

#[tokio::test]
async fn replies_of_a_batch_are_sent_even_if_the_last_client_is_dropped() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let held = Arc::new(std::sync::Mutex::new(None));
    let (dropping, served) = (held.clone(), Arc::new(AtomicUsize::new(0)));
    let handler = move |call: UnaryCall| {
        let (dropping, served) = (dropping.clone(), served.clone());
        async move {
            if served.fetch_add(1, Ordering::Relaxed) == 1 {
                let client: Option<Client> = dropping.lock().unwrap().take();
                // Runs after this batch's replies are queued, and before they are sent.
                tokio::spawn(async move { drop(client) });
            }
            Ok::<_, Infallible>(call.payload)
        }
    };
    let (added, mut connection) = join!(client.add_unary_handler("echo", false, handler), async {
        let mut connection = Persistent::accept(&daemon).await;
        let (id, _) = connection.addition().await;
        connection.answer(&id, None).await;
        connection
    });
    added.unwrap();
    *held.lock().unwrap() = Some(client);
    let calls =
        [1, 2].map(|n| framing::encode_frame(&answer(&id(n), Some(incoming("echo", "hi")))));
    connection.0.push(&calls.concat());
    for _ in 0..2 {
        let (_, reply) = connection.response().await;
        assert_eq!(reply, Reply::Response("hi".into()));
    }
    connection.0.ended().await;
}

#[tokio::test]
async fn dropped_close_still_closes() {
    let daemon = FakeDaemon::new();
    let client = daemon.client();
    let mut calling = Box::pin(call(&client, "one"));
    let connection = select! {
        _ = &mut calling => panic!("it has ended"),
        connection = async {
            let mut connection = Persistent::accept(&daemon).await;
            connection.call().await;
            connection
        } => connection,
    };
    // More than the socket takes is queued, so that close has to wait.
    let large = vec![0; 3 << 20];
    let id = peer();
    let mut sending = Box::pin(client.call_unary(&id, "echo", large));
    begin(&mut sending).await;
    let mut closing = Box::pin(client.close());
    begin(&mut closing).await;
    drop(closing);
    for outcome in [
        within("the first", calling).await,
        within("the second", sending).await,
    ] {
        assert!(
            matches!(outcome, Err(Error::ConnectionLost { .. })),
            "{outcome:?}"
        );
    }
    drop(connection);
}

#[tokio::test]
async fn serving_client_reports_a_lost_connection_and_reconnects_by_itself() {
    let daemon = FakeDaemon::new();
    let (client, connection) = serving(&daemon, "echo", echo_or_words).await;
    let (lost, ()) = join!(client.unary_lost(), async { drop(connection) });
    assert!(
        matches!(lost, Some(Error::ConnectionLost { .. })),
        "{lost:?}"
    );
    let mut connection = within("the next", Persistent::accept(&daemon)).await;
    let (id, name) = connection.addition().await;
    assert_eq!(name, "echo");
    connection.answer(&id, None).await;
    client.open_unary().await.unwrap();
    client.close().await;
    assert!(client.unary_lost().await.is_none());
}
