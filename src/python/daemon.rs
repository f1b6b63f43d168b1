//! Options and discovery of daemons for `p2pclient_rs.daemon`.

use super::errors;
use super::multiaddr::{extract_multiaddr, InvalidMultiaddr};
use p2pd_manager::process;
use p2pd_manager::{
    self as manager, Bootstrap, ConnectionManager, Dht, OptionsError, Pubsub, Search,
};
use p2pd_protocol::policy::supervision::RESTART_LIMIT;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// `bool | str`: on or off, or on with a choice.
#[derive(FromPyObject)]
enum Switch {
    Flag(bool),
    Choice(String),
}

/// `bool | tuple[int, int, float]`: on or off, or on with limits.
#[derive(FromPyObject)]
enum Manager {
    Flag(bool),
    Limits(u32, u32, f64),
}

/// `bool | int`: on or off, or on with another limit.
#[derive(FromPyObject)]
enum Restart {
    Flag(bool),
    Limit(i64),
}

/// A daemon's validated options.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct DaemonOptions(pub(super) manager::DaemonOptions);

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
        let mut options = manager::DaemonOptions::default();
        options.dht = match dht {
            Switch::Flag(on) => on.into(),
            Switch::Choice(mode) => match mode.as_str() {
                "client" => Dht::Client,
                "server" => Dht::Server,
                _ => return Err(no_choice("dht", ["client", "server"], &mode)),
            },
        };
        options.pubsub = match pubsub {
            Switch::Flag(on) => on.into(),
            Switch::Choice(router) => match router.as_str() {
                "gossipsub" => Pubsub::Gossipsub,
                "floodsub" => Pubsub::Floodsub,
                _ => return Err(no_choice("pubsub", ["gossipsub", "floodsub"], &router)),
            },
        };
        options.connection_manager = match connmgr {
            Manager::Flag(on) => on.into(),
            Manager::Limits(low, high, grace) => {
                let grace = Duration::try_from_secs_f64(grace).map_err(|error| {
                    PyValueError::new_err(format!("connmgr: grace period {grace}: {error}"))
                })?;
                ConnectionManager::Limits { low, high, grace }
            }
        };
        options.relay = relay;
        options.control = control;
        options.host_addrs = host_addrs;
        options.announce_addrs = announce_addrs;
        options.bootstrap_peers = bootstrap_peers;
        options.bootstrap = match bootstrap {
            "required" => Bootstrap::Required,
            "background" => Bootstrap::Background,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "bootstrap is \"required\" or \"background\", not {bootstrap:?}"
                )))
            }
        };
        options.identity = identity;
        options.extra_args = extra_args;
        options.restart = match restart {
            Restart::Flag(false) => 0,
            Restart::Flag(true) => RESTART_LIMIT,
            Restart::Limit(limit) => limit.try_into().map_err(|_| {
                PyValueError::new_err(format!(
                    "restart must be True, False or a number of deaths of at least 0, not {limit}"
                ))
            })?,
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

pub(super) fn value_error(error: OptionsError) -> PyErr {
    match error {
        OptionsError::Control(error) => InvalidMultiaddr::new_err(error.to_string()),
        error => PyValueError::new_err(error.to_string()),
    }
}

/// Finds the daemon's binary. Returns its path; or None, with the places searched and a hint.
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

/// Returns a TCP port that was unused a moment ago, at an address or name of this machine.
///
/// It is below the ephemeral port range, from which the system could assign it before it is used.
/// Raises OSError if the machine has no such address, or all ports are in use.
#[pyfunction]
#[pyo3(signature = (host = "127.0.0.1"))]
pub fn unused_tcp_port(py: Python<'_>, host: &str) -> PyResult<u16> {
    py.detach(|| process::unused_tcp_port(host))
        .map_err(errors::os_error)
}
