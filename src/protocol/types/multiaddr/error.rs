//! Errors of multiaddrs.

/// Why a text or some bytes are not a multiaddr, or cannot be taken apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MultiaddrError {
    /// Nothing at all.
    #[error("it is empty")]
    Empty,
    /// A text that does not begin as multiaddrs do.
    #[error("it does not begin with a slash")]
    NoLeadingSlash,
    /// A text with a name that is no protocol's.
    #[error("there is no protocol named {0:?}")]
    UnknownProtocol(String),
    /// A text that ends where a value should be.
    #[error("{0} has no value after it")]
    MissingValue(String),
    /// A value its protocol does not allow.
    #[error("{value:?} is no value for {protocol}: {reason}")]
    InvalidValue {
        /// The name of the protocol.
        protocol: String,
        /// The text of the value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Bytes of a protocol this version does not know.
    #[error("protocol {0} is not known to this version")]
    UnknownCode(u32),
    /// Bytes that cannot be a multiaddr.
    #[error("malformed at byte {offset}: {reason}")]
    Malformed {
        /// Where the component begins.
        offset: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A path with another protocol after it: its text would be a longer path.
    #[error("/unix is not its last protocol")]
    UnixNotLast,
}
