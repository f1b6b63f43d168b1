//! Unary calls: the handlers of local clients, and calls to peers' handlers.

use crate::error::NodeError;
use bytes::Bytes;
use p2pd_protocol::PeerId;
use tokio::sync::{mpsc, oneshot};

/// A handler's error message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HandlerError(pub String);

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

/// A client that handles calls. Dropping it removes its handlers, and resets the streams of the calls
/// that it has not answered.
pub struct UnaryClient {
    events: mpsc::UnboundedReceiver<UnaryEvent>,
}

impl UnaryClient {
    /// Adds a handler. If there is one already, a `balanced` one shares the calls with it in turn.
    ///
    /// # Errors
    /// The protocol has a handler and this one is not balanced.
    pub fn add_handler(&self, protocol: &str, balanced: bool) -> Result<(), NodeError> {
        let _ = (protocol, balanced);
        todo!()
    }

    /// Removes a handler of this client.
    ///
    /// # Errors
    /// The protocol has no handler, or not one of this client.
    pub fn remove_handler(&self, protocol: &str) -> Result<(), NodeError> {
        let _ = protocol;
        todo!()
    }

    /// Waits for the next event. `None` after the node has stopped. Can be dropped and called again
    /// without loss of events.
    pub async fn next_event(&mut self) -> Option<UnaryEvent> {
        self.events.recv().await
    }
}
