//! Where the daemon connects to for inbound streams.

use super::errors::{self, ClosedResourceError};
use super::socket::{new_socket, python_address, Address, Socket};
use super::stream::RawStream;
use bytes::Bytes;
use pyo3::prelude::*;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const BACKLOG: i32 = 1024;

/// A listening socket.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawListener {
    fd: RawFd,
    pid: u32,
    socket: Mutex<Option<socket2::Socket>>,
    /// The socket file and its inode: another's file at that path is not ours to remove.
    file: Option<(PathBuf, u64)>,
}

#[pymethods]
impl RawListener {
    /// Listens at a path, or at `(ip, port)`; port 0 is any free one. A socket file that nobody
    /// listens at any more is replaced; one that somebody does is an error.
    #[new]
    fn new(address: Address) -> PyResult<Self> {
        let target = address.to_sock_addr()?;
        Self::listen(&address, &target).map_err(errors::os_error)
    }

    /// The next connection, or `None` if there is none yet.
    fn try_accept(&self) -> PyResult<Option<RawStream>> {
        errors::check_fork(self.pid, "listener")?;
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = socket
            .as_ref()
            .ok_or_else(|| ClosedResourceError::new_err("the listener is closed"))?;
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
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = socket
            .as_ref()
            .ok_or_else(|| ClosedResourceError::new_err("the listener is closed"))?;
        python_address(py, &listener.local_addr()?)
    }

    /// Closes the socket and removes its file. In a forked child only the descriptor is closed.
    fn close(&self) {
        let socket = self
            .socket
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(socket) = socket.filter(|_| std::process::id() == self.pid) else {
            return;
        };
        // A forked child may hold the descriptor too, and must not keep the address.
        let _ = socket.shutdown(std::net::Shutdown::Both);
        if let Some((path, inode)) = &self.file {
            if fs::metadata(path).is_ok_and(|file| file.ino() == *inode) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl RawListener {
    fn listen(address: &Address, target: &socket2::SockAddr) -> io::Result<Self> {
        let socket = new_socket(target)?;
        let mut file = None;
        match address {
            Address::Unix(path) => {
                let path = PathBuf::from(path);
                remove_stale(&path, target)?;
                socket.bind(target)?;
                let inode = fs::metadata(&path).map(|file| file.ino());
                file = Some((path.clone(), inode.unwrap_or_default()));
                let private = fs::set_permissions(&path, fs::Permissions::from_mode(0o600));
                if let Err(error) = private.and_then(|()| socket.listen(BACKLOG)) {
                    let _ = fs::remove_file(&path);
                    return Err(error);
                }
            }
            Address::Tcp(..) => {
                socket.set_reuse_address(true)?;
                socket.bind(target)?;
                socket.listen(BACKLOG)?;
            }
        }
        Ok(Self {
            fd: socket.as_raw_fd(),
            pid: std::process::id(),
            socket: Mutex::new(Some(socket)),
            file,
        })
    }
}

impl Drop for RawListener {
    fn drop(&mut self) {
        self.close();
    }
}

/// Removes a socket file that refuses connections: its listener is gone.
fn remove_stale(path: &Path, address: &socket2::SockAddr) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(()); // nothing there, or something that `bind` will refuse
    }
    match new_socket(address)?.connect(address) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}
