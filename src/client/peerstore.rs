//! PEERSTORE: what the JS daemon knows of a peer. The Go daemons have no such requests, and
//! hivemind's fork takes them for others: send them to a JS daemon only.

use super::{mismatch, Client, Context, Error};
use crate::core::{peerstore, Answer, PeerId, PeerInfo};

impl Client {
    /// GET_PROTOCOLS: the protocols a peer is known to speak.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer is not known.
    pub async fn peerstore_get_protocols(&self, peer: &PeerId) -> Result<Vec<String>, Error> {
        let about = Context::new("PEERSTORE GET_PROTOCOLS").peer(peer);
        match self.ask(about, peerstore::get_protocols(peer)).await? {
            Answer::Protocols(protocols) => Ok(protocols),
            other => Err(mismatch(&other)),
        }
    }

    /// GET_PEER_INFO: the addresses a peer is known to have.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer is not known.
    pub async fn peerstore_get_peer_info(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("PEERSTORE GET_PEER_INFO").peer(peer);
        match self.ask(about, peerstore::get_peer_info(peer)).await? {
            Answer::PeerInfo(info) => Ok(info),
            other => Err(mismatch(&other)),
        }
    }
}
