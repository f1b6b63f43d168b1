//! Blocking Unix and TCP sockets.

use p2pd_protocol::endpoint::{Endpoint, Host};
use p2pd_protocol::Multiaddr;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
#[cfg(unix)]
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

/// Evaluates the same expression for either kind of socket.
macro_rules! either {
    ($self:expr, $socket:ident => $result:expr) => {
        match $self {
            #[cfg(unix)]
            Socket::Unix($socket) => $result,
            Socket::Tcp($socket) => $result,
        }
    };
}

/// A socket that accepts connections.
pub(crate) enum Listener {
    #[cfg(unix)]
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    pub(crate) fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => UnixListener::bind(path).map(Self::Unix),
            Endpoint::Tcp { host, port } => {
                TcpListener::bind((host.to_string(), *port)).map(Self::Tcp)
            }
            #[cfg(not(unix))]
            Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Address of a listener that was bound to `endpoint`.
    #[cfg_attr(not(unix), allow(unused_variables))]
    pub(crate) fn address(&self, endpoint: Endpoint) -> io::Result<Multiaddr> {
        Ok(Multiaddr::from(&match self {
            Self::Tcp(listener) => listener.local_addr()?.into(),
            #[cfg(unix)]
            Self::Unix(_) => endpoint,
        }))
    }

    pub(crate) fn accept(&self) -> io::Result<Socket> {
        match self {
            #[cfg(unix)]
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => Socket::tcp(listener.accept()?.0),
        }
    }
}

/// A blocking socket.
pub enum Socket {
    /// A Unix socket.
    #[cfg(unix)]
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// The error of `connect`.
    pub fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Endpoint::Tcp { host, port } => match host {
                Host::Ip4(ip) => Self::tcp(TcpStream::connect((*ip, *port))?),
                host => Self::tcp(TcpStream::connect((host.to_string(), *port))?),
            },
            #[cfg(not(unix))]
            Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn tcp(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        Ok(Self::Tcp(socket))
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        match self {
            #[cfg(unix)]
            Self::Unix(socket) => socket.try_clone().map(Self::Unix),
            Self::Tcp(socket) => socket.try_clone().map(Self::Tcp),
        }
    }

    /// Makes writes fail with `WouldBlock` if they make no progress for this time. Does nothing on Windows, where
    /// the socket would be unusable after that.
    pub(crate) fn limit_writes(&self, time: Duration) {
        if cfg!(unix) {
            let _ = either!(self, socket => socket.set_write_timeout(Some(time)));
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // Fails if the other side has closed.
        let _ = either!(self, socket => socket.shutdown(how));
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).read(buffer))
    }

    fn read_vectored(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).read_vectored(slices))
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).write(bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).write_vectored(slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
