//! Converts errors of the protocol and of sockets to the package's Python exceptions.

use super::shutdown_guard::enter;
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

/// `p2pclient_rs.exceptions.connection_lost`, which makes a ConnectionLost that is also an instance of
/// the built-in class for its errno.
static MAKE_LOST: PyOnceLock<Py<PyAny>> = PyOnceLock::new();

fn make_lost(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    let make = MAKE_LOST.get_or_try_init(py, || {
        let exceptions = py.import("p2pclient_rs.exceptions")?;
        exceptions.getattr("connection_lost").map(Bound::unbind)
    })?;
    Ok(make.bind(py))
}

/// Imports the exceptions. Called when a socket is opened: a finalizer that closes the socket while the
/// interpreter exits cannot import anything.
pub fn import(py: Python<'_>) {
    BrokenResourceError::type_object(py);
    ClosedResourceError::type_object(py);
    ConnectionLost::type_object(py);
    ControlFailure::type_object(py);
    DaemonRefused::type_object(py);
    MessageTooLarge::type_object(py);
    P2PHandlerError::type_object(py);
    ProtocolViolation::type_object(py);
    let _ = make_lost(py); // if this fails, the later use reports it
}

/// Creates an exception at once. PyO3 would create it on first use, and release the GIL for that. A
/// finalizer that runs while the interpreter exits would not get the GIL back.
pub fn made<E: PyTypeInfo>(py: Python<'_>, message: &str) -> PyErr {
    let _guard = enter(py);
    match E::type_object(py).call1((message,)) {
        Ok(value) => PyErr::from_value(value),
        Err(failed) => failed,
    }
}

/// Returns the exception whose class says whose fault the error is.
pub fn from_core(error: protocol::Error) -> PyErr {
    let message = error.to_string();
    Python::attach(|py| match error.fault() {
        protocol::Fault::Caller => made::<ControlFailure>(py, &message),
        protocol::Fault::Connection => match error {
            protocol::Error::NoMemory { .. } => made_lost(py, &message, Some(libc::ENOMEM)),
            _ => {
                let mid_answer = matches!(error, protocol::Error::Closed { mid_message: true });
                let lost = made_lost(py, &message, None);
                marked(py, lost, "mid_answer", mid_answer)
            }
        },
        protocol::Fault::Daemon => made::<ProtocolViolation>(py, &message),
    })
}

/// Returns an OSError with its errno, which also selects the subclass. PyO3's own conversion leaves the
/// errno out.
pub fn os_error(error: io::Error) -> PyErr {
    match error.raw_os_error() {
        Some(number) => Python::attach(|py| {
            let made = py
                .import("os")
                .and_then(|os| os.call_method1("strerror", (number,)))
                .and_then(|message| PyOSError::type_object(py).call1((number, message)));
            made.map_or_else(|failed| failed, PyErr::from_value)
        }),
        None => error.into(),
    }
}

/// Returns a ConnectionLost for an error of the operating system. `unexecuted`: the daemon cannot have
/// read the whole request.
pub fn connection_lost(error: io::Error, unexecuted: bool) -> PyErr {
    let message = format!("the connection was lost: {error}");
    Python::attach(|py| {
        let lost = made_lost(py, &message, error.raw_os_error());
        let lost = marked(py, lost, "unexecuted", unexecuted);
        lost.set_cause(py, Some(os_error(error)));
        lost
    })
}

/// Returns a ConnectionLost for a request that the daemon cannot have read.
pub fn connection_gone(message: &str) -> PyErr {
    connection_gone_of(message, None)
}

/// Like `connection_gone`, with the errno if there is one.
pub fn connection_gone_of(message: &str, number: Option<i32>) -> PyErr {
    Python::attach(|py| {
        let lost = made_lost(py, message, number);
        marked(py, lost, "unexecuted", true)
    })
}

/// Returns a MessageTooLarge for a message sent or received. The connection stays usable.
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

/// Returns a DaemonRefused with the daemon's message.
pub fn refused(py: Python<'_>, message: &str) -> PyErr {
    let refused = made::<DaemonRefused>(py, "the daemon refused");
    match refused.value(py).setattr("daemon_message", message) {
        Ok(()) => refused,
        Err(error) => error,
    }
}

/// Returns a ConnectionLost that is also an instance of the built-in class for the errno `number`.
fn made_lost(py: Python<'_>, message: &str, number: Option<i32>) -> PyErr {
    let special = number.and_then(|number| {
        let _guard = enter(py);
        let make = make_lost(py);
        make.and_then(|make| make.call1((message, number))).ok()
    });
    match special {
        Some(value) => PyErr::from_value(value),
        // There is no errno, or the interpreter is exiting and cannot make the class.
        None => made::<ConnectionLost>(py, message),
    }
}

fn marked(py: Python<'_>, lost: PyErr, attribute: &str, is: bool) -> PyErr {
    match lost.value(py).setattr(attribute, is) {
        Ok(()) => lost,
        Err(error) => error,
    }
}

/// Why a connection was lost.
#[derive(Clone)]
pub enum Loss {
    Protocol(protocol::Error),
    /// A message, and the errno if there is one.
    Socket(String, Option<i32>),
    Closed,
}

impl Loss {
    /// Returns a new exception, for one of the tasks that are waiting.
    pub fn to_err(&self, py: Python<'_>) -> PyErr {
        match self {
            Loss::Protocol(error) => from_core(error.clone()),
            Loss::Socket(message, number) => made_lost(py, message, *number),
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

/// Returns a ForkedClientError if an object was created in the parent of this forked process.
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

/// Classifies a refusal. Returns its kind, or None if that is unknown, and a hint, if there is one.
#[pyfunction]
pub fn classify_refusal(message: &str) -> (Option<&'static str>, Option<&'static str>) {
    let refusal = Refusal::of(message);
    let kind = match refusal {
        Refusal::NotSupported => Some("not supported"),
        Refusal::TimedOut => Some("timed out"),
        Refusal::AlreadyRegistered => Some("already registered"),
        Refusal::NotRegistered => Some("not registered"),
        _ => None,
    };
    (kind, refusal.hint())
}
