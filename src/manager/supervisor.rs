//! Supervises a daemon on tokio: carries out what [`Supervision`] decides.

use super::guard::ended;
use super::locks::lock;
use super::options::BootstrapPeer;
use super::process::Process;
use super::start::StartError;
use super::startup::{self, reason};
use p2pd_client::{Client, Error, WeakClient};
use p2pd_protocol::policy::reconnection::CONNECT_TIMEOUT;
use p2pd_protocol::policy::supervision::{Action, Event, Report, Supervision, REGISTER_TIMEOUT};
use std::future::pending;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep_until, Instant};

/// Handle of the task that supervises a daemon. Dropping it aborts the task.
#[derive(Debug)]
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    task: AbortHandle,
    /// Closed when the task has ended.
    finished: watch::Receiver<()>,
}

#[derive(Debug, Default)]
struct Shared {
    clients: Mutex<Vec<WeakClient>>,
    failure: Mutex<Option<StartError>>,
}

impl Supervisor {
    /// Starts the task for a daemon that is ready. Returns `None` if the options ask for neither
    /// restarts nor background bootstrap peers.
    pub(super) fn start(process: &Arc<Process>, start_timeout: Duration) -> Option<Self> {
        let supervision = process.supervision()?;
        let shared = Arc::<Shared>::default();
        let (sender, finished) = watch::channel(());
        let driver = Driver {
            tasks: JoinSet::new(),
            supervision,
            peers: process.background_peers(),
            clock: Instant::now(),
            start_timeout,
            failure: None,
            shared: Arc::clone(&shared),
            process: Arc::clone(process),
            _guard: RestartGuard::new(process, sender),
        };
        let task = tokio::spawn(driver.run()).abort_handle();
        Some(Supervisor {
            shared,
            task,
            finished,
        })
    }

    /// Registers the handlers of this client again after each restart.
    pub(super) fn remember(&self, client: &Client) {
        let mut clients = lock(&self.shared.clients);
        clients.retain(|client| client.upgrade().is_some());
        clients.push(client.downgrade());
    }

    /// Why the supervisor gave up, if it did.
    pub(super) fn failure(&self) -> Option<StartError> {
        lock(&self.shared.failure).clone()
    }

    /// Waits until the task has ended.
    pub(super) async fn finished(&self) {
        // No value is ever sent: `changed` fails when the task has dropped the sender.
        while self.finished.clone().changed().await.is_ok() {}
    }

    /// Stops the task, and waits until it has ended. The daemon stays as it is.
    pub(super) async fn stop(&self) {
        self.task.abort();
        self.finished().await;
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Marks the process as supervised while this exists, if the daemon is to be restarted. Between two
/// runs, [`Process::finished`] is then false.
struct RestartGuard {
    process: Arc<Process>,
    /// Closed after `drop` ran.
    _finished: watch::Sender<()>,
}

impl RestartGuard {
    fn new(process: &Arc<Process>, finished: watch::Sender<()>) -> Self {
        process.set_supervised(process.restart_limit() > 0);
        RestartGuard {
            process: Arc::clone(process),
            _finished: finished,
        }
    }
}

impl Drop for RestartGuard {
    fn drop(&mut self) {
        self.process.set_supervised(false);
    }
}

/// The state of the supervisor's task.
struct Driver {
    /// Tasks for the current run of the daemon, aborted when it ends.
    tasks: JoinSet<Option<Event>>,
    supervision: Supervision,
    /// The bootstrap peers to connect to, each with its address as the caller gave it. Actions and
    /// events refer to a peer by its index.
    peers: Vec<(String, BootstrapPeer)>,
    clock: Instant,
    start_timeout: Duration,
    /// The error of the last death or failed start.
    failure: Option<StartError>,
    shared: Arc<Shared>,
    process: Arc<Process>,
    // Dropped last, because that reports that the task has ended.
    _guard: RestartGuard,
}

impl Driver {
    async fn run(mut self) {
        let mut event = Event::Started;
        loop {
            if event == Event::Died {
                self.failure = Some(self.process.died());
            }
            self.handle(event);
            while let Some(action) = self.supervision.poll() {
                self.carry_out(action).await;
            }
            if self.supervision.is_finished() {
                return;
            }
            event = self.next_event().await;
        }
    }

    fn handle(&mut self, event: Event) {
        let random = p2pd_sockets::random(0);
        self.supervision.handle(event, self.clock.elapsed(), random);
    }

    async fn next_event(&mut self) -> Event {
        let deadline = self.supervision.deadline();
        let timeout = async {
            match deadline {
                Some(deadline) => sleep_until(self.clock + deadline).await,
                None => pending().await,
            }
        };
        tokio::pin!(timeout);
        loop {
            tokio::select! {
                Some(outcome) = self.tasks.join_next() => {
                    if let Ok(Some(event)) = outcome {
                        return event;
                    }
                }
                () = &mut timeout => return Event::Timeout,
            }
        }
    }

    async fn carry_out(&mut self, action: Action) {
        match action {
            Action::Watch => {
                self.tasks.spawn(watch_process(Arc::clone(&self.process)));
            }
            Action::Connect(peer) => {
                if let Some((_, bootstrap_peer)) = self.peers.get(peer) {
                    let work = connect(Arc::clone(&self.process), peer, bootstrap_peer.clone());
                    self.tasks.spawn(work);
                }
            }
            Action::Register => {
                for client in lock(&self.shared.clients).iter() {
                    if let Some(client) = client.upgrade() {
                        self.tasks.spawn(register(client));
                    }
                }
            }
            Action::Abort => self.tasks = JoinSet::new(),
            Action::Start => {
                let event = self.start().await;
                self.handle(event);
            }
            Action::Report(report) => self.report(report),
            Action::GiveUp { deaths } => {
                if let Some(failure) = self.failure.take() {
                    log::error!(
                        "the daemon has died {deaths} times in a row and will not be restarted: {failure}"
                    );
                    *lock(&self.shared.failure) = Some(failure);
                }
            }
        }
    }

    async fn start(&mut self) -> Event {
        match startup::start(&self.process, self.start_timeout).await {
            Ok(_) => Event::Started,
            Err(_) if self.process.ended() => Event::Stopped,
            Err(error) => {
                self.failure = Some(error);
                self.process.kill();
                ended(&self.process).await;
                Event::StartFailed
            }
        }
    }

    fn report(&self, report: Report) {
        let address = |peer: usize| self.peers.get(peer).map_or("", |(address, _)| address);
        match report {
            Report::Restarting(pause) => {
                let failure = self.failure.as_ref().map(StartError::brief);
                let (failure, seconds) = (failure.unwrap_or_default(), pause.as_secs_f64());
                log::warn!("{failure}; starting it again in {seconds:.1} s");
            }
            Report::Restarted => {
                let pid = self.process.pid();
                log::info!("restarted the daemon as process {pid:?}");
            }
            Report::PeerConnected(peer) => {
                log::info!("connected to the bootstrap peer {}", address(peer));
            }
            Report::PeerUnreachable(peer, reason) => {
                let address = address(peer);
                log::warn!("cannot connect to the bootstrap peer {address}: {reason}");
            }
        }
    }
}

async fn watch_process(process: Arc<Process>) -> Option<Event> {
    ended(&process).await;
    Some(if process.ended() {
        Event::Stopped
    } else {
        Event::Died
    })
}

async fn connect(process: Arc<Process>, peer: usize, to: BootstrapPeer) -> Option<Event> {
    let outcome = match Client::new(process.control().clone()) {
        Ok(client) => {
            let client = client.with_timeout(CONNECT_TIMEOUT);
            client.connect(&to.peer_id, &to.addrs).await
        }
        Err(error) => Err(error.into()),
    };
    Some(match outcome {
        Ok(()) => Event::Connected { peer },
        Err(error) => Event::ConnectFailed {
            peer,
            reason: reason(&error),
            daemon_lost: matches!(
                error,
                Error::Unreachable { .. } | Error::ConnectionLost { .. }
            ),
        },
    })
}

async fn register(client: Client) -> Option<Event> {
    let outcome = client
        .clone()
        .with_timeout(REGISTER_TIMEOUT)
        .register_again()
        .await;
    if let Err(error) = outcome {
        log::warn!("the handlers of {client:?} were not registered again: {error}");
    }
    None
}
