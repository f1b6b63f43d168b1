//! IDENTIFY, CONNECT, DISCONNECT, LIST_PEERS.

use super::{mismatch, Client, Context, Error};
use crate::core::{control, Answer, Multiaddr, PeerId, PeerInfo};

/// Who a daemon is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Its peer id.
    pub peer_id: PeerId,
    /// Where it listens for peers.
    pub addrs: Vec<Multiaddr>,
}

impl Client {
    /// IDENTIFY: the daemon's peer id and addresses.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if there is no daemon.
    pub async fn identify(&self) -> Result<Identity, Error> {
        let about = Context::new("IDENTIFY");
        match self.ask(about, control::identify()).await? {
            Answer::Identity { peer_id, addrs } => Ok(Identity { peer_id, addrs }),
            other => Err(mismatch(&other)),
        }
    }

    /// CONNECT: connects to a peer at any of its addresses.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be reached there, or is another peer.
    pub async fn connect(&self, peer: &PeerId, addrs: &[Multiaddr]) -> Result<(), Error> {
        let about = Context::new("CONNECT").peer(peer);
        let request = control::connect(peer, addrs, self.timeout);
        self.tell(about, request).await
    }

    /// DISCONNECT: closes every connection to a peer; there need be none. The JS daemon has no such
    /// request.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JS daemon.
    pub async fn disconnect(&self, peer: &PeerId) -> Result<(), Error> {
        let about = Context::new("DISCONNECT").peer(peer);
        self.tell(about, control::disconnect(peer)).await
    }

    /// LIST_PEERS: the connected peers, with one entry for each connection: a peer can be there
    /// twice.
    ///
    /// # Errors
    /// When the daemon cannot be asked.
    pub async fn list_peers(&self) -> Result<Vec<PeerInfo>, Error> {
        let about = Context::new("LIST_PEERS");
        match self.ask(about, control::list_peers()).await? {
            Answer::Peers(peers) => Ok(peers),
            other => Err(mismatch(&other)),
        }
    }
}
