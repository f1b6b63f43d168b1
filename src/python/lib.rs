//! The extension module `p2pclient_rs._native`.

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

// A panic in a method becomes an exception only if it unwinds.
#[cfg(not(panic = "unwind"))]
compile_error!("the extension module is to be built with panic = \"unwind\"");

mod buffer;
mod bytes_builder;
mod channel;
mod connection;
mod daemon;
mod datastructures;
mod driver;
mod errors;
mod fork_guard;
mod fork_hooks;
mod future;
mod lifecycle;
mod listener;
mod multiaddr;
mod peer_id;
mod persistent;
mod pipeline;
mod policy;
mod pool;
mod process;
mod public_key;
mod readiness;
mod request;
mod shutdown_guard;
mod socket;
mod stream;
mod supervision;
mod wake;

/// The Rust half of `p2pclient_rs`.
#[pymodule(gil_used = true)]
mod _native {
    use super::*;

    // --- types ---
    #[pymodule_export]
    use super::datastructures::{PyPeerInfo, PyPubsubMessage, PyStreamInfo};
    #[pymodule_export]
    use super::multiaddr::{
        endpoint, InvalidMultiaddr, ProtocolLookupError, PyMultiaddr, PyProtocol,
    };
    #[pymodule_export]
    use super::peer_id::{InvalidPeerID, PyPeerId};
    #[pymodule_export]
    use super::public_key::PyPublicKey;

    // --- driver ---
    #[pymodule_export]
    use super::connection::ControlConnection;
    #[pymodule_export]
    use super::errors::classify_refusal;
    #[pymodule_export]
    use super::lifecycle::Lifecycle;
    #[pymodule_export]
    use super::listener::RawListener;
    #[pymodule_export]
    use super::persistent::PersistentConnection;
    #[pymodule_export]
    use super::pipeline::Pipeline;
    #[pymodule_export]
    use super::policy::{HalfOpen, LogThrottle, Registering};
    #[pymodule_export]
    use super::pool::{may_retry, ConnectionPool};
    #[pymodule_export]
    use super::readiness::Readiness;
    #[pymodule_export]
    use super::request::{decode_pubsub_message, decode_stream_info, PyRequest};
    #[pymodule_export]
    use super::shutdown_guard::_wait_before_finalization;
    #[pymodule_export]
    use super::stream::RawStream;
    #[pymodule_export]
    use super::wake::{report_first_wake, set_inplace_wake};

    // --- daemon ---
    #[pymodule_export]
    use super::daemon::{find_daemon, unused_tcp_port, DaemonOptions};
    #[pymodule_export]
    use super::fork_hooks::{after_fork_in_child, after_fork_in_parent, before_fork};
    #[pymodule_export]
    use super::process::DaemonProcess;
    #[pymodule_export]
    use super::supervision::{Reconnection, Startup, Supervision, SupervisionAction};

    /// The descriptors of `proto/`, as a serialised `FileDescriptorSet`.
    #[pyfunction]
    fn p2pd_descriptors() -> &'static [u8] {
        p2pd_protocol::pb::DESCRIPTORS
    }

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        super::refuse_free_threading(m.py())?;
        super::refuse_subinterpreters()?;
        super::fork_guard::watch();
        super::wake::read_environment();
        super::shutdown_guard::watch(m)?;
        m.add("Identity", super::datastructures::identity_type(m.py())?)?;
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        super::policy::add_constants(m)?;
        m.add("MAX_IDLE", super::pool::MAX_IDLE)?;
        m.add("MAX_SLOW_REQUESTS", super::pool::MAX_SLOW_REQUESTS)?;
        m.add("UNKNOWN_REQUEST", super::errors::UNKNOWN_REQUEST)?;
        m.add("DEBUG_BUILD", cfg!(debug_assertions))
    }
}

/// Refuses free-threaded Python: the code relies on the GIL.
fn refuse_free_threading(py: Python<'_>) -> PyResult<()> {
    let flags: String = py
        .import("sys")?
        .getattr("abiflags")
        .and_then(|flags| flags.extract())
        .unwrap_or_default(); // Windows has none
    if flags.contains('t') {
        return Err(PyImportError::new_err(
            "p2pclient_rs does not support free-threaded Python: use a build with the GIL",
        ));
    }
    Ok(())
}

/// Refuses subinterpreters: all interpreters of a process share PyO3's types. PyO3 itself refuses only
/// subinterpreters with their own GIL.
#[allow(unsafe_code)]
fn refuse_subinterpreters() -> PyResult<()> {
    // SAFETY: the calling thread is attached to the interpreter whose id is read.
    let id = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    if id != 0 {
        return Err(PyImportError::new_err(
            "p2pclient_rs does not support subinterpreters: import it in the main one",
        ));
    }
    Ok(())
}
