//! Errors of a connection between a client and a daemon, and whose fault each is.
//!
//! A refused request is not an error but an event: [`Event::Refused`](super::Event::Refused).

/// An error of a connection. The connection stays usable only after [`Error::NotReady`],
/// [`Error::RequestTooLarge`], [`Error::ReplyTooLarge`], [`Error::UnknownRequest`] and
/// [`Error::WrongReply`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A length prefix exceeds the limit. No memory was allocated for the message.
    #[error("the daemon announced a message of {declared} bytes; the limit is {limit}")]
    FrameTooLarge {
        /// The declared length, in bytes.
        declared: u64,
        /// [`Limits::max_frame`](super::Limits), in bytes.
        limit: usize,
    },
    /// A length prefix is not an unsigned varint of at most 64 bits.
    #[error("the daemon sent a malformed length prefix ({0})")]
    MalformedLength(&'static str),
    /// Bytes are not the expected protobuf message.
    #[error("the daemon sent a malformed {message}: {reason}")]
    Malformed {
        /// The expected message.
        message: &'static str,
        /// The decoder's error.
        reason: String,
    },
    /// A message lacks a required field.
    #[error("the daemon sent a {message} without `{field}`")]
    MissingField {
        /// The message.
        message: &'static str,
        /// The missing field.
        field: &'static str,
    },
    /// A well-formed message arrived where it was not expected.
    #[error("unexpected message from the daemon: {0}")]
    Unexpected(String),
    /// The results of a DHT query exceed the limit.
    #[error("the results of a DHT query exceed {limit} bytes")]
    AnswerTooLarge {
        /// [`Limits::max_answer`](super::Limits), in bytes.
        limit: usize,
    },
    /// There is not enough memory for a message within the limit.
    #[error("there is no memory for a message of {size} bytes")]
    NoMemory {
        /// The size of its payload, in bytes.
        size: usize,
    },
    /// The connection ended before the answer was complete.
    #[error("the daemon closed the connection {}", if *.mid_message { "in the middle of its answer" } else { "without answering" })]
    Closed {
        /// Whether part of the answer had arrived.
        mid_message: bool,
    },
    /// A request exceeds the limit; it was not sent.
    #[error("the request has {size} bytes; the limit is {limit}")]
    RequestTooLarge {
        /// The size of the encoded request, in bytes.
        size: usize,
        /// [`Limits::max_frame`](super::Limits), in bytes.
        limit: usize,
    },
    /// A received message exceeds the limit; it was skipped.
    #[error("the message received has {size} bytes; the limit is {limit}")]
    ReplyTooLarge {
        /// Its size, in bytes.
        size: usize,
        /// [`UnaryLimits::max_incoming`](super::UnaryLimits), in bytes.
        limit: usize,
    },
    /// The connection is busy, has become a stream, or has failed.
    #[error("this connection cannot take a request: it is {0:?}")]
    NotReady(super::State),
    /// No daemon supports requests of this type. The server can continue with the next request.
    #[error("a request of unknown type {0}")]
    UnknownRequest(i32),
    /// The reply does not belong to the request that is being served; it was not sent.
    #[error("{reply} does not answer {request}")]
    WrongReply {
        /// Name of the request to which the reply belongs.
        reply: &'static str,
        /// Name of the request that is being served.
        request: &'static str,
    },
}

/// Whose fault an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The caller made a request that cannot be sent or answered.
    Caller,
    /// The daemon violated the protocol.
    Daemon,
    /// The connection was lost.
    Connection,
}

impl Error {
    /// Returns whose fault the error is.
    pub fn fault(&self) -> Fault {
        match self {
            Error::RequestTooLarge { .. }
            | Error::ReplyTooLarge { .. }
            | Error::NotReady(_)
            | Error::WrongReply { .. } => Fault::Caller,
            Error::Closed { .. } | Error::NoMemory { .. } => Fault::Connection,
            _ => Fault::Daemon,
        }
    }

    pub(crate) fn malformed(message: &'static str, error: &prost::DecodeError) -> Self {
        Error::Malformed {
            message,
            reason: error.to_string(),
        }
    }
}
