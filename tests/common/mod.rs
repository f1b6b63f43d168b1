//! What the tests of the client share: real daemons, a daemon that is none, waiting for what has no
//! event, and an end to every test.
#![allow(dead_code)] // every test program takes its part of it

pub mod fake;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use p2pclient_rs::Client;
use p2pd_client::{IncomingStreams, Subscription, UnaryCall};
use p2pd_manager::{Dht, P2PDaemon, P2PDaemonBuilder};
use p2pd_protocol::{PeerId, PublicKey, PubsubMessage};
use std::error::Error;
use std::future::{pending, poll_fn, Future};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::join;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver, UnboundedSender};
use tokio::sync::OnceCell;

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(90);

/// How long what must happen is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Ends the test program if a test takes too long: none hangs for ever.
pub struct Limit(#[allow(unused)] Sender<()>);

impl Limit {
    pub fn new() -> Self {
        let (sender, receiver) = mpsc::channel();
        let name = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            if receiver.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // Not by `eprintln!`, whose output is the test's, to be seen when it has ended.
                let _ = writeln!(std::io::stderr(), "{name} took over {LIMIT:?}");
                std::process::exit(101);
            }
        });
        Self(sender)
    }
}

/// The result of `attempt`, once it has one.
pub async fn eventually<T>(mut attempt: impl AsyncFnMut() -> Result<T, Box<dyn Error>>) -> T {
    let begun = Instant::now();
    loop {
        match attempt().await {
            Ok(result) => return result,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "at last: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An error for [`eventually`] if that is not so.
pub fn must(condition: bool, otherwise: &str) -> Result<(), Box<dyn Error>> {
    condition.then_some(()).ok_or_else(|| otherwise.into())
}

pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(PATIENCE, future).await;
    outcome.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Lets a future go as far as it can for now.
pub async fn begin<T>(future: impl Future<Output = T>) {
    let mut future = pin!(future);
    let begun = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await;
    assert!(begun, "it has ended already");
}

/// What a test needs to be run, named by a variable of the environment.
pub fn required(variable: &str, hint: &str) -> PathBuf {
    let path = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} must name {hint}"));
    let path = PathBuf::from(path);
    assert!(path.is_file(), "{variable} is {path:?}, which is no file");
    path
}

/// A p2pd of hivemind's, with nothing switched on.
pub fn bare_daemon() -> P2PDaemonBuilder {
    let hint = "a p2pd binary: P2PD_PATH=$(python3 tests/get_p2pd.py)";
    P2PDaemon::builder().binary(required("P2PD_PATH", hint))
}

/// One with everything switched on.
pub fn daemon() -> P2PDaemonBuilder {
    let daemon = bare_daemon().dht(Dht::Server);
    daemon.pubsub(true).connection_manager(true)
}

/// Two clients of two daemons that are connected to each other.
pub struct Pair {
    pub alice: Client,
    pub bob: Client,
    pub alice_daemon: &'static P2PDaemon,
    pub bob_daemon: &'static P2PDaemon,
    _limit: Limit,
}

/// Two new clients of the two daemons that the tests of a program share, so that names of protocols
/// and topics must be a test's own. Nothing but the program's end ends the daemons.
pub async fn pair() -> Pair {
    static DAEMONS: OnceCell<[P2PDaemon; 2]> = OnceCell::const_new();
    let limit = Limit::new();
    let [alice_daemon, bob_daemon] = DAEMONS.get_or_init(connected_daemons).await;
    Pair {
        alice: alice_daemon.client().await.unwrap(),
        bob: bob_daemon.client().await.unwrap(),
        alice_daemon,
        bob_daemon,
        _limit: limit,
    }
}

async fn connected_daemons() -> [P2PDaemon; 2] {
    let daemons = [
        daemon().spawn().await.unwrap(),
        daemon().spawn().await.unwrap(),
    ];
    for (one, other) in [(0, 1), (1, 0)] {
        let (one, other) = (&daemons[one], &daemons[other]);
        keep(one);
        let client = one.client().await.unwrap();
        let connected = client.connect(other.peer_id(), other.addrs()).await;
        connected.unwrap();
        // It is in the routing table a little later.
        eventually(async || {
            let closest = client.dht_get_closest_peers("anything").collect_all();
            must(closest.await?.contains(other.peer_id()), "it is not there")
        })
        .await;
    }
    daemons
}

/// Waits until what a client publishes reaches a subscription. That takes a while where the publisher's
/// daemon is subscribed itself: it sends to those in its mesh alone.
pub async fn hears(subscription: &mut Subscription, publisher: &Client, topic: &str) {
    let mut probe = tokio::time::interval(Duration::from_millis(50));
    let begun = Instant::now();
    loop {
        tokio::select! {
            message = subscription.next() => {
                let message = message.unwrap().unwrap();
                let sender = publisher.identify().await.unwrap().peer_id;
                if message.data == PROBE && message.from == Some(sender) {
                    return;
                }
            }
            _ = probe.tick() => {
                assert!(begun.elapsed() < PATIENCE, "nothing is heard of {topic}");
                publisher.pubsub_publish(topic, PROBE).await.unwrap();
            }
        }
    }
}

const PROBE: &str = "anybody there?";

/// The next message that is none of those that [`hears`] publishes.
pub async fn next_message(subscription: &mut Subscription) -> PubsubMessage {
    loop {
        let message = within("a message", subscription.next()).await;
        let message = message.unwrap().unwrap();
        if message.data != PROBE {
            return message;
        }
    }
}

/// Has a daemon outlive its last client: hivemind's ends when no persistent connection is left.
pub fn keep(daemon: &P2PDaemon) {
    let control = daemon.control_maddr().to_string();
    let mut socket = UnixStream::connect(control.strip_prefix("/unix").unwrap()).unwrap();
    socket.write_all(&[2, 8, 9]).unwrap(); // Request{PERSISTENT_CONN_UPGRADE}
    let mut answer = [0; 3];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [2, 8, 0]); // Response{OK}
    std::mem::forget(socket);
}

/// A key and its owner, whom nobody has heard of.
pub fn stranger() -> (PeerId, Vec<u8>) {
    let mut secret = [0; 32];
    getrandom(&mut secret);
    let key = [&[8, 1, 18, 32][..], &secret].concat();
    (PublicKey::decode(&key).unwrap().peer_id(), key)
}

fn getrandom(room: &mut [u8]) {
    let mut source = std::fs::File::open("/dev/urandom").unwrap();
    source.read_exact(room).unwrap();
}

/// Bytes that are easy to tell from others.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    let byte = |place: usize| (place.wrapping_mul(31).wrapping_add(seed) >> 3) as u8;
    (0..len).map(byte).collect()
}

/// A unary handler that never ends, and what it tells: "begun", and "given up" when it is dropped.
pub fn endless() -> (
    impl Fn(UnaryCall) -> BoxFuture<'static, Result<Bytes, String>>,
    UnboundedReceiver<&'static str>,
) {
    struct Told(UnboundedSender<&'static str>);
    impl Drop for Told {
        fn drop(&mut self) {
            let _ = self.0.send("given up");
        }
    }
    let (sender, receiver) = unbounded_channel();
    let handler = move |_: UnaryCall| {
        let told = Told(sender.clone());
        async move {
            told.0.send("begun").unwrap();
            pending().await
        }
        .boxed()
    };
    (handler, receiver)
}

/// What comes back when `payload` is sent.
pub async fn echoed(client: &Client, peer: &PeerId, protocol: &str, payload: &[u8]) -> Vec<u8> {
    let stream = client.stream_open(peer, [protocol]).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut received = vec![0; payload.len()];
    let (written, read) = join!(
        writer.write_all(payload),
        within("the echo", reader.read_exact(&mut received))
    );
    written.unwrap();
    read.unwrap();
    received
}

/// Sends back what comes, until the callers are done.
pub async fn echo_streams(mut incoming: IncomingStreams) {
    while let Some(stream) = incoming.next().await {
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(stream);
            // The end can be a reset, as the caller has everything.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}
