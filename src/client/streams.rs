//! Streams to peers, and from them.

use super::connector::Connector;
use super::socket::{Listener, Socket};
use super::{lock, mismatch, Client, Context, Error};
use crate::core::multiaddr::Endpoint;
use crate::core::{framing, streams, Answer, Multiaddr, PeerId, StreamInfo};
use bytes::{Buf, Bytes, BytesMut};
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{self, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, Notify, Semaphore};
use tokio::task::JoinHandle;

/// How many streams of a protocol may wait for being taken, before the next ones are refused: held
/// back instead, they would hold back those of other protocols.
const MAX_WAITING: usize = 256;

/// How many inbound connections may be on their way to a handler.
const MAX_ARRIVING: usize = 256;

/// The StreamInfo before an inbound stream is small, and comes at once.
const MAX_HEADER: usize = 64 * 1024;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait after an accept failed: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
/// # async fn example(client: p2pclient_rs::Client, peer: p2pclient_rs::core::PeerId) -> Result<(), Box<dyn std::error::Error>> {
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
        let request = streams::stream_open(peer, protocols, self.timeout);
        self.within(about, async {
            let (answer, lease) = self.connector().ask(&request).await?;
            let Answer::StreamOpened(info) = answer else {
                return Err(mismatch(&answer));
            };
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

    /// Where the daemon connects to for inbound streams; `None` before the first handler.
    pub fn listen_maddr(&self) -> Option<Multiaddr> {
        let listening = lock(&self.shared.inbound.listening);
        listening.as_ref().map(|listening| listening.addr.clone())
    }

    async fn register(&self, protocol: String, balanced: bool) -> Result<IncomingStreams, Error> {
        let inbound = &self.shared.inbound;
        let addr = inbound.listen(self.connector())?;
        // In place before the daemon has it: a stream can come sooner than the daemon's answer.
        let streams = inbound.handlers.enter(&protocol).await?;
        let request = streams::stream_handler(&addr, vec![protocol.clone()], balanced);
        let mut handler = IncomingStreams {
            streams,
            registration: Some(Registration {
                client: self.clone(),
                addr,
                runtime: Handle::current(),
                name: Name {
                    handlers: Arc::clone(&inbound.handlers),
                    protocol,
                },
            }),
        };
        let outcome = self.connector().ask(&request).await;
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
/// Up to 256 streams wait here for being taken; while they do, further ones are closed at once.
///
/// ```no_run
/// # async fn example(client: p2pclient_rs::Client) -> Result<(), p2pclient_rs::client::Error> {
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
        match self.registration.take() {
            Some(registration) => registration.take_back().await,
            None => Ok(()),
        }
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
        let request = streams::remove_stream_handler(&addr, vec![name.protocol.clone()]);
        let work = async {
            match client.connector().ask(&request).await {
                Ok(_) => Ok(()),
                Err(error) => Err(client.connector().unknown_request(error).await),
            }
        };
        client.within(about, work).await
    }
}

/// A name that is taken until this is dropped: once the daemon has forgotten it, or nobody is left to
/// tell the daemon.
#[derive(Debug)]
struct Name {
    handlers: Arc<Handlers>,
    protocol: String,
}

impl Drop for Name {
    fn drop(&mut self) {
        self.handlers.leave(&self.protocol);
    }
}

/// Who takes the streams of which protocol.
#[derive(Debug, Default)]
struct Handlers {
    by_protocol: Mutex<HashMap<String, mpsc::Sender<Stream>>>,
    /// Somebody has left.
    left: Notify,
}

impl Handlers {
    /// Takes a name, once the daemon has forgotten who had it before.
    async fn enter(&self, protocol: &str) -> Result<mpsc::Receiver<Stream>, Error> {
        loop {
            let left = self.left.notified();
            {
                let mut handlers = lock(&self.by_protocol);
                match handlers.get(protocol) {
                    None => {
                        let (sender, receiver) = mpsc::channel(MAX_WAITING);
                        handlers.insert(protocol.to_owned(), sender);
                        return Ok(receiver);
                    }
                    Some(sender) if !sender.is_closed() => {
                        let context = Box::default();
                        return Err(Error::AlreadyRegistered { context });
                    }
                    Some(_) => {}
                }
            }
            left.await;
        }
    }

    fn leave(&self, protocol: &str) {
        lock(&self.by_protocol).remove(protocol);
        self.left.notify_waiters();
    }

    fn get(&self, protocol: &str) -> Option<mpsc::Sender<Stream>> {
        lock(&self.by_protocol).get(protocol).cloned()
    }
}

/// Where a client takes inbound streams, and what becomes of them.
#[derive(Debug)]
pub struct Inbound {
    wanted: Option<Endpoint>,
    listening: Mutex<Option<Listening>>,
    handlers: Arc<Handlers>,
}

#[derive(Debug)]
struct Listening {
    addr: Multiaddr,
    accepting: JoinHandle<()>,
    /// Where the socket is, if nobody said where it should be.
    _directory: Option<tempfile::TempDir>,
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
            wanted,
            listening: Mutex::default(),
            handlers: Arc::default(),
        }
    }

    /// Listens, unless it does already; says where.
    fn listen(&self, connector: &Connector) -> Result<Multiaddr, Error> {
        let mut listening = lock(&self.listening);
        match &*listening {
            // It ends with its runtime.
            Some(listening) if !listening.accepting.is_finished() => {
                return Ok(listening.addr.clone())
            }
            _ => *listening = None,
        }
        let failed = |addr: &Endpoint, error: io::Error| Error::Listen {
            addr: addr.into(),
            source: Arc::new(error),
        };
        let (mut endpoint, directory) = match &self.wanted {
            Some(wanted) => (wanted.clone(), None),
            None => default_endpoint(connector.endpoint())
                .map_err(|error| failed(connector.endpoint(), error))?,
        };
        let bound = Listener::bind(&endpoint).and_then(|listener| {
            let address = listener.tcp_address()?;
            Ok((listener, address))
        });
        let (listener, address) = bound.map_err(|error| failed(&endpoint, error))?;
        if let Some(address) = address {
            endpoint = address.into();
        }
        let addr = Multiaddr::from(&endpoint);
        let handlers = Arc::downgrade(&self.handlers);
        *listening = Some(Listening {
            addr: addr.clone(),
            accepting: tokio::spawn(accept(listener, handlers)),
            _directory: directory,
        });
        Ok(addr)
    }
}

/// Where the daemon reaches us as we reach it.
fn default_endpoint(control: &Endpoint) -> io::Result<(Endpoint, Option<tempfile::TempDir>)> {
    match control {
        Endpoint::Unix(_) => {
            let directory = crate::sockets::private_directory(None, "p2pclient-", "listen.sock")?;
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

async fn accept(listener: Listener, handlers: Weak<Handlers>) {
    let arriving = Arc::new(Semaphore::new(MAX_ARRIVING));
    loop {
        let turn = Arc::clone(&arriving).acquire_owned().await;
        match listener.accept().await {
            Ok(socket) => {
                let handlers = Weak::clone(&handlers);
                tokio::spawn(async move {
                    dispatch(socket, handlers).await;
                    drop(turn);
                });
            }
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// Hands an inbound stream to its handler; one that there is no handler for is closed.
async fn dispatch(mut socket: Socket, handlers: Weak<Handlers>) {
    let header = tokio::time::timeout(HEADER_TIMEOUT, read_header(&mut socket)).await;
    let Ok(Ok((info, ahead))) = header else {
        return;
    };
    let handler = handlers.upgrade().and_then(|all| all.get(&info.protocol));
    if let Some(handler) = handler {
        let stream = Stream {
            socket,
            ahead,
            info,
        };
        let _ = handler.try_send(stream);
    }
}

async fn read_header(socket: &mut Socket) -> Result<(StreamInfo, Bytes), Error> {
    let mut buffer = BytesMut::with_capacity(1024);
    loop {
        if let Some(frame) = framing::split_frame(&mut buffer, MAX_HEADER)? {
            let info = streams::decode_stream_info(&frame)?;
            return Ok((info, buffer.freeze()));
        }
        let read = socket.read_buf(&mut buffer).await;
        if read.map_err(|error| Error::lost(error, false))? == 0 {
            return Err(Error::lost("no stream came", false));
        }
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
