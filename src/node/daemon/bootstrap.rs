//! Connects to the bootstrap peers at the start, and again when the connection is lost.

use super::options::BootstrapPeer;
use crate::NodeHandle;
use p2pd_protocol::policy::backoff::Backoff;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

/// Time limit of one attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Pauses between attempts: the first after a failure, and the longest.
const MIN_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// Interval at which a connection is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(60);

/// Connects to all peers at once, and returns at the first success. Tasks keep connecting to the others,
/// and keep the connections.
///
/// # Errors
/// The reason why each of the peers could not be reached.
pub(super) async fn connect(
    node: &NodeHandle,
    peers: Vec<BootstrapPeer>,
) -> Result<(), Vec<String>> {
    let (results, mut next) = mpsc::channel(peers.len().max(1));
    for peer in peers {
        tokio::spawn(keep_connected(node.clone(), peer, results.clone()));
    }
    drop(results);
    let mut failures = Vec::new();
    while let Some(result) = next.recv().await {
        match result {
            Ok(()) => return Ok(()),
            Err(failure) => failures.push(failure),
        }
    }
    Err(failures)
}

/// Keeps a connection to a peer. Sends the result of the first attempt.
async fn keep_connected(
    node: NodeHandle,
    peer: BootstrapPeer,
    results: mpsc::Sender<Result<(), String>>,
) {
    let mut results = Some(results);
    let mut backoff = Backoff::new(MIN_PAUSE, MAX_PAUSE);
    loop {
        let connecting = timeout(CONNECT_TIMEOUT, node.connect(&peer.peer, &peer.addrs));
        let result = match connecting.await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("context deadline exceeded".to_owned()),
        };
        let result = result.map_err(|why| format!("cannot reach {}: {why}", peer.text));
        if let Err(failure) = &result {
            log::info!("{failure}");
            sleep_after(&mut results, result, backoff.next(0)).await;
            continue;
        }
        backoff.reset();
        sleep_after(&mut results, result, CHECK_INTERVAL).await;
        while node
            .list_peers()
            .iter()
            .any(|info| info.peer_id == peer.peer)
        {
            sleep(CHECK_INTERVAL).await;
        }
    }
}

async fn sleep_after(
    results: &mut Option<mpsc::Sender<Result<(), String>>>,
    result: Result<(), String>,
    pause: Duration,
) {
    if let Some(results) = results.take() {
        // Fails after another peer was reached first.
        let _ = results.send(result).await;
    }
    sleep(pause).await;
}
