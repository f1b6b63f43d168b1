//! A client's socket, unix or TCP.

use p2pd_protocol::endpoint::Host;
use p2pd_protocol::Endpoint;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};
use tokio::net::TcpStream;
#[cfg(unix)]
use tokio::net::UnixStream;

/// Time that a TCP client has to read the last bytes before the socket is closed.
const LINGER: Duration = Duration::from_secs(5);

/// A connection between the daemon and a local program.
#[derive(Debug)]
pub(crate) enum Socket {
    #[cfg(unix)]
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Calls a method of either kind of socket.
macro_rules! either {
    ($socket:expr, $inner:ident => $call:expr) => {
        match $socket {
            #[cfg(unix)]
            Socket::Unix($inner) => $call,
            Socket::Tcp($inner) => $call,
        }
    };
}

impl Socket {
    /// Connects to the address at which a local program listens.
    pub(crate) async fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => UnixStream::connect(path).await.map(Self::Unix),
            #[cfg(not(unix))]
            Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
            Endpoint::Tcp { host, port } => {
                let stream = match host {
                    Host::Ip4(ip) => TcpStream::connect((*ip, *port)).await?,
                    Host::Ip6(ip) => TcpStream::connect((*ip, *port)).await?,
                    Host::Dns(name) | Host::Dns4(name) | Host::Dns6(name) => {
                        TcpStream::connect((name.as_str(), *port)).await?
                    }
                };
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    /// Waits until the socket is ready for one of the operations.
    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        either!(self, socket => socket.ready(interest).await)
    }

    /// Reads the available bytes, or fails with [`io::ErrorKind::WouldBlock`].
    pub(crate) fn try_read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, socket => socket.try_read_vectored(buffers))
    }

    /// Writes as many bytes as fit, or fails with [`io::ErrorKind::WouldBlock`].
    pub(crate) fn try_write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, socket => socket.try_write_vectored(buffers))
    }

    /// Whether the program is known to have closed both directions. That of a TCP client shows only
    /// when something is sent to it.
    pub(crate) fn is_hung_up(&self) -> bool {
        use futures::FutureExt as _;
        let ready = self.ready(Interest::WRITABLE).now_or_never();
        matches!(ready, Some(Ok(ready)) if ready.is_write_closed())
    }

    /// Closes the socket so that the program still receives all that was sent to it. A socket that is
    /// closed with unread input would cut that short.
    pub(crate) async fn finish(self) {
        let mut drained = vec![0; 16 << 10];
        let mut discard = || self.try_read_vectored(&mut [IoSliceMut::new(&mut drained)]);
        match &self {
            #[cfg(unix)]
            Self::Unix(_) => {
                // From now on the program's writes fail.
                let _ = self.shutdown(Shutdown::Both);
                while matches!(discard(), Ok(1..)) {}
            }
            Self::Tcp(_) => {
                let _ = self.shutdown(Shutdown::Write);
                let drain = async {
                    while self.ready(Interest::READABLE).await.is_ok() {
                        match discard() {
                            Ok(1..) => {}
                            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                            _ => break,
                        }
                    }
                };
                let _ = tokio::time::timeout(LINGER, drain).await;
            }
        }
    }

    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        either!(self, socket => socket2::SockRef::from(socket).shutdown(how))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_shutdown(cx))
    }
}
