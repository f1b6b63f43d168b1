//! Control requests: IDENTIFY, CONNECT, DISCONNECT, LIST_PEERS.

use super::{Client, Context, Error};
use p2pd_protocol::command::control::{Connect, Disconnect, Identify, ListPeers};
use p2pd_protocol::{Identity, Multiaddr, PeerId, PeerInfo};

impl Client {
    /// IDENTIFY: returns the daemon's peer id and addresses.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if there is no daemon.
    pub async fn identify(&self) -> Result<Identity, Error> {
        let about = Context::new("IDENTIFY");
        self.request(about, Identify).await
    }

    /// CONNECT: connects to a peer. One address that works is enough.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer cannot be reached, or another peer answers there.
    pub async fn connect(&self, peer: &PeerId, addrs: &[Multiaddr]) -> Result<(), Error> {
        let about = Context::new("CONNECT").peer(peer);
        let request = Connect {
            peer: peer.clone(),
            addrs: addrs.to_vec(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// DISCONNECT: closes all connections to a peer. A peer without connections is no error.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JavaScript daemon.
    pub async fn disconnect(&self, peer: &PeerId) -> Result<(), Error> {
        let about = Context::new("DISCONNECT").peer(peer);
        self.request(about, Disconnect { peer: peer.clone() }).await
    }

    /// LIST_PEERS: returns the connected peers, one entry for each connection.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if there is no daemon.
    pub async fn list_peers(&self) -> Result<Vec<PeerInfo>, Error> {
        let about = Context::new("LIST_PEERS");
        self.request(about, ListPeers).await
    }
}
