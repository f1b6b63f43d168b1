//! STREAM_OPEN, STREAM_HANDLER, REMOVE_STREAM_HANDLER, and the header of an inbound stream.

use super::family::{family, replies_done};
use super::message::{duration, encode, ok, peer_id, required, whole_seconds};
use super::request::{Answered, Request};
use crate::pb::p2pd::{self, request::Type};
use crate::{framing, Error, Multiaddr, PeerId};
use bytes::Bytes;
use prost::Message as _;
use std::time::Duration;

family!(requests { StreamOpen, StreamHandler, RemoveStreamHandler } queries {});

/// The header of a stream: the remote peer, and the negotiated protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamInfo {
    /// The remote peer.
    pub peer_id: PeerId,
    /// The remote peer's address.
    pub addr: Multiaddr,
    /// The protocol, one of those proposed.
    pub protocol: String,
}

/// Opens a stream to a peer, with the first of the protocols that the peer supports. On success the
/// connection becomes the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamOpen {
    /// The peer.
    pub peer: PeerId,
    /// Protocol ids, the preferred one first.
    pub protocols: Vec<String>,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

impl Request for StreamOpen {
    type Reply = StreamInfo;
    const NAME: &'static str = "STREAM_OPEN";
    const ANSWERED: Answered = Answered::ByTakeover;
    const WAITS_FOR_PEERS: bool = true;

    fn encode(&self) -> Bytes {
        encode(Type::StreamOpen, |request| {
            request.stream_open = Some(p2pd::StreamOpenRequest {
                peer: Some(self.peer.to_bytes()),
                proto: self.protocols.clone(),
                timeout: whole_seconds(self.timeout),
            });
        })
    }

    fn encode_reply(reply: &StreamInfo) -> p2pd::Response {
        p2pd::Response {
            stream_info: Some(message(reply)),
            ..ok()
        }
    }

    fn decode_reply(response: p2pd::Response) -> Result<StreamInfo, Error> {
        stream_info(required(response.stream_info, "Response", "streamInfo")?)
    }
}

/// Registers a handler: the daemon connects to an address for each inbound stream of the protocols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamHandler {
    /// Address at which the client listens.
    pub addr: Multiaddr,
    /// Protocol ids.
    pub protocols: Vec<String>,
    /// Whether several addresses may serve a protocol in turn. Only hivemind's fork reads it.
    pub balanced: bool,
}

impl Request for StreamHandler {
    replies_done!();
    const NAME: &'static str = "STREAM_HANDLER";

    fn encode(&self) -> Bytes {
        encode(Type::StreamHandler, |request| {
            request.stream_handler = Some(p2pd::StreamHandlerRequest {
                addr: Some(self.addr.to_bytes()),
                proto: self.protocols.clone(),
                balanced: Some(self.balanced),
            });
        })
    }
}

/// Removes a handler that [`StreamHandler`] registered. Only hivemind's fork supports it; the upstream daemon
/// closes the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoveStreamHandler {
    /// Address at which the client listens.
    pub addr: Multiaddr,
    /// Protocol ids.
    pub protocols: Vec<String>,
}

impl Request for RemoveStreamHandler {
    replies_done!();
    const NAME: &'static str = "REMOVE_STREAM_HANDLER";

    fn encode(&self) -> Bytes {
        encode(Type::RemoveStreamHandler, |request| {
            request.remove_stream_handler = Some(p2pd::RemoveStreamHandlerRequest {
                addr: Some(self.addr.to_bytes()),
                proto: self.protocols.clone(),
            });
        })
    }
}

impl Command {
    pub(super) fn decode(r#type: Type, request: &mut p2pd::Request) -> Result<Option<Self>, Error> {
        let addr = |value, message| required(value, message, "addr").map(Multiaddr::from_bytes);
        Ok(Some(match r#type {
            Type::StreamHandler => {
                let handler = required(request.stream_handler.take(), "Request", "streamHandler")?;
                Self::StreamHandler(StreamHandler {
                    addr: addr(handler.addr, "StreamHandlerRequest")?,
                    protocols: handler.proto,
                    // Clients of the upstream daemon omit it.
                    balanced: handler.balanced.unwrap_or(false),
                })
            }
            Type::RemoveStreamHandler => {
                let handler = request.remove_stream_handler.take();
                let handler = required(handler, "Request", "removeStreamHandler")?;
                Self::RemoveStreamHandler(RemoveStreamHandler {
                    addr: addr(handler.addr, "RemoveStreamHandlerRequest")?,
                    protocols: handler.proto,
                })
            }
            Type::StreamOpen => {
                let open = required(request.stream_open.take(), "Request", "streamOpen")?;
                Self::StreamOpen(StreamOpen {
                    peer: peer_id(open.peer, "StreamOpenRequest")?,
                    protocols: open.proto,
                    timeout: duration(open.timeout),
                })
            }
            _ => return Ok(None),
        }))
    }
}

/// Encodes the header of an inbound stream, with its length prefix.
pub fn encode_stream_info(info: &StreamInfo) -> Bytes {
    framing::encode_frame(&message(info))
}

/// Reads the header of an inbound stream, without its length prefix.
///
/// # Errors
/// It is not a StreamInfo, or a field is missing.
pub fn decode_stream_info(frame: &[u8]) -> Result<StreamInfo, Error> {
    let info = p2pd::StreamInfo::decode(frame).map_err(|e| Error::malformed("StreamInfo", &e))?;
    stream_info(info)
}

fn message(info: &StreamInfo) -> p2pd::StreamInfo {
    p2pd::StreamInfo {
        peer: Some(info.peer_id.to_bytes()),
        addr: Some(info.addr.to_bytes()),
        proto: Some(info.protocol.clone()),
    }
}

fn stream_info(info: p2pd::StreamInfo) -> Result<StreamInfo, Error> {
    let addr = required(info.addr, "StreamInfo", "addr")?;
    Ok(StreamInfo {
        peer_id: peer_id(info.peer, "StreamInfo")?,
        addr: Multiaddr::from_bytes(addr),
        protocol: required(info.proto, "StreamInfo", "proto")?,
    })
}
