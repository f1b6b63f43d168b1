//! Requests over a small pool of reused control connections.

use super::error::{Context, Error};
use super::lock;
use super::socket::{is_disconnect, Socket};
use bytes::Bytes;
use p2pd_protocol::command::{control::Identify, unary::Upgrade, Typed};
use p2pd_protocol::multiaddr::{Endpoint, EndpointError};
use p2pd_protocol::{
    self as protocol, ClientExchange, EncodedRequest, Event, Limits, Multiaddr, Reply, State,
};
use std::collections::VecDeque;
use std::future::{poll_fn, Future};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{self, ready, Poll};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::runtime::{self, Handle};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How many connections are kept for the next requests, and how many requests that the daemon answers
/// at once may be under way.
const MAX_IDLE: usize = 8;

/// The way to one daemon's control socket.
#[derive(Debug)]
pub struct Connector {
    control: Multiaddr,
    endpoint: Endpoint,
    limits: Limits,
    /// Requests for which the daemon asks other peers, which can take a minute, …
    slow: Arc<Semaphore>,
    /// … never hold up those that it answers at once.
    quick: Arc<Semaphore>,
    idle: Mutex<VecDeque<Connection>>,
    generation: AtomicU64,
}

/// A control connection.
#[derive(Debug)]
struct Connection {
    socket: Socket,
    exchange: ClientExchange,
    /// Whose reactor the socket is registered with: on another one it would never be ready.
    runtime: runtime::Id,
    /// How often the idle connections had been closed when it was opened.
    generation: u64,
}

/// A connection on which a request is under way. It goes back to the pool if the answer has been read
/// to its end, and is closed otherwise: nobody can be given the rest of somebody else's answer.
#[derive(Debug)]
pub struct Lease {
    connection: Option<Connection>,
    connector: Arc<Connector>,
    turn: Option<OwnedSemaphorePermit>,
}

impl Connector {
    pub fn new(
        control: Multiaddr,
        limits: Limits,
        max_connections: usize,
    ) -> Result<Self, EndpointError> {
        Ok(Self {
            endpoint: control.endpoint()?,
            control,
            limits,
            slow: Arc::new(Semaphore::new(max_connections)),
            quick: Arc::new(Semaphore::new(MAX_IDLE)),
            idle: Mutex::default(),
            generation: AtomicU64::new(0),
        })
    }

    /// The daemon's control address.
    pub fn control_maddr(&self) -> &Multiaddr {
        &self.control
    }

    /// The same, as where to connect to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Sends a request, and waits for the first that comes of it.
    pub async fn start(
        self: &Arc<Self>,
        request: &EncodedRequest,
    ) -> Result<(Lease, Event), Error> {
        let turns = if request.waits_for_peers() {
            &self.slow
        } else {
            &self.quick
        };
        let turn = Arc::clone(turns).acquire_owned().await;
        let mut lease = Lease {
            connection: None,
            connector: Arc::clone(self),
            // They are never closed.
            turn: turn.ok(),
        };
        if let Some(connection) = self.take() {
            match lease.connection.insert(connection).ask(request).await {
                // The daemon closed it meanwhile, perhaps by a restart. Only where it cannot have
                // acted on the request is it right to send that again.
                Err(error) if error.is_unexecuted() => {}
                outcome => return outcome.map(|event| (lease, event)),
            }
        }
        let connection = lease.connection.insert(self.connect().await?);
        let event = connection.ask(request).await?;
        Ok((lease, event))
    }

    /// Sends a request and returns its reply, or its only value, with the connection.
    pub async fn request<R: Typed>(
        self: &Arc<Self>,
        request: &R,
    ) -> Result<(R::Output, Lease), Error> {
        let (mut lease, mut event) = self.start(&request.encoded()).await?;
        let mut value = None;
        loop {
            match event {
                Event::Value(reply) => value = Some(reply),
                Event::Reply(reply) => return Ok((typed::<R>(Some(reply))?, lease)),
                Event::End => return Ok((typed::<R>(value)?, lease)),
                Event::Refused(words) => return Err(Error::refused(words)),
                other => return Err(other.unexpected().into()),
            }
            event = poll_fn(|cx| lease.poll_event(cx)).await?;
        }
    }

    /// A persistent connection for unary calls, and what came right behind the upgrade's answer.
    pub async fn upgrade(self: &Arc<Self>) -> Result<(Socket, Bytes), Error> {
        let about = Context::new("PERSISTENT_CONN_UPGRADE");
        match self.request(&Upgrade).await {
            Ok((_, lease)) => Ok(lease.into_socket()),
            Err(Error::Refused { message, .. }) => {
                Err(Error::not_supported(&message).about(&about))
            }
            Err(error) => Err(self.unknown_request(error).await.about(&about)),
        }
    }

    /// What it means that the daemon closed the connection: if it is there still, that it does not
    /// know the request.
    pub async fn unknown_request(self: &Arc<Self>, error: Error) -> Error {
        let closed = matches!(
            &error,
            Error::ConnectionLost {
                mid_answer: false,
                ..
            }
        );
        if closed && self.request(&Identify).await.is_ok() {
            return Error::not_supported(
                "the daemon closed the connection, as it does on a request it does not know",
            );
        }
        error
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let generation = self.generation.load(Ordering::Relaxed);
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

    /// An idle connection of this runtime on which nothing has arrived unasked, as the end would
    /// have.
    fn take(&self) -> Option<Connection> {
        let here = Handle::current().id();
        let mut idle = lock(&self.idle);
        loop {
            let last = idle.iter().rposition(|idle| idle.runtime == here)?;
            let connection = idle.remove(last)?;
            if connection.socket.is_silent() {
                return Some(connection);
            }
        }
    }

    fn give_back(&self, connection: Connection) {
        let mut idle = lock(&self.idle);
        if connection.generation != self.generation.load(Ordering::Relaxed) {
            return;
        }
        idle.push_back(connection);
        // The oldest may be of a runtime that is no more.
        if idle.len() > MAX_IDLE {
            idle.pop_front();
        }
    }

    /// Closes the idle connections, and those in use when they are given back.
    pub fn close_idle(&self) {
        let mut idle = lock(&self.idle);
        self.generation.fetch_add(1, Ordering::Relaxed);
        idle.clear();
    }
}

impl Connection {
    /// Sends a request, and waits for the first that comes of it.
    async fn ask(&mut self, request: &EncodedRequest) -> Result<Event, Error> {
        let frame = self.exchange.send(request)?;
        if let Err(error) = self.socket.write_all(&frame).await {
            // A part of a request is no request: the daemon cannot have acted on it.
            return Err(Error::lost(error, true));
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
                Err(error) => return Poll::Ready(Err(self.lost(&error))),
            }
        }
    }

    fn lost(&mut self, error: &io::Error) -> Error {
        let end = self.exchange.end_of_file();
        let nothing_came = matches!(end, protocol::Error::Closed { mid_message: false });
        // A unix socket is reset exactly when its peer closed it with input unread, and this request
        // was the only input there was.
        let unread = self.socket.is_unix() && is_disconnect(error);
        Error::lost(error, nothing_came && unread)
    }
}

impl Lease {
    /// The next that comes of the request.
    pub fn poll_event(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<Event, Error>> {
        match &mut self.connection {
            Some(connection) => connection.poll_event(cx),
            None => Poll::Ready(Err(Error::lost("it is closed", false))),
        }
    }

    /// Lets others have their turn while whoever has this reads on at leisure.
    pub fn give_up_turn(&mut self) {
        self.turn = None;
    }

    /// The socket of a connection that was consumed, and what came right behind the answer.
    pub fn into_socket(mut self) -> (Socket, Bytes) {
        let connection = self.connection.take();
        let Connection {
            socket, exchange, ..
        } = connection.expect("a lease has its connection until it is dropped");
        (socket, exchange.into_remainder())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            if connection.exchange.state() == State::Ready && connection.exchange.is_reusable() {
                self.connector.give_back(connection);
            }
        }
    }
}

/// The reply as what the request is answered with. The exchange reads no other.
pub fn typed<R: Typed>(reply: Option<Reply>) -> Result<R::Output, Error> {
    let unexpected = || protocol::Error::Unexpected("the reply to another request".to_owned());
    Ok(reply.and_then(R::unwrap).ok_or_else(unexpected)?)
}

/// The result of `work` in time, or an error that says what it was about.
pub async fn within<T>(
    timeout: Option<Duration>,
    about: Context,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let outcome = match timeout {
        None => work.await,
        Some(limit) => match tokio::time::timeout(limit, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::timeout(limit)),
        },
    };
    outcome.map_err(|error| error.about(&about))
}
