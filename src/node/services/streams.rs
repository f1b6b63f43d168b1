//! Stream handlers: local addresses to which inbound streams are passed.

use super::identify::Identify;
use super::registry::Registry;
use crate::convert::{multiaddr, peer_id};
use crate::error::NodeError;
use crate::server::pipe;
use crate::stream::PeerStream;
use crate::swarm::{Connection, Host, Service, Substream};
use futures::future::BoxFuture;
use p2pd_protocol::{Endpoint, Multiaddr, StreamInfo};
use std::sync::Arc;

/// The stream handlers of all clients. They outlive their clients, as with the Go daemons.
pub(crate) struct StreamHandlers {
    identify: Arc<Identify>,
    handlers: Registry<Handler>,
}

#[derive(Debug, Clone)]
struct Handler {
    addr: Multiaddr,
    endpoint: Endpoint,
}

impl StreamHandlers {
    pub(crate) fn new(host: Host, identify: Arc<Identify>) -> Arc<Self> {
        Arc::new(Self {
            identify,
            handlers: Registry::new(host),
        })
    }

    /// Adds a handler for a protocol. A second one must be balanced.
    pub(crate) fn add(
        self: &Arc<Self>,
        protocol: &str,
        addr: &Multiaddr,
        balanced: bool,
    ) -> Result<(), NodeError> {
        let invalid = |error| NodeError::InvalidAddress(format!("{addr}: {error}"));
        let endpoint = addr.endpoint().map_err(|error| invalid(error.reason))?;
        let addr = addr.clone();
        let handler = Handler { addr, endpoint };
        self.handlers.add(protocol, handler, balanced, self.clone())
    }

    /// Removes a handler. The last one withdraws the protocol.
    pub(crate) fn remove(&self, protocol: &str, addr: &Multiaddr) -> Result<(), NodeError> {
        match self
            .handlers
            .remove(protocol, |handler| handler.addr == *addr)?
        {
            true => Ok(()),
            false => Err(NodeError::NoHandlerAt {
                protocol: protocol.to_owned(),
                addr: addr.to_string(),
            }),
        }
    }
}

impl Service for StreamHandlers {
    /// Passes a stream to the handler whose turn it is. Tries the others if it does not accept the
    /// connection, and resets the stream if none does.
    fn inbound(
        &self,
        protocol: String,
        stream: Substream,
        from: Connection,
    ) -> BoxFuture<'static, ()> {
        let handlers = self.handlers.turn(&protocol);
        let mut stream = self.identify.peer_stream(protocol, stream, &from);
        Box::pin(async move {
            for handler in handlers {
                match pipe::deliver(stream, &handler.endpoint).await {
                    Ok(()) => return,
                    Err((refused, error)) => {
                        log::debug!("cannot connect to the handler at {}: {error}", handler.addr);
                        stream = refused;
                    }
                }
            }
        })
    }
}

impl Identify {
    /// Describes a stream for its local client.
    pub(crate) fn peer_stream(
        &self,
        protocol: String,
        stream: Substream,
        connection: &Connection,
    ) -> PeerStream {
        PeerStream {
            info: StreamInfo {
                peer_id: peer_id(&connection.peer()),
                addr: multiaddr(connection.remote_addr()),
                protocol,
            },
            half_close: self.keeps_reading(connection),
            stream,
        }
    }
}
