//! Waits on tokio until a spawned daemon is ready, and finds out why a start failed. [`Startup`]
//! makes the decisions.

use super::guard::{destroyed, ended, ProcessGuard};
use super::process::Process;
use super::start::{one_line, StartError};
use p2pd_client::{Client, Error, Identity};
use p2pd_protocol::policy::startup::{Startup, Step, EXPLAIN_TIMEOUT};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{sleep, Instant};

/// Spawns the daemon, and waits until it is ready, for at most `limit`.
///
/// # Errors
/// The daemon cannot be spawned, ended, or was not ready in time.
pub(super) async fn start(process: &Process, limit: Duration) -> Result<Identity, StartError> {
    process.spawn()?;
    let reason = match probed(process, limit).await {
        Ok(identity) => return Ok(identity),
        Err(reason) => reason,
    };
    let error = process.not_ready(limit.as_secs_f64(), reason);
    if error.is_unconnected() {
        return Err(error.with_reasons(&unreachable_peers(process).await));
    }
    Err(error)
}

/// Waits until the daemon is ready. If it ends, or is not ready within `limit`, returns why the
/// last probe failed, if there was one.
async fn probed(process: &Process, limit: Duration) -> Result<Identity, Option<String>> {
    let begun = Instant::now();
    let mut startup = Startup::new(Duration::ZERO, limit);
    let mut identity = None;
    let ended = ended(process);
    tokio::pin!(ended);
    loop {
        let now = begun.elapsed();
        match startup.step(now) {
            Step::Probe => tokio::select! {
                reply = probe(process) => {
                    let reason = reply.map(|found| identity = Some(found)).err();
                    startup.probed(reason, begun.elapsed());
                }
                _ = &mut ended => startup.ended(),
                () = sleep(startup.deadline().saturating_sub(now)) => {}
            },
            Step::Wait(until) => tokio::select! {
                () = sleep(until.saturating_sub(now)) => {}
                _ = &mut ended => startup.ended(),
            },
            // It may have ended after its reply.
            Step::Ready if process.poll().is_some() => startup.ended(),
            step => {
                let identity = identity.filter(|_| step == Step::Ready);
                return identity.ok_or_else(|| startup.reason().map(Into::into));
            }
        }
    }
}

/// Sends IDENTIFY. The error says why the daemon does not count as ready.
async fn probe(process: &Process) -> Result<Identity, String> {
    let client = Client::new(process.control().clone()).map_err(|error| error.to_string())?;
    let identity = client.identify().await.map_err(|error| error.to_string())?;
    match process.why_not_ready(&identity.peer_id) {
        None => Ok(identity),
        Some(reason) => Err(reason),
    }
}

/// Returns each bootstrap peer with the reason why it is unreachable. The daemon has ended without
/// printing the reasons, so this starts a second daemon and lets it connect to each peer.
async fn unreachable_peers(process: &Process) -> Vec<(String, String)> {
    let Ok(other) = process.without_bootstrap() else {
        return Vec::new();
    };
    let other = ProcessGuard(Arc::new(other));
    let asking = async {
        other.0.spawn().ok()?;
        probed(&other.0, EXPLAIN_TIMEOUT).await.ok()?;
        let client = Client::new(other.0.control().clone()).ok()?;
        let client = client.with_timeout(EXPLAIN_TIMEOUT);
        let mut tasks = JoinSet::new();
        for (number, (address, peer)) in other.0.bootstrap_peers().into_iter().enumerate() {
            let client = client.clone();
            tasks.spawn(async move {
                let reason = match client.connect(&peer.peer_id, &peer.addrs).await {
                    Ok(()) => "it can be reached now".into(),
                    Err(error) => reason(&error),
                };
                (number, address, reason)
            });
        }
        let mut reasons = tasks.join_all().await;
        reasons.sort_unstable_by_key(|(number, ..)| *number);
        Some(reasons)
    };
    let reasons = asking.await.unwrap_or_default().into_iter();
    destroyed(&other.0).await;
    reasons
        .map(|(_, address, reason)| (address, reason))
        .collect()
}

/// Returns the daemon's message, or else the error's, in one line.
pub(super) fn reason(error: &Error) -> String {
    match error.daemon_message() {
        Some(message) => one_line(message),
        None => one_line(&error.to_string()),
    }
}
