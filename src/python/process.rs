//! A daemon's process, as a Python class. `startup.py` waits until it is ready, and `process.py` until
//! it ends.

use super::daemon::{value_error, DaemonOptions};
use super::errors;
use super::fork_hooks;
use super::multiaddr::PyMultiaddr;
use super::peer_id::{extract_peer_id, PyPeerId};
use super::supervision::Supervision;
use p2pd_manager::process::{self, exit_code, Process};
use p2pd_manager::{BootstrapPeer, DaemonError, StartError};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Runs work that may wait for a lock of a daemon, with the GIL released.
fn outside<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(|| fork_hooks::GATE.pass(work))
}

/// A daemon's process, its watchdog and its files.
///
/// Methods that take a lock release the GIL first. A forked child never waits for one.
#[pyclass(frozen, weakref, module = "p2pclient_rs._native")]
pub struct DaemonProcess(Arc<Process>);

#[pymethods]
impl DaemonProcess {
    /// `watchdog` is "shell" or "forked"; by default "forked" only if there is no shell.
    #[new]
    #[pyo3(signature = (binary, options, parent, *, watchdog = None))]
    fn new(
        py: Python<'_>,
        binary: PathBuf,
        options: &Bound<'_, DaemonOptions>,
        parent: PathBuf,
        watchdog: Option<&str>,
    ) -> PyResult<Self> {
        let watchdog = match watchdog {
            None => None,
            #[cfg(unix)]
            Some("shell") => Some(process::WatchdogKind::Shell),
            #[cfg(target_os = "linux")]
            Some("forked") => Some(process::WatchdogKind::Forked),
            Some(other) => {
                return Err(PyValueError::new_err(format!(
                    "no such watchdog: {other:?}"
                )));
            }
        };
        let options = &options.get().0;
        outside(py, || {
            Process::prepare_with(binary, options, Some(&parent), watchdog)
                .map(fork_hooks::registered)
        })
        .map(DaemonProcess)
        .map_err(|error| prepare_error(py, error))
    }

    /// A second daemon with the same options that does not connect to the bootstrap peers.
    fn without_bootstrap(&self, py: Python<'_>) -> PyResult<Self> {
        outside(py, || {
            self.0.without_bootstrap().map(fork_hooks::registered)
        })
        .map(DaemonProcess)
        .map_err(|error| prepare_error(py, error))
    }

    /// The bootstrap peers, each with its address as the caller gave it.
    fn bootstrap_peers(&self) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
        peers(self.0.bootstrap_peers())
    }

    /// The bootstrap peers that a supervisor connects the daemon to, instead of the daemon itself.
    fn background_peers(&self) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
        peers(self.0.background_peers())
    }

    /// The decisions of a supervisor for this daemon; None if it needs no supervisor.
    fn supervision(&self) -> Option<Supervision> {
        self.0.supervision().map(Supervision)
    }

    /// Consecutive deaths after which the daemon is no longer restarted; 0 if it is never restarted.
    #[getter]
    fn restart_limit(&self) -> u32 {
        self.0.restart_limit()
    }

    /// Sets whether a supervisor restarts the daemon when it ends.
    fn set_supervised(&self, supervised: bool) {
        self.0.set_supervised(supervised);
    }

    /// Whether the daemon has ended, and no supervisor restarts it.
    #[getter]
    fn finished(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.finished())
    }

    /// Spawns the daemon, for the first time or after it has ended. Raises DaemonStartError if the
    /// binary cannot be executed.
    fn spawn(&self, py: Python<'_>) -> PyResult<()> {
        outside(py, || self.0.spawn()).map_err(|error| start_error(py, error))
    }

    #[getter]
    fn command(&self) -> Vec<String> {
        self.0.command()
    }

    #[getter]
    fn control_maddr(&self) -> PyMultiaddr {
        self.0.control().clone().into()
    }

    /// A new address at which a client can listen, in the private directory.
    fn listen_maddr(&self) -> PyMultiaddr {
        self.0.listen_maddr().into()
    }

    /// The file with the output.
    #[getter]
    fn log(&self) -> String {
        self.0.log().display().to_string()
    }

    #[getter]
    fn pid(&self) -> Option<u32> {
        self.0.pid()
    }

    #[getter]
    fn watchdog_pid(&self) -> u32 {
        self.0.watchdog_pid()
    }

    #[getter]
    fn owned(&self) -> bool {
        self.0.owned()
    }

    #[getter]
    fn ended(&self) -> bool {
        self.0.ended()
    }

    #[getter]
    fn destroyed(&self) -> bool {
        self.0.destroyed()
    }

    #[getter]
    fn alive(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.alive())
    }

    /// The exit status, negative for a signal; None if the daemon is running.
    fn poll(&self, py: Python<'_>) -> Option<i32> {
        outside(py, || self.0.poll()).map(exit_code)
    }

    /// Sends SIGTERM to the daemon and its children, if it is running.
    fn terminate(&self, py: Python<'_>) {
        outside(py, || self.0.terminate());
    }

    /// Kills the daemon and its children, if it is running.
    fn kill(&self, py: Python<'_>) {
        outside(py, || self.0.kill());
    }

    /// The last MiB of the daemon's output.
    fn output(&self, py: Python<'_>) -> String {
        outside(py, || self.0.output())
    }

    /// Takes the next step of `destroy` without blocking. Returns whether the shutdown is complete.
    fn try_destroy(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.try_destroy())
    }

    /// Kills the daemon and removes its files.
    fn destroy(&self, py: Python<'_>) {
        let mut pause = Duration::from_micros(200);
        while !self.try_destroy(py) {
            py.detach(|| thread::sleep(pause));
            pause = (2 * pause).min(Duration::from_millis(10));
        }
    }

    /// Returns why a reply to IDENTIFY with this peer id does not mean that the daemon is ready, or
    /// None.
    fn why_not_ready(
        &self,
        py: Python<'_>,
        peer_id: &Bound<'_, PyAny>,
    ) -> PyResult<Option<String>> {
        let peer_id = extract_peer_id(peer_id)?;
        Ok(outside(py, || self.0.why_not_ready(&peer_id)))
    }

    /// Returns the DaemonStartError for a daemon that ended, or was not ready in `timeout` seconds.
    /// `reasons` has each bootstrap peer and why it could not be reached.
    #[pyo3(signature = (timeout, reason, reasons = Vec::new()))]
    fn not_ready(
        &self,
        py: Python<'_>,
        timeout: f64,
        reason: Option<String>,
        reasons: Vec<(String, String)>,
    ) -> PyErr {
        let error = outside(py, || self.0.not_ready(timeout, reason));
        start_error(py, error.with_reasons(&reasons))
    }

    /// Whether the daemon ended because it could not reach any bootstrap peer.
    #[getter]
    fn unconnected(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.not_ready(0.0, None).is_unconnected())
    }

    /// Returns the DaemonStartError for a daemon that was ready and died.
    fn died(&self, py: Python<'_>) -> PyErr {
        start_error(py, outside(py, || self.0.died()))
    }
}

fn prepare_error(py: Python<'_>, error: DaemonError) -> PyErr {
    match error {
        DaemonError::Options(error) => value_error(error),
        DaemonError::Start(error) => start_error(py, error),
        error => PyValueError::new_err(error.to_string()),
    }
}

fn peers(peers: Vec<(String, BootstrapPeer)>) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
    let peers = peers.into_iter();
    let converted = |(address, peer): (String, BootstrapPeer)| {
        let addrs = peer.addrs.into_iter().map(Into::into).collect();
        (address, peer.peer_id.into(), addrs)
    };
    peers.map(converted).collect()
}

/// Converts to a DaemonStartError. If the cause is an error of the operating system, the exception has
/// the errno and the OSError as its `__cause__`, and is also an instance of that OSError's class.
fn start_error(py: Python<'_>, error: StartError) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let details = PyDict::new(py);
        details.set_item("hint", error.hint())?;
        details.set_item("command", error.command)?;
        details.set_item("returncode", error.status)?;
        details.set_item("logs", error.logs)?;
        details.set_item("cause", error.cause)?;
        let source = error.source.map(|source| match source.raw_os_error() {
            Some(number) => std::io::Error::from_raw_os_error(number),
            None => std::io::Error::new(source.kind(), source.to_string()),
        });
        let number = source.as_ref().and_then(std::io::Error::raw_os_error);
        details.set_item("errno", number)?;
        let class = py.get_type::<errors::DaemonStartError>();
        let class = class.call_method1("_of_errno", (number,))?;
        let made = PyErr::from_value(class.call((error.message,), Some(&details))?);
        if let Some(source) = source {
            made.set_cause(py, Some(errors::os_error(source)));
        }
        Ok(made)
    };
    make().unwrap_or_else(|failed| failed)
}
