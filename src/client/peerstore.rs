//! Peerstore requests: what the JavaScript daemon knows about peers.

use super::{Client, Context, Error};
use p2pd_protocol::command::peerstore::{GetPeerInfo, GetProtocols, Probe};
use p2pd_protocol::command::Typed;
use p2pd_protocol::{PeerId, PeerInfo};

impl Client {
    /// GET_PROTOCOLS: returns the protocols that a peer is known to support.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JavaScript one; [`Error::ConnectionLost`] if
    /// jsp2pd 0.10.2 has not heard of the peer, because it crashes then.
    pub async fn peerstore_get_protocols(&self, peer: &PeerId) -> Result<Vec<String>, Error> {
        let about = Context::new("PEERSTORE GET_PROTOCOLS").peer(peer);
        let peer = peer.clone();
        self.request_peerstore(about, GetProtocols { peer }).await
    }

    /// GET_PEER_INFO: returns the known addresses of a peer.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JavaScript one, or is jsp2pd 0.10.2, which
    /// does not implement the request.
    pub async fn peerstore_get_peer_info(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("PEERSTORE GET_PEER_INFO").peer(peer);
        let peer = peer.clone();
        self.request_peerstore(about, GetPeerInfo { peer }).await
    }

    /// Sends a request after making sure that the daemon is the JavaScript one: hivemind's daemon
    /// would take it for another request, and could exit.
    async fn request_peerstore<R: Typed>(
        &self,
        about: Context,
        request: R,
    ) -> Result<R::Output, Error> {
        self.within(about, async {
            let pool = self.pool();
            match pool.request(&Probe).await {
                Err(Error::NotSupported { .. }) => Ok(pool.request(&request).await?.0),
                Err(error) => Err(pool.unknown_request(error).await),
                Ok(_) => Err(Error::not_supported("the daemon has no peerstore")),
            }
        })
        .await
    }
}
