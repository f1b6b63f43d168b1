//! Errors of multiaddrs.

/// Reason why text or bytes are not a multiaddr, or cannot be split into components.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MultiaddrError {
    /// The text or the bytes are empty.
    #[error("it is empty")]
    Empty,
    /// The text does not begin with a slash.
    #[error("it does not begin with a slash")]
    NoLeadingSlash,
    /// The text names an unknown protocol.
    #[error("there is no protocol named {0:?}")]
    UnknownProtocol(String),
    /// The text ends where a value is expected.
    #[error("{0} has no value after it")]
    MissingValue(String),
    /// A value is invalid for its protocol.
    #[error("{value:?} is no value for {protocol}: {reason}")]
    InvalidValue {
        /// The name of the protocol.
        protocol: String,
        /// The text of the value.
        value: String,
        /// The reason.
        reason: String,
    },
    /// The bytes contain the number of an unknown protocol.
    #[error("protocol {0} is not known to this version")]
    UnknownCode(u32),
    /// The bytes are malformed.
    #[error("malformed at byte {offset}: {reason}")]
    Malformed {
        /// Offset of the component, in bytes.
        offset: usize,
        /// The reason.
        reason: String,
    },
    /// Another protocol follows the path of `/unix`. In text form it would become part of the path.
    #[error("/unix is not its last protocol")]
    UnixNotLast,
}
