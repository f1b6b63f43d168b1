//! Supervision of a daemon: when to restart it, when to connect it to its bootstrap peers, and what to
//! report.
//!
//! A state machine without I/O. A driver feeds it [`Event`]s and carries out the [`Action`]s that
//! [`Supervision::poll`] returns; at [`Supervision::deadline`] it feeds [`Event::Timeout`].

use super::backoff::Backoff;
use super::reconnection::Reconnection;
use std::collections::VecDeque;
use std::time::Duration;

/// Time limit for the registrations of one client after a restart.
pub const REGISTER_TIMEOUT: Duration = Duration::from_secs(30);
/// Default number of consecutive quick deaths after which a daemon is no longer restarted.
pub const RESTART_LIMIT: u32 = 10;

/// A quick death is one within this time after the start.
const QUICK_DEATH: Duration = Duration::from_secs(10);

const RESTART_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));

/// What a driver reports to a [`Supervision`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The daemon is ready: it was started by the caller, or by [`Action::Start`].
    Started,
    /// [`Action::Start`] failed, and the process is gone.
    StartFailed,
    /// The process of a daemon that was ready has ended.
    Died,
    /// [`Action::Connect`] to this bootstrap peer succeeded.
    Connected {
        /// The peer's index.
        peer: usize,
    },
    /// [`Action::Connect`] to this bootstrap peer failed.
    ConnectFailed {
        /// The peer's index.
        peer: usize,
        /// The reason, in one line.
        reason: String,
        /// Whether the daemon was unreachable, so that the failure says nothing about the peer.
        daemon_lost: bool,
    },
    /// [`Supervision::deadline`] may have passed.
    Timeout,
    /// The caller stops the daemon. It is not restarted.
    Stopped,
}

/// What a driver must do for a [`Supervision`]. The enum is exhaustive on purpose: a driver must carry
/// out every action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Watch the daemon's process, and report [`Event::Died`] when it ends.
    Watch,
    /// Connect the daemon to the bootstrap peer with this index, for at most
    /// [`CONNECT_TIMEOUT`](super::reconnection::CONNECT_TIMEOUT).
    /// Report [`Event::Connected`] or [`Event::ConnectFailed`].
    Connect(usize),
    /// Register the handlers of all clients again, for at most [`REGISTER_TIMEOUT`] each.
    Register,
    /// Abort each `Connect` and `Register` in progress: their daemon has ended.
    Abort,
    /// Spawn the daemon and wait until it is ready. If that fails, kill it and wait for its end.
    /// Report [`Event::Started`] or [`Event::StartFailed`].
    Start,
    /// Log this report.
    Report(Report),
    /// Store the last failure for the caller, and log it. The daemon has died too often and is not
    /// restarted.
    GiveUp {
        /// Number of consecutive quick deaths.
        deaths: u32,
    },
}

/// What a driver logs for a [`Supervision`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// A warning: the daemon died or could not be started, and will be restarted after this pause.
    Restarting(Duration),
    /// The daemon was restarted.
    Restarted,
    /// This bootstrap peer is connected.
    PeerConnected(usize),
    /// A warning: the connection to this bootstrap peer failed, for this reason.
    PeerUnreachable(usize, String),
}

/// The state of a daemon that is supervised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The caller has yet to start the daemon for the first time.
    Initial,
    Running {
        since: Duration,
    },
    /// Dead; to be restarted at `until`.
    Backoff {
        until: Duration,
    },
    Starting,
    /// Stopped by the caller, or dead and not to be restarted.
    Finished,
}

/// Restarts of a daemon, and connections to its bootstrap peers.
///
/// Times are measured from an arbitrary fixed moment, with a monotonic clock.
///
/// ```
/// use p2pd_protocol::policy::supervision::{Action, Event, Report, Supervision};
/// use std::time::Duration;
///
/// let mut supervision = Supervision::new(10, 0);
/// let (now, random) = (Duration::from_secs(100), 0);
/// supervision.handle(Event::Started, now, random);
/// assert_eq!(supervision.poll(), Some(Action::Watch));
///
/// supervision.handle(Event::Died, now, random);
/// assert_eq!(supervision.poll(), Some(Action::Abort));
/// let pause = Duration::from_millis(100);
/// assert_eq!(supervision.poll(), Some(Action::Report(Report::Restarting(pause))));
/// assert_eq!(supervision.deadline(), Some(now + pause));
///
/// supervision.handle(Event::Timeout, now + pause, random);
/// assert_eq!(supervision.poll(), Some(Action::Start));
/// ```
#[derive(Debug, Clone)]
pub struct Supervision {
    restart_limit: u32,
    state: State,
    backoff: Backoff,
    /// Whether the next [`Event::Started`] is a restart.
    restarting: bool,
    peers: Vec<Peer>,
    actions: VecDeque<Action>,
}

impl Supervision {
    /// Supervises a daemon with this number of bootstrap peers to connect to.
    ///
    /// After `restart_limit` consecutive deaths, each within 10 seconds of the start, the daemon is no
    /// longer restarted. With 0 it is never restarted.
    pub fn new(restart_limit: u32, peers: usize) -> Self {
        Supervision {
            restart_limit,
            state: State::Initial,
            backoff: RESTART_BACKOFF,
            restarting: false,
            peers: vec![Peer::default(); peers],
            actions: VecDeque::new(),
        }
    }

    /// Returns the next action; `None` if there is nothing to do now.
    pub fn poll(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When to feed [`Event::Timeout`]; `None` if no pause is in progress.
    pub fn deadline(&self) -> Option<Duration> {
        match self.state {
            State::Backoff { until } => Some(until),
            State::Running { .. } => self.peers.iter().filter_map(|peer| peer.retry_at).min(),
            State::Initial | State::Starting | State::Finished => None,
        }
    }

    /// Whether supervision has ended: no event leads to another action.
    pub fn is_finished(&self) -> bool {
        self.state == State::Finished
    }

    /// Takes an event that happened at `now`. `random` is a random number, for the jitter.
    ///
    /// Ignores an event that does not fit the state, such as the late result of an aborted CONNECT.
    pub fn handle(&mut self, event: Event, now: Duration, random: u64) {
        match (event, self.state) {
            (_, State::Finished) => {}
            (Event::Stopped, _) => {
                self.actions.clear();
                self.actions.push_back(Action::Abort);
                self.state = State::Finished;
            }
            (Event::Started, State::Initial | State::Starting) => self.started(now),
            (Event::Died, State::Running { since }) => {
                // Actions that were not polled yet are for the daemon that died.
                let is_stale = |action: &_| matches!(action, Action::Connect(_) | Action::Register);
                self.actions.retain(|action| !is_stale(action));
                self.actions.push_back(Action::Abort);
                self.died(now.saturating_sub(since), now, random);
            }
            (Event::StartFailed, State::Starting) => self.died(Duration::ZERO, now, random),
            (Event::Connected { peer }, State::Running { .. }) => {
                let Some(state) = self.peers.get_mut(peer) else {
                    return;
                };
                let (pause, is_news) = state.reconnection.connected(random);
                state.retry_at = Some(now + pause);
                if is_news {
                    self.report(Report::PeerConnected(peer));
                }
            }
            (
                Event::ConnectFailed {
                    peer,
                    reason,
                    daemon_lost,
                },
                State::Running { .. },
            ) => {
                let Some(state) = self.peers.get_mut(peer) else {
                    return;
                };
                let (pause, is_news) = state.reconnection.failed(&reason, random);
                state.retry_at = Some(now + pause);
                if is_news && !daemon_lost {
                    self.report(Report::PeerUnreachable(peer, reason));
                }
            }
            (Event::Timeout, State::Backoff { until }) if now >= until => {
                self.state = State::Starting;
                self.actions.push_back(Action::Start);
            }
            (Event::Timeout, State::Running { .. }) => self.reconnect(now),
            _ => {}
        }
    }

    fn started(&mut self, now: Duration) {
        self.state = State::Running { since: now };
        self.actions.push_back(Action::Watch);
        if std::mem::replace(&mut self.restarting, true) {
            self.report(Report::Restarted);
            self.actions.push_back(Action::Register);
        }
        self.peers.fill_with(Peer::default);
        let connects = (0..self.peers.len()).map(Action::Connect);
        self.actions.extend(connects);
    }

    fn died(&mut self, lived: Duration, now: Duration, random: u64) {
        if self.restart_limit == 0 {
            self.state = State::Finished;
            return;
        }
        let quick = lived < QUICK_DEATH;
        if !quick {
            self.backoff.reset();
        }
        let pause = self.backoff.next(random);
        let deaths = self.backoff.failures();
        if quick && deaths >= self.restart_limit {
            self.actions.push_back(Action::GiveUp { deaths });
            self.state = State::Finished;
            return;
        }
        self.report(Report::Restarting(pause));
        self.state = State::Backoff { until: now + pause };
    }

    /// Connects to each peer whose pause has passed.
    fn reconnect(&mut self, now: Duration) {
        for (index, peer) in self.peers.iter_mut().enumerate() {
            if peer.retry_at.is_some_and(|at| now >= at) {
                peer.retry_at = None;
                self.actions.push_back(Action::Connect(index));
            }
        }
    }

    fn report(&mut self, report: Report) {
        self.actions.push_back(Action::Report(report));
    }
}

/// A bootstrap peer.
#[derive(Debug, Clone, Default)]
struct Peer {
    reconnection: Reconnection,
    /// When to connect again; `None` while a CONNECT is in progress.
    retry_at: Option<Duration>,
}

#[cfg(test)]
mod tests;
