//! Unary calls: requests to a peer's handlers, and handlers for the requests of peers.
//!
//! - `calls`: calls to peers, over the current session.
//! - `session`: opens the persistent connection and registers handlers on it.
//! - `connection`: one persistent connection; `reader` is the task that reads it.
//! - `handler`: the user's handlers and their replies.

pub(super) mod calls;
mod connection;
mod handler;
mod reader;
mod session;

pub use handler::UnaryCall;

use super::error::{Context, Error};
use super::Client;
use bytes::Bytes;
use calls::UnaryCalls;
use handler::Handler;
use p2pd_protocol::PeerId;
use std::fmt;
use std::future::Future;
use std::sync::Arc;

impl Client {
    /// Calls a peer's handler and returns its reply.
    ///
    /// The first call opens the persistent connection. When that is lost, all pending calls fail, and
    /// the next call opens a new one. Dropping the future, or a timeout, cancels the handler.
    /// hivemind's daemon exits when its last persistent connection is closed.
    ///
    /// # Errors
    /// [`Error::HandlerFailed`] if the handler failed, or the peer's client no longer has it;
    /// [`Error::Refused`] if the peer cannot be reached or has no handler of that name;
    /// [`Error::MessageTooLarge`] if the request exceeds
    /// [`UnaryLimits::max_message`](p2pd_protocol::UnaryLimits), or the reply exceeds
    /// [`UnaryLimits::max_incoming`](p2pd_protocol::UnaryLimits);
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn call_unary(
        &self,
        peer: &PeerId,
        protocol: &str,
        payload: impl Into<Bytes>,
    ) -> Result<Bytes, Error> {
        let payload = payload.into();
        let about = Context::new("CALL_UNARY").peer(peer).protocol(protocol);
        self.within(about, self.unary().call(peer, protocol, payload))
            .await
    }

    /// Registers a handler for incoming calls, until
    /// [`remove_unary_handler`](Self::remove_unary_handler) or [`close`](Self::close).
    ///
    /// Each call runs in its own task, which is dropped if the caller is gone. If the handler
    /// fails, the caller receives the error's text. With `balanced`, several clients may serve the
    /// name, and the daemon distributes calls in turn. When the connection is lost, the client
    /// reconnects with a backoff of up to 5 s, and registers the handlers again.
    ///
    /// Dropping the future undoes the registration. A handler that holds a clone of its own client
    /// keeps the client open until `close`.
    ///
    /// ```no_run
    /// use p2pd_client::UnaryCall;
    ///
    /// # async fn example(client: p2pd_client::Client) -> Result<(), p2pd_client::Error> {
    /// client
    ///     .add_unary_handler("double", false, |call: UnaryCall| async move {
    ///         let text = std::str::from_utf8(&call.payload).map_err(|e| e.to_string())?;
    ///         let number: u32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    ///         Ok::<_, String>((2 * number).to_string())
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if this client has a handler of that name, [`Error::Refused`] if
    /// another client has one, [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn add_unary_handler<H, F, R, E>(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
        handler: H,
    ) -> Result<(), Error>
    where
        H: Fn(UnaryCall) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, E>> + Send + 'static,
        R: Into<Bytes>,
        E: fmt::Display,
    {
        let protocol = protocol.into();
        let about = Context::new("ADD_UNARY_HANDLER").protocol(&protocol);
        let handler = Arc::new(Handler::new(balanced, handler));
        let session = self.unary().session();
        self.within(about, session.add(&protocol, handler)).await
    }

    /// Removes a handler. Calls that are running go on. Dropping the future does not stop the removal.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this client has no handler of that name.
    pub async fn remove_unary_handler(&self, protocol: &str) -> Result<(), Error> {
        let about = Context::new("REMOVE_UNARY_HANDLER").protocol(protocol);
        let session = self.unary().session();
        self.within(about, session.remove(protocol)).await
    }

    /// Opens the persistent connection now, unless it is open.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn open_unary(&self) -> Result<(), Error> {
        let about = Context::new("PERSISTENT_CONN_UPGRADE");
        let session = self.unary().session();
        self.within(about, session.connect()).await
    }

    /// Waits until the persistent connection is lost, and returns the reason. Returns `None` at once
    /// if it is not open. Peers cannot call the handlers until the client has reconnected.
    pub async fn unary_lost(&self) -> Option<Error> {
        let connection = self.unary().session().connection()?;
        Some(connection.lost().await)
    }

    /// Names of the unary handlers. A handler is dropped if another client has taken its name while
    /// the connection was lost.
    pub fn unary_handlers(&self) -> Vec<String> {
        self.unary().session().handlers()
    }

    /// Closes the idle connections and the persistent one. Calls in progress fail in both directions,
    /// and the unary handlers are dropped. Streams, subscriptions and [`IncomingStreams`] stay open. A
    /// later request opens connections again.
    ///
    /// [`IncomingStreams`]: super::IncomingStreams
    pub async fn close(&self) {
        self.pool().close_idle();
        self.unary().close().await;
    }

    fn unary(&self) -> &UnaryCalls {
        &self.shared.unary
    }
}
