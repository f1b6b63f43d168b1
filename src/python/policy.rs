//! The protocol's policies for inbound streams and registrations, as Python classes.

use p2pd_protocol::policy::inbound::{self, Admission};
use p2pd_protocol::policy::registration::{self, Action, Ending, Former, Record, Reply};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::time::Duration;

/// Adds the constants of the policies.
pub fn add_constants(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("MAX_HEADER", inbound::MAX_HEADER)?;
    m.add("HEADER_TIMEOUT", inbound::HEADER_TIMEOUT.as_secs_f64())?;
    m.add("MAX_HALF_OPEN", inbound::MAX_HALF_OPEN)?;
    let patience = inbound::HALF_OPEN_PATIENCE.as_secs_f64();
    m.add("HALF_OPEN_PATIENCE", patience)?;
    m.add("ACCEPT_PAUSE", inbound::ACCEPT_PAUSE.as_secs_f64())
}

/// The accepted connections that have no complete header yet.
#[pyclass(module = "p2pclient_rs._native")]
pub struct HalfOpen(inbound::HalfOpen);

#[derive(IntoPyObject)]
enum PyAdmission {
    Wait(f64),
    Close(u64),
}

#[pymethods]
impl HalfOpen {
    #[new]
    fn new(max: usize, patience: f64) -> PyResult<Self> {
        Ok(Self(inbound::HalfOpen::new(max, duration(patience)?)))
    }

    /// Notes a connection accepted at `now`, in seconds. Returns its number.
    fn enter(&mut self, now: f64) -> PyResult<u64> {
        Ok(self.0.enter(duration(now)?))
    }

    /// Forgets a connection.
    fn leave(&mut self, number: u64) {
        self.0.leave(number);
    }

    /// Decides whether another connection may be accepted: None if it may, a float for the seconds
    /// to wait, an int for the number of a connection to close first.
    fn admission(&self, handlers: usize, now: f64) -> PyResult<Option<PyAdmission>> {
        Ok(match self.0.admission(handlers, duration(now)?) {
            Admission::Accept => None,
            Admission::Wait(wait) => Some(PyAdmission::Wait(wait.as_secs_f64())),
            Admission::Close(number) => Some(PyAdmission::Close(number)),
        })
    }
}

/// Allows one log line of a kind in each second, and counts the suppressed ones.
#[pyclass(module = "p2pclient_rs._native")]
pub struct LogThrottle(inbound::LogThrottle);

#[pymethods]
impl LogThrottle {
    #[new]
    fn new() -> Self {
        Self(inbound::LogThrottle::default())
    }

    /// Notes an event at `now`, in seconds. Returns the number of suppressed lines since the last
    /// one, or None if this one is suppressed too.
    fn note(&mut self, now: f64) -> PyResult<Option<u64>> {
        Ok(self.0.note(1, duration(now)?))
    }
}

/// A registration of one protocol, in progress.
///
/// An action is a pair: `("register", balanced)`, `("remove", former)`, `("probe", False)`, or, at
/// the end, `("registered", False)`, `("last error", False)` or `("first error", False)`.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Registering(registration::Registering);

#[pymethods]
impl Registering {
    /// `former`: whether the former registration is balanced, unchanged, and has a witness; None if
    /// there is none.
    #[new]
    fn new(balanced: bool, former: Option<(bool, bool, bool)>, replace: bool) -> Self {
        let former = former.map(|(balanced, unchanged, witnessed)| Former {
            balanced,
            unchanged,
            witnessed,
        });
        Self(registration::Registering::new(balanced, former, replace))
    }

    /// The first action.
    fn first(&mut self) -> (&'static str, bool) {
        pair(self.0.first())
    }

    /// The next action. `reply` is "done", "taken", "refused", "unreachable" or "lost".
    fn next(&mut self, reply: &str) -> PyResult<(&'static str, bool)> {
        let reply = match reply {
            "done" => Reply::Done,
            "taken" => Reply::Taken,
            "refused" => Reply::Refused,
            "unreachable" => Reply::Unreachable,
            "lost" => Reply::Lost,
            _ => return Err(PyValueError::new_err("no such reply")),
        };
        Ok(pair(self.0.next(reply)))
    }

    /// Which registration the daemon has, or may have: "former", "current" or "none".
    #[getter]
    fn record(&self) -> &'static str {
        match self.0.record() {
            Record::Former => "former",
            Record::Current => "current",
            Record::Nothing => "none",
        }
    }
}

fn pair(action: Action) -> (&'static str, bool) {
    match action {
        Action::Register { balanced } => ("register", balanced),
        Action::Remove { former } => ("remove", former),
        Action::Probe => ("probe", false),
        Action::End(Ending::Registered) => ("registered", false),
        Action::End(Ending::LastError) => ("last error", false),
        Action::End(Ending::FirstError) => ("first error", false),
    }
}

pub(super) fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))
}
