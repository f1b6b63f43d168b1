//! Unary calls: the handlers of local clients, and calls to peers' handlers.

mod exchange;

use super::registry::Registry;
use crate::convert::peer_id;
use crate::error::NodeError;
use crate::swarm::{Connection, Host, Service, Substream};
use bytes::Bytes;
pub(crate) use exchange::call;
pub use exchange::HandlerError;
use exchange::{read_call, reply, until_cancelled};
use futures::future::BoxFuture;
use p2pd_protocol::PeerId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Largest number of calls that a client has not answered. More go to other clients, or are refused.
const MAX_CALLS: usize = 16 * 1024;
/// Largest total size of the payloads of those calls, in KiB.
const MAX_CALL_KIB: usize = 256 * 1024;

/// Event for a client that handles calls.
#[derive(Debug)]
pub enum UnaryEvent {
    /// A peer calls.
    Call(IncomingCall),
    /// The caller of a call with this number has gone. The client's handler should stop; its reply will
    /// not be sent. Sent only for calls that were not answered, and after the call.
    Cancelled(u64),
}

/// A peer's call.
#[derive(Debug)]
pub struct IncomingCall {
    /// Number of the call, unique within its client.
    pub number: u64,
    /// The caller.
    pub peer: PeerId,
    /// The handler's name.
    pub protocol: String,
    /// Argument of the call.
    pub payload: Bytes,
    /// Sends the reply. Dropping it resets the caller's stream.
    pub responder: Responder,
}

/// Sends the reply to an [`IncomingCall`]. Dropping it resets the caller's stream.
#[derive(Debug)]
pub struct Responder {
    reply: oneshot::Sender<Result<Bytes, HandlerError>>,
}

impl Responder {
    /// Sends a result. Does nothing if the caller has gone.
    pub fn reply(self, payload: Bytes) {
        let _ = self.reply.send(Ok(payload));
    }

    /// Sends the handler's error.
    pub fn fail(self, error: String) {
        let _ = self.reply.send(Err(HandlerError(error)));
    }
}

/// The unary handlers of all clients.
pub(crate) struct UnaryHandlers {
    max_message: usize,
    clients: AtomicU64,
    stopped: CancellationToken,
    handlers: Registry<Client>,
}

/// A registered client, and the room that is left in its queue.
#[derive(Debug, Clone)]
struct Client(Arc<ClientQueue>);

#[derive(Debug)]
struct ClientQueue {
    id: u64,
    numbers: AtomicU64,
    /// Bounded by the semaphores: each event holds a permit until the client takes it.
    events: mpsc::UnboundedSender<(UnaryEvent, Arc<Room>)>,
    calls: Arc<Semaphore>,
    call_kib: Arc<Semaphore>,
}

/// A call's share of its client's queue.
#[derive(Debug)]
struct Room {
    _call: OwnedSemaphorePermit,
    _kib: OwnedSemaphorePermit,
}

/// A client that handles calls. Dropping it removes its handlers, and resets the streams of the calls
/// that it has not answered.
pub struct UnaryClient {
    all: Arc<UnaryHandlers>,
    client: Client,
    events: mpsc::UnboundedReceiver<(UnaryEvent, Arc<Room>)>,
}

impl UnaryHandlers {
    pub(crate) fn new(host: Host, max_message: usize, stopped: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            max_message,
            stopped,
            clients: AtomicU64::new(0),
            handlers: Registry::new(host),
        })
    }

    /// Registers a client.
    pub(crate) fn register(self: &Arc<Self>) -> UnaryClient {
        let (sender, events) = mpsc::unbounded_channel();
        let queue = ClientQueue {
            id: self.clients.fetch_add(1, Ordering::Relaxed),
            numbers: AtomicU64::new(0),
            events: sender,
            calls: Arc::new(Semaphore::new(MAX_CALLS)),
            call_kib: Arc::new(Semaphore::new(MAX_CALL_KIB)),
        };
        UnaryClient {
            all: self.clone(),
            client: Client(Arc::new(queue)),
            events,
        }
    }
}

impl UnaryClient {
    /// Adds a handler. If there is one already, a `balanced` one shares the calls with it in turn.
    ///
    /// # Errors
    /// The protocol has a handler and this one is not balanced.
    pub fn add_handler(&self, protocol: &str, balanced: bool) -> Result<(), NodeError> {
        let service = self.all.clone();
        self.all
            .handlers
            .add(protocol, self.client.clone(), balanced, service)
    }

    /// Removes a handler of this client.
    ///
    /// # Errors
    /// The protocol has no handler, or not one of this client.
    pub fn remove_handler(&self, protocol: &str) -> Result<(), NodeError> {
        let is_own = |client: &Client| client.0.id == self.client.0.id;
        match self.all.handlers.remove(protocol, is_own)? {
            true => Ok(()),
            false => Err(NodeError::HandlerOfOther(protocol.to_owned())),
        }
    }

    /// Waits for the next event. `None` after the node has stopped. Can be dropped and called again
    /// without loss of events.
    pub async fn next_event(&mut self) -> Option<UnaryEvent> {
        tokio::select! {
            biased;
            event = self.events.recv() => event.map(|(event, _)| event),
            () = self.all.stopped.cancelled() => None,
        }
    }
}

impl Drop for UnaryClient {
    fn drop(&mut self) {
        let id = self.client.0.id;
        self.all.handlers.remove_all(|client| client.0.id == id);
    }
}

impl Client {
    /// Reserves room for a call in the client's queue, if there is enough.
    fn reserve(&self, payload: usize) -> Option<Arc<Room>> {
        if self.0.events.is_closed() {
            return None;
        }
        let kib = u32::try_from(payload.div_ceil(1024)).ok()?;
        let room = Room {
            _call: self.0.calls.clone().try_acquire_owned().ok()?,
            _kib: self.0.call_kib.clone().try_acquire_many_owned(kib).ok()?,
        };
        Some(Arc::new(room))
    }
}

impl Service for UnaryHandlers {
    /// Passes a peer's call to the client whose turn it is, and sends the reply.
    fn inbound(
        &self,
        protocol: String,
        mut stream: Substream,
        from: Connection,
    ) -> BoxFuture<'static, ()> {
        let clients = self.handlers.turn(&protocol);
        let max_message = self.max_message;
        Box::pin(async move {
            let (id, payload) = match read_call(&mut stream, max_message).await {
                Ok(call) => call,
                Err(error) => return log::debug!("cannot read a call of {protocol}: {error}"),
            };
            let reserved = clients
                .iter()
                .find_map(|client| Some((client, client.reserve(payload.len())?)));
            let Some((client, room)) = reserved else {
                return log::debug!("no client accepts the call of {protocol}");
            };
            let (sender, mut result) = oneshot::channel();
            let number = client.0.numbers.fetch_add(1, Ordering::Relaxed);
            let call = IncomingCall {
                number,
                peer: peer_id(&from.peer()),
                protocol,
                payload,
                responder: Responder { reply: sender },
            };
            let _ = client.0.events.send((UnaryEvent::Call(call), room.clone()));
            let result = tokio::select! {
                biased;
                result = &mut result => result,
                () = until_cancelled(&mut stream) => {
                    drop(result);
                    let _ = client.0.events.send((UnaryEvent::Cancelled(number), room));
                    return;
                }
            };
            // Without a result, the client has gone: the stream is reset.
            if let Ok(result) = result {
                if let Err(error) = reply(&mut stream, &id, result, max_message).await {
                    log::debug!("cannot send a reply: {error}");
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn calls_that_wait_for_a_client_are_bounded() {
        let host = Host::new(libp2p::PeerId::random());
        let handlers = UnaryHandlers::new(host, 4 << 20, CancellationToken::new());
        let client = handlers.register();
        let calls: Vec<_> = std::iter::from_fn(|| client.client.reserve(4 << 20)).collect();
        assert_eq!(calls.len(), MAX_CALL_KIB / 4096);
        drop(calls);
        let calls: Vec<_> = std::iter::from_fn(|| client.client.reserve(1)).collect();
        assert_eq!(calls.len(), MAX_CALLS);
        drop(calls);
        let queue = client.client.clone();
        assert!(queue.reserve(1).is_some());
        drop(client);
        assert!(queue.reserve(1).is_none(), "nobody reads the queue");
    }
}
