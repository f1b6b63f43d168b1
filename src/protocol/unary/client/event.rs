//! Events of a persistent connection, as its client sees it.

use crate::unary::call_id::CallId;
use crate::Error;
use bytes::Bytes;
use std::borrow::Cow;

/// An event of a persistent connection, decoded from the bytes received. `T` is the driver's token of a
/// call, `P` a payload.
///
/// The enum is exhaustive on purpose: a driver that ignores a new event would leave a caller waiting.
#[derive(Debug, PartialEq, Eq)]
pub enum UnaryEvent<T, P> {
    /// A call was answered.
    Reply {
        /// The call.
        token: T,
        /// Result of the handler.
        payload: P,
    },
    /// A handler was added or removed.
    Acknowledged {
        /// The request to add or remove it.
        token: T,
    },
    /// The peer's handler failed.
    HandlerFailed {
        /// The call.
        token: T,
        /// The handler's error message.
        error: String,
    },
    /// The daemon refused a call, or to add or remove a handler.
    Refused {
        /// The call or request.
        token: T,
        /// The daemon's error message.
        error: String,
    },
    /// The peer's reply is invalid. Only this call fails; the connection stays usable.
    InvalidReply {
        /// The call.
        token: T,
        /// Error in the reply.
        error: Error,
    },
    /// A peer calls a handler of this client.
    Call {
        /// Id of the call, for the reply.
        id: CallId,
        /// The calling peer.
        peer: Bytes,
        /// Name of the handler.
        protocol: String,
        /// Argument of the call.
        payload: P,
    },
    /// The caller has cancelled its call. The driver must still reply. This sends nothing, but until
    /// then the call counts as unanswered.
    Cancelled {
        /// The call.
        id: CallId,
    },
    /// A peer's call that the driver must [refuse](super::PersistentClient::refuse).
    Rejected {
        /// The call.
        id: CallId,
        /// Reason to send to the peer.
        reason: Cow<'static, str>,
    },
    /// The reply was too large and was skipped. The connection stays usable.
    Oversized {
        /// The call.
        token: T,
        /// [`Error::ReplyTooLarge`] or [`Error::NoMemory`].
        error: Error,
    },
    /// A message was too large and was skipped, and it had no call id. The driver should log it.
    Skipped {
        /// As in [`UnaryEvent::Oversized`].
        error: Error,
    },
}
