//! The live connections, and the protocols that this node serves.

use super::negotiate::{self, Negotiated, Offer, OpenError};
use futures::future::BoxFuture;
use futures::task::AtomicWaker;
use libp2p::core::muxing::SubstreamBox;
use libp2p::{Multiaddr, PeerId};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::sync::{broadcast, mpsc, oneshot, watch};

/// A stream to a peer.
pub type Substream = SubstreamBox;

/// Number of streams that tasks may have requested on a connection. Further tasks wait.
const OPENING: usize = 256;
/// Number of events that a slow receiver of them may leave unread before it misses some.
const EVENTS: usize = 1024;
/// Number of protocols that are remembered of one peer.
const MAX_PEER_PROTOCOLS: usize = 4096;

/// The live connections of a node, and the protocols that it serves. Cheap to clone.
#[derive(Clone)]
pub struct Host(Arc<Shared>);

struct Shared {
    local: PeerId,
    connections: Mutex<Connections>,
    protocols: Mutex<Protocols>,
    changes: watch::Sender<u64>,
    events: broadcast::Sender<HostEvent>,
}

#[derive(Default)]
struct Connections {
    opened: u64,
    /// By peer; the newest is the last one.
    live: HashMap<PeerId, Vec<Connection>>,
}

#[derive(Default)]
struct Protocols {
    services: HashMap<String, Arc<dyn Service>>,
    /// Those that the behaviours of the swarm serve.
    delegated: BTreeSet<String>,
}

/// A change of the connections.
#[derive(Clone, Debug)]
pub enum HostEvent {
    /// A connection was opened.
    Opened(Connection),
    /// A connection was closed.
    Closed(Connection),
}

/// Serves the inbound streams of a protocol.
pub trait Service: Send + Sync {
    /// Serves one stream. The future runs in a task of its own. The protocol is confirmed with the first
    /// bytes that it writes, or as soon as it waits for a read. It must do one of both soon: a peer may let
    /// only 256 streams wait for their first bytes.
    fn inbound(
        &self,
        protocol: String,
        stream: Substream,
        from: Connection,
    ) -> BoxFuture<'static, ()>;
}

impl Host {
    /// A host without connections.
    pub fn new(local: PeerId) -> Self {
        Self(Arc::new(Shared {
            local,
            connections: Mutex::default(),
            protocols: Mutex::default(),
            changes: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENTS),
        }))
    }

    /// The peer id of this node.
    pub fn local(&self) -> PeerId {
        self.0.local
    }

    /// Serves a protocol, whose name may lack the leading `/`. Replaces its service, if there is one.
    pub fn serve(&self, protocol: &str, service: Arc<dyn Service>) {
        let before = self
            .lock_protocols()
            .services
            .insert(protocol.to_owned(), service);
        if before.is_none() {
            self.note_change();
        }
    }

    /// Ends the service of a protocol. Its open streams go on.
    pub fn withdraw(&self, protocol: &str) {
        let before = self.lock_protocols().services.remove(protocol);
        if before.is_some() {
            self.note_change();
        }
    }

    /// Leaves the inbound streams of a protocol to the behaviours of the swarm.
    pub fn delegate(&self, protocol: &str) {
        if self.lock_protocols().delegated.insert(protocol.to_owned()) {
            self.note_change();
        }
    }

    /// The names of all protocols that this node serves.
    pub fn protocols(&self) -> Vec<String> {
        let protocols = self.lock_protocols();
        let services = protocols.services.keys();
        services.chain(&protocols.delegated).cloned().collect()
    }

    /// Changes whenever [`protocols`](Self::protocols) does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.0.changes.subscribe()
    }

    /// All live connections.
    pub fn connections(&self) -> Vec<Connection> {
        let connections = self.lock_connections();
        connections.live.values().flatten().cloned().collect()
    }

    /// The newest live connection to a peer.
    pub fn newest(&self, peer: &PeerId) -> Option<Connection> {
        let connections = self.lock_connections();
        let of_peer = connections.live.get(peer)?;
        of_peer.iter().rev().find(|it| it.is_open()).cloned()
    }

    /// Receives the changes of the connections from now on. A receiver that lags behind misses some.
    pub fn events(&self) -> broadcast::Receiver<HostEvent> {
        self.0.events.subscribe()
    }

    /// Adds a connection. Returns it, with the streams that its muxer must open.
    pub(super) fn add(
        &self,
        peer: PeerId,
        remote_addr: Multiaddr,
        is_dialer: bool,
    ) -> (Connection, mpsc::Receiver<OpenRequest>) {
        let (requests, opening) = mpsc::channel(OPENING);
        let mut connections = self.lock_connections();
        connections.opened += 1;
        let connection = Connection(Arc::new(ConnectionState {
            id: connections.opened,
            peer,
            remote_addr,
            is_dialer,
            closed: AtomicBool::new(false),
            requests,
            closing: AtomicBool::new(false),
            muxer: AtomicWaker::new(),
            peer_protocols: Mutex::default(),
        }));
        let of_peer = connections.live.entry(peer).or_default();
        of_peer.push(connection.clone());
        drop(connections);
        let _ = self.0.events.send(HostEvent::Opened(connection.clone()));
        (connection, opening)
    }

    /// Removes a connection whose muxer has ended.
    pub(super) fn remove(&self, connection: &Connection) {
        connection.0.closed.store(true, Ordering::Release);
        {
            let mut connections = self.lock_connections();
            if let Some(of_peer) = connections.live.get_mut(&connection.0.peer) {
                of_peer.retain(|it| it.0.id != connection.0.id);
                if of_peer.is_empty() {
                    connections.live.remove(&connection.0.peer);
                }
            }
        }
        let _ = self.0.events.send(HostEvent::Closed(connection.clone()));
    }

    /// Returns which part of the node serves a protocol.
    pub(super) fn offer(&self, protocol: &str) -> Offer {
        let protocols = self.lock_protocols();
        if protocols.services.contains_key(protocol) {
            Offer::Served
        } else if protocols.delegated.contains(protocol) {
            Offer::Delegated
        } else {
            Offer::Unknown
        }
    }

    pub(super) fn service(&self, protocol: &str) -> Option<Arc<dyn Service>> {
        self.lock_protocols().services.get(protocol).cloned()
    }

    fn note_change(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }

    fn lock_connections(&self) -> MutexGuard<'_, Connections> {
        lock(&self.0.connections)
    }

    fn lock_protocols(&self) -> MutexGuard<'_, Protocols> {
        lock(&self.0.protocols)
    }
}

/// A request for a new stream, which is handed over before its protocol is negotiated.
pub(super) type OpenRequest = oneshot::Sender<Substream>;

/// A connection to a peer. Cheap to clone.
#[derive(Clone)]
pub struct Connection(Arc<ConnectionState>);

struct ConnectionState {
    id: u64,
    peer: PeerId,
    remote_addr: Multiaddr,
    is_dialer: bool,
    closed: AtomicBool,
    requests: mpsc::Sender<OpenRequest>,
    closing: AtomicBool,
    /// Wakes the muxer when `closing` changes.
    muxer: AtomicWaker,
    peer_protocols: Mutex<Arc<Vec<String>>>,
}

impl Connection {
    /// The peer.
    pub fn peer(&self) -> PeerId {
        self.0.peer
    }

    /// Address of the peer's end, without `/p2p`.
    pub fn remote_addr(&self) -> &Multiaddr {
        &self.0.remote_addr
    }

    /// A number that no other connection of this node has. Later connections have larger ones.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// Whether this node has dialed the peer.
    pub fn is_dialer(&self) -> bool {
        self.0.is_dialer
    }

    /// Whether the connection is open.
    pub fn is_open(&self) -> bool {
        !self.0.closed.load(Ordering::Acquire)
    }

    /// Opens a stream, and waits until the peer has accepted the first protocol that it supports.
    /// Returns its name.
    ///
    /// # Errors
    /// The peer supports none of the protocols, or the connection fails.
    pub async fn open(&self, protocols: &[String]) -> Result<(String, Substream), OpenError> {
        let stream = self.open_raw().await?;
        let (protocol, stream) = negotiate::select(stream, protocols).await?;
        Ok((protocol, Substream::new(stream)))
    }

    /// Opens a stream, and sends the protocol's name with the first bytes. If the peer does not support
    /// it, the first read fails with an [`OpenError::Unsupported`] within its error.
    ///
    /// # Errors
    /// The connection is closed.
    pub async fn open_lazily(&self, protocol: &str) -> Result<Substream, OpenError> {
        let stream = self.open_raw().await?;
        Ok(Substream::new(Negotiated::lazy(stream, protocol)))
    }

    /// Closes the connection.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Release);
        self.0.muxer.wake();
    }

    /// Waits until the connection is closed.
    pub async fn closed(&self) {
        // The muxer drops its end after it has removed the connection from the host.
        self.0.requests.closed().await;
    }

    /// The protocols that the peer supports, as far as known.
    pub fn peer_protocols(&self) -> Arc<Vec<String>> {
        lock(&self.0.peer_protocols).clone()
    }

    /// Replaces the protocols that the peer is known to support.
    pub fn set_peer_protocols(&self, mut protocols: Vec<String>) {
        protocols.truncate(MAX_PEER_PROTOCOLS);
        *lock(&self.0.peer_protocols) = Arc::new(protocols);
    }

    /// Remembers that the peer supports a protocol.
    pub fn remember_protocol(&self, protocol: &str) {
        let mut known = lock(&self.0.peer_protocols);
        if known.len() < MAX_PEER_PROTOCOLS && !known.iter().any(|it| it == protocol) {
            Arc::make_mut(&mut known).push(protocol.to_owned());
        }
    }

    /// Ready when [`close`](Self::close) was called.
    pub(super) fn poll_closing(&self, cx: &Context<'_>) -> Poll<()> {
        self.0.muxer.register(cx.waker());
        match self.0.closing.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    async fn open_raw(&self) -> Result<Substream, OpenError> {
        let (request, opened) = oneshot::channel();
        let sent = self.0.requests.send(request).await;
        sent.map_err(|_| OpenError::Closed)?;
        opened.await.map_err(|_| OpenError::Closed)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("id", &self.0.id)
            .field("peer", &self.0.peer)
            .field("remote_addr", &self.0.remote_addr)
            .field("is_dialer", &self.is_dialer())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
