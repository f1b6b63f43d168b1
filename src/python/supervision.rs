//! The protocol's policies for starting and supervising a daemon, as Python classes.
//! `p2pclient_rs.supervisor` and `p2pclient_rs.startup` carry out the decisions. Times are seconds of
//! the event loop's clock.

use p2pd_protocol::policy::reconnection::{self, CONNECT_TIMEOUT};
use p2pd_protocol::policy::startup::{self, Step, EXPLAIN_TIMEOUT};
use p2pd_protocol::policy::supervision::{self, Action, Event, Report, REGISTER_TIMEOUT};
use pyo3::prelude::*;
use std::time::Duration;

/// A time or a limit in seconds, which may be infinite.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 {
        Duration::MAX
    } else {
        Duration::ZERO
    })
}

/// Restarts of a daemon, and connections to its bootstrap peers.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Supervision(pub(super) supervision::Supervision);

impl Supervision {
    fn handle(&mut self, event: Event, now: f64) {
        let random = p2pd_sockets::random(0);
        self.0.handle(event, duration(now), random);
    }
}

#[pymethods]
impl Supervision {
    /// Time limit for the registrations of one client after a restart.
    #[classattr]
    const REGISTER_TIMEOUT: f64 = REGISTER_TIMEOUT.as_secs_f64();

    /// Returns the next action; None if there is nothing to do now.
    fn poll(&mut self) -> Option<SupervisionAction> {
        self.0.poll().map(SupervisionAction::from)
    }

    /// When to call `timeout`; None if no pause is in progress.
    #[getter]
    fn deadline(&self) -> Option<f64> {
        self.0.deadline().map(|deadline| deadline.as_secs_f64())
    }

    /// Whether supervision has ended: no event leads to another action.
    #[getter]
    fn finished(&self) -> bool {
        self.0.is_finished()
    }

    fn started(&mut self, now: f64) {
        self.handle(Event::Started, now);
    }

    fn start_failed(&mut self, now: f64) {
        self.handle(Event::StartFailed, now);
    }

    fn died(&mut self, now: f64) {
        self.handle(Event::Died, now);
    }

    fn connected(&mut self, peer: usize, now: f64) {
        self.handle(Event::Connected { peer }, now);
    }

    fn connect_failed(&mut self, peer: usize, reason: String, daemon_lost: bool, now: f64) {
        let event = Event::ConnectFailed {
            peer,
            reason,
            daemon_lost,
        };
        self.handle(event, now);
    }

    fn timeout(&mut self, now: f64) {
        self.handle(Event::Timeout, now);
    }

    fn stopped(&mut self, now: f64) {
        self.handle(Event::Stopped, now);
    }
}

/// What the driver of a `Supervision` must do. Fields that the kind does not use are 0 or empty.
#[pyclass(frozen, get_all, module = "p2pclient_rs._native")]
pub struct SupervisionAction {
    kind: &'static str,
    peer: usize,
    pause: f64,
    deaths: u32,
    reason: String,
}

impl From<Action> for SupervisionAction {
    fn from(action: Action) -> Self {
        let mut converted = SupervisionAction {
            kind: "",
            peer: 0,
            pause: 0.0,
            deaths: 0,
            reason: String::new(),
        };
        converted.kind = match action {
            Action::Watch => "watch",
            Action::Connect(peer) => {
                converted.peer = peer;
                "connect"
            }
            Action::Register => "register",
            Action::Abort => "abort",
            Action::Start => "start",
            Action::GiveUp { deaths } => {
                converted.deaths = deaths;
                "give up"
            }
            Action::Report(Report::Restarting(pause)) => {
                converted.pause = pause.as_secs_f64();
                "report restarting"
            }
            Action::Report(Report::Restarted) => "report restarted",
            Action::Report(Report::PeerConnected(peer)) => {
                converted.peer = peer;
                "report connected"
            }
            Action::Report(Report::PeerUnreachable(peer, reason)) => {
                (converted.peer, converted.reason) = (peer, reason);
                "report unreachable"
            }
        };
        converted
    }
}

/// Waiting for a spawned daemon to become ready.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Startup(startup::Startup);

#[pymethods]
impl Startup {
    #[new]
    fn new(now: f64, limit: f64) -> Self {
        Startup(startup::Startup::new(duration(now), duration(limit)))
    }

    /// Time limit for finding out why no bootstrap peer could be reached.
    #[classattr]
    const EXPLAIN_TIMEOUT: f64 = EXPLAIN_TIMEOUT.as_secs_f64();

    /// Returns what to do next and, for "wait", until when. For other steps, ignore the time.
    fn step(&self, now: f64) -> (&'static str, f64) {
        match self.0.step(duration(now)) {
            Step::Probe => ("probe", 0.0),
            Step::Wait(until) => ("wait", until.as_secs_f64()),
            Step::Ready => ("ready", 0.0),
            Step::Failed => ("failed", 0.0),
        }
    }

    /// Takes the outcome of a probe: None if the daemon is ready, otherwise why it is not.
    fn probed(&mut self, reason: Option<String>, now: f64) {
        self.0.probed(reason, duration(now));
    }

    /// Notes that the process has ended. The startup then fails, even if the daemon was ready before.
    fn ended(&mut self) {
        self.0.ended();
    }

    /// When to stop waiting for the reply to a probe.
    #[getter]
    fn deadline(&self) -> f64 {
        self.0.deadline().as_secs_f64()
    }

    /// Why the last probe did not find the daemon ready.
    #[getter]
    fn reason(&self) -> Option<&str> {
        self.0.reason()
    }
}

/// When to connect to a peer again, and which outcomes to report.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Reconnection(reconnection::Reconnection);

#[pymethods]
impl Reconnection {
    #[new]
    fn new() -> Self {
        Reconnection(reconnection::Reconnection::default())
    }

    /// Time limit for a CONNECT to a bootstrap peer.
    #[classattr]
    const TIMEOUT: f64 = CONNECT_TIMEOUT.as_secs_f64();

    /// Notes that the peer is connected. Returns the pause before the next CONNECT, and whether to
    /// report the connection.
    fn connected(&mut self) -> (f64, bool) {
        let (pause, is_news) = self.0.connected(p2pd_sockets::random(0));
        (pause.as_secs_f64(), is_news)
    }

    /// Notes that the CONNECT failed. Returns the pause before the next CONNECT, and whether to report
    /// the failure.
    fn failed(&mut self, reason: &str) -> (f64, bool) {
        let (pause, is_news) = self.0.failed(reason, p2pd_sockets::random(0));
        (pause.as_secs_f64(), is_news)
    }
}
