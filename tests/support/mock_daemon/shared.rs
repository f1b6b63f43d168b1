//! State shared by all connections: the daemon's identity, and the registered handlers.

use super::load::Connection;
use bytes::Bytes;
use p2pd_protocol::command::{control, Request as _};
use p2pd_protocol::framing::encode_frame;
use p2pd_protocol::{Identity, Multiaddr, PeerId, PeerInfo};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex};

/// State shared by all connections.
pub(super) struct Shared {
    pub(super) identity: Identity,
    /// The reply to IDENTIFY, encoded once, so that benchmarks do not measure its encoding.
    pub(super) identify: Bytes,
    pub(super) peers: Vec<PeerInfo>,
    /// Number of threads, and of those that wait for a connection.
    pub(super) threads: AtomicUsize,
    pub(super) idle: AtomicUsize,
    /// Number of the next persistent connection.
    pub(super) next: AtomicU64,
    pub(super) stream_handlers: Mutex<HashMap<String, Multiaddr>>,
    pub(super) handlers: Mutex<HashMap<String, Handlers>>,
}

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        let peer_id = PeerId::from_bytes([&[0, 36, 8, 1, 18, 32][..], &[7; 32]].concat());
        let addr = "/ip4/127.0.0.1/tcp/4001".parse();
        let identity = Identity::new(peer_id, vec![addr.map_err(io::Error::other)?]);
        Ok(Self {
            peers: vec![PeerInfo {
                peer_id: identity.peer_id.clone(),
                addrs: identity.addrs.clone(),
            }],
            identify: encode_frame(&control::Identify::encode_reply(&identity)),
            identity,
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            stream_handlers: Mutex::default(),
            handlers: Mutex::default(),
        })
    }
}

/// Error that ended a connection.
pub(super) type Failure = Box<dyn std::error::Error>;

/// The connections that handle calls of one name.
#[derive(Default)]
pub(super) struct Handlers {
    /// At least one; several only if they are balanced.
    pub(super) connections: Vec<Arc<Connection>>,
    pub(super) balanced: bool,
    pub(super) turn: usize,
}
