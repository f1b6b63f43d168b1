//! Passes bytes between a peer's stream and a client's socket.

use crate::handle::PeerStream;
use p2pd_protocol::Endpoint;
use std::io;

/// Connects to a handler's address, sends the stream's header, and passes bytes both ways until both
/// directions have ended.
///
/// # Errors
/// Gives the stream back, untouched, if the handler does not accept a connection.
#[allow(dead_code)] // until services::streams uses it
pub async fn deliver(
    stream: PeerStream,
    handler: &Endpoint,
) -> Result<(), (PeerStream, io::Error)> {
    let _ = (stream, handler);
    todo!()
}
