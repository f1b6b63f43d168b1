//! The lifecycle of a persistent connection, for the driver in `persistent.py`. See
//! `p2pd_protocol::policy::persistent`.

use super::errors::DaemonRefused;
use super::policy::duration;
use p2pd_protocol::policy::backoff::Backoff;
use p2pd_protocol::policy::persistent::{
    self as policy, Action, ConnectionId, Failure, Registration, Timing,
};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

type Error = Py<PyAny>;

/// Decides when a persistent connection is opened, and which handlers are registered on it.
///
/// Errors are exceptions. The caller of a method holds a reference to its error, so that no exception
/// is freed, and no Python code runs, under the lock.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Lifecycle(Mutex<policy::Lifecycle<u64, Error>>);

impl Lifecycle {
    fn lock(&self) -> MutexGuard<'_, policy::Lifecycle<u64, Error>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Lifecycle {
    /// `backoff` has the first and the longest pause. All times are in seconds.
    #[new]
    #[pyo3(signature = (random, *, open_timeout = None, backoff = None))]
    fn new(random: u64, open_timeout: Option<f64>, backoff: Option<(f64, f64)>) -> PyResult<Self> {
        let mut timing = Timing::default();
        if let Some(seconds) = open_timeout {
            timing.open_timeout = duration(seconds)?;
        }
        if let Some((first, longest)) = backoff {
            timing.backoff = Backoff::new(duration(first)?, duration(longest)?);
        }
        Ok(Self(Mutex::new(policy::Lifecycle::new(timing, random))))
    }

    fn connect(&self, token: u64) {
        self.lock().connect(token, Instant::now());
    }

    fn add(&self, token: u64, name: &str, balanced: bool) {
        self.lock().add(token, name, balanced, Instant::now());
    }

    fn remove(&self, token: u64, name: &str) {
        self.lock().remove(token, name, Instant::now());
    }

    fn cancel(&self, token: u64) {
        self.lock().cancel(token, Instant::now());
    }

    fn withdraw(&self, name: &str) {
        self.lock().withdraw(name, Instant::now());
    }

    fn close(&self) {
        self.lock().close();
    }

    fn opened(&self, connection_id: u64) -> bool {
        let id = ConnectionId(connection_id);
        self.lock().opened(id, Instant::now())
    }

    fn open_failed(&self, connection_id: u64, error: &Bound<'_, PyAny>) {
        let (id, error) = (ConnectionId(connection_id), error.clone().unbind());
        self.lock().open_failed(id, error, Instant::now());
    }

    fn lost(&self, connection_id: u64, error: &Bound<'_, PyAny>) {
        let (id, error) = (ConnectionId(connection_id), error.clone().unbind());
        self.lock().lost(id, error, Instant::now());
    }

    #[pyo3(signature = (connection_id, name, error = None, *, unsent = false))]
    fn registered(
        &self,
        connection_id: u64,
        name: &str,
        error: Option<&Bound<'_, PyAny>>,
        unsent: bool,
    ) {
        let outcome = match error {
            None => Registration::Accepted,
            Some(error) if unsent => Registration::Unsent(error.clone().unbind()),
            Some(error) if error.is_instance_of::<DaemonRefused>() => {
                Registration::Refused(error.clone().unbind())
            }
            Some(error) => Registration::Failed(error.clone().unbind()),
        };
        let id = ConnectionId(connection_id);
        self.lock().registered(id, name, outcome, Instant::now());
    }

    fn unregistered(&self, connection_id: u64, name: &str) {
        let id = ConnectionId(connection_id);
        self.lock().unregistered(id, name, Instant::now());
    }

    fn time(&self) {
        self.lock().time(Instant::now());
    }

    /// The next action, as a tuple of its name and its arguments.
    fn poll<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        let action = self.lock().poll();
        action.map(|action| to_tuple(py, action)).transpose()
    }

    /// Seconds until the next call of `time`.
    #[getter]
    fn deadline(&self) -> Option<f64> {
        let deadline = self.lock().deadline()?;
        let left = deadline.saturating_duration_since(Instant::now());
        Some(left.as_secs_f64())
    }

    /// The names of the handlers.
    #[getter]
    fn handlers(&self) -> Vec<String> {
        self.lock().handlers().map(str::to_owned).collect()
    }
}

fn to_tuple(py: Python<'_>, action: Action<u64, Error>) -> PyResult<Bound<'_, PyTuple>> {
    match action {
        Action::Open(id) => ("open", id.0).into_pyobject(py),
        Action::CancelOpen(id) => ("cancel_open", id.0).into_pyobject(py),
        Action::Close => ("close",).into_pyobject(py),
        Action::Ready => ("ready",).into_pyobject(py),
        Action::Serve { name, token } => ("serve", name, token).into_pyobject(py),
        Action::Forget(name) => ("forget", name).into_pyobject(py),
        Action::Register { name, balanced } => ("register", name, balanced).into_pyobject(py),
        Action::Unregister(name) => ("unregister", name).into_pyobject(py),
        Action::Report { name, error } => ("report", name, error).into_pyobject(py),
        Action::Complete { tokens, outcome } => match outcome {
            Ok(()) => ("complete", tokens).into_pyobject(py),
            Err(Failure::Driver(error)) => ("fail", tokens, "error", error).into_pyobject(py),
            Err(Failure::TimedOut(after)) => {
                let seconds = after.as_secs_f64();
                ("fail", tokens, "timed_out", seconds).into_pyobject(py)
            }
            Err(Failure::AlreadyRegistered) => {
                ("fail", tokens, "already_registered", py.None()).into_pyobject(py)
            }
            Err(Failure::NotRegistered) => {
                ("fail", tokens, "not_registered", py.None()).into_pyobject(py)
            }
            Err(Failure::Closed) => ("fail", tokens, "closed", py.None()).into_pyobject(py),
        },
    }
}
