//! Multiaddrs in their binary form, read on demand.
//!
//! The protocols come from the `multiaddr` crate, except `/unix`, of which that crate reads one
//! path segment only. Here, as in Go, a path is the rest of the address: `/unix/tmp/p2pd.sock` is
//! the path `/tmp/p2pd.sock`, stored with its leading slash.

use crate::types::peer_id::{ParsePeerIdError, PeerId};
use bytes::Bytes;
use multiaddr::{Error as CrateError, Protocol};
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use unsigned_varint::{decode, encode};

const UNIX: u32 = 400;

/// The longest path a unix socket can have: `sockaddr_un` less its final NUL.
const MAX_UNIX_PATH: usize = if cfg!(target_os = "linux") { 107 } else { 103 };

/// A multiaddr. Addresses from a daemon are kept as they came, also where this version does not
/// know one of their protocols.
///
/// ```
/// use p2pd_protocol::Multiaddr;
///
/// let addr: Multiaddr = "/ip4/127.0.0.1/tcp/4001".parse()?;
/// assert_eq!(addr.as_bytes(), [4, 127, 0, 0, 1, 6, 0x0f, 0xa1]);
/// assert_eq!(addr.to_string(), "/ip4/127.0.0.1/tcp/4001");
/// # Ok::<(), p2pd_protocol::multiaddr::MultiaddrError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Multiaddr(Bytes);

/// One protocol of a multiaddr, with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component<'a> {
    /// The number of the protocol.
    pub code: u32,
    /// Its name in text.
    pub name: &'static str,
    /// The text of its value, where it takes one. Of `/unix`, the path, with its leading slash.
    pub value: Option<String>,
    /// The whole component in binary.
    pub bytes: &'a [u8],
}

impl fmt::Display for Component<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.name)?;
        match &self.value {
            Some(path) if self.code == UNIX => f.write_str(path),
            Some(value) => write!(f, "/{value}"),
            None => Ok(()),
        }
    }
}

impl Multiaddr {
    /// Takes the bytes as they are; see [`validate`](Self::validate).
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The binary form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The binary form, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// The protocols and their values, in order.
    ///
    /// # Errors
    /// When a component is not well-formed, or of a protocol unknown here.
    pub fn components(&self) -> Result<Vec<Component<'_>>, MultiaddrError> {
        self.walk().collect()
    }

    /// The protocols' numbers and names, in order.
    ///
    /// # Errors
    /// As [`components`](Self::components).
    pub fn protocols(&self) -> Result<Vec<(u32, &'static str)>, MultiaddrError> {
        self.walk()
            .map(|part| part.map(|part| (part.code, part.name)))
            .collect()
    }

    /// Whether the bytes are a multiaddr as far as can be told: what follows a protocol unknown
    /// here cannot be judged, and passes.
    ///
    /// # Errors
    /// Says what is wrong with them.
    pub fn validate(&self) -> Result<(), MultiaddrError> {
        if self.0.is_empty() {
            return Err(MultiaddrError::Empty);
        }
        match self.walk().find_map(Result::err) {
            None | Some(MultiaddrError::UnknownCode(_)) => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// The same address with the path of `/unix` made absolute.
    ///
    /// py-multiaddr leaves out the leading slash, and a Go daemon given such an address dials a
    /// path relative to its working directory.
    #[must_use]
    pub fn with_absolute_path(self) -> Self {
        let code = encode::u32(UNIX, &mut encode::u32_buffer()).to_vec();
        if !self.0.windows(code.len()).any(|window| window == code) {
            return self;
        }
        match self.components().as_deref() {
            Ok([before @ .., unix]) if unix.code == UNIX => {
                let start: usize = before.iter().map(|part| part.bytes.len()).sum();
                let mut bytes = self.0[..start].to_vec();
                push_unix(&mut bytes, unix.value.as_deref().unwrap_or_default());
                Self::from_bytes(bytes)
            }
            _ => self,
        }
    }

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

    /// The components one after the other, ending after the first error.
    fn walk(&self) -> impl Iterator<Item = Result<Component<'_>, MultiaddrError>> {
        let mut rest: &[u8] = &self.0;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let item = read_component(rest, self.0.len() - rest.len());
            rest = item.as_ref().map_or(&[], |part| &rest[part.bytes.len()..]);
            Some(item)
        })
    }
}

/// Reads the first component of `input`, which is not empty and begins `offset` bytes into the
/// address.
fn read_component(input: &[u8], offset: usize) -> Result<Component<'_>, MultiaddrError> {
    let malformed = |reason: String| MultiaddrError::Malformed { offset, reason };
    let (code, value) = decode::u32(input).map_err(|error| malformed(error.to_string()))?;
    if code == UNIX {
        let (length, path) = decode::usize(value).map_err(|error| malformed(error.to_string()))?;
        if path.len() < length {
            return Err(malformed(format!("a path of {length} bytes is cut short")));
        }
        if path.len() > length {
            return Err(MultiaddrError::UnixNotLast);
        }
        let path = std::str::from_utf8(path).map_err(|error| malformed(error.to_string()))?;
        if path.trim_matches('/').is_empty() {
            return Err(malformed("an empty path".into()));
        }
        let slash = if path.starts_with('/') { "" } else { "/" };
        let value = Some(format!("{slash}{path}"));
        return Ok(Component {
            code,
            name: "unix",
            value,
            bytes: input,
        });
    }
    let (protocol, rest) = Protocol::from_bytes(input).map_err(|error| match error {
        CrateError::UnknownProtocolId(code) => MultiaddrError::UnknownCode(code),
        other => malformed(other.to_string()),
    })?;
    let name = protocol.tag();
    let text = protocol.to_string();
    let value = text[1 + name.len()..].strip_prefix('/');
    // Such a value would come back from text as something else.
    if value.is_some_and(|value| value.is_empty() || value.contains('/')) {
        return Err(malformed(format!(
            "the value of {name} is empty or has a slash in it"
        )));
    }
    let value = value.map(str::to_owned);
    Ok(Component {
        code,
        name,
        value,
        bytes: &input[..input.len() - rest.len()],
    })
}

fn push_unix(out: &mut Vec<u8>, path: &str) {
    out.extend_from_slice(encode::u32(UNIX, &mut encode::u32_buffer()));
    out.extend_from_slice(encode::usize(path.len(), &mut encode::usize_buffer()));
    out.extend_from_slice(path.as_bytes());
}

impl FromStr for Multiaddr {
    type Err = MultiaddrError;

    /// Reads the text form. As in Go, slashes at the end are ignored.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim_end_matches('/');
        if trimmed.is_empty() {
            return Err(MultiaddrError::Empty);
        }
        let path = trimmed
            .strip_prefix('/')
            .ok_or(MultiaddrError::NoLeadingSlash)?;
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = Some(path);
        while let Some(text) = rest {
            rest = parse_component(text, &mut bytes)?;
        }
        Ok(Self::from_bytes(bytes))
    }
}

/// Reads the first component of `text` (with no slash before it) into `out`, and returns the text
/// after it, if any.
fn parse_component<'a>(
    text: &'a str,
    out: &mut Vec<u8>,
) -> Result<Option<&'a str>, MultiaddrError> {
    let (name, after) = text
        .split_once('/')
        .map_or((text, None), |(n, rest)| (n, Some(rest)));
    if name == "unix" {
        let path = after.ok_or_else(|| MultiaddrError::MissingValue(name.into()))?;
        push_unix(out, &format!("/{path}"));
        return Ok(None);
    }
    let (value, after_value) = match after.map(|rest| rest.split_once('/').unwrap_or((rest, ""))) {
        Some((value, _)) => (
            Some(value),
            after.and_then(|rest| rest.get(value.len() + 1..)),
        ),
        None => (None, None),
    };
    let invalid = |value: &str, reason: String| MultiaddrError::InvalidValue {
        protocol: name.into(),
        value: value.into(),
        reason,
    };
    // The crate reads base58 only; a peer id may also be a CID.
    let peer = match (name, value) {
        ("p2p" | "ipfs", Some(value)) => {
            let peer = value.parse::<PeerId>();
            Some(
                peer.map_err(|e: ParsePeerIdError| invalid(value, e.to_string()))?
                    .to_base58(),
            )
        }
        _ => None,
    };
    let mut taken = 0;
    let parts = [Some(name), peer.as_deref().or(value)]
        .into_iter()
        .flatten();
    let protocol = Protocol::from_str_parts(parts.inspect(|_| taken += 1));
    let protocol = protocol.map_err(|error| match (error, value) {
        (CrateError::UnknownProtocolString(name), _) => MultiaddrError::UnknownProtocol(name),
        (_, None) => MultiaddrError::MissingValue(name.into()),
        (CrateError::ParsingError(error), Some(value)) => invalid(value, error.to_string()),
        (error, Some(value)) => invalid(value, error.to_string()),
    })?;
    let start = out.len();
    let written = protocol.write_bytes(out);
    // What is written must be readable: this is what refuses an empty or over-long value.
    if let Err(error) = written.map_err(|e| e.to_string()).and_then(|()| {
        read_component(&out[start..], start)
            .map_err(|error| error.to_string())
            .map(drop)
    }) {
        return Err(invalid(value.unwrap_or_default(), error));
    }
    Ok(if taken > 1 { after_value } else { after })
}

impl fmt::Display for Multiaddr {
    /// The text form. From the first component that cannot be read (unknown here, or malformed)
    /// on, it is `/unknown/` and the bytes in hexadecimal, which does not parse again.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = 0;
        for part in self.walk() {
            match part {
                Ok(part) => {
                    shown += part.bytes.len();
                    write!(f, "{part}")?;
                }
                Err(_) => {
                    f.write_str("/unknown/")?;
                    for byte in &self.0[shown..] {
                        write!(f, "{byte:02x}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Multiaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Multiaddr({self})")
    }
}

/// Why a text or some bytes are not a multiaddr, or cannot be taken apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MultiaddrError {
    /// Nothing at all.
    #[error("it is empty")]
    Empty,
    /// A text that does not begin as multiaddrs do.
    #[error("it does not begin with a slash")]
    NoLeadingSlash,
    /// A text with a name that is no protocol's.
    #[error("there is no protocol named {0:?}")]
    UnknownProtocol(String),
    /// A text that ends where a value should be.
    #[error("{0} has no value after it")]
    MissingValue(String),
    /// A value its protocol does not allow.
    #[error("{value:?} is no value for {protocol}: {reason}")]
    InvalidValue {
        /// The name of the protocol.
        protocol: String,
        /// The text of the value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Bytes of a protocol this version does not know.
    #[error("protocol {0} is not known to this version")]
    UnknownCode(u32),
    /// Bytes that cannot be a multiaddr.
    #[error("malformed at byte {offset}: {reason}")]
    Malformed {
        /// Where the component begins.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A path with another protocol after it: its text would be a longer path.
    #[error("/unix is not its last protocol")]
    UnixNotLast,
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PEER: &str = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7";

    fn parse(text: &str) -> Multiaddr {
        text.parse()
            .unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn refusal(text: &str) -> MultiaddrError {
        text.parse::<Multiaddr>().expect_err(text)
    }

    #[test]
    fn the_path_of_unix_is_the_rest_with_a_leading_slash() {
        let addr = parse("/unix/tmp/p2pd.sock");
        assert_eq!(addr.as_bytes(), b"\x90\x03\x0e/tmp/p2pd.sock");
        assert_eq!(addr.to_string(), "/unix/tmp/p2pd.sock");
        let parts = addr.components().unwrap();
        assert_eq!(parts[0].value.as_deref(), Some("/tmp/p2pd.sock"));
        // As Go does with an absolute path pasted after "/unix/".
        assert_eq!(parse("/unix//tmp/x").as_bytes(), b"\x90\x03\x07//tmp/x");
        assert_eq!(parse("/unix//tmp/x").to_string(), "/unix//tmp/x");
        let after_tcp = parse("/ip4/1.2.3.4/tcp/80/unix/a/tcp");
        assert_eq!(
            after_tcp.protocols().unwrap(),
            [(4, "ip4"), (6, "tcp"), (400, "unix")]
        );
    }

    #[test]
    fn a_path_without_its_slash_reads_the_same_and_is_made_absolute() {
        let relative = Multiaddr::from_bytes(&b"\x04\x01\x02\x03\x04\x90\x03\x03a/b"[..]);
        assert_eq!(relative.to_string(), "/ip4/1.2.3.4/unix/a/b");
        assert_ne!(relative, parse("/ip4/1.2.3.4/unix/a/b"));
        assert_eq!(
            relative.with_absolute_path(),
            parse("/ip4/1.2.3.4/unix/a/b")
        );
        // 0x90 0x03 as part of something else, and nothing there to change.
        for same in ["/ip4/1.2.144.3/tcp/1", "/tcp/36867", "/unix/a"] {
            assert_eq!(parse(same).with_absolute_path(), parse(same));
        }
    }

    #[test]
    fn text_round_trips() {
        for text in [
            "/ip4/127.0.0.1/udp/9/quic-v1",
            "/ip6/::1/tcp/80/ws",
            "/ip6zone/eth0/ip6/fe80::1/tcp/1",
            "/dns4/example.com/tcp/443/tls/sni/example.com/ws",
            "/dnsaddr/bootstrap.libp2p.io/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7",
            "/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7/p2p-circuit",
            "/memory/3",
            "/ip4/1.2.3.4/tcp/1/http/http-path/a%2Fb",
            "/onion3/vww6ybal4bd7szmgncyruucpgfkqahzddi37ktceo3ah7ngmcopnpyyd:1234",
        ] {
            assert_eq!(parse(text).to_string(), text);
        }
        assert_eq!(
            parse("/ip4/1.2.3.4/tcp/80/").to_string(),
            "/ip4/1.2.3.4/tcp/80"
        );
        let cid = parse(
            PEER.parse::<PeerId>()
                .map(|p| format!("/p2p/{}", p.to_cid()))
                .as_deref()
                .unwrap(),
        );
        assert_eq!(cid, parse(&format!("/ipfs/{PEER}")));
        assert_eq!(cid.to_string(), format!("/p2p/{PEER}"));
    }

    #[test]
    fn bad_text_is_refused_with_the_reason() {
        use MultiaddrError as E;
        assert_eq!(refusal(""), E::Empty);
        assert_eq!(refusal("//"), E::Empty);
        assert_eq!(refusal("ip4/1.2.3.4"), E::NoLeadingSlash);
        assert_eq!(refusal("/nope/1"), E::UnknownProtocol("nope".into()));
        assert_eq!(
            refusal("/ip4/1.2.3.4//tcp/1"),
            E::UnknownProtocol(String::new())
        );
        assert_eq!(refusal("/unix/"), E::MissingValue("unix".into()));
        assert_eq!(refusal("/ip4/1.2.3.4/tcp"), E::MissingValue("tcp".into()));
        for (text, named) in [
            ("/ip4/1.2.3/tcp/1", "\"1.2.3\" is no value for ip4"),
            (
                "/ip4/1.2.3.4/tcp/65536",
                "\"65536\" is no value for tcp: number too large",
            ),
            ("/ip4/1.2.3.4/tcp/-1", "\"-1\" is no value for tcp"),
            ("/dns//tcp/1", "\"\" is no value for dns"),
            ("/p2p/Qm0", "\"Qm0\" is no value for p2p: it is not base58"),
            ("/p2p/QmS5", "no value for p2p: its multihash declares"),
            ("/certhash/u", "no value for certhash"),
        ] {
            let message = refusal(text).to_string();
            assert!(message.contains(named), "{text}: {message}");
        }
    }

    #[test]
    fn unknown_protocols_are_kept_and_shown_and_malformed_bytes_told_apart() {
        let unknown = Multiaddr::from_bytes(&b"\x04\x01\x02\x03\x04\xff\xff\x03abc"[..]);
        assert_eq!(unknown.to_string(), "/ip4/1.2.3.4/unknown/ffff03616263");
        assert_eq!(unknown.protocols(), Err(MultiaddrError::UnknownCode(65535)));
        assert_eq!(unknown.validate(), Ok(()));
        for bad in [
            &b"\x04\x01"[..],
            b"\x90\x03\x05tmp",
            b"\x90\x03\x00",
            b"\x90\x03\x02//",
            b"\x90\x03\x02\xff\xfe",
            b"\x90\x03\x01a\x06\x00\x50",
            b"\x36\x03a/b",
            b"\x80",
            b"",
        ] {
            assert!(Multiaddr::from_bytes(bad).validate().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn endpoints_are_unix_sockets_and_tcp_ports() {
        let endpoint = |text: &str| parse(text).endpoint().unwrap();
        let tcp = |host, port| Endpoint::Tcp { host, port };
        assert_eq!(endpoint("/unix/tmp/x"), Endpoint::Unix("/tmp/x".into()));
        assert_eq!(
            endpoint("/ip4/0.0.0.0/tcp/0"),
            tcp(Host::Ip4(Ipv4Addr::UNSPECIFIED), 0)
        );
        assert_eq!(
            endpoint("/ip6/::1/tcp/65535"),
            tcp(Host::Ip6(Ipv6Addr::LOCALHOST), 65535)
        );
        assert_eq!(endpoint("/dns/h/tcp/1"), tcp(Host::Dns("h".into()), 1));
        for text in [
            "/unix/a/b",
            "/ip4/1.2.3.4/tcp/5",
            "/ip6/::1/tcp/5",
            "/dns/h/tcp/1",
            "/dns4/h/tcp/1",
            "/dns6/h/tcp/1",
        ] {
            assert_eq!(Multiaddr::from(&endpoint(text)), parse(text));
        }
        let bound: SocketAddr = "127.0.0.1:4".parse().unwrap();
        assert_eq!(Endpoint::from(bound), endpoint("/ip4/127.0.0.1/tcp/4"));
    }

    #[test]
    fn other_addresses_are_refused_as_endpoints_with_the_reason() {
        use NotAnEndpoint as N;
        let reason = |text: &str| parse(text).endpoint().unwrap_err().reason;
        assert_eq!(reason(&format!("/p2p/{PEER}")), N::NoHost("p2p"));
        assert_eq!(reason("/tcp/80"), N::NoHost("tcp"));
        assert_eq!(reason("/ip4/1.2.3.4"), N::NoPort);
        assert_eq!(reason("/ip4/1.2.3.4/udp/5"), N::NotTcp("udp"));
        assert_eq!(reason("/ip4/1.2.3.4/tcp/5/ws"), N::Trailing("ws"));
        assert_eq!(reason("/ip4/1.2.3.4/tcp/5/unix/x"), N::Trailing("unix"));
        assert_eq!(reason("/unix/a\0b"), N::NulInPath);
        assert_eq!(
            reason(&format!("/unix/{}", "x".repeat(120))),
            N::PathTooLong(121)
        );
        let empty = Multiaddr::from_bytes(Bytes::new()).endpoint().unwrap_err();
        assert_eq!(empty.reason, N::Multiaddr(MultiaddrError::Empty));
        assert_eq!(
            parse("/ip4/1.2.3.4/udp/5")
                .endpoint()
                .unwrap_err()
                .to_string(),
            "/ip4/1.2.3.4/udp/5 cannot be a control or listen address: its transport is udp \
             rather than tcp (expected /unix/PATH or /ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT)"
        );
    }

    /// Texts of which many parse: what the daemons use, in any order.
    fn text() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            any::<Ipv4Addr>().prop_map(|ip| format!("/ip4/{ip}")),
            any::<Ipv6Addr>().prop_map(|ip| format!("/ip6/{ip}")),
            any::<u16>().prop_map(|port| format!("/tcp/{port}")),
            any::<u16>().prop_map(|port| format!("/udp/{port}")),
            "[a-z.]{0,9}".prop_map(|name| format!("/dns4/{name}")),
            "[a-z%/]{0,9}".prop_map(|path| format!("/http-path/{path}")),
            "[a-z ]{0,9}".prop_map(|path| format!("/x-parity-ws/{path}")),
            prop::sample::select(vec!["/ws", "/quic-v1", "/p2p-circuit", "/ipcidr/24", "/"])
                .prop_map(str::to_owned),
        ];
        (
            prop::collection::vec(part, 0..5),
            prop::option::of("/unix/[a-z/ ]{0,12}"),
        )
            .prop_map(|(parts, unix)| parts.concat() + &unix.unwrap_or_default())
    }

    proptest! {
        #[test]
        fn what_parses_reads_back_as_itself(text in text()) {
            if let Ok(addr) = text.parse::<Multiaddr>() {
                prop_assert_eq!(addr.validate(), Ok(()));
                prop_assert_eq!(&parse(&addr.to_string()), &addr);
                let parts = addr.components().unwrap();
                let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes).copied().collect();
                prop_assert_eq!(bytes, addr.as_bytes());
            }
        }

        #[test]
        fn no_bytes_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..60),
            code in prop::sample::select(vec![4_u32, 6, 41, 42, 53, 400, 421, 444, 445, 446, 447, 466, 481, 4770]),
        ) {
            let mut prefixed = encode::u32(code, &mut encode::u32_buffer()).to_vec();
            prefixed.extend_from_slice(&bytes);
            for bytes in [bytes, prefixed] {
                let addr = Multiaddr::from_bytes(bytes);
                let readable = addr.components().is_ok();
                prop_assert_eq!(addr.to_string().contains("/unknown/"), !readable);
                let _ = (addr.endpoint(), addr.clone().with_absolute_path());
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}", value in "[ -~]{0,20}") {
            let _ = text.parse::<Multiaddr>();
            for name in ["ip4", "ip6", "tcp", "p2p", "unix", "certhash", "onion", "garlic64", "memory"] {
                let _ = format!("/{name}/{value}").parse::<Multiaddr>();
            }
        }
    }
}
