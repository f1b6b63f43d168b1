//! Sockets for connections to and from the daemon: unix sockets (not on Windows) or TCP.

use p2pd_protocol::endpoint::{Endpoint, Host};
use p2pd_protocol::policy::retry::Transport;
use socket2::{SockAddr, SockRef};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read as _};
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::task::{ready, Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
#[cfg(unix)]
use tokio::net::{UnixListener, UnixStream};

/// The size of a read if the size of the message is not known, in bytes.
const READ: usize = 16 * 1024;

/// How much unread input is discarded when a socket is closed, in bytes.
const DRAIN_LIMIT: usize = 1024 * 1024;

#[derive(Debug)]
pub enum Socket {
    #[cfg(unix)]
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// Evaluates an expression for either kind of socket.
macro_rules! either {
    ($socket:expr, $inner:ident => $body:expr) => {
        match $socket {
            #[cfg(unix)]
            Socket::Unix($inner) => $body,
            Socket::Tcp($inner) => $body,
        }
    };
}

impl Socket {
    /// Connects to the first address that accepts.
    pub async fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        let (host, port) = match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => return connect_unix(path).await,
            #[cfg(not(unix))]
            Endpoint::Unix(_) => return Err(no_unix_sockets()),
            Endpoint::Tcp { host, port } => (host, *port),
        };
        let mut last = no_address();
        for address in resolve(host, port).await? {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self::Tcp(stream));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Resolves the host name of an endpoint, so that a socket can listen there.
    pub async fn resolve_endpoint(endpoint: &Endpoint) -> io::Result<Endpoint> {
        match endpoint {
            Endpoint::Tcp { host, port } => {
                let addresses = resolve(host, *port).await?;
                let first = addresses.first().ok_or_else(no_address)?;
                Ok((*first).into())
            }
            Endpoint::Unix(_) => Ok(endpoint.clone()),
        }
    }

    /// Whether nothing has arrived, not even the end.
    pub fn is_silent(&self) -> bool {
        let blocked = self.read_now(&mut [IoSliceMut::new(&mut [0])]);
        matches!(blocked, Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    pub fn transport(&self) -> Transport {
        match self {
            Self::Tcp(_) => Transport::Tcp,
            #[cfg(unix)]
            Self::Unix(_) => Transport::Unix,
        }
    }

    /// Reads the available input. Unlike tokio's read, this always asks the operating system; tokio's
    /// knows only what the reactor has seen so far.
    pub fn read_now(&self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, socket => (&*SockRef::from(socket)).read_vectored(pieces))
    }

    /// Reads the available input after `readable`. If that does not fill the buffers, the next
    /// `readable` waits for more input. This saves a system call: tokio's own read would first have to
    /// find the socket empty.
    pub fn try_read_vectored(&self, pieces: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let capacity: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut read = None;
        let outcome = either!(self, socket => socket.try_io(Interest::READABLE, || {
            let count = self.read_now(pieces)?;
            read = Some(count);
            // A short read empties the socket; epoll and kqueue then report the next input.
            if cfg!(unix) && count > 0 && count < capacity {
                return Err(ErrorKind::WouldBlock.into());
            }
            Ok(())
        }));
        match read {
            Some(count) => Ok(count),
            None => outcome.map(|()| 0),
        }
    }

    pub fn try_write_vectored(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, socket => socket.try_write_vectored(pieces))
    }

    pub async fn readable(&self) -> io::Result<()> {
        either!(self, socket => socket.readable().await)
    }

    pub async fn writable(&self) -> io::Result<()> {
        either!(self, socket => socket.writable().await)
    }

    /// Ends the connection, even if another task holds the socket.
    pub fn end(&self) {
        let _ = either!(self, socket => SockRef::from(socket).shutdown(Shutdown::Both));
    }

    /// Reads the available input and passes it to `take`. No bytes mean the end.
    pub fn poll_read_with<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&[u8]) -> T,
    ) -> Poll<io::Result<T>> {
        let mut bytes = [std::mem::MaybeUninit::uninit(); READ];
        let mut buffer = ReadBuf::uninit(&mut bytes);
        let read = Pin::new(self).poll_read(cx, &mut buffer);
        read.map_ok(|()| take(buffer.filled()))
    }

    /// Discards unread input. Closing a socket with unread input resets the connection, and the daemon
    /// would then lose the data sent last.
    pub fn drain(&self) {
        let mut buffer = [0; READ];
        let mut drained = 0;
        while drained < DRAIN_LIMIT {
            match self.read_now(&mut [IoSliceMut::new(&mut buffer)]) {
                Ok(count) if count > 0 => drained += count,
                _ => break,
            }
        }
    }
}

#[cfg(unix)]
async fn connect_unix(path: &str) -> io::Result<Socket> {
    use p2pd_protocol::policy::backoff::Backoff;
    use std::time::Duration;

    let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(50));
    loop {
        match UnixStream::connect(path).await {
            // The daemon's accept queue is full. There is no event for when that changes.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                tokio::time::sleep(backoff.next(0)).await;
            }
            connected => return connected.map(Socket::Unix),
        }
    }
}

fn no_address() -> io::Error {
    io::Error::new(ErrorKind::NotFound, "the name has no address")
}

#[cfg(not(unix))]
fn no_unix_sockets() -> io::Error {
    let message = "there are no unix sockets here: use TCP";
    io::Error::new(ErrorKind::Unsupported, message)
}

async fn resolve(host: &Host, port: u16) -> io::Result<Vec<SocketAddr>> {
    let name = match host {
        Host::Ip4(ip) => return Ok(vec![(*ip, port).into()]),
        Host::Ip6(ip) => return Ok(vec![(*ip, port).into()]),
        Host::Dns(name) | Host::Dns4(name) | Host::Dns6(name) => name,
    };
    let found = tokio::net::lookup_host((name.as_str(), port)).await?;
    Ok(found
        .filter(|address| match host {
            Host::Dns4(_) => address.is_ipv4(),
            Host::Dns6(_) => address.is_ipv6(),
            _ => true,
        })
        .collect())
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

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_write_vectored(cx, pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self.get_mut(), socket => Pin::new(socket).poll_shutdown(cx))
    }
}

/// The socket that the daemon connects to for inbound streams.
#[derive(Debug)]
pub struct Listener {
    socket: Listening,
    _file: Option<p2pd_sockets::SocketFile>,
}

#[derive(Debug)]
enum Listening {
    #[cfg(unix)]
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. TCP port 0 stands for any free port.
    pub fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        #[cfg(not(unix))]
        if let Endpoint::Unix(_) = endpoint {
            return Err(no_unix_sockets());
        }
        let address = sock_addr(endpoint)?;
        let (socket, file) = p2pd_sockets::listen(&address)?;
        let socket = match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(_) => Listening::Unix(UnixListener::from_std(socket.into())?),
            _ => Listening::Tcp(TcpListener::from_std(socket.into())?),
        };
        Ok(Self {
            socket,
            _file: file,
        })
    }

    /// The address of a TCP listener.
    pub fn tcp_address(&self) -> io::Result<Option<SocketAddr>> {
        match &self.socket {
            Listening::Tcp(listener) => listener.local_addr().map(Some),
            #[cfg(unix)]
            Listening::Unix(_) => Ok(None),
        }
    }

    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Socket>> {
        match &self.socket {
            #[cfg(unix)]
            Listening::Unix(listener) => {
                let accepted = ready!(listener.poll_accept(cx));
                Poll::Ready(accepted.map(|(stream, _)| Socket::Unix(stream)))
            }
            Listening::Tcp(listener) => {
                let accepted = ready!(listener.poll_accept(cx));
                Poll::Ready(accepted.and_then(|(stream, _)| {
                    stream.set_nodelay(true)?;
                    Ok(Socket::Tcp(stream))
                }))
            }
        }
    }
}

/// The socket address of an endpoint without a host name.
fn sock_addr(endpoint: &Endpoint) -> io::Result<SockAddr> {
    let ip = match endpoint {
        Endpoint::Unix(path) => return SockAddr::unix(path),
        Endpoint::Tcp { host, port } => match host {
            Host::Ip4(ip) => SocketAddr::from((*ip, *port)),
            Host::Ip6(ip) => SocketAddr::from((*ip, *port)),
            name => {
                let message = format!("{name} is a name, not an address of this machine");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
            }
        },
    };
    Ok(ip.into())
}
