//! Multiaddrs in their binary form, read on demand.

use bytes::Bytes;

/// A multiaddr. Addresses from a daemon are kept as they came, also where this version does not
/// know one of their protocols.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Multiaddr(Bytes);

impl Multiaddr {
    /// Takes the bytes as they are.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// The binary form.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The binary form, shared.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }
}
