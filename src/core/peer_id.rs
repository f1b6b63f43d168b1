//! Peer ids: the multihash of a peer's public key.

use bytes::Bytes;

/// The identity of a libp2p peer, as the bytes of a multihash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(Bytes);

impl PeerId {
    /// Takes the bytes as they are: whether they are a peer id is for the daemon to say.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The bytes of the multihash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of the multihash, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}
