//! Addresses of a daemon's sockets.

use super::multiaddr::component::{push_unix, Component};
use super::multiaddr::{Multiaddr, MultiaddrError};
use multiaddr::Protocol;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// The longest path a unix socket can have: `sockaddr_un` less its final NUL.
const MAX_UNIX_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Where a daemon's socket is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket: its absolute path.
    Unix(String),
    /// A TCP socket.
    Tcp {
        /// The address or name.
        host: Host,
        /// The port; 0, when listening, for any.
        port: u16,
    },
}

/// The host of a TCP [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// An IPv4 address.
    Ip4(Ipv4Addr),
    /// An IPv6 address.
    Ip6(Ipv6Addr),
    /// A name, to be resolved to an address of either family.
    Dns(String),
    /// A name, to be resolved to an IPv4 address.
    Dns4(String),
    /// A name, to be resolved to an IPv6 address.
    Dns6(String),
}

impl fmt::Display for Host {
    /// The address or name alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip4(ip) => ip.fmt(f),
            Self::Ip6(ip) => ip.fmt(f),
            Self::Dns(name) | Self::Dns4(name) | Self::Dns6(name) => f.write_str(name),
        }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        let host = match addr {
            SocketAddr::V4(addr) => Host::Ip4(*addr.ip()),
            SocketAddr::V6(addr) => Host::Ip6(*addr.ip()),
        };
        Self::Tcp {
            host,
            port: addr.port(),
        }
    }
}

impl From<&Endpoint> for Multiaddr {
    fn from(endpoint: &Endpoint) -> Self {
        let mut bytes = Vec::new();
        match endpoint {
            Endpoint::Unix(path) => push_unix(&mut bytes, path),
            Endpoint::Tcp { host, port } => {
                let host = match host {
                    Host::Ip4(ip) => Protocol::Ip4(*ip),
                    Host::Ip6(ip) => Protocol::Ip6(*ip),
                    Host::Dns(name) => Protocol::Dns(name.into()),
                    Host::Dns4(name) => Protocol::Dns4(name.into()),
                    Host::Dns6(name) => Protocol::Dns6(name.into()),
                };
                let tcp = Protocol::Tcp(*port);
                bytes.extend_from_slice(multiaddr::Multiaddr::from(host).with(tcp).as_ref());
            }
        }
        Self::from_bytes(bytes)
    }
}

/// An address that cannot be a control or listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{addr} cannot be a control or listen address: {reason} \
     (expected /unix/PATH or /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT)"
)]
pub struct EndpointError {
    /// The address.
    pub addr: Multiaddr,
    /// What is wrong with it.
    pub reason: NotAnEndpoint,
}

/// Why an address cannot be a control or listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnEndpoint {
    /// It cannot even be taken apart.
    #[error(transparent)]
    Multiaddr(#[from] MultiaddrError),
    /// It begins with something that is neither a host nor `/unix`.
    #[error("it begins with {0}, which is neither a host nor a unix socket")]
    NoHost(&'static str),
    /// It ends after the host.
    #[error("it has no port")]
    NoPort,
    /// The host is followed by another transport.
    #[error("its transport is {0} rather than tcp")]
    NotTcp(&'static str),
    /// It goes on after the port.
    #[error("it has {0} after the port")]
    Trailing(&'static str),
    /// A path no file can have.
    #[error("its path contains a NUL character")]
    NulInPath,
    /// A path no unix socket can have.
    #[error("its path is {0} bytes long, more than the {MAX_UNIX_PATH} a unix socket can have")]
    PathTooLong(usize),
}

impl Multiaddr {
    /// Where to connect or listen, if this is the address of a socket a daemon can be spoken to
    /// through: `/unix/PATH` or `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, and nothing after it.
    ///
    /// # Errors
    /// Says why it is not.
    pub fn endpoint(&self) -> Result<Endpoint, EndpointError> {
        self.try_endpoint().map_err(|reason| EndpointError {
            addr: self.clone(),
            reason,
        })
    }

    fn try_endpoint(&self) -> Result<Endpoint, NotAnEndpoint> {
        let mut parts = self.walk();
        let first = parts.next().ok_or(MultiaddrError::Empty)??;
        let value = first.value.unwrap_or_default();
        let host = match first.name {
            "unix" if value.contains('\0') => return Err(NotAnEndpoint::NulInPath),
            "unix" if value.len() > MAX_UNIX_PATH => {
                return Err(NotAnEndpoint::PathTooLong(value.len()))
            }
            "unix" => return Ok(Endpoint::Unix(value)),
            "ip4" => Host::Ip4(
                value
                    .parse()
                    .map_err(|_| NotAnEndpoint::NoHost(first.name))?,
            ),
            "ip6" => Host::Ip6(
                value
                    .parse()
                    .map_err(|_| NotAnEndpoint::NoHost(first.name))?,
            ),
            "dns" => Host::Dns(value),
            "dns4" => Host::Dns4(value),
            "dns6" => Host::Dns6(value),
            other => return Err(NotAnEndpoint::NoHost(other)),
        };
        let port = match parts.next().transpose()? {
            Some(Component {
                name: "tcp",
                value: Some(port),
                ..
            }) => port.parse().map_err(|_| NotAnEndpoint::NoPort)?,
            Some(other) => return Err(NotAnEndpoint::NotTcp(other.name)),
            None => return Err(NotAnEndpoint::NoPort),
        };
        match parts.next().transpose()? {
            None => Ok(Endpoint::Tcp { host, port }),
            Some(extra) => Err(NotAnEndpoint::Trailing(extra.name)),
        }
    }
}

#[cfg(test)]
mod tests;
