//! Unary calls: requests to a peer's handlers, and handlers for the requests of peers.
//!
//! - `calls`: calls to peers, over the present session.
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
    /// The first call opens the persistent connection; when that is lost, all that waits for it fails
    /// at once, and the next call opens another one. Dropping the future, or running out of time,
    /// cancels the handler. hivemind's daemon ends when its last persistent connection is closed.
    ///
    /// # Errors
    /// [`Error::HandlerFailed`] if the handler failed, or the peer's client has none of that name;
    /// [`Error::Refused`] if the peer cannot be reached or serves no calls of that name;
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

    /// Serves the peers' calls of a name, until [`remove_unary_handler`](Self::remove_unary_handler)
    /// or [`close`](Self::close).
    ///
    /// Each call runs in a task of its own, which is dropped if the caller is gone. An error reaches
    /// the caller as its text. With `balanced`, several clients may serve the name in turn. When the
    /// connection is lost, another one is opened as soon as the daemon is there again, which is looked
    /// for every 5 s at the least, and the handlers are registered there.
    ///
    /// A handler that holds a clone of its own client keeps it open until `close`.
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
    /// [`Error::AlreadyRegistered`] if this client serves the name, [`Error::Refused`] if another one
    /// does, [`Error::NotSupported`] if the daemon is not hivemind's.
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

    /// Takes back [`add_unary_handler`](Self::add_unary_handler). Calls at work are finished.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this client does not serve the name.
    pub async fn remove_unary_handler(&self, protocol: &str) -> Result<(), Error> {
        let about = Context::new("REMOVE_UNARY_HANDLER").protocol(protocol);
        let session = self.unary().session();
        self.within(about, session.remove(protocol)).await
    }

    /// Opens the persistent connection now, if it is not open.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn open_unary(&self) -> Result<(), Error> {
        let about = Context::new("PERSISTENT_CONN_UPGRADE");
        let session = self.unary().session();
        self.within(about, session.connect()).await
    }

    /// Waits until the persistent connection is lost, and says why; `None`, at once, if it is not
    /// open. A client that only serves handlers learns from this that nobody can call it, until the
    /// daemon is there again.
    pub async fn unary_lost(&self) -> Option<Error> {
        let connection = self.unary().session().connection()?;
        Some(connection.lost().await)
    }

    /// The names of the unary handlers that this client serves. One that the daemon would not take
    /// again, when the connection was lost, is no longer among them.
    pub fn unary_handlers(&self) -> Vec<String> {
        self.unary().session().handlers()
    }

    /// Closes the idle connections and the persistent one: calls at work, of either side, fail, and
    /// the unary handlers are forgotten. Streams, subscriptions and [`IncomingStreams`] live on, and
    /// a later call opens connections again.
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
