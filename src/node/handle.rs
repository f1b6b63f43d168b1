//! What a front end can ask of a node: one method per request.

use crate::error::NodeError;
pub use crate::services::unary::{HandlerError, IncomingCall, Responder, UnaryClient, UnaryEvent};
use bytes::Bytes;
pub use libp2p::core::muxing::SubstreamBox as Substream;
use p2pd_protocol::{Identity, Multiaddr, PeerId, PeerInfo, StreamInfo};

/// A stream between a peer and a local client.
pub struct PeerStream {
    /// The peer, its address and the protocol.
    pub info: StreamInfo,
    /// Whether the peer still reads after it has closed its own direction. A Go peer on yamux does not:
    /// what it is sent then stalls, so its end of file ends the whole stream.
    pub half_close: bool,
    /// The stream.
    pub stream: Substream,
}

/// A running node. Cheap to clone; the node stops when [`shutdown`](Self::shutdown) is called or all
/// handles are dropped.
#[derive(Clone)]
pub struct NodeHandle;

impl NodeHandle {
    /// The node's peer id.
    pub fn peer_id(&self) -> PeerId {
        todo!()
    }

    /// The node's peer id, and the addresses that it announces to peers, without `/p2p`.
    pub fn identify(&self) -> Identity {
        todo!()
    }

    /// Connects to a peer, and waits until the peer has been identified. Does nothing if a connection
    /// exists. Dials the given addresses and all that are known, in parallel.
    ///
    /// # Errors
    /// The peer id or an address is invalid, the peer is this node, or no address can be reached.
    pub async fn connect(&self, peer: &PeerId, addrs: &[Multiaddr]) -> Result<(), NodeError> {
        let _ = (peer, addrs);
        todo!()
    }

    /// Closes every connection to a peer, and waits until they are closed.
    ///
    /// # Errors
    /// The peer id is invalid.
    pub async fn disconnect(&self, peer: &PeerId) -> Result<(), NodeError> {
        let _ = peer;
        todo!()
    }

    /// The connected peers: one entry per connection.
    pub fn list_peers(&self) -> Vec<PeerInfo> {
        todo!()
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
        let _ = (peer, protocols);
        todo!()
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
        let _ = (protocol, addr, balanced);
        todo!()
    }

    /// Removes a handler.
    ///
    /// # Errors
    /// The protocol has no handler with this address.
    pub fn remove_stream_handler(&self, protocol: &str, addr: &Multiaddr) -> Result<(), NodeError> {
        let _ = (protocol, addr);
        todo!()
    }

    /// Registers a client that handles unary calls: one per persistent connection.
    pub fn register_unary_client(&self) -> UnaryClient {
        todo!()
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
        let _ = (peer, protocol, payload);
        todo!()
    }

    /// Closes all connections and listeners, and waits until the node has stopped.
    pub async fn shutdown(self) {
        todo!()
    }
}
