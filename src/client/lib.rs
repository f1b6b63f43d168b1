//! The client for tokio: everything that can be asked of a daemon.
//!
//! - [`Client`]: cheap to clone, shared between tasks. Each family of requests is a file with its
//!   methods: `control`, `stream`, `dht`, `connmgr`, `pubsub`, `peerstore`, `unary`.
//! - [`Stream`], [`IncomingStreams`], [`Results`], [`Subscription`]: what they return that goes on.
//! - [`Error`]: what they fail with.
//!
//! This is a driver: the protocol is in [`p2pd_protocol`], and its sockets, timers and tasks are here.
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
/// Clones are cheap and share their connections and handlers. Connections are made when needed, on
/// the tokio runtime of whoever needs them, and kept for the next request. Dropping a future gives
/// the request up; so does [`with_timeout`](Self::with_timeout), which also tells the daemon.
///
/// The last clone to be dropped closes the idle connections and the persistent one. Streams and
/// subscriptions live on. An [`IncomingStreams`] has a clone of its own.
///
/// The persistent connection and the listener for inbound streams belong to the runtime on which they
/// were opened. Calls from another one wait for that to be running; when it has ended, they are opened
/// anew.
///
/// # Panics
/// Its methods panic on a tokio runtime without I/O or time: build it with
/// [`enable_all`](tokio::runtime::Builder::enable_all).
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    timeout: Option<Duration>,
}

/// What the clones of a client share.
struct Shared {
    pool: Arc<Pool>,
    inbound: listener::Inbound,
    unary: UnaryCalls,
}

/// A client that lives only as long as others have it.
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
    /// A client of the daemon with that control address: `/unix/PATH` or
    /// `/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT`.
    ///
    /// # Errors
    /// It is another kind of address. Whether a daemon is there shows when it is used.
    pub fn new(control: Multiaddr) -> Result<Self, EndpointError> {
        let built = Self::builder(control).build();
        built.map_err(|error| match error {
            Error::Address(error) => error,
            other => unreachable!("nothing but the address was given: {other}"),
        })
    }

    /// A client with other settings than the default ones.
    pub fn builder(control: Multiaddr) -> ClientBuilder {
        ClientBuilder {
            control,
            listen: None,
            limits: Limits::default(),
            unary_limits: UnaryLimits::default(),
            max_connections: MAX_SLOW_REQUESTS,
        }
    }

    /// The same client, with the same connections and handlers, whose calls may take so long, all
    /// together; with `None`, the default, as long as the daemon takes, which is 60 s where it has a
    /// limit. The daemon is told in CONNECT, STREAM_OPEN and the DHT's requests, in whole seconds.
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

    /// How long calls may take.
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

    /// Returns the result of `work`, or a timeout. An error says what the request was about.
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
    /// Where the daemon is to connect to for inbound streams; for TCP port 0, a free port is taken.
    /// By default a unix socket in a private directory, or, if the control address is no unix
    /// socket, a free TCP port of the same host.
    pub fn listen_maddr(mut self, listen: Multiaddr) -> Self {
        self.listen = Some(listen);
        self
    }

    /// What is taken from the daemon.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// What unary calls may come to; the largest message must not exceed the daemon's
    /// `-persistentConnMaxMsgSize`.
    pub fn unary_limits(mut self, limits: UnaryLimits) -> Self {
        self.unary_limits = limits;
        self
    }

    /// How many requests for which the daemon asks other peers (CONNECT, STREAM_OPEN, DHT) may be
    /// under way at once, each on a connection of its own; further ones wait their turn. 64 by
    /// default, at least 1. Open streams do not count.
    pub fn max_connections(mut self, count: usize) -> Self {
        self.max_connections = count.max(1);
        self
    }

    /// The client.
    ///
    /// # Errors
    /// [`Error::Address`]: an address is none of a unix or TCP socket.
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
