//! TCP with noise or TLS, and yamux.

use super::host::Host;
use super::socket::ReadAhead;
use super::{muxer, tls, yamux};
use crate::config::Security;
use crate::convert::without_peer;
use futures::future::{BoxFuture, Either};
use futures::{AsyncRead, AsyncWrite, FutureExt, TryFutureExt};
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::{Boxed, DialOpts, ListenerId, TransportError, TransportEvent};
use libp2p::core::upgrade::{
    InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo, Version,
};
use libp2p::core::{ConnectedPoint, Transport};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{noise, tcp, Multiaddr, PeerId};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

/// Time that a connection may take until it can carry streams.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Returns the transport of a node. Each of its connections belongs to `host`.
///
/// # Errors
/// The certificate or the keys of the security protocols cannot be made.
pub fn build(
    keypair: &Keypair,
    security: &[Security],
    host: &Host,
) -> io::Result<Boxed<(PeerId, StreamMuxerBox)>> {
    let host = host.clone();
    let decorate = move |(peer, muxer), point: ConnectedPoint| {
        let addr = without_peer(point.get_remote_address().clone());
        let muxer = muxer::Muxer::new(host.clone(), peer, addr, point.is_dialer(), muxer);
        (peer, StreamMuxerBox::new(muxer))
    };
    let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
    Ok(Resolving::new(tcp)
        .map(|socket, _| ReadAhead::new(socket))
        .upgrade(Version::V1Lazy)
        .authenticate(Secure::new(keypair, security)?)
        .multiplex(yamux::Config)
        .timeout(TIMEOUT)
        .map(decorate)
        .boxed())
}

/// The upgrade of a connection by the security protocol that both sides support.
#[derive(Clone)]
struct Secure {
    /// The preferred one is first.
    names: Vec<&'static str>,
    noise: noise::Config,
    tls: tls::Config,
}

const NOISE: &str = "/noise";

impl Secure {
    fn new(keypair: &Keypair, security: &[Security]) -> io::Result<Self> {
        let name = |it: &Security| match it {
            Security::Noise => NOISE,
            Security::Tls => tls::NAME,
        };
        Ok(Self {
            names: security.iter().map(name).collect(),
            noise: noise::Config::new(keypair).map_err(io::Error::other)?,
            tls: tls::Config::new(keypair)?,
        })
    }
}

type Secured<S> = Either<noise::Output<S>, futures_rustls::TlsStream<S>>;

impl UpgradeInfo for Secure {
    type Info = &'static str;
    type InfoIter = std::vec::IntoIter<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        self.names.clone().into_iter()
    }
}

impl<S> InboundConnectionUpgrade<S> for Secure
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (PeerId, Secured<S>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: S, name: Self::Info) -> Self::Future {
        if name == NOISE {
            return self
                .noise
                .upgrade_inbound(socket, name)
                .map_ok(|(peer, stream)| (peer, Either::Left(stream)))
                .map_err(io::Error::other)
                .boxed();
        }
        self.tls
            .inbound(socket)
            .map_ok(|(peer, stream)| (peer, Either::Right(stream)))
            .boxed()
    }
}

impl<S> OutboundConnectionUpgrade<S> for Secure
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (PeerId, Secured<S>);
    type Error = io::Error;
    type Future = BoxFuture<'static, io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: S, name: Self::Info) -> Self::Future {
        if name == NOISE {
            return self
                .noise
                .upgrade_outbound(socket, name)
                .map_ok(|(peer, stream)| (peer, Either::Left(stream)))
                .map_err(io::Error::other)
                .boxed();
        }
        self.tls
            .outbound(socket)
            .map_ok(|(peer, stream)| (peer, Either::Right(stream)))
            .boxed()
    }
}

/// A transport that resolves names as the system does, at each dial.
struct Resolving<T> {
    inner: Arc<Mutex<T>>,
}

impl<T> Resolving<T> {
    fn new(inner: T) -> Self {
        Self {
            inner: Arc::new(Mutex::new(inner)),
        }
    }
}

/// Dials an address without names.
fn dial<T: Transport<Error = io::Error>>(
    inner: &Mutex<T>,
    addr: Multiaddr,
    opts: DialOpts,
) -> Result<T::Dial, TransportError<io::Error>> {
    let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
    inner.dial(addr, opts)
}

/// Returns an address with its name replaced by `ip`.
fn with_ip(addr: &Multiaddr, ip: IpAddr) -> Multiaddr {
    let replaced = |protocol| match protocol {
        Protocol::Dns(_) | Protocol::Dns4(_) | Protocol::Dns6(_) => Protocol::from(ip),
        protocol => protocol,
    };
    addr.iter().map(replaced).collect()
}

/// Whether a name stands for an address.
type Family = fn(&IpAddr) -> bool;

/// Returns the name in an address, and which addresses it stands for.
fn name_in(addr: &Multiaddr) -> Option<(String, Family)> {
    addr.iter().find_map(|protocol| match protocol {
        Protocol::Dns(name) => Some((name.into_owned(), (|_| true) as Family)),
        Protocol::Dns4(name) => Some((name.into_owned(), IpAddr::is_ipv4 as _)),
        Protocol::Dns6(name) => Some((name.into_owned(), IpAddr::is_ipv6 as _)),
        _ => None,
    })
}

impl<T> Transport for Resolving<T>
where
    T: Transport<Error = io::Error> + Send + Unpin + 'static,
    T::Dial: Send + 'static,
    T::Output: 'static,
{
    type Output = T::Output;
    type Error = io::Error;
    type ListenerUpgrade = T::ListenerUpgrade;
    type Dial = BoxFuture<'static, io::Result<T::Output>>;

    fn listen_on(
        &mut self,
        id: ListenerId,
        addr: Multiaddr,
    ) -> Result<(), TransportError<io::Error>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.listen_on(id, addr)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.remove_listener(id)
    }

    fn dial(
        &mut self,
        addr: Multiaddr,
        opts: DialOpts,
    ) -> Result<Self::Dial, TransportError<io::Error>> {
        let Some((name, is_wanted)) = name_in(&addr) else {
            return Ok(dial(&self.inner, addr, opts)?.boxed());
        };
        let inner = self.inner.clone();
        Ok(async move {
            let resolved = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let ips = resolved.map(|addr| addr.ip()).filter(is_wanted);
            let mut failure = None;
            for ip in ips {
                let dialing = match dial(&inner, with_ip(&addr, ip), opts) {
                    Ok(dialing) => dialing,
                    Err(TransportError::MultiaddrNotSupported(addr)) => {
                        let message = format!("no transport for {addr}");
                        return Err(io::Error::new(io::ErrorKind::Unsupported, message));
                    }
                    Err(TransportError::Other(error)) => {
                        failure = Some(error);
                        continue;
                    }
                };
                match dialing.await {
                    Ok(connection) => return Ok(connection),
                    Err(error) => failure = Some(error),
                }
            }
            Err(failure.unwrap_or_else(|| {
                let message = format!("{name} has no address of the wanted kind");
                io::Error::new(io::ErrorKind::NotFound, message)
            }))
        }
        .boxed())
    }

    fn poll(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, io::Error>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Transport::poll(Pin::new(&mut *inner), cx)
    }
}
