//! One call on its stream: the messages between this node and another daemon.

use crate::error::NodeError;
use crate::services::identify::Identify;
use crate::services::open::open;
use crate::swarm::{Connection, OpenError, Substream};
use bytes::{Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use p2pd_protocol::unary::peer::{
    encode_call, encode_handler_error, encode_reply, reply_size, PeerMessage, PeerReader,
};
use p2pd_protocol::unary::CallId;
use p2pd_protocol::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// A handler's error message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HandlerError(pub String);

/// Time within which a peer's call must arrive.
const ARRIVAL: Duration = Duration::from_secs(60);
/// Payloads up to this size are sent together with their heads, in bytes.
const COPIED: usize = 16 * 1024;
/// Size of the reads of a stream, in bytes.
const READ_SIZE: usize = 8 * 1024;

/// Calls a handler of a connected peer. Dropping the future resets the stream, which cancels the call.
pub(crate) async fn call(
    identify: &Arc<Identify>,
    connection: &Connection,
    protocol: &str,
    payload: Bytes,
    max_message: usize,
) -> Result<Result<Bytes, HandlerError>, NodeError> {
    let (_, mut stream) = open(identify, connection, &[protocol.to_owned()]).await?;
    let mut id = CallId::default();
    getrandom::fill(&mut id).map_err(|error| NodeError::Call(error.to_string()))?;
    let mut head = BytesMut::with_capacity(128 + protocol.len() + payload.len().min(COPIED));
    let peer = connection.peer().to_bytes();
    encode_call(&id, &peer, protocol, payload.len(), &mut head);
    send(&mut stream, head, &payload).await.map_err(failure)?;
    let result = match read(&mut stream, max_message).await {
        Ok(PeerMessage::Reply(payload)) => Ok(payload.into()),
        Ok(PeerMessage::HandlerFailed(error)) => Err(HandlerError(error)),
        Ok(PeerMessage::Call { .. }) => {
            return Err(NodeError::Call("the peer replied with a call".to_owned()))
        }
        Err(error) => return Err(failure(error)),
    };
    // The result does not depend on it.
    let _ = stream.close().await;
    Ok(result)
}

/// Reads a peer's call.
pub(super) async fn read_call(
    stream: &mut Substream,
    max_message: usize,
) -> io::Result<(CallId, Bytes)> {
    match timeout(ARRIVAL, read(stream, max_message)).await?? {
        PeerMessage::Call { id, payload } => Ok((id, payload.into())),
        _ => Err(io::Error::other("it is a reply")),
    }
}

/// Returns when the caller cancels its call: by any byte, the end of its stream, or a reset.
pub(super) async fn until_cancelled(stream: &mut (impl AsyncRead + Unpin)) {
    let _ = stream.read(&mut [0]).await;
}

/// Sends the reply to a peer's call.
pub(super) async fn reply(
    stream: &mut Substream,
    id: &CallId,
    result: Result<Bytes, HandlerError>,
    max_message: usize,
) -> io::Result<()> {
    let mut head = BytesMut::with_capacity(128);
    let result = result.and_then(|payload| {
        if reply_size(payload.len()) > max_message {
            let size = payload.len();
            let error = format!(
                "the reply of {size} bytes exceeds the message size limit of {max_message} bytes"
            );
            return Err(HandlerError(error));
        }
        Ok(payload)
    });
    match result {
        Ok(payload) => {
            encode_reply(id, payload.len(), &mut head);
            send(stream, head, &payload).await?;
        }
        Err(HandlerError(error)) => {
            encode_handler_error(id, &error, max_message, &mut head);
            send(stream, head, &[]).await?;
        }
    }
    stream.close().await
}

/// Sends the head of a message and its payload.
async fn send(stream: &mut Substream, mut head: BytesMut, payload: &[u8]) -> io::Result<()> {
    if payload.len() <= COPIED {
        head.extend_from_slice(payload);
        stream.write_all(&head).await?;
    } else {
        stream.write_all(&head).await?;
        stream.write_all(payload).await?;
    }
    stream.flush().await
}

/// Reads one message.
async fn read(stream: &mut Substream, max_message: usize) -> io::Result<PeerMessage<Vec<u8>>> {
    let mut reader = PeerReader::new(max_message);
    let mut buffer = [0; READ_SIZE];
    loop {
        if let Some(unfilled) = reader.payload_buffer() {
            let count = some(stream.read(unfilled).await?)?;
            reader.payload_filled(count);
            if let Some(message) = reader.poll(&mut &[][..]).map_err(io::Error::other)? {
                return Ok(message);
            }
            continue;
        }
        let count = some(stream.read(&mut buffer).await?)?;
        let mut input = &buffer[..count];
        if let Some(message) = reader.poll(&mut input).map_err(io::Error::other)? {
            // A caller that sends more cancels its call.
            if !input.is_empty() && matches!(message, PeerMessage::Call { .. }) {
                return Err(io::Error::other("the caller has cancelled it"));
            }
            return Ok(message);
        }
    }
}

/// Fails at the end of the stream.
fn some(count: usize) -> io::Result<usize> {
    match count {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => Ok(count),
    }
}

/// Returns the reason for which a call failed.
fn failure(error: io::Error) -> NodeError {
    let inner = error.get_ref();
    if let Some(refused) = inner.and_then(|inner| inner.downcast_ref::<OpenError>()) {
        return NodeError::Call(refused.to_string());
    }
    if let Some(invalid) = inner.and_then(|inner| inner.downcast_ref::<Error>()) {
        return match invalid {
            Error::FrameTooLarge { .. } => NodeError::TooLarge(invalid.to_string()),
            invalid => NodeError::Call(invalid.to_string()),
        };
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::WriteZero => NodeError::Eof,
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionAborted => NodeError::Reset,
        _ => NodeError::Call(error.to_string()),
    }
}
