//! The pool of idle control connections of one event loop: applies the protocol's pool policy to Python
//! objects.

use super::connection::ControlConnection;
use p2pd_protocol::policy::pool::{self as policy, Fitness, Generation, WitnessId};
use p2pd_protocol::policy::retry::Attempt;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{intern, PyTraverseError, PyVisit};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Limit on concurrent requests for which the daemon asks other peers.
pub const MAX_SLOW_REQUESTS: usize = policy::MAX_SLOW_REQUESTS;

/// Limit on other concurrent requests, and on idle connections.
pub const MAX_IDLE: usize = policy::MAX_IDLE;

/// The idle connections of one event loop. A connection is a tuple whose first item is a
/// `ControlConnection`, with a method `close`.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct ConnectionPool {
    inner: Mutex<policy::Pool<Idle>>,
    /// The generation of every connection. A closed pool is in a later generation, so it takes none
    /// back.
    generation: Generation,
}

struct Idle {
    connection: Py<PyTuple>,
    raw: Py<ControlConnection>,
}

impl Idle {
    fn is_silent(&self) -> bool {
        self.raw.get().stale().is_ok_and(|stale| !stale)
    }
}

#[pymethods]
impl ConnectionPool {
    #[new]
    fn new(max_idle: usize) -> Self {
        let pool = policy::Pool::new(max_idle);
        Self {
            generation: pool.generation(),
            inner: Mutex::new(pool),
        }
    }

    /// Takes the most recently used idle connection, and closes stale ones.
    fn take(&self, py: Python<'_>) -> PyResult<Option<Py<PyTuple>>> {
        let mut closed = Vec::new();
        let fitness = |idle: &Idle| match idle.is_silent() {
            true => Fitness::Fit,
            false => Fitness::Stale,
        };
        let taken = self.lock().take(fitness, &mut closed);
        close_all(py, closed)?;
        Ok(taken.map(|idle| idle.connection))
    }

    /// Takes a connection back after a request. Closes it if it cannot be used again, or the oldest
    /// idle one if there are too many.
    fn give_back(&self, connection: Bound<'_, PyTuple>) -> PyResult<()> {
        let raw = connection.get_item(0)?;
        let raw = raw.cast_into::<ControlConnection>()?.unbind();
        let py = connection.py();
        let reusable = raw.get().reusable();
        let idle = Idle {
            connection: connection.unbind(),
            raw,
        };
        let closed = self.lock().give_back(idle, self.generation, reusable);
        close_all(py, closed)
    }

    /// Removes and returns the idle connections and the witness. From now on the pool takes no
    /// connection back.
    fn close(&self) -> Vec<Py<PyTuple>> {
        let closed = self.lock().close_idle();
        closed.into_iter().map(|idle| idle.connection).collect()
    }

    /// Chooses the witness of a registration that was just made. Returns its number, or None if
    /// there is no suitable connection.
    fn choose_witness(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let mut closed = Vec::new();
        let witness = self.lock().choose_witness(Idle::is_silent, &mut closed);
        close_all(py, closed)?;
        Ok(witness.map(|WitnessId(number)| number))
    }

    /// Begins a request on a witness. Returns its connection, or None if it is gone.
    fn begin_probe(&self, py: Python<'_>, witness: u64) -> Option<Py<PyTuple>> {
        let mut pool = self.lock();
        let idle = pool.begin_probe(WitnessId(witness))?;
        Some(idle.connection.clone_ref(py))
    }

    /// Ends a request on a witness. Closes its connection if it cannot be used again.
    fn end_probe(&self, py: Python<'_>, witness: u64) -> PyResult<()> {
        let closed = {
            let mut pool = self.lock();
            let id = WitnessId(witness);
            let reusable = pool
                .begin_probe(id)
                .is_some_and(|idle| idle.raw.get().reusable());
            pool.end_probe(id, reusable)
        };
        close_all(py, closed)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        if let Ok(pool) = self.inner.try_lock() {
            for idle in pool.connections() {
                visit.call(&idle.connection)?;
                visit.call(&idle.raw)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let closed = match self.inner.try_lock() {
            Ok(mut pool) => pool.close_idle(),
            Err(_) => return,
        };
        drop(closed);
    }
}

impl ConnectionPool {
    fn lock(&self) -> MutexGuard<'_, policy::Pool<Idle>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Calls `close` of each connection. The caller must not hold the lock.
fn close_all(py: Python<'_>, closed: impl IntoIterator<Item = Idle>) -> PyResult<()> {
    for idle in closed {
        idle.connection.call_method0(py, intern!(py, "close"))?;
    }
    Ok(())
}

/// Whether to send a request once more, on a new connection.
///
/// `pooled`: the failed attempt used a connection that was idle before. `repeated`: it was not the
/// first attempt. `unsent`: the daemon cannot have read the whole request.
#[pyfunction]
pub fn may_retry(pooled: bool, repeated: bool, unsent: bool) -> bool {
    Attempt { pooled, repeated }.may_retry(unsent)
}
