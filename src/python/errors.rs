//! Errors of the protocol and of sockets as the package's Python exceptions.

use p2pd_protocol as protocol;
use p2pd_protocol::policy::refusal::Refusal;
pub use p2pd_protocol::policy::refusal::UNKNOWN_REQUEST;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::PyTypeInfo;
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

/// `p2pclient_rs.exceptions.connection_lost`, which makes a ConnectionLost of the class for its errno.
static MAKE_LOST: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

fn make_lost(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    let make = MAKE_LOST.get_or_try_init(py, || {
        let exceptions = py.import("p2pclient_rs.exceptions")?;
        exceptions.getattr("connection_lost").map(Bound::unbind)
    })?;
    Ok(make.bind(py))
}

/// Imports the exceptions. What opens a socket does it, for a finalizer that closes one at the
/// interpreter's end cannot import anything any more.
pub fn import(py: Python<'_>) {
    BrokenResourceError::type_object(py);
    ClosedResourceError::type_object(py);
    ConnectionLost::type_object(py);
    ControlFailure::type_object(py);
    DaemonRefused::type_object(py);
    MessageTooLarge::type_object(py);
    P2PHandlerError::type_object(py);
    ProtocolViolation::type_object(py);
    let _ = make_lost(py); // what fails here fails there
}

/// An exception that is made here and now. PyO3 makes its own when they are looked at, for which
/// it lets go of the interpreter; at its end, in a finalizer, it does not come back.
pub fn made<E: PyTypeInfo>(py: Python<'_>, words: &str) -> PyErr {
    match E::type_object(py).call1((words,)) {
        Ok(value) => PyErr::from_value(value),
        Err(failed) => failed,
    }
}

/// The exception that says whose fault it was.
pub fn from_core(error: protocol::Error) -> PyErr {
    let words = error.to_string();
    Python::attach(|py| match error.fault() {
        protocol::Fault::Caller => made::<ControlFailure>(py, &words),
        protocol::Fault::Connection => match error {
            protocol::Error::NoMemory { .. } => made_lost(py, &words, Some(libc::ENOMEM)),
            _ => {
                let mid_answer = matches!(error, protocol::Error::Closed { mid_message: true });
                let lost = made_lost(py, &words, None);
                marked(py, lost, "mid_answer", mid_answer)
            }
        },
        protocol::Fault::Daemon => made::<ProtocolViolation>(py, &words),
    })
}

/// The OSError with its number, by which Python and its programs tell one from another; PyO3's own
/// conversion leaves it out.
pub fn os_error(error: io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => Python::attach(|py| {
            let made = py
                .import("os")
                .and_then(|os| os.call_method1("strerror", (number,)))
                .and_then(|words| PyOSError::type_object(py).call1((number, words)));
            made.map_or_else(|failed| failed, PyErr::from_value)
        }),
        None => error.into(),
    }
}

/// A control connection that an error of the operating system ended. `unexecuted` says that the
/// daemon cannot have read the whole request.
pub fn connection_lost(error: io::Error, unexecuted: bool) -> PyErr {
    let words = format!("the connection was lost: {error}");
    Python::attach(|py| {
        let lost = made_lost(py, &words, error.raw_os_error());
        let lost = marked(py, lost, "unexecuted", unexecuted);
        lost.set_cause(py, Some(os_error(error)));
        lost
    })
}

/// A connection that was lost before it took the whole of a request.
pub fn connection_gone(words: &str) -> PyErr {
    connection_gone_of(words, None)
}

/// As `connection_gone`, with the operating system's number of the error, if it gave one.
pub fn connection_gone_of(words: &str, number: Option<i32>) -> PyErr {
    Python::attach(|py| {
        let lost = made_lost(py, words, number);
        marked(py, lost, "unexecuted", true)
    })
}

/// A message over a limit, sent or received, which the connection survives.
pub fn too_large(py: Python<'_>, error: &protocol::Error) -> PyErr {
    let (size, limit) = match *error {
        protocol::Error::RequestTooLarge { size, limit }
        | protocol::Error::ReplyTooLarge { size, limit } => (Some(size), Some(limit)),
        protocol::Error::NoMemory { size } => (Some(size), None),
        _ => (None, None),
    };
    let received = !matches!(error, protocol::Error::RequestTooLarge { .. });
    let raised = made::<MessageTooLarge>(py, &error.to_string());
    let value = raised.value(py);
    let set = value
        .setattr("size", size)
        .and_then(|()| value.setattr("limit", limit))
        .and_then(|()| value.setattr("received", received));
    match set {
        Ok(()) => raised,
        Err(failed) => failed,
    }
}

/// A refusal in the daemon's words.
pub fn refused(py: Python<'_>, words: &str) -> PyErr {
    let refused = made::<DaemonRefused>(py, "the daemon refused");
    match refused.value(py).setattr("daemon_message", words) {
        Ok(()) => refused,
        Err(error) => error,
    }
}

/// A ConnectionLost that is an instance of the built-in class for `number`, too.
fn made_lost(py: Python<'_>, words: &str, number: Option<i32>) -> PyErr {
    let special = number.and_then(|number| {
        let make = make_lost(py);
        make.and_then(|make| make.call1((words, number))).ok()
    });
    match special {
        Some(value) => PyErr::from_value(value),
        // The number is not known, or the interpreter ends and there is nothing left to make it.
        None => made::<ConnectionLost>(py, words),
    }
}

fn marked(py: Python<'_>, lost: PyErr, attribute: &str, is: bool) -> PyErr {
    match lost.value(py).setattr(attribute, is) {
        Ok(()) => lost,
        Err(error) => error,
    }
}

/// Why a connection is no more.
#[derive(Clone)]
pub enum Loss {
    Protocol(protocol::Error),
    /// In words, and the operating system's number for it.
    Socket(String, Option<i32>),
    Closed,
}

impl Loss {
    /// The exception, anew for each who is told.
    pub fn to_err(&self, py: Python<'_>) -> PyErr {
        match self {
            Loss::Protocol(error) => from_core(error.clone()),
            Loss::Socket(words, number) => made_lost(py, words, *number),
            Loss::Closed => made::<ConnectionLost>(py, "the client was closed"),
        }
    }
}

impl From<io::Error> for Loss {
    fn from(error: io::Error) -> Self {
        let number = error.raw_os_error();
        Loss::Socket(format!("the connection was lost: {error}"), number)
    }
}

/// Refuses what was made in another process, from which this one was forked.
pub fn check_fork(pid: u32, what: &str) -> PyResult<()> {
    let here = super::fork_guard::pid();
    if here == pid {
        return Ok(());
    }
    Err(ForkedClientError::new_err(format!(
        "this {what} belongs to process {pid} and cannot be used in its forked child {here}: \
         make a new one here"
    )))
}

/// The class of a refusal: "not supported", "timed out", "already registered", or None.
#[pyfunction]
pub fn refusal_kind(message: &str) -> Option<&'static str> {
    match Refusal::of(message) {
        Refusal::NotSupported => Some("not supported"),
        Refusal::TimedOut => Some("timed out"),
        Refusal::AlreadyRegistered => Some("already registered"),
        _ => None,
    }
}
