//! PEERSTORE: what the JS daemon knows of a peer. The Go daemons have no such requests.

use super::{Client, Context, Error};
use p2pd_protocol::command::peerstore::{GetPeerInfo, GetProtocols, Probe};
use p2pd_protocol::command::Typed;
use p2pd_protocol::{PeerId, PeerInfo};

impl Client {
    /// GET_PROTOCOLS: the protocols a peer is known to speak.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JS one. jsp2pd 0.10.2 crashes when it is
    /// asked about a peer it has not heard of: [`Error::ConnectionLost`].
    pub async fn peerstore_get_protocols(&self, peer: &PeerId) -> Result<Vec<String>, Error> {
        let about = Context::new("PEERSTORE GET_PROTOCOLS").peer(peer);
        let peer = peer.clone();
        self.request_peerstore(about, GetProtocols { peer }).await
    }

    /// GET_PEER_INFO: the addresses a peer is known to have.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JS one, or is jsp2pd 0.10.2, which has not
    /// implemented it.
    pub async fn peerstore_get_peer_info(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("PEERSTORE GET_PEER_INFO").peer(peer);
        let peer = peer.clone();
        self.request_peerstore(about, GetPeerInfo { peer }).await
    }

    /// As `request`, once the daemon is known to be the JavaScript one: hivemind's would take the
    /// request for another, and could exit because of it.
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
