//! The user's handlers of unary calls, and the replies to their callers.

use super::connection::Connection;
use bytes::Bytes;
use p2pd_protocol::unary::CallId;
use p2pd_protocol::PeerId;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

type Outcome = Result<Bytes, String>;
type Work = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// A peer's call, passed to a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnaryCall {
    /// The caller.
    pub peer: PeerId,
    /// The request.
    pub payload: Bytes,
}

/// A handler of unary calls.
pub struct Handler {
    /// Whether several clients may serve its name.
    pub balanced: bool,
    handle: Box<dyn Fn(UnaryCall) -> Work + Send + Sync>,
}

impl Handler {
    pub fn new<H, F, R, E>(balanced: bool, handler: H) -> Self
    where
        H: Fn(UnaryCall) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, E>> + Send + 'static,
        R: Into<Bytes>,
        E: fmt::Display,
    {
        let handle = move |call| -> Work {
            let work = handler(call);
            Box::pin(async move {
                match work.await {
                    Ok(reply) => Ok(reply.into()),
                    Err(error) => Err(error.to_string()),
                }
            })
        };
        Self {
            balanced,
            handle: Box::new(handle),
        }
    }

    pub async fn handle(&self, call: UnaryCall) -> Outcome {
        (self.handle)(call).await
    }
}

/// Sends the reply to a peer's call. If this is dropped without a reply, it sends an error.
pub struct Reply {
    connection: Arc<Connection>,
    id: CallId,
    sent: bool,
}

impl Reply {
    pub fn new(connection: Arc<Connection>, id: CallId) -> Self {
        Self {
            connection,
            id,
            sent: false,
        }
    }

    pub fn send(mut self, outcome: Outcome) {
        self.sent = true;
        self.connection.reply(&self.id, outcome);
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.sent {
            let reason = if std::thread::panicking() {
                "the handler panicked"
            } else {
                "the handler was cancelled"
            };
            self.connection.reply(&self.id, Err(reason.to_owned()));
        }
    }
}
