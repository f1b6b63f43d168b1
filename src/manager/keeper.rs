//! Waits for a daemon's answer, keeps its bootstrap peers connected, and starts it again when it
//! dies: the part of the daemon manager that runs on tokio by itself.

use super::options::BootstrapPeer;
use super::process::Process;
use super::retry::{Reconnection, Restarts};
use super::start::{one_line, StartError};
use p2pd_client::{Client, Error, Identity, WeakClient};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, Instant};

/// How often the daemon is looked at while somebody waits for something of it.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long it may take to find out why no bootstrap peer could be reached.
const EXPLAINING: Duration = Duration::from_secs(10);
/// How long dropping a daemon waits for its end before it leaves that to a thread.
const DROP_LIMIT: Duration = Duration::from_millis(100);
/// How long the registrations of a client may take when the daemon was started again.
const REGISTERING: Duration = Duration::from_secs(30);

/// Ends the daemon when it is dropped.
#[derive(Debug)]
pub(super) struct Started(pub(super) Arc<Process>);

impl Drop for Started {
    fn drop(&mut self) {
        // Others may still have the process.
        if self.0.destroy_within(DROP_LIMIT) {
            return;
        }
        // An event loop may stand still here.
        let process = Arc::clone(&self.0);
        let elsewhere = std::thread::Builder::new().spawn(move || process.destroy());
        if elsewhere.is_err() {
            self.0.destroy();
        }
    }
}

/// Looks after a daemon, until it has ended for good or this is dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    shared: Arc<Shared>,
    task: AbortHandle,
    /// Closed when the task has ended.
    over: watch::Receiver<()>,
}

#[derive(Debug, Default)]
struct Shared {
    clients: Mutex<Vec<WeakClient>>,
    failure: Mutex<Option<StartError>>,
}

impl Keeper {
    /// Begins, if there is anything to do for this daemon.
    pub(super) fn start(process: &Arc<Process>, start_timeout: Duration) -> Option<Self> {
        let restarts = process.restarts();
        if restarts.is_none() && process.background_peers().is_empty() {
            return None;
        }
        let shared = Arc::<Shared>::default();
        let (sender, over) = watch::channel(());
        // It is kept from now on, and no longer when the task ends, before others learn of that.
        process.keep(restarts.is_some());
        let kept = Kept(Arc::clone(process), sender);
        let work = keep(kept, restarts, Arc::clone(&shared), start_timeout);
        let task = tokio::spawn(work).abort_handle();
        Some(Keeper { shared, task, over })
    }

    /// Has the handlers of this client registered again when the daemon was started again.
    pub(super) fn remember(&self, client: &Client) {
        let clients = &self.shared.clients;
        let mut clients = clients.lock().unwrap_or_else(PoisonError::into_inner);
        clients.retain(|client| client.upgrade().is_some());
        clients.push(client.downgrade());
    }

    /// Why the daemon was given up, if it was.
    pub(super) fn failure(&self) -> Option<StartError> {
        let failure = &self.shared.failure;
        let failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone()
    }

    /// Waits until it no longer looks after the daemon.
    pub(super) async fn over(&self) {
        // Nothing is ever sent.
        while self.over.clone().changed().await.is_ok() {}
    }

    pub(super) async fn stop(&self) {
        self.task.abort();
        self.over().await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Kept(Arc<Process>, #[allow(dead_code)] watch::Sender<()>);

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.keep(false);
    }
}

async fn keep(
    kept: Kept,
    mut restarts: Option<Restarts>,
    shared: Arc<Shared>,
    start_timeout: Duration,
) {
    let process = &*kept.0;
    let mut lived = live(process, Vec::new()).await;
    let Some(restarts) = &mut restarts else {
        return;
    };
    loop {
        let mut failure = process.died();
        loop {
            let Some(pause) = restarts.died(lived) else {
                let deaths = restarts.deaths();
                log::error!(
                    "the daemon has died {deaths} times in a row and is given up: {failure}"
                );
                let mut given_up = shared
                    .failure
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                *given_up = Some(failure);
                return;
            };
            let seconds = pause.as_secs_f64();
            log::warn!("{}; it is started again in {seconds:.1} s", failure.brief());
            sleep(pause).await;
            match start_again(process, start_timeout).await {
                Ok(()) => break,
                Err(error) => (failure, lived) = (error, Duration::ZERO),
            }
        }
        log::info!(
            "the daemon was started again as process {:?}",
            process.pid()
        );
        let clients = {
            let clients = shared
                .clients
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            clients.iter().filter_map(WeakClient::upgrade).collect()
        };
        lived = live(process, clients).await;
    }
}

/// Says, at the daemon's end, how long it has lived.
async fn live(process: &Process, clients: Vec<Client>) -> Duration {
    let begun = Instant::now();
    // They end with this.
    let mut tasks = JoinSet::new();
    for (address, peer) in process.background_peers() {
        if let Ok(client) = Client::new(process.control().clone()) {
            tasks.spawn(stay_connected(client, address.to_owned(), peer));
        }
    }
    for client in clients {
        tasks.spawn(register_again(client));
    }
    ended(process).await;
    begun.elapsed()
}

async fn start_again(process: &Process, start_timeout: Duration) -> Result<(), StartError> {
    process.spawn()?;
    let outcome = ready(process, start_timeout).await;
    if outcome.is_err() {
        process.kill();
        ended(process).await;
    }
    outcome.map(drop)
}

/// Connects a daemon to a bootstrap peer, and again when that is lost.
async fn stay_connected(client: Client, address: String, peer: BootstrapPeer) {
    let client = client.with_timeout(Reconnection::TIMEOUT);
    let mut schedule = Reconnection::default();
    loop {
        let pause = match client.connect(&peer.peer_id, &peer.addrs).await {
            Ok(()) => {
                let (pause, news) = schedule.connected();
                if news {
                    log::info!("connected to the bootstrap peer {address}");
                }
                pause
            }
            Err(error) => {
                let reason = reason(&error);
                let (pause, news) = schedule.failed(&reason);
                // That the daemon itself has ended is not the peer's fault.
                let of_daemon = matches!(
                    error,
                    Error::Unreachable { .. } | Error::ConnectionLost { .. }
                );
                if news && !of_daemon {
                    log::warn!("cannot connect to the bootstrap peer {address}: {reason}");
                }
                pause
            }
        };
        sleep(pause).await;
    }
}

async fn register_again(client: Client) {
    let outcome = client.with_timeout(REGISTERING).register_again().await;
    if let Err(error) = outcome {
        log::warn!("the handlers of {client:?} were not registered again: {error}");
    }
}

/// Waits until the daemon answers; or says why it does not, if it ends or takes too long.
pub(super) async fn ready(process: &Process, limit: Duration) -> Result<Identity, StartError> {
    let mut obstacle = None;
    if let Some(identity) = answer(process, limit, &mut obstacle).await {
        return Ok(identity);
    }
    let error = process.not_ready(limit.as_secs_f64(), obstacle);
    if error.is_unconnected() {
        return Err(error.with_reasons(&unreachable(process).await));
    }
    Err(error)
}

/// Who the daemon is; nothing if it ends or takes too long.
async fn answer(
    process: &Process,
    limit: Duration,
    obstacle: &mut Option<String>,
) -> Option<Identity> {
    let answer = tokio::select! {
        identity = ask(process, obstacle) => Some(identity),
        _ = ended(process) => None,
        () = sleep(limit) => None,
    };
    answer.filter(|_| process.poll().is_none())
}

/// Asks the daemon who it is until it answers and may be believed.
async fn ask(process: &Process, obstacle: &mut Option<String>) -> Identity {
    let mut pause = Duration::from_millis(1);
    loop {
        let answer = match Client::new(process.control().clone()) {
            Ok(client) => client.identify().await,
            Err(error) => Err(error.into()),
        };
        *obstacle = match answer {
            Ok(identity) => match process.doubt(&identity.peer_id) {
                None => return identity,
                doubt => doubt,
            },
            Err(error) => Some(error.to_string()),
        };
        sleep(pause).await;
        pause = LOOK_AGAIN.min(2 * pause);
    }
}

/// Why which bootstrap peer could not be reached, in the words of another such daemon: the one
/// that ended has only said that none could.
async fn unreachable(process: &Process) -> Vec<(String, String)> {
    let Ok(other) = process.without_bootstrap() else {
        return Vec::new();
    };
    let other = Started(Arc::new(other));
    let asking = async {
        other.0.spawn().ok()?;
        answer(&other.0, EXPLAINING, &mut None).await?;
        let client = Client::new(other.0.control().clone()).ok()?;
        let client = client.with_timeout(EXPLAINING);
        let mut tasks = JoinSet::new();
        for (number, (address, peer)) in other.0.bootstrap_peers().into_iter().enumerate() {
            let (client, address) = (client.clone(), address.to_owned());
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

/// The daemon's words, in one line.
fn reason(error: &Error) -> String {
    match error.daemon_message() {
        Some(words) => one_line(words),
        None => one_line(&error.to_string()),
    }
}

/// Ends all of the daemon, and waits until nothing is left of it.
pub(super) async fn destroyed(process: &Process) {
    let mut pause = Duration::from_millis(1);
    while !process.try_destroy() {
        sleep(pause).await;
        pause = LOOK_AGAIN.min(2 * pause);
    }
}

/// Waits until the daemon has ended.
pub(super) async fn ended(process: &Process) -> ExitStatus {
    #[cfg(unix)]
    // Before looking, so that no end is missed in between.
    let mut children = {
        use tokio::signal::unix::{signal, SignalKind};
        signal(SignalKind::child()).ok()
    };
    loop {
        if let Some(status) = process.poll() {
            return status;
        }
        #[cfg(unix)]
        if let Some(children) = &mut children {
            // Somebody may have put another handler in the place of tokio's.
            let _ = tokio::time::timeout(Duration::from_secs(1), children.recv()).await;
            continue;
        }
        sleep(LOOK_AGAIN).await;
    }
}
