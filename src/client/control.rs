//! IDENTIFY, CONNECT, DISCONNECT, LIST_PEERS.

use super::{Client, Context, Error};
use p2pd_protocol::command::control::{Connect, Disconnect, Identify, ListPeers};
use p2pd_protocol::{Identity, Multiaddr, PeerId, PeerInfo};

impl Client {
    /// IDENTIFY: the daemon's peer id and addresses.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if there is no daemon.
    pub async fn identify(&self) -> Result<Identity, Error> {
        let about = Context::new("IDENTIFY");
        self.request(about, Identify).await
    }

    /// CONNECT: connects to a peer at any of its addresses.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be reached there, or is another peer.
    pub async fn connect(&self, peer: &PeerId, addrs: &[Multiaddr]) -> Result<(), Error> {
        let about = Context::new("CONNECT").peer(peer);
        let request = Connect {
            peer: peer.clone(),
            addrs: addrs.to_vec(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// DISCONNECT: closes every connection to a peer; there need be none. The JS daemon has no such
    /// request.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JS daemon.
    pub async fn disconnect(&self, peer: &PeerId) -> Result<(), Error> {
        let about = Context::new("DISCONNECT").peer(peer);
        self.request(about, Disconnect { peer: peer.clone() }).await
    }

    /// LIST_PEERS: the connected peers, with one entry for each connection: a peer can be there
    /// twice.
    ///
    /// # Errors
    /// When the daemon cannot be asked.
    pub async fn list_peers(&self) -> Result<Vec<PeerInfo>, Error> {
        let about = Context::new("LIST_PEERS");
        self.request(about, ListPeers).await
    }
}
