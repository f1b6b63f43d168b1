//! Connection manager requests: which connections the daemon keeps.

use super::{Client, Context, Error};
use p2pd_protocol::command::connmgr::{TagPeer, Trim, UntagPeer};
use p2pd_protocol::PeerId;

impl Client {
    /// TAG_PEER: tags a peer. The higher the total weight of its tags, the longer the daemon keeps
    /// its connections. Tagging again with the same name sets the weight.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JavaScript daemon.
    pub async fn connmgr_tag_peer(
        &self,
        peer: &PeerId,
        tag: impl Into<String>,
        weight: i64,
    ) -> Result<(), Error> {
        let about = Context::new("CONNMANAGER TAG_PEER").peer(peer);
        let request = TagPeer {
            peer: peer.clone(),
            tag: tag.into(),
            weight,
        };
        self.request(about, request).await
    }

    /// UNTAG_PEER: removes a tag from a peer.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JavaScript daemon.
    pub async fn connmgr_untag_peer(
        &self,
        peer: &PeerId,
        tag: impl Into<String>,
    ) -> Result<(), Error> {
        let about = Context::new("CONNMANAGER UNTAG_PEER").peer(peer);
        let request = UntagPeer {
            peer: peer.clone(),
            tag: tag.into(),
        };
        self.request(about, request).await
    }

    /// TRIM: closes connections until the low-water mark is reached.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JavaScript daemon.
    pub async fn connmgr_trim(&self) -> Result<(), Error> {
        let about = Context::new("CONNMANAGER TRIM");
        self.request(about, Trim).await
    }
}
