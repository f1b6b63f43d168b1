//! Starts hivemind's p2pd for tests: a single daemon, or a connected pair.

use crate::deadline::{eventually, must, within, Limit, PATIENCE};
use p2pd_client::{Client, Subscription};
use p2pd_manager::{Dht, P2PDaemon, P2PDaemonBuilder};
use p2pd_protocol::PubsubMessage;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;

/// Path of a file that a test needs, from an environment variable.
pub fn required(variable: &str, hint: &str) -> PathBuf {
    let path = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} must name {hint}"));
    let path = PathBuf::from(path);
    assert!(path.is_file(), "{variable} is {path:?}, which is no file");
    path
}

/// hivemind's p2pd without optional services.
pub fn bare_daemon() -> P2PDaemonBuilder {
    let hint = "a p2pd binary: P2PD_PATH=$(python3 tests/get_p2pd.py)";
    P2PDaemon::builder().binary(required("P2PD_PATH", hint))
}

/// hivemind's p2pd with the DHT, pubsub and the connection manager.
pub fn daemon() -> P2PDaemonBuilder {
    let daemon = bare_daemon().dht(Dht::Server);
    daemon.pubsub(true).connection_manager(true)
}

/// Two clients of two daemons that are connected to each other.
pub struct Pair {
    /// A client of the first daemon.
    pub alice: Client,
    /// A client of the second daemon.
    pub bob: Client,
    /// The first daemon.
    pub alice_daemon: &'static P2PDaemon,
    /// The second daemon.
    pub bob_daemon: &'static P2PDaemon,
    _limit: Limit,
}

/// Two new clients of the two daemons that all tests of a program share. Each test must use its own names of
/// protocols and topics. The daemons end with the program.
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
        // The peer enters the routing table a little later.
        eventually(async || {
            let closest = client.dht_get_closest_peers("anything").collect_all();
            must(closest.await?.contains(other.peer_id()), "it is not there")
        })
        .await;
    }
    daemons
}

/// Waits until messages of a publisher reach a subscription. That takes a while if the publisher's daemon is
/// subscribed too, since it then sends only to its mesh.
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

/// Returns the next message except those that [`hears`] publishes.
pub async fn next_message(subscription: &mut Subscription) -> PubsubMessage {
    loop {
        let message = within("a message", subscription.next()).await;
        let message = message.unwrap().unwrap();
        if message.data != PROBE {
            return message;
        }
    }
}

/// Keeps a daemon running without clients: hivemind's exits when its last persistent connection closes.
pub fn keep(daemon: &P2PDaemon) {
    let control = daemon.control_maddr().to_string();
    let mut socket = UnixStream::connect(control.strip_prefix("/unix").unwrap()).unwrap();
    socket.write_all(&[2, 8, 9]).unwrap(); // Request{PERSISTENT_CONN_UPGRADE}
    let mut answer = [0; 3];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [2, 8, 0]); // Response{OK}
    std::mem::forget(socket);
}
