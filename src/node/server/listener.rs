//! Listens at the control address and serves each connection in a task.

use super::session;
use super::shared::Shared;
use super::socket::Socket;
use crate::error::os_message;
use p2pd_protocol::endpoint::Host;
use p2pd_protocol::policy::inbound::ACCEPT_PAUSE;
use p2pd_protocol::{Endpoint, Multiaddr};
use p2pd_sockets::SocketFile;
use socket2::SockAddr;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;
#[cfg(unix)]
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

/// Largest number of clients' connections, streams included. Further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 16 * 1024;

/// A listening control socket. The file of a unix socket is removed on drop.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Accepting,
    addr: Multiaddr,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Accepting {
    #[cfg(unix)]
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at a unix or TCP address. Replaces a unix socket whose listener has ended.
    ///
    /// # Errors
    /// Another process listens there, or the operating system refuses the address. The error has the
    /// words of the Go daemons.
    pub(super) async fn bind(addr: &Multiaddr) -> io::Result<Self> {
        let endpoint = addr.endpoint().map_err(io::Error::other)?;
        let (name, target) = match &endpoint {
            Endpoint::Unix(path) => (format!("unix {path}"), SockAddr::unix(path)?),
            Endpoint::Tcp { host, port } => {
                let resolved = resolve(host, *port).await?;
                let family = if resolved.is_ipv4() { "tcp4" } else { "tcp6" };
                (format!("{family} {resolved}"), resolved.into())
            }
        };
        let refused = |error: io::Error| {
            let words = os_message(&error);
            io::Error::new(error.kind(), format!("listen {name}: bind: {words}"))
        };
        let (socket, file) = p2pd_sockets::listen(&target).map_err(refused)?;
        let (socket, addr) = match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(_) => {
                let listener = UnixListener::from_std(socket.into())?;
                (Accepting::Unix(listener), addr.clone())
            }
            #[cfg(not(unix))]
            Endpoint::Unix(_) => return Err(io::ErrorKind::Unsupported.into()),
            Endpoint::Tcp { .. } => {
                let listener = TcpListener::from_std(socket.into())?;
                let assigned = Endpoint::from(listener.local_addr()?);
                (Accepting::Tcp(listener), Multiaddr::from(&assigned))
            }
        };
        Ok(Self {
            socket,
            addr,
            _file: file,
        })
    }

    /// Address at which clients connect, with the assigned port.
    pub(super) fn addr(&self) -> &Multiaddr {
        &self.addr
    }

    /// Accepts connections, and serves each until it ends.
    pub(super) async fn serve(&self, shared: Arc<Shared>) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let permit = permits.clone().acquire_owned().await;
            match self.accept().await {
                Ok(socket) => {
                    let shared = shared.clone();
                    tokio::spawn(async move {
                        session::serve(socket, shared).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn accept(&self) -> io::Result<Socket> {
        match &self.socket {
            #[cfg(unix)]
            Accepting::Unix(listener) => Ok(Socket::Unix(listener.accept().await?.0)),
            Accepting::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Socket::Tcp(stream))
            }
        }
    }
}

async fn resolve(host: &Host, port: u16) -> io::Result<SocketAddr> {
    let name = match host {
        Host::Ip4(ip) => return Ok((*ip, port).into()),
        Host::Ip6(ip) => return Ok((*ip, port).into()),
        Host::Dns(name) | Host::Dns4(name) | Host::Dns6(name) => name,
    };
    let is_wanted = |addr: &SocketAddr| match host {
        Host::Dns4(_) => addr.is_ipv4(),
        Host::Dns6(_) => addr.is_ipv6(),
        _ => true,
    };
    let mut found = tokio::net::lookup_host((name.as_str(), port)).await?;
    found
        .find(is_wanted)
        .ok_or_else(|| io::Error::other(format!("lookup {name}: no such host")))
}
