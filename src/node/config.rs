//! Settings of a node.

use libp2p::identity::Keypair;
use libp2p::Multiaddr;

/// Settings of a node.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The node's identity.
    pub keypair: Keypair,
    /// Addresses to listen at. Those that cannot be bound are dropped if another works.
    pub listen: Vec<Multiaddr>,
    /// Addresses to announce to peers, in place of those that the node listens at, if there are any.
    pub announce: Vec<Multiaddr>,
    /// Agent version that peers see. Default: `p2pclient-rs/` and the version of this crate.
    pub agent: String,
    /// Protocols that secure connections, the preferred one first. At least one is required.
    pub security: Vec<Security>,
    /// Largest message of a unary call, in bytes. Default: 4 MiB.
    pub max_message: usize,
}

impl Config {
    /// The defaults: no listen address, TLS and noise.
    pub fn new(keypair: Keypair) -> Self {
        Self {
            keypair,
            listen: Vec::new(),
            announce: Vec::new(),
            agent: concat!("p2pclient-rs/", env!("CARGO_PKG_VERSION")).to_owned(),
            security: vec![Security::Tls, Security::Noise],
            max_message: 4 << 20,
        }
    }
}

/// A protocol that secures connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Noise.
    Noise,
    /// TLS 1.3.
    Tls,
}
