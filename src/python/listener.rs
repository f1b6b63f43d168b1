//! The listening socket to which the daemon connects for inbound streams.

use super::errors::{self, ClosedResourceError};
use super::socket::{python_address, Address, Socket};
use super::stream::RawStream;
use bytes::Bytes;
use p2pd_sockets::SocketFile;
use pyo3::prelude::*;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A listening socket.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawListener {
    pid: u32,
    inner: Mutex<Option<Listening>>,
}

struct Listening {
    socket: socket2::Socket,
    file: Option<SocketFile>,
}

#[pymethods]
impl RawListener {
    /// Listens at a path, or at `(ip, port)`; with port 0, at a free port. Replaces a stale socket file;
    /// raises OSError if a process listens there.
    #[new]
    fn new(py: Python<'_>, address: Address) -> PyResult<Self> {
        errors::import(py);
        let target = address.to_sock_addr()?;
        let (socket, file) = p2pd_sockets::listen(&target).map_err(errors::os_error)?;
        Ok(Self {
            pid: std::process::id(),
            inner: Mutex::new(Some(Listening { socket, file })),
        })
    }

    /// Returns the next connection, or `None` if there is none yet.
    fn try_accept(&self) -> PyResult<Option<RawStream>> {
        errors::check_fork(self.pid, "listener")?;
        let accepted = self.look(Listening::accept).ok_or_else(closed)?;
        let accepted = accepted.map_err(errors::os_error)?;
        Ok(accepted.map(|socket| RawStream::new(socket, Bytes::new())))
    }

    /// The file descriptor, or -1 if the listener is closed.
    fn fileno(&self) -> RawFd {
        self.look(|listening| listening.socket.as_raw_fd())
            .unwrap_or(-1)
    }

    /// The local address: a path, or `(host, port)`.
    #[getter]
    fn local_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let address = self.look(|listening| listening.socket.local_addr());
        let address = address.ok_or_else(closed)?.map_err(errors::os_error)?;
        python_address(py, &address)
    }

    /// Closes the socket and removes its file. In a forked child only the descriptor is closed.
    fn close(&self) {
        let Some(inner) = self.lock().take() else {
            return;
        };
        if std::process::id() != self.pid {
            // The file belongs to the parent.
            std::mem::forget(inner.file);
            return;
        }
        // A forked child may have the descriptor too, and must not keep the address in use.
        let _ = inner.socket.shutdown(std::net::Shutdown::Both);
    }
}

impl RawListener {
    fn lock(&self) -> MutexGuard<'_, Option<Listening>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `look` on the open listener. Returns its result, or `None` if the listener is closed.
    /// `look` must not run Python, since the state is locked.
    fn look<T>(&self, look: impl FnOnce(&Listening) -> T) -> Option<T> {
        self.lock().as_ref().map(look)
    }
}

impl Listening {
    fn accept(&self) -> io::Result<Option<Socket>> {
        loop {
            match self.socket.accept() {
                Ok((socket, _)) => return Socket::accepted(socket).map(Some),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
                // The peer has closed the connection before it was accepted.
                Err(e)
                    if matches!(
                        e.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                    ) => {}
                Err(e) => return Err(e),
            }
        }
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
