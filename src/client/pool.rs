//! The pool of control connections, and requests over them. [`p2pd_protocol::policy`] decides which
//! connection a request uses, and whether it is sent again.

use super::error::{Context, Error};
use super::lock;
use super::socket::Socket;
use bytes::Bytes;
use p2pd_protocol::command::{control::Identify, unary::Upgrade, Typed};
use p2pd_protocol::endpoint::{Endpoint, EndpointError};
use p2pd_protocol::policy::pool::{self as policy, Fitness, Generation, Permit, MAX_IDLE};
use p2pd_protocol::policy::refusal::{may_be_unknown_request, UNKNOWN_REQUEST};
use p2pd_protocol::policy::retry::{Attempt, Progress};
use p2pd_protocol::{
    self as protocol, ClientExchange, EncodedRequest, Event, Limits, Multiaddr, Reply, State,
};
use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex};
use std::task::{self, ready, Poll};
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::{self, Handle};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The control connections to one daemon.
#[derive(Debug)]
pub struct Pool {
    control: Multiaddr,
    endpoint: Endpoint,
    limits: Limits,
    slow: Arc<Semaphore>,
    quick: Arc<Semaphore>,
    idle: Mutex<policy::Pool<Connection>>,
}

/// A control connection.
#[derive(Debug)]
struct Connection {
    socket: Socket,
    exchange: ClientExchange,
    /// The runtime whose reactor the socket is registered with. On another runtime the socket would
    /// never become ready.
    runtime: runtime::Id,
    generation: Generation,
}

/// A connection on which a request is under way. When this is dropped, the connection goes back to
/// the pool if the reply was read to its end, and is closed otherwise.
#[derive(Debug)]
pub struct PooledConnection {
    connection: Option<Connection>,
    pool: Arc<Pool>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Pool {
    /// Makes an empty pool.
    ///
    /// # Arguments
    /// `max_slow`: the maximum number of concurrent requests for which the daemon asks other peers.
    pub fn new(control: Multiaddr, limits: Limits, max_slow: usize) -> Result<Self, EndpointError> {
        Ok(Self {
            endpoint: control.endpoint()?,
            control,
            limits,
            slow: Arc::new(Semaphore::new(max_slow)),
            quick: Arc::new(Semaphore::new(MAX_IDLE)),
            idle: Mutex::new(policy::Pool::new(MAX_IDLE)),
        })
    }

    /// The daemon's control address.
    pub fn control_maddr(&self) -> &Multiaddr {
        &self.control
    }

    /// The endpoint of the control address.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sends a request and returns its first event, with the connection.
    pub async fn start(
        self: &Arc<Self>,
        request: &EncodedRequest,
    ) -> Result<(PooledConnection, Event), Error> {
        let permits = match Permit::of(request) {
            Permit::Slow => &self.slow,
            Permit::Quick => &self.quick,
        };
        let mut pooled = PooledConnection {
            connection: None,
            pool: Arc::clone(self),
            // The semaphores are never closed.
            permit: Arc::clone(permits).acquire_owned().await.ok(),
        };
        let mut idle = self.take();
        let mut attempt = Attempt {
            pooled: idle.is_some(),
            repeated: false,
        };
        loop {
            let connection = match idle.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            match pooled.connection.insert(connection).send(request).await {
                Err(error) if attempt.may_retry(error.is_unsent()) => {
                    attempt = Attempt {
                        pooled: false,
                        repeated: true,
                    };
                }
                outcome => return outcome.map(|event| (pooled, event)),
            }
        }
    }

    /// Sends a request and returns its reply, or its only value, with the connection.
    pub async fn request<R: Typed>(
        self: &Arc<Self>,
        request: &R,
    ) -> Result<(R::Output, PooledConnection), Error> {
        let (mut pooled, mut event) = self.start(&request.encoded()).await?;
        let mut value = None;
        loop {
            match event {
                Event::Value(reply) => value = Some(reply),
                Event::Reply(reply) => return Ok((typed::<R>(Some(reply))?, pooled)),
                Event::End => return Ok((typed::<R>(value)?, pooled)),
                Event::Refused(message) => return Err(Error::refused(message)),
                other => return Err(other.unexpected().into()),
            }
            event = poll_fn(|cx| pooled.poll_event(cx)).await?;
        }
    }

    /// Opens a persistent connection for unary calls. Returns it with the bytes after the reply.
    pub async fn upgrade(self: &Arc<Self>) -> Result<(Socket, Bytes), Error> {
        let about = Context::new("PERSISTENT_CONN_UPGRADE");
        match self.request(&Upgrade).await {
            Ok((_, pooled)) => Ok(pooled.into_socket()),
            Err(Error::Refused { message, .. }) => {
                Err(Error::not_supported(&message).about(&about))
            }
            Err(error) => Err(self.unknown_request(error).await.about(&about)),
        }
    }

    /// Returns the error to report after a request failed: `NotSupported` if the daemon closed the
    /// connection without a reply but still answers other requests, else the given error.
    pub async fn unknown_request(self: &Arc<Self>, error: Error) -> Error {
        let closed = matches!(
            &error,
            Error::ConnectionLost { mid_answer, .. } if may_be_unknown_request(*mid_answer)
        );
        if closed && self.request(&Identify).await.is_ok() {
            return Error::not_supported(UNKNOWN_REQUEST);
        }
        error
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let generation = lock(&self.idle).generation();
        let socket = Socket::connect(&self.endpoint).await;
        let socket = socket.map_err(|error| Error::Unreachable {
            addr: self.control.clone(),
            source: Arc::new(error),
            context: Box::default(),
        })?;
        Ok(Connection {
            socket,
            exchange: ClientExchange::new(self.limits),
            runtime: Handle::current().id(),
            generation,
        })
    }

    /// Takes an idle connection of this runtime.
    fn take(&self) -> Option<Connection> {
        let here = Handle::current().id();
        let fitness = |connection: &Connection| {
            if connection.runtime != here {
                Fitness::Elsewhere
            } else if connection.socket.is_silent() {
                Fitness::Fit
            } else {
                Fitness::Stale
            }
        };
        let mut closed = Vec::new();
        // The lock is released before the connections in `closed` are dropped.
        let taken = lock(&self.idle).take(fitness, &mut closed);
        taken
    }

    fn give_back(&self, connection: Connection) {
        let generation = connection.generation;
        let state = connection.exchange.state();
        let reusable = state == State::Ready && connection.exchange.is_reusable();
        let closed = lock(&self.idle).give_back(connection, generation, reusable);
        drop(closed);
    }

    /// Closes the idle connections. Connections in use are closed when they are given back.
    pub fn close_idle(&self) {
        let closed = lock(&self.idle).close_idle();
        drop(closed);
    }
}

impl Connection {
    /// Sends a request and returns its first event.
    async fn send(&mut self, request: &EncodedRequest) -> Result<Event, Error> {
        let frame = self.exchange.send(request)?;
        if let Err(error) = self.socket.write_all(&frame).await {
            return Err(self.lost(Progress::Sending, &error));
        }
        poll_fn(|cx| self.poll_event(cx)).await
    }

    fn poll_event(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<Event, Error>> {
        loop {
            if let Some(event) = self.exchange.poll()? {
                return Poll::Ready(Ok(event));
            }
            let exchange = &mut self.exchange;
            let read = self.socket.poll_read_with(cx, |bytes| {
                exchange.receive(bytes);
                bytes.len()
            });
            match ready!(read) {
                Ok(0) => return Poll::Ready(Err(self.exchange.end_of_file().into())),
                Ok(_) => {}
                Err(error) => {
                    let progress = Progress::waiting(&mut self.exchange);
                    return Poll::Ready(Err(self.lost(progress, &error)));
                }
            }
        }
    }

    fn lost(&self, progress: Progress, error: &io::Error) -> Error {
        let unsent = progress.is_unsent(self.socket.transport(), Some(error.kind()));
        Error::lost(error, unsent)
    }
}

impl PooledConnection {
    /// Returns the next event of the request.
    pub fn poll_event(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<Event, Error>> {
        match &mut self.connection {
            Some(connection) => connection.poll_event(cx),
            None => Poll::Ready(Err(Error::lost("the connection is closed", false))),
        }
    }

    /// Lets other requests start while the caller reads the rest of the reply.
    pub fn release_permit(&mut self) {
        self.permit = None;
    }

    /// Takes the socket out of the pool for a stream, a subscription or unary calls. Returns it with the
    /// bytes after the reply.
    pub fn into_socket(mut self) -> (Socket, Bytes) {
        let connection = self.connection.take();
        let Connection {
            socket, exchange, ..
        } = connection.expect("the connection is there until this is dropped");
        (socket, exchange.into_remainder())
    }
}

impl Drop for PooledConnection {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.give_back(connection);
        }
    }
}

/// Converts a reply to the output of its request. The exchange reads no other replies.
pub fn typed<R: Typed>(reply: Option<Reply>) -> Result<R::Output, Error> {
    let unexpected = || protocol::Error::Unexpected("the reply to another request".to_owned());
    Ok(reply.and_then(R::from_reply).ok_or_else(unexpected)?)
}
