//! CONNMANAGER: which connections to keep. (The JS daemon has no such requests.)

use super::{Client, Context, Error};
use p2pd_protocol::command::connmgr::{TagPeer, Trim, UntagPeer};
use p2pd_protocol::PeerId;

impl Client {
    /// TAG_PEER: gives a peer a tag; connections to peers with more weight are kept longer.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JS daemon.
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

    /// UNTAG_PEER: takes a tag off a peer.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JS daemon.
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

    /// TRIM: closes connections down to the low-water mark.
    ///
    /// # Errors
    /// [`Error::NotSupported`] from the JS daemon.
    pub async fn connmgr_trim(&self) -> Result<(), Error> {
        let about = Context::new("CONNMANAGER TRIM");
        self.request(about, Trim).await
    }
}
