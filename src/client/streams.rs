//! Streams to peers, and from them.

use super::connector::Connector;
use super::socket::{Listener, Socket};
use super::{lock, runtime_ended, Client, Context, Error};
use bytes::{Buf, Bytes, BytesMut};
use p2pd_protocol::command::streams::{
    decode_stream_info, RemoveStreamHandler, StreamHandler, StreamOpen,
};
use p2pd_protocol::multiaddr::Endpoint;
use p2pd_protocol::{framing, Multiaddr, PeerId, StreamInfo};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::task::{self, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, Notify};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

/// How many streams of a protocol may wait for being taken, before the next ones are refused: held
/// back instead, they would hold back those of other protocols.
const MAX_WAITING: usize = 256;

/// How many inbound connections may be on their way to a handler; when there are more, those go
/// that were given so long to say what they are.
const MAX_ARRIVING: usize = 256;
const ARRIVING_PATIENCE: Duration = Duration::from_secs(1);

/// The StreamInfo before an inbound stream is small, and comes at once.
const MAX_HEADER: usize = 64 * 1024;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the daemon may take to answer when nobody waits for that any more.
const ANSWERING: Duration = Duration::from_secs(30);

/// How long to wait after an accept failed: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The least time between two log lines about refused streams of one kind.
const QUIET: Duration = Duration::from_secs(1);

/// A stream to a peer, through the daemon: tokio's [`AsyncRead`] and [`AsyncWrite`].
///
/// Dropping it closes it; what was written before reaches the peer. The Go daemons end both
/// directions when one is shut down: what the peer sends after a
/// [`shutdown`](tokio::io::AsyncWriteExt::shutdown) is lost. Protocols say where a message ends, as by
/// its length.
///
/// ```no_run
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// # async fn example(client: p2pd_client::Client, peer: p2pd_protocol::PeerId) -> Result<(), Box<dyn std::error::Error>> {
/// let mut stream = client.stream_open(&peer, ["/echo/1"]).await?;
/// stream.write_all(b"hello").await?;
/// let mut answer = [0; 5];
/// stream.read_exact(&mut answer).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    /// What was read behind what came before the stream.
    ahead: Bytes,
    info: StreamInfo,
}

impl Client {
    /// STREAM_OPEN: opens a stream to a peer for the first of `protocols` that it speaks.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer cannot be reached or speaks none of the protocols.
    pub async fn stream_open<S: Into<String>>(
        &self,
        peer: &PeerId,
        protocols: impl IntoIterator<Item = S>,
    ) -> Result<Stream, Error> {
        let protocols: Vec<String> = protocols.into_iter().map(Into::into).collect();
        let about = Context::new("STREAM_OPEN").peer(peer);
        let about = about.protocol(protocols.join(", "));
        let request = StreamOpen {
            peer: peer.clone(),
            protocols,
            timeout: self.timeout,
        };
        self.within(about, async {
            let (info, lease) = self.connector().request(&request).await?;
            let (socket, ahead) = lease.into_socket();
            Ok(Stream {
                socket,
                ahead,
                info,
            })
        })
        .await
    }

    /// STREAM_HANDLER: takes the inbound streams of a protocol, until what is returned is dropped.
    /// With `balanced`, several clients may serve it in turn (hivemind's fork; others ignore it).
    ///
    /// The first handler makes the client listen, in a task on the tokio runtime that is running
    /// now.
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if this client serves the protocol, [`Error::Refused`] if another
    /// one does (hivemind's fork), [`Error::Listen`] if it cannot listen.
    pub async fn stream_handler(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
    ) -> Result<IncomingStreams, Error> {
        let protocol = protocol.into();
        let about = Context::new("STREAM_HANDLER").protocol(&protocol);
        self.within(about, self.register(protocol, balanced)).await
    }

    /// Tells a daemon that was started anew of the handlers that this client has, of streams and of
    /// unary calls. One that a `P2PDaemon` starts again is told by that.
    ///
    /// # Errors
    /// [`Error::Refused`] if another client has taken a protocol, after all others were registered;
    /// at the first request that fails in another way.
    pub async fn register_again(&self) -> Result<(), Error> {
        let handlers = self.shared.inbound.handlers.all();
        let addr = self.listen_maddr().filter(|_| !handlers.is_empty());
        let mut refused = None;
        for (protocol, balanced) in handlers {
            let Some(addr) = &addr else { break };
            match self.tell_again(addr, &protocol, balanced).await {
                Ok(()) => {}
                Err(error @ Error::Refused { .. }) => {
                    log::error!("the handler of {protocol:?} is lost: {error}");
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        if !self.unary_handlers().is_empty() {
            self.open_unary().await?;
        }
        refused.map_or(Ok(()), Err)
    }

    /// Registers a handler at a daemon that may have it already, or have one of another client.
    async fn tell_again(
        &self,
        addr: &Multiaddr,
        protocol: &str,
        balanced: bool,
    ) -> Result<(), Error> {
        let register = || {
            let about = Context::new("STREAM_HANDLER").protocol(protocol);
            let request = StreamHandler {
                addr: addr.clone(),
                protocols: vec![protocol.to_owned()],
                balanced,
            };
            self.request(about, request)
        };
        // hivemind's fork removes only a registration with this client's address.
        let take_back = || {
            let about = Context::new("REMOVE_STREAM_HANDLER").protocol(protocol);
            let request = RemoveStreamHandler {
                addr: addr.clone(),
                protocols: vec![protocol.to_owned()],
            };
            self.request(about, request)
        };
        if balanced {
            // The fork would append a second entry, and give this client twice its share.
            let _ = take_back().await;
            return register().await;
        }
        let outcome = register().await;
        if !matches!(outcome, Err(Error::Refused { .. })) {
            return outcome;
        }
        // The words are the same if the name is this client's own, at a daemon not restarted.
        match take_back().await {
            Ok(()) => register().await,
            Err(_) => outcome,
        }
    }

    /// The numbers of accepted and refused inbound streams since this client was made.
    pub fn listener_stats(&self) -> ListenerStats {
        self.shared.inbound.tally.stats()
    }

    /// Where the daemon connects to for inbound streams; `None` before the first handler.
    pub fn listen_maddr(&self) -> Option<Multiaddr> {
        let listening = lock(&self.shared.inbound.listening);
        listening.as_ref().map(|listening| listening.addr.clone())
    }

    /// In a task of its own: a caller who gives up must not leave a handler behind, as when what takes
    /// it back overtook what registers it.
    async fn register(&self, protocol: String, balanced: bool) -> Result<IncomingStreams, Error> {
        let (mut waiting, outcome) = oneshot::channel();
        let client = self.clone();
        let wanted = Arc::new(());
        let still_wanted = Arc::downgrade(&wanted);
        tokio::spawn(async move {
            let inbound = &client.shared.inbound;
            // Until the daemon is asked, it can be given up.
            let ready = tokio::select! {
                biased;
                () = waiting.closed() => return,
                ready = async {
                    let addr = inbound.listen(client.connector()).await?;
                    let handlers = &inbound.handlers;
                    Ok((addr, handlers.enter(protocol, balanced, still_wanted).await?))
                } => ready,
            };
            let registered = match ready {
                Ok((addr, entered)) => client.try_register(addr, entered, balanced).await,
                Err(error) => Err(error),
            };
            // Dropped, by us or by who waits, it is taken back.
            drop(waiting.send(registered));
        });
        let mut incoming = outcome.await.unwrap_or_else(|_| Err(runtime_ended()))?;
        incoming._wanted = Some(wanted);
        Ok(incoming)
    }

    async fn try_register(
        &self,
        addr: Multiaddr,
        (name, streams): (Name, mpsc::Receiver<Stream>),
        balanced: bool,
    ) -> Result<IncomingStreams, Error> {
        let request = StreamHandler {
            addr: addr.clone(),
            protocols: vec![name.protocol.clone()],
            balanced,
        };
        let mut handler = IncomingStreams {
            streams,
            registration: Some(Registration {
                client: self.clone(),
                addr,
                runtime: Handle::current(),
                name,
            }),
            _wanted: None,
        };
        let asking = timeout(ANSWERING, self.connector().request(&request)).await;
        let outcome = asking.unwrap_or_else(|_| Err(Error::timeout(ANSWERING)));
        if let Err(Error::Refused { .. } | Error::Unreachable { .. }) = &outcome {
            // The daemon has nothing to forget.
            handler.registration = None;
        }
        outcome.map(|_| handler)
    }
}

/// The inbound streams of a protocol: a futures `Stream` of [`Stream`]s. Dropping it takes the handler
/// back.
///
/// Up to 256 streams wait here for being taken; while they do, further ones are closed at once. It
/// holds a clone of its client.
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client) -> Result<(), p2pd_client::Error> {
/// let mut incoming = client.stream_handler("/echo/1", false).await?;
/// while let Some(mut stream) = incoming.next().await {
///     tokio::spawn(async move {
///         let (mut reader, mut writer) = tokio::io::split(&mut stream);
///         tokio::io::copy(&mut reader, &mut writer).await
///     });
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "dropping it takes the handler back"]
pub struct IncomingStreams {
    streams: mpsc::Receiver<Stream>,
    /// `None` once the daemon was told to forget it.
    registration: Option<Registration>,
    /// While somebody has this, the name is taken.
    _wanted: Option<Arc<()>>,
}

/// A handler that the daemon knows of, or may know of.
#[derive(Debug)]
struct Registration {
    client: Client,
    addr: Multiaddr,
    runtime: Handle,
    name: Name,
}

impl IncomingStreams {
    /// The next stream; `None` if none will come, since the tokio runtime that took them has ended.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// REMOVE_STREAM_HANDLER: takes the handler back, as dropping this does, and waits for the
    /// daemon's answer.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not hivemind's: it goes on offering the protocol to
    /// its peers, but their streams are refused here.
    pub async fn close(mut self) -> Result<(), Error> {
        let Some(registration) = self.registration.take() else {
            return Ok(());
        };
        // To its end, also if this is dropped.
        let taking = tokio::spawn(registration.take_back());
        taking.await.unwrap_or_else(|_| Err(runtime_ended()))
    }
}

impl futures_core::Stream for IncomingStreams {
    type Item = Stream;

    fn poll_next(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Stream>> {
        self.get_mut().streams.poll_recv(cx)
    }
}

impl Drop for IncomingStreams {
    fn drop(&mut self) {
        if let Some(registration) = self.registration.take() {
            // Its own may have ended.
            let runtime = Handle::try_current().unwrap_or_else(|_| registration.runtime.clone());
            runtime.spawn(async move {
                // There is nobody to be told; a daemon that lacks the request stays as it is.
                let _ = registration.take_back().await;
            });
        }
    }
}

impl Registration {
    async fn take_back(self) -> Result<(), Error> {
        let Self {
            client, addr, name, ..
        } = self;
        let about = Context::new("REMOVE_STREAM_HANDLER").protocol(&name.protocol);
        if !name.is_taken() {
            return Ok(());
        }
        let request = RemoveStreamHandler {
            addr,
            protocols: vec![name.protocol.clone()],
        };
        let work = async {
            match client.connector().request(&request).await {
                Ok(_) => Ok(()),
                Err(error) => Err(client.connector().unknown_request(error).await),
            }
        };
        let limit = client.timeout().unwrap_or(ANSWERING);
        client.with_timeout(limit).within(about, work).await
    }
}

/// A name that is taken until this is dropped: once the daemon has forgotten it, or nobody is left to
/// tell the daemon.
#[derive(Debug)]
struct Name {
    handlers: Arc<Handlers>,
    protocol: String,
    number: u64,
}

impl Name {
    /// Whether it was not lost with the runtime, and maybe taken by another since.
    fn is_taken(&self) -> bool {
        let handlers = lock(&self.handlers.by_protocol);
        let entry = handlers.get(&self.protocol);
        entry.is_some_and(|entry| entry.number == self.number)
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.is_taken() {
            // Nobody but this removes an entry with that number. Streams that wait are dropped with
            // the receiver.
            let left = lock(&self.handlers.by_protocol).remove(&self.protocol);
            drop(left);
        }
        self.handlers.left.notify_waiters();
    }
}

/// Who takes the streams of which protocol.
#[derive(Debug, Default)]
struct Handlers {
    by_protocol: Mutex<HashMap<String, Entry>>,
    entered: AtomicU64,
    /// Somebody has left.
    left: Notify,
}

#[derive(Debug)]
struct Entry {
    /// Tells one from those who had the name before and after.
    number: u64,
    balanced: bool,
    sender: mpsc::Sender<Stream>,
    /// Whether anybody has what comes of it, or waits for that. If not, the name is about to be free.
    wanted: Weak<()>,
}

impl Handlers {
    /// Takes a name, once the daemon has forgotten who had it before.
    async fn enter(
        self: &Arc<Self>,
        protocol: String,
        balanced: bool,
        wanted: Weak<()>,
    ) -> Result<(Name, mpsc::Receiver<Stream>), Error> {
        loop {
            let left = self.left.notified();
            {
                let mut handlers = lock(&self.by_protocol);
                match handlers.get(&protocol) {
                    None => {
                        let (sender, receiver) = mpsc::channel(MAX_WAITING);
                        let number = self.entered.fetch_add(1, Ordering::Relaxed);
                        let entry = Entry {
                            number,
                            balanced,
                            sender,
                            wanted,
                        };
                        handlers.insert(protocol.clone(), entry);
                        let name = Name {
                            handlers: Arc::clone(self),
                            protocol,
                            number,
                        };
                        return Ok((name, receiver));
                    }
                    Some(entry) if entry.wanted.strong_count() > 0 => {
                        let context = Box::default();
                        return Err(Error::AlreadyRegistered { context });
                    }
                    Some(_) => {}
                }
            }
            left.await;
        }
    }

    /// Nobody takes streams any more.
    fn leave_all(&self) {
        let all = std::mem::take(&mut *lock(&self.by_protocol));
        drop(all);
        self.left.notify_waiters();
    }

    /// The protocols, and whether each is balanced.
    fn all(&self) -> Vec<(String, bool)> {
        let handlers = lock(&self.by_protocol);
        let of_each = |(protocol, entry): (&String, &Entry)| (protocol.clone(), entry.balanced);
        handlers.iter().map(of_each).collect()
    }

    fn get(&self, protocol: &str) -> Option<mpsc::Sender<Stream>> {
        let handlers = lock(&self.by_protocol);
        handlers.get(protocol).map(|entry| entry.sender.clone())
    }
}

/// The numbers of a client's accepted and refused inbound streams.
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
    /// Failed attempts to accept a connection, as without free descriptors.
    pub accept_errors: u64,
}

/// Counts inbound streams and logs refusals, at most one line per kind and second.
#[derive(Debug, Default)]
struct Tally {
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
    /// The time of the last line, and how many were suppressed since.
    logged: Mutex<Option<(Instant, u64)>>,
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
}

impl Refusals {
    /// Counts `more` refusals and logs `words`, unless the last line is too recent.
    fn note(&self, level: log::Level, more: u64, words: impl FnOnce() -> String) {
        self.count.fetch_add(more, Ordering::Relaxed);
        let Some(withheld) = self.may_log(more, Instant::now()) else {
            return;
        };
        let words = words();
        match withheld {
            0 => log::log!(level, "{words}"),
            _ => log::log!(
                level,
                "{words} (and {withheld} more since the last such line)"
            ),
        }
    }

    /// Returns how many lines were suppressed, if another may be logged.
    fn may_log(&self, more: u64, now: Instant) -> Option<u64> {
        let mut logged = lock(&self.logged);
        match &mut *logged {
            Some((last, withheld)) if now.duration_since(*last) < QUIET => {
                *withheld += more;
                None
            }
            before => {
                let withheld = before.map_or(0, |(_, withheld)| withheld);
                *before = Some((now, 0));
                Some(withheld + more - 1)
            }
        }
    }
}

/// Where a client takes inbound streams, and what becomes of them.
#[derive(Debug)]
pub struct Inbound {
    tally: Arc<Tally>,
    wanted: Option<Endpoint>,
    listening: Mutex<Option<Listening>>,
    handlers: Arc<Handlers>,
}

#[derive(Debug)]
struct Listening {
    addr: Multiaddr,
    accepting: JoinHandle<()>,
    /// The task has it only while it looks, so that it is closed when this is dropped.
    _listener: Arc<Listener>,
    /// Where the socket is, if nobody said where it should be.
    _directory: Option<p2pd_sockets::PrivateDirectory>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Inbound {
    /// With no endpoint, one that the daemon can reach is chosen.
    pub fn new(wanted: Option<Endpoint>) -> Self {
        Self {
            tally: Arc::default(),
            wanted,
            listening: Mutex::default(),
            handlers: Arc::default(),
        }
    }

    /// Listens, unless it does already; says where.
    async fn listen(&self, connector: &Connector) -> Result<Multiaddr, Error> {
        if let Some(listening) = &*lock(&self.listening) {
            // It ends with its runtime.
            if !listening.accepting.is_finished() {
                return Ok(listening.addr.clone());
            }
        }
        let failed = |addr: &Endpoint, error: io::Error| Error::Listen {
            addr: addr.into(),
            source: Arc::new(error),
        };
        let (endpoint, directory) = match &self.wanted {
            Some(wanted) => (wanted.clone(), None),
            None => default_endpoint(connector.endpoint())
                .map_err(|error| failed(connector.endpoint(), error))?,
        };
        let resolved = Socket::resolve_endpoint(&endpoint).await;
        let mut endpoint = resolved.map_err(|error| failed(&endpoint, error))?;

        let mut listening = lock(&self.listening);
        // Another handler may have made it listen meanwhile.
        if let Some(listening) = &*listening {
            if !listening.accepting.is_finished() {
                return Ok(listening.addr.clone());
            }
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
            Accepting(Arc::downgrade(&self.handlers)),
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

/// Where the daemon reaches us as we reach it.
fn default_endpoint(
    control: &Endpoint,
) -> io::Result<(Endpoint, Option<p2pd_sockets::PrivateDirectory>)> {
    match control {
        Endpoint::Unix(_) => {
            let directory = p2pd_sockets::private_directory(None, "p2pclient-", "listen.sock")?;
            let path = directory.path().join("listen.sock");
            let path = path.to_str().ok_or_else(|| {
                let words = "the path of the directory for temporary files is no UTF-8";
                io::Error::new(io::ErrorKind::InvalidData, words)
            })?;
            Ok((Endpoint::Unix(path.to_owned()), Some(directory)))
        }
        Endpoint::Tcp { host, .. } => {
            let host = host.clone();
            Ok((Endpoint::Tcp { host, port: 0 }, None))
        }
    }
}

/// Whoever accepts streams for these handlers; when that ends, so do they.
struct Accepting(Weak<Handlers>);

impl Drop for Accepting {
    fn drop(&mut self) {
        if let Some(handlers) = self.0.upgrade() {
            handlers.leave_all();
        }
    }
}

async fn accept(listener: Weak<Listener>, accepting: Accepting, tally: Arc<Tally>) {
    let mut arriving = JoinSet::new();
    loop {
        while arriving.try_join_next().is_some() {}
        if arriving.len() >= MAX_ARRIVING
            && timeout(ARRIVING_PATIENCE, arriving.join_next())
                .await
                .is_err()
        {
            let silent = arriving.len() as u64;
            arriving.shutdown().await;
            tally.bad_header.note(log::Level::Warn, silent, || {
                "refused inbound streams: too many connections do not say what they are".into()
            });
        }
        let accepted = poll_fn(|cx| match listener.upgrade() {
            Some(listener) => listener.poll_accept(cx).map(Some),
            None => Poll::Ready(None),
        });
        match accepted.await {
            Some(Ok(socket)) => {
                tally.accepted.fetch_add(1, Ordering::Relaxed);
                let handlers = Weak::clone(&accepting.0);
                arriving.spawn(dispatch(socket, handlers, Arc::clone(&tally)));
            }
            Some(Err(error)) => {
                tally.accept_errors.note(log::Level::Error, 1, || {
                    format!("cannot accept inbound streams: {error}")
                });
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            None => return,
        }
    }
}

/// Hands an inbound stream to its handler; one that there is no handler for is closed.
async fn dispatch(mut socket: Socket, handlers: Weak<Handlers>, tally: Arc<Tally>) {
    use log::Level::{Debug, Warn};

    let mut buffer = BytesMut::with_capacity(1024);
    // The JS daemon connects when a handler is registered, and says nothing until there is a stream.
    if let Err(error) = read_some(&mut socket, &mut buffer).await {
        // It ends so with the daemon, too.
        let words = || format!("refused an inbound stream: {error}");
        return tally.bad_header.note(Debug, 1, words);
    }
    let header = timeout(HEADER_TIMEOUT, read_header(&mut socket, buffer)).await;
    let (info, ahead) = match header.unwrap_or_else(|_| Err(Error::timeout(HEADER_TIMEOUT))) {
        Ok(header) => header,
        Err(error) => {
            let words = || format!("refused an inbound stream: {error}");
            return tally.bad_header.note(Warn, 1, words);
        }
    };
    let handler = handlers.upgrade().and_then(|all| all.get(&info.protocol));
    let Some(handler) = handler else {
        return tally.no_handler.note(Warn, 1, || no_handler(&info));
    };
    let stream = Stream {
        socket,
        ahead,
        info,
    };
    match handler.try_send(stream) {
        Ok(()) => {}
        Err(mpsc::error::TrySendError::Full(stream)) => {
            tally.queue_full.note(Warn, 1, || {
                let (protocol, peer) = (&stream.info.protocol, &stream.info.peer_id);
                format!("refused a stream of {protocol:?} from {peer}: {MAX_WAITING} wait already")
            });
        }
        Err(mpsc::error::TrySendError::Closed(stream)) => {
            tally.no_handler.note(Warn, 1, || no_handler(stream.info()));
        }
    }
}

fn no_handler(info: &StreamInfo) -> String {
    let (protocol, peer) = (&info.protocol, &info.peer_id);
    format!("refused a stream of {protocol:?} from {peer}: it has no handler")
}

async fn read_header(
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
        0 => Err(Error::lost("no stream came", false)),
        _ => Ok(()),
    }
}

impl Stream {
    /// Who is at the other end, and which protocol was agreed on.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }

    /// What of a read comes from `ahead`.
    fn take_ahead(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        count > 0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.socket.drain();
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.take_ahead(buffer) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
