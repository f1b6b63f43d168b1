//! PEERSTORE: what the JS daemon knows of a peer. The Go daemons have no such requests.

use super::{mismatch, Client, Context, Error};
use crate::core::{peerstore, Answer, PeerId, PeerInfo, Request};

impl Client {
    /// GET_PROTOCOLS: the protocols a peer is known to speak.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JS one. jsp2pd 0.10.2 crashes when it is
    /// asked about a peer it has not heard of: [`Error::ConnectionLost`].
    pub async fn peerstore_get_protocols(&self, peer: &PeerId) -> Result<Vec<String>, Error> {
        let about = Context::new("PEERSTORE GET_PROTOCOLS").peer(peer);
        match self
            .ask_peerstore(about, peerstore::get_protocols(peer))
            .await?
        {
            Answer::Protocols(protocols) => Ok(protocols),
            other => Err(mismatch(&other)),
        }
    }

    /// GET_PEER_INFO: the addresses a peer is known to have.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not the JS one, or is jsp2pd 0.10.2, which has not
    /// implemented it.
    pub async fn peerstore_get_peer_info(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("PEERSTORE GET_PEER_INFO").peer(peer);
        match self
            .ask_peerstore(about, peerstore::get_peer_info(peer))
            .await?
        {
            Answer::PeerInfo(info) => Ok(info),
            other => Err(mismatch(&other)),
        }
    }

    /// As `ask`, once the daemon turned out to be the JS one: hivemind's would take the request
    /// for another, and could end from that.
    async fn ask_peerstore(&self, about: Context, request: Request) -> Result<Answer, Error> {
        self.within(about, async {
            let connector = self.connector();
            match connector.ask(&peerstore::is_there()).await {
                Err(Error::NotSupported { .. }) => Ok(connector.ask(&request).await?.0),
                Err(error) => Err(connector.unknown_request(error).await),
                Ok(_) => Err(Error::not_supported("the daemon has no peerstore")),
            }
        })
        .await
    }
}
