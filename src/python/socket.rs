//! A non-blocking socket: every call does what it can at once, or says that it would block.

use super::errors;
use p2pd_protocol::policy::retry::Transport;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use socket2::{Domain, SockAddr, SockRef};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

/// How much one system call reads at the most, in bytes.
pub const READ_SIZE: usize = 256 * 1024;

/// How much unread input is thrown away when a socket is closed, in bytes.
const DRAIN_LIMIT: usize = 1024 * 1024;

/// A peer that is gone is an error, not a signal. (Where there is no such flag, Python has SIGPIPE
/// ignored anyway.)
#[cfg(target_os = "linux")]
const SEND_FLAGS: i32 = libc::MSG_NOSIGNAL;
#[cfg(not(target_os = "linux"))]
const SEND_FLAGS: i32 = 0;

/// The poll event of a peer that has ended its direction, on systems that have one.
#[cfg(target_os = "linux")]
const READ_ENDED: libc::c_short = libc::POLLRDHUP;
#[cfg(not(target_os = "linux"))]
const READ_ENDED: libc::c_short = 0;

thread_local! {
    /// Where reads go before it is known how much came.
    static SCRATCH: std::cell::RefCell<Box<[u8]>> =
        std::cell::RefCell::new(vec![0; READ_SIZE].into_boxed_slice());
}

/// Lends the thread's room for reads. No Python may run in `f`.
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

/// How far a connection attempt has come.
pub enum Connecting {
    /// The socket is connected.
    Done(Socket),
    /// The socket will be writable once connected or failed.
    Pending(Socket),
    /// A unix listener's queue is full, which nothing announces the end of: try again later.
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

    /// Takes a socket just accepted.
    pub fn accepted(socket: socket2::Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        if !is_unix(&socket)? {
            socket.set_tcp_nodelay(true)?;
        }
        Ok(Self(socket))
    }

    /// The error a pending connection ended with, if it did.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.0.take_error()
    }

    /// Reads once and hands what came to `take`: nothing at all means the end of the stream.
    /// `None` if it would block.
    pub fn read_with<T>(&self, max: usize, take: impl FnOnce(&[u8]) -> T) -> io::Result<Option<T>> {
        with_scratch(|scratch| {
            let size = max.min(scratch.len());
            match unless_blocked(|| (&self.0).read(&mut scratch[..size]))? {
                Some(count) => Ok(Some(take(&scratch[..count]))),
                None => Ok(None),
            }
        })
    }

    /// Reads once; 0 at the end of the stream, `None` if it would block.
    pub fn read(&self, room: &mut [u8]) -> io::Result<Option<usize>> {
        unless_blocked(|| (&self.0).read(room))
    }

    /// As `read`, into two places one after the other.
    pub fn read_both(&self, room: &mut [u8], more: &mut [u8]) -> io::Result<Option<usize>> {
        unless_blocked(|| {
            (&self.0).read_vectored(&mut [IoSliceMut::new(room), IoSliceMut::new(more)])
        })
    }

    /// Writes what fits of several pieces; 0 if it would block.
    pub fn write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let write = || self.0.send_vectored_with_flags(pieces, SEND_FLAGS);
        Ok(unless_blocked(write)?.unwrap_or(0))
    }

    /// Writes what fits; 0 if it would block (or `bytes` is empty).
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        Ok(unless_blocked(|| self.0.send_with_flags(bytes, SEND_FLAGS))?.unwrap_or(0))
    }

    /// Whether a read would return at once, with data, the end, or an error.
    pub fn is_readable(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        !matches!(unless_blocked(|| self.0.peek(&mut byte)), Ok(None))
    }

    /// Ends the writing half.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Write)
    }

    /// Closes in good order. Input left unread would turn the close into a reset, in which the
    /// peer can lose what was sent to it before, so that is read and thrown away first.
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

    /// Ends the connection although a forked child may hold the descriptor too.
    pub fn end(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    /// Closes at once. A TCP peer sees a reset; a unix peer sees one if it sent what was not read.
    pub fn abort(self) {
        if matches!(is_unix(&self.0), Ok(false)) {
            let _ = SockRef::from(&self.0).set_linger(Some(Duration::ZERO));
        }
    }

    /// Whether this is a unix socket.
    pub fn is_unix(&self) -> bool {
        matches!(is_unix(&self.0), Ok(true))
    }

    /// What carries the connection, for the policy on retries.
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

    /// Another descriptor of the same socket, not inheritable.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.try_clone().map(OwnedFd::from)
    }

    /// Whether the peer has closed both directions. A unix socket tells that from a half-close;
    /// TCP sends a FIN for either, which counts.
    pub fn peer_closed(&self) -> bool {
        let (gone, ended) = self.poll();
        gone || ended && !self.is_unix()
    }

    /// Whether the peer has ended at least its own direction.
    pub fn peer_ended(&self) -> bool {
        let (gone, ended) = self.poll();
        gone || ended
    }

    /// Number of bytes that have arrived and were not read.
    #[allow(unsafe_code)]
    pub fn unread(&self) -> usize {
        let mut count: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int to the place given.
        let failed = unsafe { libc::ioctl(self.as_raw_fd(), libc::FIONREAD, &mut count) };
        if failed == 0 {
            usize::try_from(count).unwrap_or(0)
        } else {
            0
        }
    }

    /// Whether the connection is gone in both directions, and whether the peer has ended its own.
    /// Neither if that cannot be found out.
    #[allow(unsafe_code)]
    fn poll(&self) -> (bool, bool) {
        let mut entry = libc::pollfd {
            fd: self.as_raw_fd(),
            events: READ_ENDED,
            revents: 0,
        };
        // SAFETY: one entry, which lives until the call returns, and no time to wait.
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

/// As Python's `socket` gives addresses: a path, or `(host, port)`.
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
