//! Errors of the core and of sockets as the package's Python exceptions.

use crate::core;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use std::io;

pyo3::import_exception!(anyio, BrokenResourceError);
pyo3::import_exception!(anyio, ClosedResourceError);
pyo3::import_exception!(asyncio, LimitOverrunError);
pyo3::import_exception!(p2pclient_rs.exceptions, ConnectionLost);
pyo3::import_exception!(p2pclient_rs.exceptions, ControlFailure);
pyo3::import_exception!(p2pclient_rs.exceptions, DaemonRefused);
pyo3::import_exception!(p2pclient_rs.exceptions, DaemonStartError);
pyo3::import_exception!(p2pclient_rs.exceptions, ForkedClientError);
pyo3::import_exception!(p2pclient_rs.exceptions, MessageTooLarge);
pyo3::import_exception!(p2pclient_rs.exceptions, P2PHandlerError);
pyo3::import_exception!(p2pclient_rs.exceptions, ProtocolViolation);

/// The exception that says whose fault it was.
pub fn from_core(error: core::Error) -> PyErr {
    let words = error.to_string();
    match error.fault() {
        core::Fault::Caller => ControlFailure::new_err(words),
        core::Fault::Connection => {
            let mid_answer = matches!(error, core::Error::Closed { mid_message: true });
            Python::attach(|py| lost(py, words, "mid_answer", mid_answer))
        }
        core::Fault::Daemon => ProtocolViolation::new_err(words),
    }
}

/// The OSError with its number, by which Python and its programs tell one from another; PyO3's own
/// conversion leaves it out.
pub fn os_error(error: io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => Python::attach(|py| {
            let words = py
                .import("os")
                .and_then(|os| os.call_method1("strerror", (number,)));
            match words {
                Ok(words) => PyOSError::new_err((number, words.unbind())),
                Err(failed) => failed,
            }
        }),
        None => error.into(),
    }
}

/// A control connection that an error of the operating system ended. `unexecuted` says that the
/// daemon cannot have read the whole request.
pub fn connection_lost(error: io::Error, unexecuted: bool) -> PyErr {
    let words = format!("the connection was lost: {error}");
    Python::attach(|py| {
        let lost = lost(py, words, "unexecuted", unexecuted);
        lost.set_cause(py, Some(os_error(error)));
        lost
    })
}

/// A connection that was lost before it took the whole of a request.
pub fn connection_gone(words: &str) -> PyErr {
    Python::attach(|py| lost(py, words.to_owned(), "unexecuted", true))
}

fn lost(py: Python<'_>, words: String, attribute: &str, is: bool) -> PyErr {
    let lost = ConnectionLost::new_err(words);
    match lost.value(py).setattr(attribute, is) {
        Ok(()) => lost,
        Err(error) => error,
    }
}

/// Refuses what was made in another process, from which this one was forked.
pub fn check_fork(pid: u32, what: &str) -> PyResult<()> {
    let here = std::process::id();
    if here == pid {
        return Ok(());
    }
    Err(ForkedClientError::new_err(format!(
        "this {what} belongs to process {pid} and cannot be used in its forked child {here}: \
         make a new one here"
    )))
}

/// What a daemon means by refusing in these words: "not supported", "timed out", or None.
#[pyfunction]
pub fn refusal_kind(words: &str) -> Option<&'static str> {
    match core::error::Refusal::of(words) {
        core::error::Refusal::NotSupported => Some("not supported"),
        core::error::Refusal::TimedOut => Some("timed out"),
        core::error::Refusal::Other => None,
    }
}
