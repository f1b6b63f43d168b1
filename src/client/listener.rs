//! The listener for inbound streams: accepts the daemon's connections, reads the header of each, and
//! hands the streams to their handlers.

use super::handlers::{Handlers, MAX_WAITING};
use super::pool::Pool;
use super::socket::{Listener, Socket};
use super::stream::Stream;
use super::{lock, Error};
use bytes::{Bytes, BytesMut};
use p2pd_protocol::command::streams::decode_stream_info;
use p2pd_protocol::endpoint::Endpoint;
use p2pd_protocol::policy::inbound::{
    Admission, HalfOpen, LogThrottle, ACCEPT_PAUSE, HEADER_TIMEOUT, MAX_HEADER,
};
use p2pd_protocol::{framing, Multiaddr, StreamInfo};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio::time::timeout;

/// Counters of a client's accepted and refused inbound streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListenerStats {
    /// Connections of the daemon that were accepted.
    pub accepted: u64,
    /// Streams of protocols without a handler.
    pub no_handler: u64,
    /// Connections without a valid stream header.
    pub bad_header: u64,
    /// Streams refused because 256 others waited for their handler.
    pub queue_full: u64,
    /// Failed attempts to accept a connection, for example because no descriptor was free.
    pub accept_errors: u64,
}

/// Counts inbound streams and logs refusals, at most one line per kind and second.
#[derive(Debug)]
struct Tally {
    started: Instant,
    accepted: AtomicU64,
    no_handler: Refusals,
    bad_header: Refusals,
    queue_full: Refusals,
    accept_errors: Refusals,
}

/// The refusals for one reason.
#[derive(Debug, Default)]
struct Refusals {
    count: AtomicU64,
    throttle: Mutex<LogThrottle>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            accepted: AtomicU64::default(),
            no_handler: Refusals::default(),
            bad_header: Refusals::default(),
            queue_full: Refusals::default(),
            accept_errors: Refusals::default(),
        }
    }
}

impl Tally {
    fn stats(&self) -> ListenerStats {
        ListenerStats {
            accepted: self.accepted.load(Ordering::Relaxed),
            no_handler: self.no_handler.count.load(Ordering::Relaxed),
            bad_header: self.bad_header.count.load(Ordering::Relaxed),
            queue_full: self.queue_full.count.load(Ordering::Relaxed),
            accept_errors: self.accept_errors.count.load(Ordering::Relaxed),
        }
    }

    /// The time since the start, which the policies use as their clock.
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Counts one refusal and logs `message`, unless the last line of its kind is too recent.
    fn refuse(
        &self,
        kind: fn(&Self) -> &Refusals,
        level: log::Level,
        message: impl FnOnce() -> String,
    ) {
        let refusals = kind(self);
        refusals.count.fetch_add(1, Ordering::Relaxed);
        let Some(suppressed) = lock(&refusals.throttle).note(1, self.now()) else {
            return;
        };
        let message = message();
        match suppressed {
            0 => log::log!(level, "{message}"),
            _ => log::log!(
                level,
                "{message} (and {suppressed} more since the last such line)"
            ),
        }
    }
}

/// The inbound side of a client: its handlers, and its listener once there is a handler.
#[derive(Debug)]
pub struct Inbound {
    pub handlers: Arc<Handlers>,
    tally: Arc<Tally>,
    wanted: Option<Endpoint>,
    listening: Mutex<Option<Listening>>,
}

#[derive(Debug)]
struct Listening {
    addr: Multiaddr,
    accepting: JoinHandle<()>,
    /// The task upgrades its weak reference only while it accepts, so dropping this closes the
    /// socket.
    _listener: Arc<Listener>,
    /// The directory of a socket at the default address.
    _directory: Option<p2pd_sockets::PrivateDirectory>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Inbound {
    /// Does not listen yet. Without `wanted`, [`listen`](Self::listen) chooses an endpoint that the
    /// daemon can reach.
    pub fn new(wanted: Option<Endpoint>) -> Self {
        Self {
            handlers: Arc::default(),
            tally: Arc::default(),
            wanted,
            listening: Mutex::default(),
        }
    }

    /// The numbers of accepted and refused streams.
    pub fn stats(&self) -> ListenerStats {
        self.tally.stats()
    }

    /// The address listened at; `None` before the first handler.
    pub fn addr(&self) -> Option<Multiaddr> {
        let listening = lock(&self.listening);
        listening.as_ref().map(|listening| listening.addr.clone())
    }

    /// Starts to listen, unless it already does. Returns the address.
    pub async fn listen(&self, pool: &Pool) -> Result<Multiaddr, Error> {
        if let Some(addr) = current(&lock(&self.listening)) {
            return Ok(addr);
        }
        let failed = |addr: &Endpoint, error: io::Error| Error::Listen {
            addr: addr.into(),
            source: Arc::new(error),
        };
        let (endpoint, directory) = match &self.wanted {
            Some(wanted) => (wanted.clone(), None),
            None => {
                default_endpoint(pool.endpoint()).map_err(|error| failed(pool.endpoint(), error))?
            }
        };
        let resolved = Socket::resolve_endpoint(&endpoint).await;
        let mut endpoint = resolved.map_err(|error| failed(&endpoint, error))?;

        let mut listening = lock(&self.listening);
        // Another registration may have begun to listen meanwhile.
        if let Some(addr) = current(&listening) {
            return Ok(addr);
        }
        *listening = None;
        let bound = Listener::bind(&endpoint).and_then(|listener| {
            let address = listener.tcp_address()?;
            Ok((Arc::new(listener), address))
        });
        let (listener, address) = bound.map_err(|error| failed(&endpoint, error))?;
        if let Some(address) = address {
            endpoint = address.into();
        }
        let addr = Multiaddr::from(&endpoint);
        let accepting = accept(
            Arc::downgrade(&listener),
            ClearWhenDone(Arc::downgrade(&self.handlers)),
            Arc::clone(&self.tally),
        );
        *listening = Some(Listening {
            addr: addr.clone(),
            accepting: tokio::spawn(accepting),
            _listener: listener,
            _directory: directory,
        });
        Ok(addr)
    }
}

/// The address listened at, unless the accepting task has ended with its runtime.
fn current(listening: &Option<Listening>) -> Option<Multiaddr> {
    let listening = listening.as_ref()?;
    (!listening.accepting.is_finished()).then(|| listening.addr.clone())
}

/// Returns an endpoint that the daemon can reach: of the same kind as its control endpoint, and on the
/// same host. For a unix socket, also returns the directory that contains it.
fn default_endpoint(
    control: &Endpoint,
) -> io::Result<(Endpoint, Option<p2pd_sockets::PrivateDirectory>)> {
    match control {
        Endpoint::Unix(_) => {
            let directory = p2pd_sockets::private_directory(None, "p2pclient-", "listen.sock")?;
            let path = directory.path().join("listen.sock");
            let path = path.to_str().ok_or_else(|| {
                let message = "the path of the directory for temporary files is not UTF-8";
                io::Error::new(io::ErrorKind::InvalidData, message)
            })?;
            Ok((Endpoint::Unix(path.to_owned()), Some(directory)))
        }
        Endpoint::Tcp { host, .. } => {
            let host = host.clone();
            Ok((Endpoint::Tcp { host, port: 0 }, None))
        }
    }
}

/// Removes all handlers when the task that accepts their streams ends.
struct ClearWhenDone(Weak<Handlers>);

impl Drop for ClearWhenDone {
    fn drop(&mut self) {
        if let Some(handlers) = self.0.upgrade() {
            handlers.clear();
        }
    }
}

/// The connections whose header is being read, each in a task.
#[derive(Default)]
struct HalfOpenTasks {
    policy: HalfOpen,
    tasks: HashMap<u64, AbortHandle>,
}

/// A connection whose header is being read, until this is dropped.
struct HalfOpenGuard {
    half_open: Arc<Mutex<HalfOpenTasks>>,
    number: u64,
}

impl Drop for HalfOpenGuard {
    fn drop(&mut self) {
        let mut half_open = lock(&self.half_open);
        half_open.policy.leave(self.number);
        half_open.tasks.remove(&self.number);
    }
}

async fn accept(listener: Weak<Listener>, handlers: ClearWhenDone, tally: Arc<Tally>) {
    let half_open = Arc::new(Mutex::new(HalfOpenTasks::default()));
    let mut reading = JoinSet::new();
    loop {
        while reading.try_join_next().is_some() {}
        let served = handlers.0.upgrade().map_or(0, |handlers| handlers.len());
        let admission = lock(&half_open).policy.admission(served, tally.now());
        match admission {
            Admission::Accept => {}
            Admission::Wait(wait) => {
                // A task that ends leaves room for another connection sooner.
                let _ = timeout(wait, reading.join_next()).await;
                continue;
            }
            Admission::Close(number) => {
                let task = lock(&half_open).tasks.remove(&number);
                lock(&half_open).policy.leave(number);
                if let Some(task) = task {
                    task.abort();
                }
                tally.refuse(
                    |tally| &tally.bad_header,
                    log::Level::Warn,
                    || {
                        "refused an inbound stream: it has sent no header, and too many others wait"
                            .into()
                    },
                );
                continue;
            }
        }
        let accepted = poll_fn(|cx| match listener.upgrade() {
            Some(listener) => listener.poll_accept(cx).map(Some),
            None => Poll::Ready(None),
        });
        match accepted.await {
            Some(Ok(socket)) => {
                tally.accepted.fetch_add(1, Ordering::Relaxed);
                let number = lock(&half_open).policy.enter(tally.now());
                let guard = HalfOpenGuard {
                    half_open: Arc::clone(&half_open),
                    number,
                };
                let (handlers, tally) = (Weak::clone(&handlers.0), Arc::clone(&tally));
                let task = reading.spawn(async move {
                    let stream = read_header(socket, &tally).await;
                    drop(guard);
                    if let Some(stream) = stream {
                        dispatch(stream, &handlers, &tally);
                    }
                });
                // Not locked during the spawn: a runtime that shuts down drops the guard at once, which
                // takes the lock.
                let mut locked = lock(&half_open);
                if locked.policy.contains(number) {
                    locked.tasks.insert(number, task);
                }
            }
            Some(Err(error)) => {
                tally.refuse(
                    |tally| &tally.accept_errors,
                    log::Level::Error,
                    || format!("cannot accept inbound streams: {error}"),
                );
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None => return,
        }
    }
}

/// Reads the header of an inbound stream. A connection without a valid one is closed.
async fn read_header(mut socket: Socket, tally: &Tally) -> Option<Stream> {
    use log::Level::{Debug, Warn};

    let refuse = |level, error: Error| {
        let message = || format!("refused an inbound stream: {error}");
        tally.refuse(|tally| &tally.bad_header, level, message);
    };
    let mut buffer = BytesMut::with_capacity(1024);
    if let Err(error) = read_some(&mut socket, &mut buffer).await {
        // jsp2pd connects when a handler is registered, and closes this when it exits.
        refuse(Debug, error);
        return None;
    }
    let header = timeout(HEADER_TIMEOUT, read_frame(&mut socket, buffer)).await;
    match header.unwrap_or_else(|_| Err(Error::timeout(HEADER_TIMEOUT))) {
        Ok((info, ahead)) => Some(Stream::new(socket, ahead, info)),
        Err(error) => {
            refuse(Warn, error);
            None
        }
    }
}

/// Hands an inbound stream to its handler. A stream without one is closed.
fn dispatch(stream: Stream, handlers: &Weak<Handlers>, tally: &Tally) {
    use log::Level::Warn;

    let handlers = handlers.upgrade();
    let handler = handlers.and_then(|handlers| handlers.get(&stream.info().protocol));
    let outcome = match handler {
        Some(handler) => handler.try_send(stream),
        None => Err(mpsc::error::TrySendError::Closed(stream)),
    };
    match outcome {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(stream)) => {
            tally.refuse(
                |tally| &tally.queue_full,
                Warn,
                || {
                    let (protocol, peer) = (&stream.info().protocol, &stream.info().peer_id);
                    format!(
                        "refused a stream of {protocol:?} from {peer}: {MAX_WAITING} wait already"
                    )
                },
            );
        }
        Err(mpsc::error::TrySendError::Closed(stream)) => {
            tally.refuse(
                |tally| &tally.no_handler,
                Warn,
                || {
                    let (protocol, peer) = (&stream.info().protocol, &stream.info().peer_id);
                    format!("refused a stream of {protocol:?} from {peer}: it has no handler")
                },
            );
        }
    }
}

async fn read_frame(
    socket: &mut Socket,
    mut buffer: BytesMut,
) -> Result<(StreamInfo, Bytes), Error> {
    loop {
        if let Some(frame) = framing::split_frame(&mut buffer, MAX_HEADER)? {
            let info = decode_stream_info(&frame)?;
            return Ok((info, buffer.freeze()));
        }
        read_some(socket, &mut buffer).await?;
    }
}

async fn read_some(socket: &mut Socket, buffer: &mut BytesMut) -> Result<(), Error> {
    let read = socket.read_buf(buffer).await;
    match read.map_err(|error| Error::lost(error, false))? {
        0 => Err(Error::lost(
            "it ended before a complete stream header",
            false,
        )),
        _ => Ok(()),
    }
}
