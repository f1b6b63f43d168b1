//! The client for tokio: a method for each request that a daemon serves.
//!
//! - [`Client`]: cheap to clone, shared between tasks. Each family of requests has a file with its
//!   methods: `control`, `streams`, `incoming`, `dht`, `connmgr`, `pubsub`, `peerstore`, `unary`.
//! - [`Stream`], [`IncomingStreams`], [`Results`], [`Subscription`]: results that arrive over time.
//! - [`Error`]: the failures.
//!
//! This crate has the sockets, timers and tasks. [`p2pd_protocol`] has the protocol, and decides about
//! pooling, retries and registrations.
//!
//! ```no_run
//! use p2pd_client::Client;
//! use p2pd_protocol::Multiaddr;
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::new("/unix/tmp/p2pd.sock".parse()?)?;
//! let me = client.identify().await?;
//! println!("{} listens at {:?}", me.peer_id, me.addrs);
//! # Ok(()) }
//! ```

mod connmgr;
mod control;
mod dht;
mod error;
mod handlers;
mod incoming;
mod listener;
mod peerstore;
mod pool;
mod pubsub;
mod results;
mod socket;
mod stream;
mod streams;
mod sync;
mod unary;

pub use error::{Context, Error};
pub use incoming::IncomingStreams;
pub use listener::ListenerStats;
pub use pubsub::Subscription;
pub use results::Results;
pub use stream::Stream;
pub use unary::UnaryCall;

pub(crate) use sync::lock;

pub use p2pd_protocol::Identity;

use p2pd_protocol::command::Typed;
use p2pd_protocol::endpoint::EndpointError;
use p2pd_protocol::policy::pool::MAX_SLOW_REQUESTS;
use p2pd_protocol::{Limits, Multiaddr, UnaryLimits};
use pool::Pool;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;
use unary::calls::UnaryCalls;

/// A client of one libp2p daemon.
///
/// Clones are cheap and share their connections and handlers. A request opens a connection on the
/// caller's tokio runtime, or reuses an idle one. Dropping a future cancels the request.
/// [`with_timeout`](Self::with_timeout) cancels it after a time.
///
/// Dropping the last clone closes the idle connections and the persistent connection. Streams and
/// subscriptions stay open. An [`IncomingStreams`] holds a clone.
///
/// The persistent connection and the listener for inbound streams belong to the runtime on which they
/// were opened, and work only while it runs. After it has ended, the next use opens them again.
///
/// # Panics
/// Its methods panic on a tokio runtime without I/O or time: build it with
/// [`enable_all`](tokio::runtime::Builder::enable_all).
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    timeout: Option<Duration>,
}

/// The state that the clones of a client share.
struct Shared {
    pool: Arc<Pool>,
    inbound: listener::Inbound,
    unary: UnaryCalls,
}

/// A weak reference to a client.
#[derive(Clone)]
#[doc(hidden)]
pub struct WeakClient {
    shared: Weak<Shared>,
    timeout: Option<Duration>,
}

impl WeakClient {
    #[doc(hidden)]
    pub fn upgrade(&self) -> Option<Client> {
        let shared = self.shared.upgrade()?;
        Some(Client {
            shared,
            timeout: self.timeout,
        })
    }
}

impl fmt::Debug for WeakClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakClient")
    }
}

/// The settings of a [`Client`].
///
/// ```
/// use p2pd_client::Client;
///
/// let client = Client::builder("/unix/tmp/p2pd.sock".parse()?)
///     .listen_maddr("/unix/tmp/my-program.sock".parse()?)
///     .build()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct ClientBuilder {
    control: Multiaddr,
    listen: Option<Multiaddr>,
    limits: Limits,
    unary_limits: UnaryLimits,
    max_connections: usize,
}

impl Client {
    /// Makes a client of the daemon with this control address: `/unix/PATH` or
    /// `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`.
    ///
    /// # Errors
    /// The address is of another kind. This does not connect: a missing daemon shows at the first
    /// request.
    pub fn new(control: Multiaddr) -> Result<Self, EndpointError> {
        let built = Self::builder(control).build();
        built.map_err(|error| match error {
            Error::Address(error) => error,
            other => unreachable!("nothing but the address was given: {other}"),
        })
    }

    /// Returns a builder for a client with custom settings.
    pub fn builder(control: Multiaddr) -> ClientBuilder {
        ClientBuilder {
            control,
            listen: None,
            limits: Limits::default(),
            unary_limits: UnaryLimits::default(),
            max_connections: MAX_SLOW_REQUESTS,
        }
    }

    /// Returns a clone with a time limit for each call, from beginning to end. `None`, the default, sets
    /// no limit. The daemons have their own limits: they abort CONNECT, STREAM_OPEN and DHT requests
    /// after 60 s. These requests carry the timeout, in whole seconds, so that the daemon applies it.
    ///
    /// ```
    /// # use p2pd_client::Client;
    /// # use std::time::Duration;
    /// # let client = Client::new("/unix/tmp/p2pd.sock".parse()?)?;
    /// let hasty = client.with_timeout(Some(Duration::from_secs(2)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_timeout(&self, timeout: impl Into<Option<Duration>>) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            timeout: timeout.into(),
        }
    }

    /// How long each call may take.
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout
    }

    /// The daemon's control address.
    pub fn control_maddr(&self) -> &Multiaddr {
        self.pool().control_maddr()
    }

    #[doc(hidden)]
    pub fn downgrade(&self) -> WeakClient {
        WeakClient {
            shared: Arc::downgrade(&self.shared),
            timeout: self.timeout,
        }
    }

    fn pool(&self) -> &Arc<Pool> {
        &self.shared.pool
    }

    /// Sends a request and returns its reply, or its only value.
    async fn request<R: Typed>(&self, about: Context, request: R) -> Result<R::Output, Error> {
        self.within(about, async {
            let (reply, _) = self.pool().request(&request).await?;
            Ok(reply)
        })
        .await
    }

    /// Returns the result of `work`, or a timeout. Adds the request to an error.
    async fn within<T>(
        &self,
        about: Context,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let outcome = match self.timeout {
            None => work.await,
            Some(limit) => match tokio::time::timeout(limit, work).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Error::timeout(limit)),
            },
        };
        outcome.map_err(|error| error.about(&about))
    }
}

impl ClientBuilder {
    /// Sets the address that the daemon connects to for inbound streams. TCP port 0 stands for any free
    /// port. The default is a unix socket in a private directory, or, if the control address is TCP, a
    /// free port of the same host.
    pub fn listen_maddr(mut self, listen: Multiaddr) -> Self {
        self.listen = Some(listen);
        self
    }

    /// Sets limits on messages from the daemon.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets limits on unary calls. The largest message must not exceed the daemon's
    /// `-persistentConnMaxMsgSize`.
    pub fn unary_limits(mut self, limits: UnaryLimits) -> Self {
        self.unary_limits = limits;
        self
    }

    /// Sets the maximum number of concurrent slow requests: those for which the daemon asks other peers
    /// (CONNECT, STREAM_OPEN, DHT). Each uses its own connection, and further ones wait. 64 by
    /// default, at least 1. Open streams do not count.
    pub fn max_connections(mut self, count: usize) -> Self {
        self.max_connections = count.max(1);
        self
    }

    /// Makes the client.
    ///
    /// # Errors
    /// [`Error::Address`] if an address is not that of a unix or TCP socket.
    pub fn build(self) -> Result<Client, Error> {
        let pool = Pool::new(self.control, self.limits, self.max_connections)?;
        let pool = Arc::new(pool);
        let listen = self.listen.map(|addr| addr.endpoint()).transpose()?;
        Ok(Client {
            shared: Arc::new(Shared {
                inbound: listener::Inbound::new(listen),
                unary: UnaryCalls::new(Arc::clone(&pool), self.unary_limits),
                pool,
            }),
            timeout: None,
        })
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("control_maddr", &self.control_maddr().to_string())
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}
