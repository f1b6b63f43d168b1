//! Where the daemon connects to for inbound streams.

use super::errors::{self, ClosedResourceError};
use super::socket::{python_address, Address, Socket};
use super::stream::RawStream;
use crate::sockets::{self, SocketFile};
use bytes::Bytes;
use pyo3::prelude::*;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A listening socket.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawListener {
    fd: RawFd,
    pid: u32,
    inner: Mutex<Option<Listening>>,
}

struct Listening {
    socket: socket2::Socket,
    file: Option<SocketFile>,
}

#[pymethods]
impl RawListener {
    /// Listens at a path, or at `(ip, port)`; port 0 is any free one. A socket file that nobody
    /// listens at any more is replaced; one that somebody does is an error.
    #[new]
    fn new(py: Python<'_>, address: Address) -> PyResult<Self> {
        errors::import(py);
        let target = address.to_sock_addr()?;
        let (socket, file) = sockets::listen(&target).map_err(errors::os_error)?;
        Ok(Self {
            fd: socket.as_raw_fd(),
            pid: std::process::id(),
            inner: Mutex::new(Some(Listening { socket, file })),
        })
    }

    /// The next connection, or `None` if there is none yet.
    fn try_accept(&self) -> PyResult<Option<RawStream>> {
        errors::check_fork(self.pid, "listener")?;
        let inner = self.lock();
        let listener = &inner.as_ref().ok_or_else(closed)?.socket;
        loop {
            match listener.accept() {
                Ok((socket, _)) => {
                    return Ok(Some(RawStream::new(
                        Socket::accepted(socket)?,
                        Bytes::new(),
                    )))
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                // The connection was gone again before it was accepted.
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(errors::os_error(e)),
            }
        }
    }

    fn fileno(&self) -> RawFd {
        self.fd
    }

    /// Where it listens: a path, or `(host, port)`.
    #[getter]
    fn local_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let inner = self.lock();
        let listener = &inner.as_ref().ok_or_else(closed)?.socket;
        python_address(py, &listener.local_addr()?)
    }

    /// Closes the socket and removes its file. In a forked child only the descriptor is closed.
    fn close(&self) {
        let Some(inner) = self.lock().take() else {
            return;
        };
        if std::process::id() != self.pid {
            // The file is the parent's.
            std::mem::forget(inner.file);
            return;
        }
        // A forked child may hold the descriptor too, and must not keep the address.
        let _ = inner.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl RawListener {
    fn lock(&self) -> MutexGuard<'_, Option<Listening>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn closed() -> PyErr {
    ClosedResourceError::new_err("the listener is closed")
}

impl Drop for RawListener {
    fn drop(&mut self) {
        self.close();
    }
}
