//! Stream handlers: local addresses to which inbound streams are passed.

use super::identify::Identify;
use super::round_robin::RoundRobin;
use crate::error::NodeError;
use crate::server::pipe;
use crate::stream::PeerStream;
use crate::swarm::{Connection, Host, Service, Substream};
use futures::future::BoxFuture;
use p2pd_protocol::{Endpoint, Multiaddr, PeerId, StreamInfo};
use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The stream handlers of all clients. They outlive their clients, as with the Go daemons.
pub(crate) struct StreamHandlers {
    host: Host,
    identify: Arc<Identify>,
    handlers: Mutex<HashMap<String, RoundRobin<Handler>>>,
}

#[derive(Debug, Clone)]
struct Handler {
    addr: Multiaddr,
    endpoint: Endpoint,
}

impl StreamHandlers {
    pub(crate) fn new(host: Host, identify: Arc<Identify>) -> Arc<Self> {
        Arc::new(Self {
            host,
            identify,
            handlers: Mutex::default(),
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
        match self.lock().entry(protocol.to_owned()) {
            Entry::Vacant(vacant) => {
                vacant.insert(RoundRobin::new(handler));
                self.host.serve(protocol, self.clone());
            }
            Entry::Occupied(mut handlers) if balanced => handlers.get_mut().push(handler),
            Entry::Occupied(_) => return Err(NodeError::HandlerExists(protocol.to_owned())),
        }
        Ok(())
    }

    /// Removes a handler. The last one withdraws the protocol.
    pub(crate) fn remove(&self, protocol: &str, addr: &Multiaddr) -> Result<(), NodeError> {
        let mut all = self.lock();
        let Some(handlers) = all.get_mut(protocol) else {
            return Err(NodeError::NoHandler(protocol.to_owned()));
        };
        if !handlers.remove(|handler| handler.addr == *addr) {
            return Err(NodeError::NoHandlerAt {
                protocol: protocol.to_owned(),
                addr: addr.to_string(),
            });
        }
        if handlers.is_empty() {
            all.remove(protocol);
            self.host.withdraw(protocol);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, RoundRobin<Handler>>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
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
        let handlers = self.lock().get_mut(&protocol).map(RoundRobin::turn);
        let mut stream = self.identify.peer_stream(protocol, stream, &from);
        Box::pin(async move {
            for handler in handlers.unwrap_or_default() {
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
                peer_id: PeerId::from_bytes(connection.peer().to_bytes()),
                addr: Multiaddr::from_bytes(connection.remote_addr().to_vec()),
                protocol,
            },
            half_close: self.keeps_reading(connection),
            stream,
        }
    }
}
