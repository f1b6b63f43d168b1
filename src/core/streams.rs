//! STREAM_OPEN, STREAM_HANDLER, REMOVE_STREAM_HANDLER, and the header of an inbound stream.

use super::control::message;
use super::pb::p2pd::{self, request::Type};
use super::request::{whole_seconds, Expect};
use super::{Answer, Error, Multiaddr, PeerId, Request};
use prost::Message as _;
use std::time::Duration;

/// What the daemon says of a stream: who is at the other end, and which protocol was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// The remote peer.
    pub peer_id: PeerId,
    /// The remote peer's address.
    pub addr: Multiaddr,
    /// The protocol, of those proposed.
    pub protocol: String,
}

/// Opens a stream to `peer` for the first of `protocols` that it speaks. The daemon gives up
/// after `timeout`, 60 s if none. On success the connection *is* the stream.
pub fn stream_open(peer: &PeerId, protocols: Vec<String>, timeout: Option<Duration>) -> Request {
    let message = p2pd::Request {
        stream_open: Some(p2pd::StreamOpenRequest {
            peer: Some(peer.to_bytes()),
            proto: protocols,
            timeout: whole_seconds(timeout),
        }),
        ..message(Type::StreamOpen)
    };
    Request::new(&message, Expect::Stream)
}

/// Has the daemon connect to `addr` for every inbound stream of `protocols`. With `balanced`
/// several addresses may serve a protocol, in turn (hivemind's fork; others ignore it).
pub fn stream_handler(addr: &Multiaddr, protocols: Vec<String>, balanced: bool) -> Request {
    let message = p2pd::Request {
        stream_handler: Some(p2pd::StreamHandlerRequest {
            addr: Some(addr.to_bytes()),
            proto: protocols,
            balanced: Some(balanced),
        }),
        ..message(Type::StreamHandler)
    };
    Request::new(&message, Expect::Done)
}

/// Undoes [`stream_handler`]. Only hivemind's fork knows this request; upstream's daemon closes
/// the connection.
pub fn remove_stream_handler(addr: &Multiaddr, protocols: Vec<String>) -> Request {
    let message = p2pd::Request {
        remove_stream_handler: Some(p2pd::RemoveStreamHandlerRequest {
            addr: Some(addr.to_bytes()),
            proto: protocols,
        }),
        ..message(Type::RemoveStreamHandler)
    };
    Request::new(&message, Expect::Done)
}

/// Reads the message with which the daemon begins an inbound stream.
pub fn decode_stream_info(frame: &[u8]) -> Result<StreamInfo, Error> {
    let info = p2pd::StreamInfo::decode(frame).map_err(|e| Error::malformed("StreamInfo", &e))?;
    stream_info(info)
}

pub(super) fn opened(response: p2pd::Response) -> Result<Answer, Error> {
    let info = response.stream_info.ok_or(Error::MissingField {
        message: "Response",
        field: "streamInfo",
    })?;
    Ok(Answer::StreamOpened(stream_info(info)?))
}

fn stream_info(info: p2pd::StreamInfo) -> Result<StreamInfo, Error> {
    let missing = |field| Error::MissingField {
        message: "StreamInfo",
        field,
    };
    Ok(StreamInfo {
        peer_id: PeerId::from_bytes(info.peer.ok_or(missing("peer"))?),
        addr: Multiaddr::from_bytes(info.addr.ok_or(missing("addr"))?),
        protocol: info.proto.ok_or(missing("proto"))?,
    })
}
