//! Conversions between the types of the control protocol and those of libp2p.

use crate::error::NodeError;
use libp2p::multiaddr::Protocol;
use p2pd_protocol::{Multiaddr, PeerId};

/// A peer id for clients.
pub(crate) fn peer_id(peer: &libp2p::PeerId) -> PeerId {
    PeerId::from_bytes(peer.to_bytes())
}

/// An address for clients.
pub(crate) fn multiaddr(addr: &libp2p::Multiaddr) -> Multiaddr {
    Multiaddr::from_bytes(addr.to_vec())
}

/// Reads a client's peer id.
pub(crate) fn parse_peer(peer: &PeerId) -> Result<libp2p::PeerId, NodeError> {
    peer.validate().map_err(|error| NodeError::from(&error))?;
    libp2p::PeerId::from_bytes(peer.as_bytes())
        .map_err(|error| NodeError::InvalidPeerId(error.to_string()))
}

/// Reads a client's address.
pub(crate) fn parse_addr(addr: &Multiaddr) -> Result<libp2p::Multiaddr, NodeError> {
    let parsed = libp2p::Multiaddr::try_from(addr.as_bytes().to_vec());
    parsed.map_err(|error| NodeError::InvalidAddress(format!("{addr}: {error}")))
}

/// Removes the `/p2p` at the end of an address.
pub(crate) fn without_peer(mut addr: libp2p::Multiaddr) -> libp2p::Multiaddr {
    if let Some(Protocol::P2p(_)) = addr.iter().last() {
        addr.pop();
    }
    addr
}
