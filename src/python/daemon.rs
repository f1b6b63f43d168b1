//! Options, discovery and diagnosis of daemons for `p2pclient_rs.daemon`, which does the rest.

use crate::daemon::{self, ConnectionManager, Dht, Flavour, Pubsub, Search, Startup};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::ffi::OsString;
use std::path::PathBuf;
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

/// A daemon's options, checked.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct DaemonOptions(daemon::DaemonOptions);

#[pymethods]
impl DaemonOptions {
    #[new]
    #[pyo3(signature = (*, dht, relay, pubsub, connmgr, host_addrs, announce_addrs, bootstrap_peers, identity, extra_args))]
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
        identity: Option<PathBuf>,
        extra_args: Vec<String>,
    ) -> PyResult<Self> {
        let options = daemon::DaemonOptions {
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
            host_addrs,
            announce_addrs,
            bootstrap_peers,
            identity,
            extra_args,
            ..Default::default()
        };
        options.validate().map_err(value_error)?;
        Ok(DaemonOptions(options))
    }

    /// The arguments for this binary, serving the control protocol at this multiaddr.
    fn arguments(&self, binary: PathBuf, control: String) -> PyResult<Vec<String>> {
        let options = daemon::DaemonOptions {
            flavour: Flavour::of(&binary),
            control: Some(control),
            ..self.0.clone()
        };
        options.arguments().map_err(value_error)
    }
}

fn no_choice(option: &str, choices: [&str; 2], given: &str) -> PyErr {
    let [one, other] = choices;
    PyValueError::new_err(format!(
        "{option} is True, False, {one:?} or {other:?}, not {given:?}"
    ))
}

fn value_error(error: daemon::OptionsError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Finds the daemon's binary; returns it, or None and every place looked at.
#[pyfunction]
#[pyo3(signature = (explicit, variable, path, hivemind))]
pub fn find_daemon(
    explicit: Option<PathBuf>,
    variable: Option<OsString>,
    path: Option<OsString>,
    hivemind: Vec<PathBuf>,
) -> (Option<PathBuf>, Vec<String>) {
    let search = Search {
        explicit: explicit.as_deref(),
        variable: variable.as_deref(),
        path: path.as_deref(),
        hivemind,
    };
    match daemon::find(&search) {
        Ok(binary) => (Some(binary), Vec::new()),
        Err(error) => (None, error.looked_at),
    }
}

/// Reads from the daemon's output whether it has started, and its peer id if it prints one.
#[pyfunction]
pub fn daemon_startup(output: &str) -> (bool, Option<String>) {
    let startup = Startup::read(output);
    (startup.started, startup.peer_id)
}

/// Tells why a start failed, where that can be told.
#[pyfunction]
#[pyo3(signature = (output, returncode, arguments))]
pub fn diagnose_daemon(
    output: &str,
    returncode: Option<i32>,
    arguments: Vec<String>,
) -> Option<String> {
    daemon::diagnose(output, returncode, &arguments)
}

/// The lines of a daemon's output worth showing.
#[pyfunction]
pub fn excerpt_daemon_output(output: &str, limit: usize) -> Vec<String> {
    daemon::excerpt(output, limit)
        .into_iter()
        .map(str::to_owned)
        .collect()
}
