//! The messages of a persistent connection, for both ends.
//!
//! A call and its reply have the same content in both directions; only the number of the field that
//! holds the reply differs.

use super::call_id::CallId;
use crate::Error;
use bytes::Bytes;

/// The field that holds a call, in both directions.
pub(super) const CALL: u32 = 3;
/// The fields of a client's requests, which have no payload.
pub(super) const ADD_HANDLER: u32 = 2;
pub(super) const REMOVE_HANDLER: u32 = 6;
/// The field of a cancel, in both directions.
pub(super) const CANCEL: u32 = 5;

/// Reason for refusing a [`Message::InvalidCall`].
pub(super) const INVALID_CALL: &str = "the call has no peer, protocol or data";

/// The error of a [`Message::EmptyReply`].
pub(super) fn empty_reply() -> Error {
    Error::MissingField {
        message: "CallUnaryResponse",
        field: "response",
    }
}

/// Reason for refusing a call that was skipped.
pub(super) fn skip_reason(error: &Error) -> String {
    match error {
        Error::ReplyTooLarge { size, limit } => {
            format!("the call of {size} bytes exceeds the message size limit of {limit} bytes")
        }
        error => error.to_string(),
    }
}

/// Error sent in place of a reply of `len` bytes, which exceeds the limit.
pub(super) fn reply_too_large(len: usize, limit: usize) -> String {
    format!("the reply of {len} bytes exceeds the message size limit of {limit} bytes")
}

/// Direction of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// `PersistentConnectionRequest`: from the client to the daemon.
    ToDaemon,
    /// `PersistentConnectionResponse`: from the daemon to the client.
    ToClient,
}

impl Direction {
    /// Number of the field that holds the reply to a call.
    pub(super) fn reply(self) -> u32 {
        match self {
            Self::ToDaemon => 4,
            Self::ToClient => 2,
        }
    }

    /// Whether a field is one of those that determine the kind of message.
    pub(super) fn is_content(self, field: u64) -> bool {
        match self {
            Self::ToDaemon => (2..=6).contains(&field),
            Self::ToClient => (2..=5).contains(&field),
        }
    }

    /// Name of the message.
    pub(super) fn message(self) -> &'static str {
        match self {
            Self::ToDaemon => "PersistentConnectionRequest",
            Self::ToClient => "PersistentConnectionResponse",
        }
    }
}

/// A message that has arrived. `P` is a payload.
#[derive(Debug)]
pub(super) enum Message<P> {
    /// A call.
    Call {
        id: CallId,
        peer: Bytes,
        protocol: String,
        payload: P,
        /// Size of the payload, in bytes.
        size: usize,
    },
    /// A call without peer, protocol or data. It comes from a peer, so only that call fails.
    InvalidCall { id: CallId },
    /// A handler's result.
    Reply { id: CallId, payload: P },
    /// A handler's error.
    HandlerError { id: CallId, error: String },
    /// A reply with neither a payload nor an error.
    EmptyReply { id: CallId },
    /// A reply that belongs to no pending call; it was not copied.
    UnwantedReply { id: CallId },
    /// Any other message: the field that determines its kind, if any, and its content.
    Other {
        id: CallId,
        field: Option<u64>,
        content: Bytes,
    },
    /// A message that was too large and was skipped.
    Skipped {
        id: Option<CallId>,
        field: Option<u64>,
        /// Whether all of its fields were well-formed.
        is_sound: bool,
        error: Error,
    },
}

/// The part of a frame before its payload. `B` (bytes) and `S` (a string) may borrow from the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head<B, S> {
    Reply { id: CallId },
    Call { id: CallId, peer: B, protocol: S },
}

/// A head that borrows from its frame.
pub(super) type HeadRef<'a> = Head<&'a [u8], &'a str>;

impl HeadRef<'_> {
    #[inline]
    pub(super) fn to_owned(self) -> Head<Bytes, String> {
        match self {
            Self::Reply { id } => Head::Reply { id },
            Self::Call { id, peer, protocol } => Head::Call {
                id,
                peer: Bytes::copy_from_slice(peer),
                protocol: protocol.to_owned(),
            },
        }
    }
}

impl Head<Bytes, String> {
    /// Combines a head and its payload into a message.
    #[inline]
    pub(super) fn with<P>(self, payload: P, size: usize) -> Message<P> {
        match self {
            Self::Reply { id } => Message::Reply { id, payload },
            Self::Call { id, peer, protocol } => Message::Call {
                id,
                peer,
                protocol,
                payload,
                size,
            },
        }
    }
}
