//! The control protocol without I/O: bytes in, events out.

pub mod multiaddr;
pub mod pb;
pub mod peer_id;
pub mod public_key;

pub use multiaddr::Multiaddr;
pub use peer_id::PeerId;
pub use public_key::PublicKey;
