//! Errors of a node, with the messages of the Go daemons.

use libp2p::{Multiaddr, PeerId};
use p2pd_protocol::peer_id::ParsePeerIdError;
use std::fmt;
use std::io;

/// Failure of a request. Its text is the one that the Go daemons send, since clients compare it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// The bytes of a request are not a peer id.
    #[error("{0}")]
    InvalidPeerId(String),
    /// The bytes of a request are not a multiaddr.
    #[error("failed to parse multiaddr {0}")]
    InvalidAddress(String),
    /// The peer is this node.
    #[error("failed to dial: dial to self attempted")]
    DialToSelf,
    /// No connection to the peer could be made.
    #[error("failed to dial: {0}")]
    Dial(DialFailure),
    /// The connection was closed before the stream was open.
    #[error("connection failed")]
    ConnectionFailed,
    /// The stream could not be opened.
    #[error("failed to open stream: {0}")]
    OpenStream(String),
    /// A stream was requested without a protocol.
    #[error("failed to negotiate protocol: no protocols specified")]
    NoProtocols,
    /// The peer supports none of these protocols.
    #[error("failed to negotiate protocol: protocols not supported: [{}]", .0.join(" "))]
    NotSupported(Vec<String>),
    /// The negotiation of the protocol failed.
    #[error("failed to negotiate protocol: {0}")]
    Negotiation(String),
    /// Another handler serves the protocol, and the new one is not balanced.
    #[error("handler for protocol {0} already set")]
    HandlerExists(String),
    /// The protocol has no handler.
    #[error("handler for protocol {0} does not exist")]
    NoHandler(String),
    /// The protocol has no handler with this address.
    #[error("handler for protocol {protocol} with maddr {addr} does not exist")]
    NoHandlerAt {
        /// The protocol.
        protocol: String,
        /// Address of the handler.
        addr: String,
    },
    /// Another client added the protocol's handler.
    #[error("handler for protocol {0} was not created in this persistent connection")]
    HandlerOfOther(String),
    /// The peer closed the stream of a call before its reply was complete.
    #[error("EOF")]
    Eof,
    /// The peer reset the stream of a call.
    #[error("stream reset")]
    Reset,
    /// The reply to a call exceeds the limit on messages.
    #[error("short buffer: {0}")]
    TooLarge(String),
    /// The stream of a call failed, or its reply is malformed.
    #[error("{0}")]
    Call(String),
    /// The node is shutting down.
    #[error("swarm closed")]
    ShutDown,
}

/// The message of an operating system's error, as Go writes it.
pub(crate) fn os_message(error: &io::Error) -> String {
    p2pd_sockets::message_of(error).to_lowercase()
}

impl From<&ParsePeerIdError> for NodeError {
    fn from(error: &ParsePeerIdError) -> Self {
        Self::InvalidPeerId(match error {
            ParsePeerIdError::DigestLength { declared, actual } if *declared > *actual as u64 => {
                "length greater than remaining number of bytes in buffer".to_owned()
            }
            ParsePeerIdError::NotAMultihash | ParsePeerIdError::Empty => {
                "multihash too short. must be >= 2 bytes".to_owned()
            }
            error => format!("failed to parse peer ID: {error}"),
        })
    }
}

/// Reason why a peer could not be dialed, with the cause for each address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DialFailure {
    /// The peer.
    pub peer: PeerId,
    /// The overall cause.
    pub cause: DialCause,
    /// The addresses and the cause for each.
    pub addrs: Vec<(Multiaddr, String)>,
}

/// Overall cause of a [`DialFailure`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DialCause {
    /// No address of the peer is known.
    #[error("no addresses")]
    NoAddresses,
    /// Addresses are known, but the node can dial none of them.
    #[error("no good addresses")]
    NoGoodAddresses,
    /// Each address failed.
    #[error("all dials failed")]
    AllDialsFailed,
}

/// Largest number of addresses that an error message lists.
const MAX_LISTED: usize = 16;

impl fmt::Display for DialFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed to dial {}: {}", self.peer, self.cause)?;
        for (addr, cause) in self.addrs.iter().take(MAX_LISTED) {
            write!(f, "\n  * [{addr}] {cause}")?;
        }
        match self.addrs.len().saturating_sub(MAX_LISTED) {
            0 => Ok(()),
            skipped => write!(f, "\n    ... skipping {skipped} errors ..."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dial_failure_lists_the_cause_for_each_address() {
        let peer: PeerId = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
            .parse()
            .unwrap();
        let addr = |port: u16| format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
        let mut failure = DialFailure {
            peer,
            cause: DialCause::AllDialsFailed,
            addrs: vec![(addr(1), "dial tcp4: refused".to_owned())],
        };
        assert_eq!(
            NodeError::Dial(failure.clone()).to_string(),
            format!("failed to dial: failed to dial {peer}: all dials failed\n  * [/ip4/127.0.0.1/tcp/1] dial tcp4: refused")
        );
        failure.addrs = (0..18).map(|port| (addr(port), String::new())).collect();
        assert!(failure
            .to_string()
            .ends_with("\n    ... skipping 2 errors ..."));
        failure.cause = DialCause::NoAddresses;
        failure.addrs.clear();
        assert!(failure.to_string().ends_with(": no addresses"));
    }

    #[test]
    fn invalid_peer_id_has_the_message_of_go() {
        let words = |bytes: &'static [u8]| {
            let error = p2pd_protocol::PeerId::from_bytes(bytes).validate();
            NodeError::from(&error.unwrap_err()).to_string()
        };
        assert_eq!(
            words(&[0x12, 32, 1]),
            "length greater than remaining number of bytes in buffer"
        );
        assert_eq!(words(&[]), "multihash too short. must be >= 2 bytes");
    }

    #[test]
    fn unsupported_protocols_are_listed_as_go_lists_them() {
        let error = NodeError::NotSupported(vec!["a".to_owned(), "/b".to_owned()]);
        assert_eq!(
            error.to_string(),
            "failed to negotiate protocol: protocols not supported: [a /b]"
        );
    }
}
