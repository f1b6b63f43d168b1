//! Values of the protocol: peer ids, multiaddrs, public keys.

pub mod endpoint;
pub mod multiaddr;
pub mod peer_id;
pub mod public_key;
