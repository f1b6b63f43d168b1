//! Endpoints: socket addresses, derived from multiaddrs.

use super::multiaddr::component::{push_unix, Component};
use super::multiaddr::{Multiaddr, MultiaddrError};
use multiaddr::Protocol;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest path of a unix socket, in bytes: `sockaddr_un` without the final NUL.
const MAX_UNIX_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// Address of a daemon's or client's socket.
///
/// ```
/// use p2pd_protocol::{Endpoint, Multiaddr};
///
/// let addr: Multiaddr = "/unix/tmp/p2pd.sock".parse()?;
/// assert_eq!(addr.endpoint()?, Endpoint::Unix("/tmp/p2pd.sock".to_owned()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket: its absolute path.
    Unix(String),
    /// A TCP socket.
    Tcp {
        /// The address or name.
        host: Host,
        /// The port. A listener at port 0 gets any free port.
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
    /// A name that resolves to addresses of either family.
    Dns(String),
    /// A name that resolves to IPv4 addresses.
    Dns4(String),
    /// A name that resolves to IPv6 addresses.
    Dns6(String),
}

impl fmt::Display for Host {
    /// Writes only the address or name.
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

/// Error of an address that cannot be a control or listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{addr} cannot be a control or listen address: {reason} \
     (expected /unix/PATH or /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT)"
)]
pub struct EndpointError {
    /// The address.
    pub addr: Multiaddr,
    /// The reason.
    pub reason: NotAnEndpoint,
}

/// Reason why an address cannot be a control or listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotAnEndpoint {
    /// It cannot be split into components.
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
    /// Something follows the port.
    #[error("it has {0} after the port")]
    Trailing(&'static str),
    /// Its path contains a NUL character.
    #[error("its path contains a NUL character")]
    NulInPath,
    /// Its path is too long for a unix socket.
    #[error("its path is {0} bytes long, more than the {MAX_UNIX_PATH} a unix socket can have")]
    PathTooLong(usize),
}

impl Multiaddr {
    /// Returns the endpoint to connect to or listen at. The address must be `/unix/PATH` or
    /// `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`, with nothing after it.
    ///
    /// # Errors
    /// The address has another form, or its path is not valid for a unix socket.
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
