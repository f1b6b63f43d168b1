//! A stream between a peer and a local client.

use crate::swarm::Substream;
use p2pd_protocol::StreamInfo;

/// A stream between a peer and a local client.
pub struct PeerStream {
    /// The peer, its address and the protocol.
    pub info: StreamInfo,
    /// Whether the peer still reads after it has closed its own direction. A Go peer on yamux does not:
    /// data sent to it then stalls, so its end of file ends the whole stream.
    pub half_close: bool,
    /// The stream.
    pub stream: Substream,
}
