//! IDENTIFY, CONNECT, DISCONNECT, LIST_PEERS.

use super::pb::p2pd::{self, request::Type};
use super::request::{whole_seconds, Expect};
use super::{Answer, Error, Multiaddr, PeerId, Request};
use std::time::Duration;

/// A peer and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// The peer.
    pub peer_id: PeerId,
    /// Where it can be reached.
    pub addrs: Vec<Multiaddr>,
}

/// Asks the daemon for its peer id and addresses.
pub fn identify() -> Request {
    Request::new(&message(Type::Identify), Expect::Identity)
}

/// Connects to `peer` at any of `addrs`. The daemon gives up after `timeout`, 60 s if none.
pub fn connect(peer: &PeerId, addrs: &[Multiaddr], timeout: Option<Duration>) -> Request {
    let message = p2pd::Request {
        connect: Some(p2pd::ConnectRequest {
            peer: Some(peer.to_bytes()),
            addrs: addrs.iter().map(Multiaddr::to_bytes).collect(),
            timeout: whole_seconds(timeout),
        }),
        ..message(Type::Connect)
    };
    Request::new(&message, Expect::Done)
}

/// Closes every connection to `peer`. (The JS daemon has no such request.)
pub fn disconnect(peer: &PeerId) -> Request {
    let message = p2pd::Request {
        disconnect: Some(p2pd::DisconnectRequest {
            peer: Some(peer.to_bytes()),
        }),
        ..message(Type::Disconnect)
    };
    Request::new(&message, Expect::Done)
}

/// Asks for the connected peers: one entry per connection, so a peer can appear twice.
pub fn list_peers() -> Request {
    Request::new(&message(Type::ListPeers), Expect::Peers)
}

/// A request of type `r#type` and nothing else yet.
pub(super) fn message(r#type: Type) -> p2pd::Request {
    p2pd::Request {
        r#type: Some(r#type as i32),
        ..Default::default()
    }
}

pub(super) fn identity(response: p2pd::Response) -> Result<Answer, Error> {
    let identify = response.identify.ok_or(Error::MissingField {
        message: "Response",
        field: "identify",
    })?;
    Ok(Answer::Identity {
        peer_id: PeerId::from_bytes(identify.id.ok_or(Error::MissingField {
            message: "IdentifyResponse",
            field: "id",
        })?),
        addrs: multiaddrs(identify.addrs),
    })
}

pub(super) fn peers(response: p2pd::Response) -> Result<Answer, Error> {
    let peers = response.peers.into_iter().map(peer_info);
    Ok(Answer::Peers(peers.collect::<Result<_, _>>()?))
}

pub(super) fn peer_info(info: p2pd::PeerInfo) -> Result<PeerInfo, Error> {
    Ok(PeerInfo {
        peer_id: PeerId::from_bytes(info.id.ok_or(Error::MissingField {
            message: "PeerInfo",
            field: "id",
        })?),
        addrs: multiaddrs(info.addrs),
    })
}

fn multiaddrs(addrs: Vec<bytes::Bytes>) -> Vec<Multiaddr> {
    addrs.into_iter().map(Multiaddr::from_bytes).collect()
}
