//! The state that all connections of a server share.

use crate::handle::NodeHandle;
use std::fmt;
use tokio::sync::watch;

/// Settings of a server.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ServerConfig {
    /// Largest message of a client, in bytes. Default: 4 MiB.
    pub max_message: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
        }
    }
}

/// Number of persistent connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Persistent {
    /// Number of those that are open.
    pub open: usize,
    /// Number of all since the start.
    pub opened: usize,
}

/// State of a server, shared by its connections.
pub(crate) struct Shared {
    pub(super) node: NodeHandle,
    pub(super) config: ServerConfig,
    pub(super) persistent: watch::Sender<Persistent>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
