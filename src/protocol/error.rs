//! What can go wrong between a client and a daemon, and whose fault it is.
//!
//! A daemon that understood a request and said no is not an error here: that is
//! [`Event::Refused`](super::Event::Refused).

/// A failed exchange. After any of these but [`Error::NotReady`], [`Error::RequestTooLarge`] and
/// [`Error::ReplyTooLarge`] the connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A length prefix over the limit; nothing was allocated for it.
    #[error("the daemon announced a message of {declared} bytes; the limit is {limit}")]
    FrameTooLarge {
        /// The length it declared, in bytes.
        declared: u64,
        /// [`Limits::max_frame`](super::Limits), in bytes.
        limit: usize,
    },
    /// A length prefix that is no unsigned varint of 64 bits.
    #[error("the daemon sent a malformed length prefix ({0})")]
    MalformedLength(&'static str),
    /// Bytes that are not the protobuf message they should be.
    #[error("the daemon sent a malformed {message}: {reason}")]
    Malformed {
        /// The message expected.
        message: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A message without something that it must have.
    #[error("the daemon sent a {message} without `{field}`")]
    MissingField {
        /// The message.
        message: &'static str,
        /// What it lacks.
        field: &'static str,
    },
    /// A well-formed message that does not belong here.
    #[error("unexpected message from the daemon: {0}")]
    Unexpected(String),
    /// A DHT query with more results than are kept.
    #[error("the results of a DHT query exceed {limit} bytes")]
    AnswerTooLarge {
        /// [`Limits::max_answer`](super::Limits), in bytes.
        limit: usize,
    },
    /// A message that is not too large, but for what memory there is.
    #[error("there is no memory for a message of {size} bytes")]
    NoMemory {
        /// The size of its payload, in bytes.
        size: usize,
    },
    /// The connection ended before the answer did.
    #[error("the daemon closed the connection {}", if *.mid_message { "in the middle of its answer" } else { "without answering" })]
    Closed {
        /// Whether a part of the answer had arrived.
        mid_message: bool,
    },
    /// A request over the limit, not sent.
    #[error("the request has {size} bytes; the limit is {limit}")]
    RequestTooLarge {
        /// The size of the encoded request, in bytes.
        size: usize,
        /// [`Limits::max_frame`](super::Limits), in bytes.
        limit: usize,
    },
    /// A message from the daemon over the limit of this client. It was skipped.
    #[error("the message received has {size} bytes; the limit is {limit}")]
    ReplyTooLarge {
        /// Its size, in bytes.
        size: usize,
        /// [`UnaryLimits::max_incoming`](super::UnaryLimits), in bytes.
        limit: usize,
    },
    /// A request on a connection that is busy, has become a stream, or has failed.
    #[error("this connection cannot take a request: it is {0:?}")]
    NotReady(super::State),
    /// A request of a type that no daemon has. The server may go on with the next one.
    #[error("a request of unknown type {0}")]
    UnknownRequest(i32),
    /// A reply that does not fit the request being served; nothing was sent.
    #[error("{reply} does not answer {request}")]
    WrongReply {
        /// The reply that was given.
        reply: &'static str,
        /// The request being served.
        request: &'static str,
    },
}

/// Whose fault an [`Error`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The program asked for what cannot be done.
    Caller,
    /// The daemon broke the protocol.
    Daemon,
    /// The connection was lost.
    Connection,
}

impl Error {
    /// Whose fault it is.
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
