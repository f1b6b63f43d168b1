//! Events of a persistent connection, as its client sees it.

use crate::unary::call_id::CallId;
use crate::Error;
use bytes::Bytes;
use std::borrow::Cow;

/// What the bytes received amount to. `T` is the driver's token of a call, `P` a payload.
///
/// The enum is exhaustive on purpose: a driver that ignores a new event would leave a caller waiting.
#[derive(Debug, PartialEq, Eq)]
pub enum UnaryEvent<T, P> {
    /// The reply to a call.
    Reply {
        /// The call.
        token: T,
        /// What the handler returned.
        payload: P,
    },
    /// A handler was added or removed.
    Acknowledged {
        /// The request to do so.
        token: T,
    },
    /// The peer's handler failed, in these words.
    HandlerFailed {
        /// The call.
        token: T,
        /// The words.
        error: String,
    },
    /// The daemon refused a call, or to add or remove a handler, in these words.
    Refused {
        /// The call.
        token: T,
        /// The words.
        error: String,
    },
    /// The answer is none. The connection is good still: it is the peer that sent it.
    InvalidReply {
        /// The call.
        token: T,
        /// What is wrong with it.
        error: Error,
    },
    /// A peer calls.
    Call {
        /// What the reply must carry.
        id: CallId,
        /// The caller.
        peer: Bytes,
        /// The handler.
        protocol: String,
        /// What it is called with.
        payload: P,
    },
    /// Whoever made the call with this id is gone: there is nobody to reply to. The call counts as
    /// at work until it is replied to all the same, which sends nothing.
    Cancelled {
        /// The call.
        id: CallId,
    },
    /// A peer calls, and is to be [refused](super::PersistentClient::refuse).
    Rejected {
        /// The call.
        id: CallId,
        /// Why.
        reason: Cow<'static, str>,
    },
    /// The answer was too large, and was skipped. The connection stays usable.
    Oversized {
        /// The call.
        token: T,
        /// [`Error::ReplyTooLarge`] or [`Error::NoMemory`].
        error: Error,
    },
    /// A message that was too large was skipped, and no call id was found in it. The driver logs it.
    Skipped {
        /// As in [`UnaryEvent::Oversized`].
        error: Error,
    },
}
