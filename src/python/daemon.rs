//! Options, discovery and processes of daemons for `p2pclient_rs.daemon`, which does the waiting.

use super::errors;
use super::forks;
use super::multiaddr::extract_multiaddr;
use super::multiaddr::{InvalidMultiaddr, PyMultiaddr};
use super::peer_id::extract_peer_id;
use super::peer_id::PyPeerId;
use p2pd_manager::process::{self, exit_code, Process};
use p2pd_manager::retry;
use p2pd_manager::{
    self as manager, Bootstrap, BootstrapPeer, ConnectionManager, DaemonError, Dht, OptionsError,
    Pubsub, Search, StartError,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// `bool | str`: on and off, or on with a choice.
#[derive(FromPyObject)]
enum Switch {
    Flag(bool),
    Choice(String),
}

/// `bool | tuple[int, int, float]`: on and off, or on with limits.
#[derive(FromPyObject)]
enum Manager {
    Flag(bool),
    Limits(u32, u32, f64),
}

/// `bool | int`: on and off, or on with another limit.
#[derive(FromPyObject)]
enum Restart {
    Flag(bool),
    Limit(i64),
}

/// A daemon's options, checked.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct DaemonOptions(manager::DaemonOptions);

#[pymethods]
impl DaemonOptions {
    #[new]
    #[pyo3(signature = (*, dht, relay, pubsub, connmgr, host_addrs, announce_addrs, bootstrap_peers, bootstrap, identity, control_maddr, extra_args, restart))]
    // One parameter for each option of Python's `Daemon`.
    #[allow(clippy::too_many_arguments)]
    fn new(
        dht: Switch,
        relay: Option<bool>,
        pubsub: Switch,
        connmgr: Manager,
        host_addrs: Vec<String>,
        announce_addrs: Vec<String>,
        bootstrap_peers: Vec<String>,
        bootstrap: &str,
        identity: Option<PathBuf>,
        control_maddr: Option<&Bound<'_, PyAny>>,
        extra_args: Vec<String>,
        restart: Restart,
    ) -> PyResult<Self> {
        let control = control_maddr.map(extract_multiaddr).transpose()?;
        let options = manager::DaemonOptions {
            dht: match dht {
                Switch::Flag(on) => on.into(),
                Switch::Choice(mode) => match mode.as_str() {
                    "client" => Dht::Client,
                    "server" => Dht::Server,
                    _ => return Err(no_choice("dht", ["client", "server"], &mode)),
                },
            },
            pubsub: match pubsub {
                Switch::Flag(on) => on.into(),
                Switch::Choice(router) => match router.as_str() {
                    "gossipsub" => Pubsub::Gossipsub,
                    "floodsub" => Pubsub::Floodsub,
                    _ => return Err(no_choice("pubsub", ["gossipsub", "floodsub"], &router)),
                },
            },
            connection_manager: match connmgr {
                Manager::Flag(on) => on.into(),
                Manager::Limits(low, high, grace) => {
                    let grace = Duration::try_from_secs_f64(grace).map_err(|error| {
                        PyValueError::new_err(format!("connmgr: grace period {grace}: {error}"))
                    })?;
                    ConnectionManager::Limits { low, high, grace }
                }
            },
            relay,
            control,
            host_addrs,
            announce_addrs,
            bootstrap_peers,
            bootstrap: match bootstrap {
                "required" => Bootstrap::Required,
                "background" => Bootstrap::Background,
                _ => {
                    return Err(PyValueError::new_err(format!(
                        "bootstrap is \"required\" or \"background\", not {bootstrap:?}"
                    )))
                }
            },
            identity,
            extra_args,
            restart: match restart {
                Restart::Flag(false) => 0,
                Restart::Flag(true) => retry::Restarts::LIMIT,
                Restart::Limit(limit) => limit.try_into().map_err(|_| {
                    PyValueError::new_err(format!("restart cannot be {limit} deaths"))
                })?,
            },
            ..Default::default()
        };
        options.validate().map_err(value_error)?;
        Ok(DaemonOptions(options))
    }
}

fn no_choice(option: &str, choices: [&str; 2], given: &str) -> PyErr {
    let [one, other] = choices;
    PyValueError::new_err(format!(
        "{option} is True, False, {one:?} or {other:?}, not {given:?}"
    ))
}

fn value_error(error: OptionsError) -> PyErr {
    match error {
        OptionsError::Control(error) => InvalidMultiaddr::new_err(error.to_string()),
        error => PyValueError::new_err(error.to_string()),
    }
}

/// Finds the daemon's binary; returns it, or None, the places searched, and a hint.
#[pyfunction]
#[pyo3(signature = (explicit, variable, path, hivemind))]
pub fn find_daemon(
    explicit: Option<PathBuf>,
    variable: Option<OsString>,
    path: Option<OsString>,
    hivemind: Vec<PathBuf>,
) -> (Option<PathBuf>, Vec<String>, Option<&'static str>) {
    let search = Search {
        explicit: explicit.as_deref(),
        variable: variable.as_deref(),
        path: path.as_deref(),
        hivemind,
    };
    match manager::find(&search) {
        Ok(binary) => (Some(binary), Vec::new(), None),
        Err(error) => (None, error.looked_at, Some(error.hint)),
    }
}

/// A TCP port that nobody listened on a moment ago, at an address or name of this machine.
///
/// It is none of those that the system gives to whoever asks for any, or connects: one of these
/// could be gone before it is used. Raises OSError if there is no such address, or no port.
#[pyfunction]
#[pyo3(signature = (host = "127.0.0.1"))]
pub fn unused_tcp_port(py: Python<'_>, host: &str) -> PyResult<u16> {
    py.detach(|| process::unused_tcp_port(host))
        .map_err(errors::os_error)
}

/// Does what may wait for a lock of a daemon, with the interpreter released.
fn outside<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(|| forks::GATE.pass(work))
}

/// A daemon's process, its janitor and its files.
///
/// Whatever takes a lock of it lets go of the interpreter first. A forked child never waits for one.
#[pyclass(frozen, weakref, module = "p2pclient_rs._native")]
pub struct DaemonProcess(Arc<Process>);

#[pymethods]
impl DaemonProcess {
    /// `janitor` is "shell" or "forked"; by default "forked" only if there is no shell.
    #[new]
    #[pyo3(signature = (binary, options, parent, *, janitor = None))]
    fn new(
        py: Python<'_>,
        binary: PathBuf,
        options: &Bound<'_, DaemonOptions>,
        parent: PathBuf,
        janitor: Option<&str>,
    ) -> PyResult<Self> {
        let janitor = match janitor {
            None => None,
            #[cfg(unix)]
            Some("shell") => Some(process::Kind::Shell),
            #[cfg(target_os = "linux")]
            Some("forked") => Some(process::Kind::Forked),
            Some(other) => {
                return Err(PyValueError::new_err(format!("no such janitor: {other:?}")));
            }
        };
        let options = &options.get().0;
        outside(py, || {
            Process::prepare_with(binary, options, Some(&parent), janitor).map(forks::registered)
        })
        .map(DaemonProcess)
        .map_err(|error| prepare_error(py, error))
    }

    /// The same daemon in a process of its own, which does not connect to its bootstrap peers.
    fn without_bootstrap(&self, py: Python<'_>) -> PyResult<Self> {
        outside(py, || self.0.without_bootstrap().map(forks::registered))
            .map(DaemonProcess)
            .map_err(|error| prepare_error(py, error))
    }

    /// Each with its address as it was given.
    fn bootstrap_peers(&self) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
        peers(self.0.bootstrap_peers())
    }

    /// Those that are not for the daemon itself to connect to.
    fn background_peers(&self) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
        peers(self.0.background_peers())
    }

    /// When it is to be started again; None if never.
    fn restarts(&self) -> Option<Restarts> {
        self.0.restarts().map(Restarts)
    }

    /// Says whether somebody starts it again when it ends.
    fn keep(&self, kept: bool) {
        self.0.keep(kept);
    }

    /// Whether it has ended and nobody starts it again.
    #[getter]
    fn over(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.over())
    }

    /// Runs the daemon; again, if it has ended. Raises DaemonStartError if it cannot be executed.
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

    /// A new address for a client to listen at, in the private directory.
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
    fn janitor_pid(&self) -> u32 {
        self.0.janitor_pid()
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

    /// Asks the daemon and its children to end, if it is running.
    fn terminate(&self, py: Python<'_>) {
        outside(py, || self.0.terminate());
    }

    /// Kills the daemon and its children, if it is running.
    fn kill(&self, py: Python<'_>) {
        outside(py, || self.0.kill());
    }

    /// The end of what the daemon has printed.
    fn output(&self, py: Python<'_>) -> String {
        outside(py, || self.0.output())
    }

    /// Does the next step of `destroy` without waiting; returns whether nothing is left.
    fn try_destroy(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.try_destroy())
    }

    /// Ends all of it now.
    fn destroy(&self, py: Python<'_>) {
        let mut pause = Duration::from_micros(200);
        while !self.try_destroy(py) {
            py.detach(|| thread::sleep(pause));
            pause = (2 * pause).min(Duration::from_millis(10));
        }
    }

    /// Why the answer to IDENTIFY that this peer id came in is not to be believed yet, or None.
    fn doubt(&self, py: Python<'_>, peer_id: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
        let peer_id = extract_peer_id(peer_id)?;
        Ok(outside(py, || self.0.doubt(&peer_id)))
    }

    /// The DaemonStartError of a daemon that ended, or was not ready in this many seconds.
    /// `reasons` says why which bootstrap peer could not be reached.
    #[pyo3(signature = (timeout, obstacle, reasons = Vec::new()))]
    fn not_ready(
        &self,
        py: Python<'_>,
        timeout: f64,
        obstacle: Option<String>,
        reasons: Vec<(String, String)>,
    ) -> PyErr {
        let error = outside(py, || self.0.not_ready(timeout, obstacle));
        start_error(py, error.with_reasons(&reasons))
    }

    /// Whether it ended since it reached none of its bootstrap peers.
    #[getter]
    fn unconnected(&self, py: Python<'_>) -> bool {
        outside(py, || self.0.not_ready(0.0, None).is_unconnected())
    }

    /// The DaemonStartError of a daemon that was ready, and died.
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

fn peers(peers: Vec<(&str, BootstrapPeer)>) -> Vec<(String, PyPeerId, Vec<PyMultiaddr>)> {
    let peers = peers.into_iter();
    let taken_apart = |(address, peer): (&str, BootstrapPeer)| {
        let addrs = peer.addrs.into_iter().map(Into::into).collect();
        (address.to_owned(), peer.peer_id.into(), addrs)
    };
    peers.map(taken_apart).collect()
}

/// When a daemon that died is started again.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Restarts(retry::Restarts);

#[pymethods]
impl Restarts {
    /// It has died, having lived for so many seconds. Returns the pause until it is started again,
    /// or None if it is given up.
    fn died(&mut self, lived: f64) -> Option<f64> {
        // A clock that went backwards, or has no number.
        let lived = Duration::try_from_secs_f64(lived).unwrap_or_default();
        self.0.died(lived).map(|pause| pause.as_secs_f64())
    }

    #[getter]
    fn deaths(&self) -> u32 {
        self.0.deaths()
    }
}

/// When to connect to a bootstrap peer, and what to tell of it.
#[pyclass(module = "p2pclient_rs._native")]
pub struct Reconnection(retry::Reconnection);

#[pymethods]
impl Reconnection {
    #[new]
    fn new() -> Self {
        Reconnection(retry::Reconnection::default())
    }

    #[classattr]
    const TIMEOUT: f64 = retry::Reconnection::TIMEOUT.as_secs_f64();

    /// It is connected. Returns the pause until the next time, and whether this is news.
    fn connected(&mut self) -> (f64, bool) {
        let (pause, news) = self.0.connected();
        (pause.as_secs_f64(), news)
    }

    /// It could not be connected to. Returns the pause until the next time, and whether this is news.
    fn failed(&mut self, reason: &str) -> (f64, bool) {
        let (pause, news) = self.0.failed(reason);
        (pause.as_secs_f64(), news)
    }
}

/// The DaemonStartError. One for which the operating system is to blame has its error as the
/// `__cause__`, its number, and also the built-in class for that.
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
