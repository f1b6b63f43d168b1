//! A node and hivemind's real p2pd, named by P2PD_PATH.
#![cfg(unix)]

use bytes::Bytes;
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::identity::Keypair;
use p2pd_client::{Client, UnaryCall};
use p2pd_manager::P2PDaemon;
use p2pd_node::{Config, Node, NodeHandle, Security, UnaryEvent};
use p2pd_protocol::Multiaddr;
use p2pd_test_support::{
    bare_daemon, echo_streams, echoed, endless, eventually, must, pattern, within, Limit,
};
use std::convert::Infallible;
use std::future::Future;
use std::time::{Duration, Instant};
use tokio::net::UnixListener;

const SOON: Duration = Duration::from_millis(50);

/// A node and a Go daemon that are connected.
struct Pair {
    node: NodeHandle,
    go: Client,
    daemon: P2PDaemon,
    _limit: Limit,
}

async fn node(security: &[Security], keypair: Keypair) -> NodeHandle {
    let mut config = Config::new(keypair);
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    config.security = security.to_vec();
    Node::start(config).await.unwrap()
}

/// Either side dials the other.
async fn pair_with(security: &[Security], keypair: Keypair, go_dials: bool) -> Pair {
    let limit = Limit::new();
    let node = node(security, keypair).await;
    let daemon = bare_daemon()
        .host_addrs(["/ip4/127.0.0.1/tcp/0".parse().unwrap()])
        .spawn()
        .await
        .unwrap();
    let go = daemon.client().await.unwrap();
    go.open_unary().await.unwrap();
    let own = node.identify();
    if go_dials {
        within("Go's dial", go.connect(&own.peer_id, &own.addrs))
            .await
            .unwrap();
    } else {
        within("the dial", node.connect(daemon.peer_id(), daemon.addrs()))
            .await
            .unwrap();
    }
    Pair {
        node,
        go,
        daemon,
        _limit: limit,
    }
}

async fn pair() -> Pair {
    pair_with(
        &[Security::Tls, Security::Noise],
        Keypair::generate_ed25519(),
        false,
    )
    .await
}

/// Serves a protocol of the node by echoing its streams at a unix socket.
fn echo_at(node: &NodeHandle, protocol: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("handler.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let addr: Multiaddr = format!("/unix{}", path.display()).parse().unwrap();
    node.add_stream_handler(protocol, &addr, false).unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut reader, mut writer) = socket.into_split();
                use tokio::io::AsyncReadExt as _;
                let length = reader.read_u8().await.unwrap();
                reader
                    .read_exact(&mut vec![0; length.into()])
                    .await
                    .unwrap();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    });
    dir
}

/// Serves a protocol of the node by echoing the payloads of its calls.
fn echo_calls(node: &NodeHandle, protocol: &str) {
    let mut client = node.register_unary_client();
    client.add_handler(protocol, false).unwrap();
    tokio::spawn(async move {
        while let Some(event) = client.next_event().await {
            match event {
                UnaryEvent::Call(call) if call.payload == "fail" => {
                    call.responder.fail("as you wish".to_owned());
                }
                UnaryEvent::Call(call) => call.responder.reply(call.payload),
                UnaryEvent::Cancelled(_) => {}
            }
        }
    });
}

async fn try_streams_and_calls(pair: &Pair) {
    let go_id = pair.daemon.peer_id();
    let node_id = pair.node.peer_id();

    let _handler = echo_at(&pair.node, "node.echo");
    let data = pattern(1 << 20, 1);
    assert!(echoed(&pair.go, &node_id, "node.echo", &data).await == data);

    let incoming = pair.go.stream_handler("go.echo", false).await.unwrap();
    tokio::spawn(echo_streams(incoming));
    let opened = pair.node.open_stream(go_id, vec!["go.echo".to_owned()]);
    let opened = within("the stream", opened).await.unwrap();
    assert_eq!(opened.info.protocol, "go.echo");
    let (mut reader, mut writer) = opened.stream.split();
    let mut received = vec![0; data.len()];
    let (read, written) = tokio::join!(
        within("the echo", reader.read_exact(&mut received)),
        async {
            writer.write_all(&data).await?;
            writer.flush().await
        }
    );
    read.unwrap();
    written.unwrap();
    assert!(received == data);

    echo_calls(&pair.node, "node.call");
    let echo = |call: UnaryCall| async { Ok::<_, Infallible>(call.payload) };
    pair.go
        .add_unary_handler("go.call", false, echo)
        .await
        .unwrap();
    for size in [0, 1, 1000, 16_384, 1 << 20, 3 << 20] {
        let payload = Bytes::from(pattern(size, size));
        let reply = pair
            .go
            .call_unary(&node_id, "node.call", payload.clone())
            .await;
        assert!(reply.unwrap() == payload, "{size}");
        let reply = within("a reply", pair.node.call(go_id, "go.call", payload.clone())).await;
        assert!(reply.unwrap().unwrap() == payload, "{size}");
    }
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    within("it", future).await
}

#[tokio::test]
async fn streams_and_calls_pass_in_both_directions_over_tls() {
    let pair = pair_with(&[Security::Tls], Keypair::generate_ed25519(), false).await;
    try_streams_and_calls(&pair).await;
}

#[tokio::test]
async fn streams_and_calls_pass_in_both_directions_over_noise_when_go_dials() {
    let pair = pair_with(&[Security::Noise], Keypair::generate_ed25519(), true).await;
    try_streams_and_calls(&pair).await;
}

#[tokio::test]
async fn secp256k1_and_ecdsa_identities_connect() {
    for keypair in [Keypair::generate_secp256k1(), Keypair::generate_ecdsa()] {
        let pair = pair_with(&[Security::Tls, Security::Noise], keypair, true).await;
        let peers = pair.go.list_peers().await.unwrap();
        assert_eq!(peers.len(), 1);
        assert_eq!(peers[0].peer_id, pair.node.peer_id());
    }
}

#[tokio::test]
async fn addresses_that_identify_told_are_dialed_again() {
    let pair = pair().await;
    let (go, node) = (pair.daemon.peer_id(), pair.node.peer_id());
    soon(pair.node.disconnect(go)).await.unwrap();
    soon(pair.node.connect(go, &[])).await.unwrap();
    soon(pair.node.disconnect(go)).await.unwrap();
    eventually(async || {
        let peers = pair.go.list_peers().await?;
        must(peers.is_empty(), "still connected")
    })
    .await;
    // Go has the node's addresses from its signed record.
    soon(pair.go.connect(&node, &[])).await.unwrap();
}

#[tokio::test]
async fn go_opens_lazily_what_the_node_has_pushed() {
    let pair = pair().await;
    let node = pair.node.peer_id();
    let mut names: Vec<String> = Vec::new();
    // Opening succeeds without a reply only if Go knows the name; the handler's socket is gone. Go forgets a
    // push that overtakes the reply to its own identify request, so that later names are pushed too.
    let mut stream = eventually(async || {
        if names.len() < 10 {
            let name = format!("pushed {}", names.len());
            drop(echo_at(&pair.node, &name));
            names.push(name);
        }
        for name in &names {
            if let Ok(stream) = pair.go.stream_open(&node, [name]).await {
                return Ok(stream);
            }
        }
        Err("Go knows none of the names".into())
    })
    .await;
    use tokio::io::AsyncReadExt as _;
    let read = soon(stream.read(&mut [0; 9])).await;
    assert!(matches!(read, Ok(0) | Err(_)));
}

#[tokio::test]
async fn errors_pass_in_both_directions() {
    let pair = pair().await;
    let (go, node) = (pair.daemon.peer_id(), pair.node.peer_id());
    echo_calls(&pair.node, "node.fails");
    let error = pair.go.call_unary(&node, "node.fails", "fail").await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("as you wish"), "{error}");
    let fail = |_: UnaryCall| async { Err::<Bytes, _>("as I wish") };
    pair.go
        .add_unary_handler("go.fails", false, fail)
        .await
        .unwrap();
    let error = soon(pair.node.call(go, "go.fails", Bytes::new())).await;
    assert_eq!(error.unwrap().unwrap_err().0, "as I wish");

    let error = pair.go.call_unary(&node, "nothing", "").await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("protocols not supported"), "{error}");
    let error = soon(pair.node.call(go, "nothing", Bytes::new())).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("protocols not supported: [nothing]"),
        "{error}"
    );
    let error = soon(pair.node.open_stream(go, vec!["nothing".to_owned()])).await;
    let error = error.err().unwrap().to_string();
    assert!(
        error.contains("protocols not supported: [nothing]"),
        "{error}"
    );
}

#[tokio::test]
async fn cancelled_calls_are_seen_by_the_handler() {
    let pair = pair().await;
    let (go, node) = (pair.daemon.peer_id(), pair.node.peer_id());
    let (handler, mut events) = endless();
    pair.go
        .add_unary_handler("go.slow", false, handler)
        .await
        .unwrap();
    let mut soonest = Duration::MAX; // of several, since other processes can delay one
    for _ in 0..5 {
        tokio::select! {
            reply = pair.node.call(go, "go.slow", Bytes::new()) => panic!("{reply:?}"),
            event = events.recv() => assert_eq!(event, Some("begun")),
        }
        let dropped = Instant::now();
        assert_eq!(soon(events.recv()).await, Some("given up"));
        soonest = soonest.min(dropped.elapsed());
    }
    assert!(soonest < SOON, "{soonest:?}");

    let mut client = pair.node.register_unary_client();
    client.add_handler("node.slow", false).unwrap();
    let mut soonest = Duration::MAX;
    for _ in 0..5 {
        let call = tokio::select! {
            reply = pair.go.call_unary(&node, "node.slow", "") => panic!("{reply:?}"),
            event = client.next_event() => match event {
                Some(UnaryEvent::Call(call)) => call,
                other => panic!("{other:?}"),
            },
        };
        let dropped = Instant::now();
        match soon(client.next_event()).await {
            Some(UnaryEvent::Cancelled(number)) => assert_eq!(number, call.number),
            other => panic!("{other:?}"),
        }
        soonest = soonest.min(dropped.elapsed());
    }
    // Go passes the cancel on itself.
    assert!(soonest < 2 * SOON, "{soonest:?}");
}

#[tokio::test]
async fn wrong_peer_is_refused_in_both_directions() {
    let pair = pair().await;
    let stranger = p2pd_protocol::PeerId::from_bytes(
        Keypair::generate_ed25519().public().to_peer_id().to_bytes(),
    );
    let error = soon(pair.go.connect(&stranger, &pair.node.identify().addrs)).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("peer id mismatch"), "{error}");
    let error = soon(pair.node.connect(&stranger, pair.daemon.addrs())).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("peer id mismatch"), "{error}");
}
