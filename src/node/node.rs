//! Starts a node, and drives its swarm.

use crate::handle::NodeHandle;
use libp2p::identity::Keypair;
use libp2p::Multiaddr;
use std::io;

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

/// A protocol that secures connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// Noise.
    Noise,
    /// TLS 1.3.
    Tls,
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

/// A libp2p node.
pub struct Node;

impl Node {
    /// Starts a node in the current tokio runtime, and waits until it listens.
    ///
    /// # Errors
    /// No listen address could be bound, or no security protocol is enabled.
    pub async fn start(config: Config) -> io::Result<NodeHandle> {
        let _ = config;
        todo!()
    }
}
