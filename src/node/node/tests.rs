//! Two nodes in one process.

use super::*;
use crate::error::NodeError;
use crate::handle::{PeerStream, UnaryClient, UnaryEvent};
use bytes::Bytes;
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::identity::Keypair;
use p2pd_protocol::command::streams::decode_stream_info;
use p2pd_protocol::{FrameDecoder, PeerId, StreamInfo};
use std::future::Future;
use std::time::Instant;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);
const SOON: Duration = Duration::from_millis(50);

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("in time")
}

async fn until(condition: impl Fn() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

fn config() -> Config {
    let mut config = Config::new(Keypair::generate_ed25519());
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    config
}

async fn node() -> NodeHandle {
    Node::start(config()).await.unwrap()
}

async fn connect(from: &NodeHandle, to: &NodeHandle) {
    let to = to.identify();
    within(from.connect(&to.peer_id, &to.addrs)).await.unwrap();
}

async fn pair() -> (NodeHandle, NodeHandle) {
    let (alice, bob) = (node().await, node().await);
    connect(&alice, &bob).await;
    (alice, bob)
}

/// The protocols of a peer that a node knows.
fn known(node: &NodeHandle, peer: &NodeHandle) -> Vec<String> {
    let connection = node.0.host.newest(&peer.0.host.local());
    connection.map_or(Vec::new(), |it| it.peer_protocols().to_vec())
}

fn knows(node: &NodeHandle, peer: &NodeHandle, protocol: &str) -> bool {
    known(node, peer).iter().any(|name| name == protocol)
}

/// A listener for the streams of a handler, at a unix socket.
struct Handler {
    addr: p2pd_protocol::Multiaddr,
    listener: UnixListener,
    _dir: tempfile::TempDir,
}

impl Handler {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handler.sock");
        Self {
            addr: format!("/unix{}", path.display()).parse().unwrap(),
            listener: UnixListener::bind(&path).unwrap(),
            _dir: dir,
        }
    }

    /// Accepts a stream and reads its header.
    async fn accept(&self) -> (StreamInfo, UnixStream) {
        let (mut socket, _) = within(self.listener.accept()).await.unwrap();
        let mut decoder = FrameDecoder::new(1000);
        let header = loop {
            if let Some(frame) = decoder.next_frame().unwrap() {
                break decode_stream_info(&frame).unwrap();
            }
            decoder.extend(&[within(socket.read_u8()).await.unwrap()]);
        };
        (header, socket)
    }
}

async fn open(from: &NodeHandle, to: &PeerId, name: &str) -> Result<PeerStream, NodeError> {
    within(from.open_stream(to, vec![name.to_owned()])).await
}

async fn next_call(client: &mut UnaryClient) -> crate::handle::IncomingCall {
    match within(client.next_event()).await {
        Some(UnaryEvent::Call(call)) => call,
        other => panic!("{other:?}"),
    }
}

/// A client that replies to each call with its name.
fn named(node: &NodeHandle, protocol: &str, name: &'static str) {
    let mut client = node.register_unary_client();
    client.add_handler(protocol, true).unwrap();
    tokio::spawn(async move {
        while let Some(UnaryEvent::Call(call)) = client.next_event().await {
            call.responder.reply(Bytes::from_static(name.as_bytes()));
        }
    });
}

// --- connections ---

#[tokio::test]
async fn connects_once_and_disconnects() {
    let (alice, bob) = pair().await;
    connect(&alice, &bob).await;
    let peers = alice.list_peers();
    assert_eq!(peers.len(), 1);
    assert_eq!(peers[0].peer_id, bob.peer_id());
    assert_eq!(peers[0].addrs, bob.identify().addrs);
    until(|| bob.list_peers().len() == 1).await;
    assert_eq!(bob.list_peers()[0].peer_id, alice.peer_id());

    within(alice.disconnect(&bob.peer_id())).await.unwrap();
    assert!(alice.list_peers().is_empty());
    until(|| bob.list_peers().is_empty()).await;
    within(alice.disconnect(&bob.peer_id())).await.unwrap();
    // Identify told the addresses.
    within(alice.connect(&bob.peer_id(), &[])).await.unwrap();
    within(bob.disconnect(&alice.peer_id())).await.unwrap();
    within(bob.connect(&alice.peer_id(), &[])).await.unwrap();
}

#[tokio::test]
async fn failed_dials_have_the_messages_of_go() {
    let (alice, bob) = (node().await, node().await);
    let carol = Keypair::generate_ed25519().public().to_peer_id();
    let peer = PeerId::from_bytes(carol.to_bytes());
    let failure = async |addrs: &[_]| within(alice.connect(&peer, addrs)).await.unwrap_err();
    assert_eq!(
        failure(&[]).await.to_string(),
        format!("failed to dial: failed to dial {carol}: no addresses")
    );
    let refused = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    assert_eq!(
        failure(&[refused]).await.to_string(),
        format!("failed to dial: failed to dial {carol}: all dials failed\n  * [/ip4/127.0.0.1/tcp/1] dial tcp4 127.0.0.1:1: connect: connection refused")
    );
    let words = failure(&bob.identify().addrs).await.to_string();
    let mismatch = format!(
        "peer id mismatch: expected {carol}, but remote key matches {}",
        bob.peer_id()
    );
    assert!(words.contains(&mismatch), "{words}");
    assert!(words.contains("all dials failed"), "{words}");
    assert!(alice.list_peers().is_empty());

    let own = alice.identify();
    let error = within(alice.connect(&own.peer_id, &own.addrs)).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "failed to dial: dial to self attempted"
    );
    let cut_off = PeerId::from_bytes(&[0x12, 32, 1][..]);
    let error = within(alice.connect(&cut_off, &[])).await.unwrap_err();
    assert!(error.to_string().contains("buffer"), "{error}");
}

#[tokio::test]
async fn unsupported_addresses_are_no_good() {
    let alice = node().await;
    let carol = Keypair::generate_ed25519().public().to_peer_id();
    let addr = "/ip4/127.0.0.1/udp/1/quic".parse().unwrap();
    let peer = PeerId::from_bytes(carol.to_bytes());
    let error = within(alice.connect(&peer, &[addr])).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("failed to dial: failed to dial {carol}: no good addresses\n  * [/ip4/127.0.0.1/udp/1/quic] no transport for protocol")
    );
}

#[tokio::test]
async fn one_good_address_among_bad_ones_is_enough() {
    let (alice, bob, carol) = (node().await, node().await, node().await);
    let mut addrs = carol.identify().addrs;
    addrs.push("/ip4/127.0.0.1/tcp/1".parse().unwrap());
    addrs.push("/ip4/127.0.0.1/udp/1/quic".parse().unwrap());
    addrs.extend(bob.identify().addrs);
    within(alice.connect(&bob.peer_id(), &addrs)).await.unwrap();
    assert_eq!(alice.list_peers().len(), 1);
}

#[tokio::test]
async fn both_sides_can_dial_at_once() {
    for _ in 0..20 {
        let (alice, bob) = (node().await, node().await);
        tokio::join!(connect(&alice, &bob), connect(&bob, &alice));
        assert!(!alice.list_peers().is_empty());
        assert!(!bob.list_peers().is_empty());
        alice.shutdown().await;
        bob.shutdown().await;
    }
}

#[tokio::test]
async fn concurrent_requests_share_a_dial() {
    let (alice, bob) = (node().await, node().await);
    let connects = (0..20).map(|_| connect(&alice, &bob));
    futures::future::join_all(connects).await;
    assert_eq!(alice.list_peers().len(), 1);
}

#[tokio::test]
async fn listens_if_one_of_the_addresses_works() {
    let mut some = config();
    some.listen.push("/ip4/192.0.2.1/tcp/0".parse().unwrap());
    let node = Node::start(some).await.unwrap();
    assert_eq!(node.identify().addrs.len(), 1);
    let mut none = config();
    none.listen = vec!["/ip4/192.0.2.1/tcp/0".parse().unwrap()];
    let error = Node::start(none).await.err().unwrap().to_string();
    assert!(
        error.starts_with("failed to listen on any addresses: [listen tcp4 192.0.2.1:0: bind: "),
        "{error}"
    );
}

#[tokio::test]
async fn wildcard_listen_address_is_expanded() {
    let mut config = config();
    config.listen = vec!["/ip4/0.0.0.0/tcp/0".parse().unwrap()];
    let node = Node::start(config).await.unwrap();
    let addrs = node.identify().addrs;
    let texts: Vec<_> = addrs.iter().map(ToString::to_string).collect();
    assert!(
        texts
            .iter()
            .any(|addr| addr.starts_with("/ip4/127.0.0.1/tcp/")),
        "{texts:?}"
    );
    assert!(
        !texts.iter().any(|addr| addr.contains("0.0.0.0")),
        "{texts:?}"
    );
}

#[tokio::test]
async fn announced_addresses_replace_the_real_ones() {
    let announced: Multiaddr = "/ip4/192.0.2.7/tcp/4001".parse().unwrap();
    let mut config = config();
    config.announce = vec![announced.clone()];
    let alice = Node::start(config).await.unwrap();
    assert_eq!(alice.identify().addrs.len(), 1);
    assert_eq!(alice.identify().addrs[0].as_bytes(), announced.as_ref());
    let bob = node().await;
    connect(&alice, &bob).await;
    until(|| bob.0.book.get(&alice.0.host.local()) == [announced.clone()]).await;
}

#[tokio::test]
async fn node_stops_when_it_is_shut_down() {
    let (alice, bob) = pair().await;
    let mut client = alice.register_unary_client();
    until(|| !bob.list_peers().is_empty()).await;
    within(alice.clone().shutdown()).await;
    assert!(within(client.next_event()).await.is_none());
    until(|| bob.list_peers().is_empty()).await;
    let error = within(alice.connect(&bob.peer_id(), &[])).await;
    assert_eq!(error, Err(NodeError::ShutDown));
}

// --- identify ---

#[tokio::test]
async fn changes_of_the_protocols_arrive_by_push() {
    let (alice, bob) = pair().await;
    assert!(knows(&alice, &bob, "/ipfs/id/1.0.0"));
    assert!(knows(&alice, &bob, "/ipfs/id/push/1.0.0"));
    assert!(knows(&alice, &bob, "/ipfs/ping/1.0.0"));
    let handler = Handler::new();
    bob.add_stream_handler("bare.name", &handler.addr, false)
        .unwrap();
    until(|| knows(&alice, &bob, "bare.name")).await;
    let client = bob.register_unary_client();
    for i in 0..1000 {
        client
            .add_handler(&format!("expert.{i}.forward"), false)
            .unwrap();
    }
    until(|| knows(&alice, &bob, "expert.999.forward")).await;
    assert!(known(&alice, &bob).len() > 1000);
    bob.remove_stream_handler("bare.name", &handler.addr)
        .unwrap();
    drop(client);
    until(|| known(&alice, &bob).len() == 3).await;
}

// --- streams ---

#[tokio::test]
async fn streams_pass_bytes_in_both_directions() {
    let (alice, bob) = pair().await;
    for (from, to) in [(&alice, &bob), (&bob, &alice)] {
        let handler = Handler::new();
        to.add_stream_handler("echo", &handler.addr, false).unwrap();
        let mut stream = open(from, &to.peer_id(), "echo").await.unwrap();
        assert_eq!(stream.info.protocol, "echo");
        assert_eq!(stream.info.peer_id, to.peer_id());
        stream.stream.write_all(b"hello").await.unwrap();
        stream.stream.flush().await.unwrap();
        let (header, mut socket) = handler.accept().await;
        assert_eq!(header.peer_id, from.peer_id());
        assert_eq!(header.protocol, "echo");
        let mut bytes = [0; 5];
        within(socket.read_exact(&mut bytes)).await.unwrap();
        assert_eq!(&bytes, b"hello");
        socket.write_all(b"and back").await.unwrap();
        drop(socket);
        let mut reply = Vec::new();
        within(stream.stream.read_to_end(&mut reply)).await.unwrap();
        assert_eq!(reply, b"and back");
    }
}

#[tokio::test]
async fn stream_opens_the_connection_itself() {
    let (alice, bob) = pair().await;
    within(alice.disconnect(&bob.peer_id())).await.unwrap();
    let handler = Handler::new();
    bob.add_stream_handler("auto", &handler.addr, false)
        .unwrap();
    open(&alice, &bob.peer_id(), "auto").await.unwrap();
    assert_eq!(alice.list_peers().len(), 1);
    let stranger = PeerId::from_bytes(Keypair::generate_ed25519().public().to_peer_id().to_bytes());
    let error = open(&alice, &stranger, "auto").await.err().unwrap();
    assert!(error.to_string().ends_with("no addresses"), "{error}");
}

#[tokio::test]
async fn unsupported_protocols_are_refused() {
    let (alice, bob) = pair().await;
    let names = vec!["nothing".to_owned(), "/no/thing".to_owned()];
    let error = within(alice.open_stream(&bob.peer_id(), names)).await;
    assert_eq!(
        error.err().unwrap().to_string(),
        "failed to negotiate protocol: protocols not supported: [nothing /no/thing]"
    );
    let error = within(alice.open_stream(&bob.peer_id(), Vec::new())).await;
    assert_eq!(
        error.err().unwrap().to_string(),
        "failed to negotiate protocol: no protocols specified"
    );
    let error = within(alice.call(&bob.peer_id(), "nothing", Bytes::new())).await;
    assert!(error
        .unwrap_err()
        .to_string()
        .contains("protocols not supported: [nothing]"));
}

#[tokio::test]
async fn first_supported_protocol_is_taken() {
    let (alice, bob) = pair().await;
    let handler = Handler::new();
    bob.add_stream_handler("second", &handler.addr, false)
        .unwrap();
    let names = || vec!["first".to_owned(), "second".to_owned()];
    // By negotiation or from what identify told.
    let stream = within(alice.open_stream(&bob.peer_id(), names()))
        .await
        .unwrap();
    assert_eq!(stream.info.protocol, "second");
    until(|| knows(&alice, &bob, "second")).await;
    let stream = within(alice.open_stream(&bob.peer_id(), names()))
        .await
        .unwrap();
    assert_eq!(stream.info.protocol, "second");
}

#[tokio::test]
async fn stale_protocol_opens_and_fails_at_the_first_read() {
    let (alice, bob) = pair().await;
    let connection = alice.0.host.newest(&bob.0.host.local()).unwrap();
    connection.remember_protocol("stale");
    let mut stream = open(&alice, &bob.peer_id(), "stale").await.unwrap();
    let error = within(stream.stream.read(&mut [0])).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("protocols not supported: [stale]"),
        "{error}"
    );
    let error = within(alice.call(&bob.peer_id(), "stale", Bytes::new())).await;
    assert_eq!(
        error.unwrap_err().to_string(),
        "protocols not supported: [stale]"
    );
}

#[tokio::test]
async fn balanced_stream_handlers_take_turns_and_dead_ones_are_passed_over() {
    let (alice, bob) = pair().await;
    let (one, two, dead) = (Handler::new(), Handler::new(), Handler::new());
    bob.add_stream_handler("turns", &one.addr, false).unwrap();
    assert_eq!(
        bob.add_stream_handler("turns", &two.addr, false)
            .unwrap_err()
            .to_string(),
        "handler for protocol turns already set"
    );
    bob.add_stream_handler("turns", &dead.addr, true).unwrap();
    bob.add_stream_handler("turns", &two.addr, true).unwrap();
    let dead_addr = dead.addr.clone();
    drop(dead);
    for handler in [&one, &two, &two, &one, &two, &two] {
        let mut stream = open(&alice, &bob.peer_id(), "turns").await.unwrap();
        stream.stream.write_all(b"x").await.unwrap();
        stream.stream.flush().await.unwrap();
        handler.accept().await;
    }
    let nowhere = "/unix/tmp/nowhere".parse().unwrap();
    assert_eq!(
        bob.remove_stream_handler("turns", &nowhere)
            .unwrap_err()
            .to_string(),
        "handler for protocol turns with maddr /unix/tmp/nowhere does not exist"
    );
    for addr in [&one.addr, &two.addr] {
        bob.remove_stream_handler("turns", addr).unwrap();
    }
    let mut stream = open(&alice, &bob.peer_id(), "turns").await.unwrap();
    let _ = stream.stream.write_all(b"x").await;
    let _ = stream.stream.flush().await;
    let read = within(stream.stream.read(&mut [0])).await;
    assert!(matches!(read, Ok(0) | Err(_)), "no handler is alive");
    bob.remove_stream_handler("turns", &dead_addr).unwrap();
    assert_eq!(
        bob.remove_stream_handler("turns", &dead_addr)
            .unwrap_err()
            .to_string(),
        "handler for protocol turns does not exist"
    );
}

// --- unary calls ---

#[tokio::test]
async fn calls_return_results_and_errors_of_any_size() {
    let (alice, bob) = pair().await;
    let mut client = bob.register_unary_client();
    client.add_handler("echo", false).unwrap();
    let alice_id = alice.peer_id();
    tokio::spawn(async move {
        while let Some(UnaryEvent::Call(call)) = client.next_event().await {
            assert_eq!(call.peer, alice_id);
            assert_eq!(call.protocol, "echo");
            match call.payload.len() {
                3 => call.responder.fail("three is too few".to_owned()),
                _ => call.responder.reply(call.payload),
            }
        }
    });
    for size in [0, 1, 1000, 16_383, 16_384, 70_000, 1 << 20, 4_000_000] {
        let payload: Bytes = (0..size).map(|i| (i / 7) as u8).collect::<Vec<_>>().into();
        let reply = within(alice.call(&bob.peer_id(), "echo", payload.clone())).await;
        assert!(reply.unwrap().unwrap() == payload, "{size}");
    }
    let reply = within(alice.call(&bob.peer_id(), "echo", Bytes::from_static(b"123"))).await;
    assert_eq!(reply.unwrap().unwrap_err().0, "three is too few");
    let large = vec![0; (4 << 20) + 1].into();
    let error = within(alice.call(&bob.peer_id(), "echo", large))
        .await
        .unwrap_err();
    assert!(
        matches!(error, NodeError::Eof | NodeError::Reset),
        "{error:?}"
    );
}

#[tokio::test]
async fn hundred_calls_at_once_get_their_own_replies() {
    let (alice, bob) = pair().await;
    let mut client = bob.register_unary_client();
    client.add_handler("many", false).unwrap();
    tokio::spawn(async move {
        while let Some(UnaryEvent::Call(call)) = client.next_event().await {
            call.responder.reply(call.payload);
        }
    });
    let bob = bob.peer_id();
    let call = async |i: u32| {
        let payload = Bytes::copy_from_slice(&i.to_be_bytes());
        let reply = alice.call(&bob, "many", payload.clone()).await;
        assert_eq!(reply.unwrap().unwrap(), payload);
    };
    within(futures::future::join_all((0..100).map(call))).await;
}

#[tokio::test]
async fn dropped_call_is_cancelled_at_the_handler() {
    let (alice, bob) = pair().await;
    let mut client = bob.register_unary_client();
    client.add_handler("slow", false).unwrap();
    let bob = bob.peer_id();
    let mut soonest = Duration::MAX; // of several, since other processes can delay one
    for _ in 0..5 {
        let call = alice.call(&bob, "slow", Bytes::from_static(b"hi"));
        let call = tokio::select! {
            reply = call => panic!("{reply:?}"),
            call = next_call(&mut client) => call,
        };
        let dropped = Instant::now();
        match within(client.next_event()).await {
            Some(UnaryEvent::Cancelled(number)) => assert_eq!(number, call.number),
            other => panic!("{other:?}"),
        }
        soonest = soonest.min(dropped.elapsed());
        call.responder.reply(Bytes::new()); // too late
    }
    assert!(soonest < SOON, "{soonest:?}");
}

#[tokio::test]
async fn balanced_clients_take_turns_until_they_are_dropped() {
    let (alice, bob) = pair().await;
    named(&bob, "turns", "one");
    named(&bob, "turns", "two");
    let mut third = bob.register_unary_client();
    assert_eq!(
        third.add_handler("turns", false).unwrap_err().to_string(),
        "handler for protocol turns already set"
    );
    assert_eq!(
        third.remove_handler("turns").unwrap_err().to_string(),
        "handler for protocol turns was not created in this persistent connection"
    );
    assert_eq!(
        third.remove_handler("other").unwrap_err().to_string(),
        "handler for protocol other does not exist"
    );
    third.add_handler("turns", true).unwrap();
    let bob_id = bob.peer_id();
    let call = || alice.call(&bob_id, "turns", Bytes::new());
    for name in ["one", "two"] {
        assert_eq!(within(call()).await.unwrap().unwrap(), name);
    }
    // The third client goes while it handles a call.
    let (error, ()) = tokio::join!(within(call()), async {
        let call = next_call(&mut third).await;
        drop(third);
        drop(call);
    });
    let error = error.unwrap_err();
    assert!(
        matches!(error, NodeError::Eof | NodeError::Reset),
        "{error:?}"
    );
    for name in ["one", "two", "one"] {
        assert_eq!(within(call()).await.unwrap().unwrap(), name);
    }
}
