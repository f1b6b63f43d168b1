//! A non-blocking socket. A call that would block returns a value that says so.

use super::errors;
use p2pd_protocol::policy::retry::Transport;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use socket2::{Domain, SockAddr, SockRef};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// The most that one system call reads, in bytes.
pub const READ_SIZE: usize = 256 * 1024;

/// The most unread input that a close discards, in bytes.
const DRAIN_LIMIT: usize = 1024 * 1024;

/// Writing to a closed connection is an error, not a signal. (Python ignores SIGPIPE where this flag does
/// not exist.)
#[cfg(target_os = "linux")]
const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL;
#[cfg(not(target_os = "linux"))]
const SEND_FLAGS: i32 = 0;

/// The poll event for a peer that has shut its writing half down; 0 on systems without one.
#[cfg(target_os = "linux")]
const READ_ENDED: libc::c_short = libc::POLLRDHUP;
#[cfg(not(target_os = "linux"))]
const READ_ENDED: libc::c_short = 0;

thread_local! {
    /// The buffer for reads of unknown length.
    static SCRATCH: std::cell::RefCell<Box<[u8]>> =
        std::cell::RefCell::new(vec![0; READ_SIZE].into_boxed_slice());
}

/// Lends the thread's read buffer. `f` must not run Python.
pub fn with_scratch<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| f(scratch))
}

/// A connected or connecting socket.
#[derive(Debug)]
pub struct Socket(socket2::Socket);

/// Where to connect to or listen at: `path` for a unix socket, or `(ip, port)`.
#[derive(FromPyObject, Debug)]
pub enum Address {
    /// A unix socket.
    Unix(String),
    /// A TCP socket.
    Tcp(String, u16),
}

impl Address {
    pub fn to_sock_addr(&self) -> PyResult<SockAddr> {
        match self {
            Address::Unix(path) => SockAddr::unix(path).map_err(|error| {
                PyValueError::new_err(format!("{path:?} is no path for a unix socket: {error}"))
            }),
            Address::Tcp(ip, port) => {
                let ip: IpAddr = ip
                    .parse()
                    .map_err(|_| PyValueError::new_err(format!("{ip:?} is no IP address")))?;
                Ok(SockAddr::from(SocketAddr::new(ip, *port)))
            }
        }
    }
}

/// The state of a connection attempt.
pub enum Connecting {
    /// The socket is connected.
    Done(Socket),
    /// The socket will be writable once connected or failed.
    Pending(Socket),
    /// The listen queue of a unix socket is full. No event reports when it has space: try again later.
    Full,
}

impl Socket {
    /// Begins to connect.
    pub fn connect(address: &Address) -> PyResult<Connecting> {
        let target = address.to_sock_addr()?;
        let socket = p2pd_sockets::new(&target).map_err(errors::os_error)?;
        match socket.connect(&target) {
            Ok(()) => Ok(Connecting::Done(Self(socket))),
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(Connecting::Full),
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {
                Ok(Connecting::Pending(Self(socket)))
            }
            Err(e) => Err(errors::os_error(e)),
        }
    }

    /// Prepares a socket that was just accepted.
    pub fn accepted(socket: socket2::Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if !is_unix(&socket)? {
            socket.set_tcp_nodelay(true)?;
        }
        Ok(Self(socket))
    }

    /// Returns the error with which a pending connection has failed, if it has.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.0.take_error()
    }

    /// Reads once and passes the bytes to `take`; none at the end of the stream. Returns `None` if it would
    /// block.
    pub fn read_with<T>(&self, max: usize, take: impl FnOnce(&[u8]) -> T) -> io::Result<Option<T>> {
        with_scratch(|scratch| {
            let size = max.min(scratch.len());
            match unless_blocked(|| (&self.0).read(&mut scratch[..size]))? {
                Some(count) => Ok(Some(take(&scratch[..count]))),
                None => Ok(None),
            }
        })
    }

    /// Reads once. Returns 0 at the end of the stream, `None` if it would block.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        unless_blocked(|| (&self.0).read(buffer))
    }

    /// Like `read`, into two buffers one after the other.
    pub fn read_both(&self, buffer: &mut [u8], more: &mut [u8]) -> io::Result<Option<usize>> {
        unless_blocked(|| {
            (&self.0).read_vectored(&mut [IoSliceMut::new(buffer), IoSliceMut::new(more)])
        })
    }

    /// Writes several slices. Returns how many bytes were written; 0 if it would block.
    pub fn write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let write = || self.0.send_vectored_with_flags(pieces, SEND_FLAGS);
        Ok(unless_blocked(write)?.unwrap_or(0))
    }

    /// Writes `bytes`. Returns how many were written; 0 if it would block.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        Ok(unless_blocked(|| self.0.send_with_flags(bytes, SEND_FLAGS))?.unwrap_or(0))
    }

    /// Whether a read would return at once: with data, the end of the stream, or an error.
    pub fn is_readable(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        !matches!(unless_blocked(|| self.0.peek(&mut byte)), Ok(None))
    }

    /// Shuts the writing half down.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }

    /// Closes gracefully. Discards unread input first: otherwise the close would be a reset, and the
    /// peer could lose the last bytes sent to it.
    pub fn close(self) {
        let _ = self.0.shutdown(Shutdown::Write);
        let mut drained = 0;
        while drained < DRAIN_LIMIT {
            match self.read_with(READ_SIZE, <[u8]>::len) {
                Ok(Some(count)) if count > 0 => drained += count,
                _ => break,
            }
        }
        self.end();
    }

    /// Shuts the connection down, even if a forked child has the descriptor too.
    pub fn end(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Closes at once. A TCP peer sees a reset; a unix peer sees one if input was unread.
    pub fn abort(self) {
        if matches!(is_unix(&self.0), Ok(false)) {
            let _ = SockRef::from(&self.0).set_linger(Some(Duration::ZERO));
        }
    }

    /// Whether this is a unix socket.
    pub fn is_unix(&self) -> bool {
        matches!(is_unix(&self.0), Ok(true))
    }

    /// The transport, for the policy on retries.
    pub fn transport(&self) -> Transport {
        if self.is_unix() {
            Transport::Unix
        } else {
            Transport::Tcp
        }
    }

    pub fn local_address(&self) -> io::Result<SockAddr> {
        self.0.local_addr()
    }

    pub fn remote_address(&self) -> io::Result<SockAddr> {
        self.0.peer_addr()
    }

    /// Returns a duplicate of the descriptor, which is not inheritable.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone().map(OwnedFd::from)
    }

    /// Whether the peer has closed both directions. TCP sends the same FIN for a half-close, which counts
    /// too; a unix socket tells them apart.
    pub fn peer_closed(&self) -> bool {
        let (gone, ended) = self.poll();
        gone || ended && !self.is_unix()
    }

    /// Whether the peer has shut its writing half down.
    pub fn peer_ended(&self) -> bool {
        let (gone, ended) = self.poll();
        gone || ended
    }

    /// Number of unread bytes in the socket's buffer.
    #[allow(unsafe_code)]
    pub fn unread(&self) -> usize {
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int to the given address.
        let failed = unsafe { libc::ioctl(self.as_raw_fd(), libc::FIONREAD, &mut count) };
        if failed == 0 {
            usize::try_from(count).unwrap_or(0)
        } else {
            0
        }
    }

    /// Whether both directions are closed, and whether the peer has shut its writing half down. Both false
    /// if the poll fails.
    #[allow(unsafe_code)]
    fn poll(&self) -> (bool, bool) {
        let mut entry = libc::pollfd {
            fd: self.as_raw_fd(),
            events: READ_ENDED,
            revents: 0,
        };
        // SAFETY: `entry` is valid until the call returns.
        if unsafe { libc::poll(&mut entry, 1, 0) } < 0 {
            return (false, false);
        }
        let gone = entry.revents & (libc::POLLHUP | libc::POLLERR) != 0;
        let ended = if cfg!(target_os = "linux") {
            entry.revents & READ_ENDED != 0
        } else {
            let mut byte = [std::mem::MaybeUninit::uninit()];
            matches!(self.0.peek(&mut byte), Ok(0))
        };
        (gone, ended)
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Returns an address as Python's `socket` does: a path, or `(host, port)`.
pub fn python_address(py: Python<'_>, address: &SockAddr) -> PyResult<Py<PyAny>> {
    if let Some(tcp) = address.as_socket() {
        return Ok((tcp.ip().to_string(), tcp.port())
            .into_pyobject(py)?
            .into_any()
            .unbind());
    }
    let path = address
        .as_pathname()
        .map(|path| path.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(path.into_pyobject(py)?.into_any().unbind())
}

fn is_unix(socket: &socket2::Socket) -> io::Result<bool> {
    Ok(socket.local_addr()?.domain() == Domain::UNIX)
}

fn unless_blocked<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<Option<T>> {
    loop {
        match call() {
            Ok(value) => return Ok(Some(value)),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}
