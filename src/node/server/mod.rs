//! The control protocol: requests of local clients, carried out by a node.

mod listener;
mod persistent;
pub(crate) mod pipe;
mod session;
mod shared;
pub(crate) mod socket;

use crate::handle::NodeHandle;
use listener::Listener;
use p2pd_protocol::Multiaddr;
use shared::Shared;
pub use shared::{Persistent, ServerConfig};
use std::io;
use std::sync::Arc;
use tokio::sync::watch;

/// A listening server of the control protocol.
#[derive(Debug)]
pub struct Server {
    listener: Listener,
    shared: Arc<Shared>,
}

impl Server {
    /// Listens at a unix or TCP address; with port 0, at a free port.
    ///
    /// # Errors
    /// The daemon cannot listen at the address. The message is that of the Go daemons.
    pub async fn bind(
        addr: &Multiaddr,
        node: NodeHandle,
        config: ServerConfig,
    ) -> io::Result<Self> {
        Ok(Self {
            listener: Listener::bind(addr).await?,
            shared: Arc::new(Shared {
                node,
                config,
                persistent: watch::Sender::new(Persistent::default()),
            }),
        })
    }

    /// Address at which clients connect, with the assigned port.
    pub fn addr(&self) -> &Multiaddr {
        self.listener.addr()
    }

    /// Number of persistent connections, and its changes.
    pub fn persistent(&self) -> watch::Receiver<Persistent> {
        self.shared.persistent.subscribe()
    }

    /// Serves clients until the future is dropped. Connections that were accepted go on until the
    /// runtime ends.
    pub async fn serve(&self) {
        self.listener.serve(self.shared.clone()).await;
    }
}
