//! Opens streams to peers, lazily if the peer is known to support the protocol.

use super::identify::Identify;
use crate::error::NodeError;
use crate::swarm::{Connection, OpenError, Substream};
use std::sync::Arc;

/// Opens a stream with the first of the protocols that the peer supports, after the peer has been
/// identified. Returns at once if the peer is known to support one of them.
pub(crate) async fn open(
    identify: &Arc<Identify>,
    connection: &Connection,
    protocols: &[String],
) -> Result<(String, Substream), OpenError> {
    identify.wait(connection).await;
    let known = connection.peer_protocols();
    if let Some(protocol) = protocols.iter().find(|name| known.contains(name)) {
        let stream = connection.open_lazily(protocol).await?;
        return Ok((protocol.clone(), stream));
    }
    let (protocol, stream) = connection.open(protocols).await?;
    connection.remember_protocol(&protocol);
    Ok((protocol, stream))
}

impl From<OpenError> for NodeError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Unsupported(protocols) => Self::NotSupported(protocols),
            OpenError::Closed => Self::ConnectionFailed,
            OpenError::Io(error) => Self::OpenStream(error.to_string()),
        }
    }
}
