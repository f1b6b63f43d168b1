//! What a front end can ask of a node: one method per request.

use crate::command::Command;
use crate::convert::{multiaddr, parse_addr, parse_peer, peer_id};
use crate::dial::Dialer;
use crate::error::NodeError;
use crate::services::identify::Identify;
use crate::services::open::open;
use crate::services::peers::AddressBook;
use crate::services::streams::StreamHandlers;
use crate::services::unary::{self, UnaryHandlers};
pub use crate::services::unary::{HandlerError, IncomingCall, Responder, UnaryClient, UnaryEvent};
pub use crate::stream::PeerStream;
pub use crate::swarm::Substream;
use crate::swarm::{Connection, Host};
use bytes::Bytes;
use futures::future::join_all;
use p2pd_protocol::{Identity, Multiaddr, PeerId, PeerInfo};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Time to wait for the connections of a peer to close.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A running node. Cheap to clone; the node stops when [`shutdown`](Self::shutdown) is called or all
/// handles are dropped.
#[derive(Clone)]
pub struct NodeHandle(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) host: Host,
    pub(crate) book: Arc<AddressBook>,
    pub(crate) identify: Arc<Identify>,
    pub(crate) streams: Arc<StreamHandlers>,
    pub(crate) unary: Arc<UnaryHandlers>,
    pub(crate) dialer: Arc<Dialer>,
    pub(crate) max_message: usize,
    pub(crate) announced: watch::Receiver<Vec<libp2p::Multiaddr>>,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) stopped: CancellationToken,
}

impl NodeHandle {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// The node's peer id.
    pub fn peer_id(&self) -> PeerId {
        peer_id(&self.0.host.local())
    }

    /// The node's peer id, and the addresses that it announces to peers, without `/p2p`.
    pub fn identify(&self) -> Identity {
        let addrs = self.0.announced.borrow();
        Identity::new(self.peer_id(), addrs.iter().map(multiaddr).collect())
    }

    /// Connects to a peer, and waits until the peer has been identified. Does nothing if a connection
    /// exists. Dials the given addresses and all that are known, in parallel.
    ///
    /// # Errors
    /// The peer id or an address is invalid, the peer is this node, or no address can be reached.
    pub async fn connect(&self, peer: &PeerId, addrs: &[Multiaddr]) -> Result<(), NodeError> {
        let peer = parse_peer(peer)?;
        let addrs: Result<Vec<_>, _> = addrs.iter().map(parse_addr).collect();
        let addrs = addrs?;
        if !addrs.is_empty() {
            self.0.book.add(peer, addrs);
        }
        self.0.connection(peer).await.map(drop)
    }

    /// Closes every connection to a peer, and waits until they are closed.
    ///
    /// # Errors
    /// The peer id is invalid.
    pub async fn disconnect(&self, peer: &PeerId) -> Result<(), NodeError> {
        let peer = parse_peer(peer)?;
        let mut connections = self.0.host.connections();
        connections.retain(|connection| connection.peer() == peer);
        connections.iter().for_each(Connection::close);
        let closed = join_all(connections.iter().map(Connection::closed));
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closed).await;
        Ok(())
    }

    /// The connected peers: one entry per connection.
    pub fn list_peers(&self) -> Vec<PeerInfo> {
        let connections = self.0.host.connections();
        let info = |connection: &Connection| PeerInfo {
            peer_id: peer_id(&connection.peer()),
            addrs: vec![multiaddr(connection.remote_addr())],
        };
        connections.iter().map(info).collect()
    }

    /// Opens a stream to a peer, and connects to it if necessary. If the peer is known to support one of
    /// the protocols, returns before the peer has confirmed it; a refusal then fails the first read.
    ///
    /// # Errors
    /// Those of [`connect`](Self::connect), or the peer supports none of the protocols.
    pub async fn open_stream(
        &self,
        peer: &PeerId,
        protocols: Vec<String>,
    ) -> Result<PeerStream, NodeError> {
        let connection = self.0.connection(parse_peer(peer)?).await?;
        if protocols.is_empty() {
            return Err(NodeError::NoProtocols);
        }
        let identify = &self.0.identify;
        let (protocol, stream) = open(identify, &connection, &protocols).await?;
        Ok(identify.peer_stream(protocol, stream, &connection))
    }

    /// Registers a local address as the handler of a protocol's inbound streams. If there is one already,
    /// a `balanced` one shares the streams with it in turn.
    ///
    /// # Errors
    /// The address is invalid, or the protocol has a handler and this one is not balanced.
    pub fn add_stream_handler(
        &self,
        protocol: &str,
        addr: &Multiaddr,
        balanced: bool,
    ) -> Result<(), NodeError> {
        self.0.streams.add(protocol, addr, balanced)
    }

    /// Removes a handler.
    ///
    /// # Errors
    /// The protocol has no handler with this address.
    pub fn remove_stream_handler(&self, protocol: &str, addr: &Multiaddr) -> Result<(), NodeError> {
        self.0.streams.remove(protocol, addr)
    }

    /// Registers a client that handles unary calls: one per persistent connection.
    pub fn register_unary_client(&self) -> UnaryClient {
        self.0.unary.register()
    }

    /// Calls a peer's unary handler. Dropping the future cancels the call.
    ///
    /// # Errors
    /// Those of [`open_stream`](Self::open_stream), or the stream ended without a reply. The inner error
    /// is that of the peer's handler.
    pub async fn call(
        &self,
        peer: &PeerId,
        protocol: &str,
        payload: Bytes,
    ) -> Result<Result<Bytes, HandlerError>, NodeError> {
        let connection = self.0.connection(parse_peer(peer)?).await?;
        let max_message = self.0.max_message;
        unary::call(
            &self.0.identify,
            &connection,
            protocol,
            payload,
            max_message,
        )
        .await
    }

    /// Closes all connections and listeners, and waits until the node has stopped.
    pub async fn shutdown(self) {
        let _ = self.0.commands.send(Command::Shutdown).await;
        self.0.stopped.cancelled().await;
    }
}

impl Inner {
    /// Returns the newest connection to a peer. If the peer is not connected, dials it and waits until it
    /// has been identified.
    async fn connection(&self, peer: libp2p::PeerId) -> Result<Connection, NodeError> {
        if let Some(connection) = self.host.newest(&peer) {
            return Ok(connection);
        }
        if peer == self.host.local() {
            return Err(NodeError::DialToSelf);
        }
        self.dialer.dial(peer).await?;
        let connection = self.host.newest(&peer);
        let connection = connection.ok_or(NodeError::ConnectionFailed)?;
        self.identify.wait(&connection).await;
        Ok(connection)
    }
}
