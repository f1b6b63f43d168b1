//! PEERSTORE: requests for what the JavaScript daemon knows about a peer. The Go daemons do not have
//! them. hivemind's fork uses their number for another request, which can make the daemon exit: see
//! [`Probe`].

use super::control::{decode_peer_info, encode_peer_info};
use super::family::{family, replies_done};
use super::message::{ok, required};
use super::request::Request;
use crate::fields::Fields;
use crate::pb::p2pd::{self, peerstore_request, request::Type};
use crate::{framing, Error, PeerId, PeerInfo};
use bytes::Bytes;
use prost::Message as _;

family!(requests { Probe, GetProtocols, GetPeerInfo } queries {});

/// Number of a request type that no daemon has.
const UNKNOWN: i32 = i32::MAX;

/// Probes for a peer store with a request of a type that no daemon has. Only the JavaScript daemon answers
/// with an error; the Go daemons close the connection.
///
/// Send it before any other request of this family. hivemind's fork takes the others for
/// PERSISTENT_CONN_UPGRADE, and exits when its last persistent connection closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe;

impl Request for Probe {
    replies_done!();
    const NAME: &'static str = "PEERSTORE";

    fn encode(&self) -> Bytes {
        framing::encode_frame(&p2pd::JsRequest {
            r#type: Some(UNKNOWN),
            peer_store: None,
        })
    }
}

/// Requests the protocols that a peer supports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetProtocols {
    /// The peer.
    pub peer: PeerId,
}

impl Request for GetProtocols {
    type Reply = Vec<String>;
    const NAME: &'static str = "PEERSTORE GET_PROTOCOLS";

    fn encode(&self) -> Bytes {
        encode_peerstore(&self.peer, peerstore_request::Type::GetProtocols)
    }

    fn encode_reply(reply: &Vec<String>) -> p2pd::Response {
        response(p2pd::PeerstoreResponse {
            protos: reply.clone(),
            ..Default::default()
        })
    }

    fn decode_reply(response: p2pd::Response) -> Result<Vec<String>, Error> {
        Ok(required(response.peer_store, "Response", "peerStore")?.protos)
    }
}

/// Requests a peer's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetPeerInfo {
    /// The peer.
    pub peer: PeerId,
}

impl Request for GetPeerInfo {
    type Reply = PeerInfo;
    const NAME: &'static str = "PEERSTORE GET_PEER_INFO";

    fn encode(&self) -> Bytes {
        encode_peerstore(&self.peer, peerstore_request::Type::GetPeerInfo)
    }

    fn encode_reply(reply: &PeerInfo) -> p2pd::Response {
        response(p2pd::PeerstoreResponse {
            peer: Some(encode_peer_info(reply)),
            ..Default::default()
        })
    }

    fn decode_reply(response: p2pd::Response) -> Result<PeerInfo, Error> {
        let response = required(response.peer_store, "Response", "peerStore")?;
        decode_peer_info(required(response.peer, "PeerstoreResponse", "peer")?)
    }
}

impl Command {
    /// Returns `None`: `decode_frame` reads the requests of this family.
    pub(super) fn decode(_: Type, _: &mut p2pd::Request) -> Result<Option<Self>, Error> {
        Ok(None)
    }

    /// Reads a request if it belongs to this family. Its message differs from that of all other
    /// families.
    pub(super) fn decode_frame(frame: &Bytes) -> Result<Option<Self>, Error> {
        // Looks only at the type and the first byte of field 9, since the message may belong to another
        // family.
        let mut fields = Fields::new(frame);
        let mut field_9 = None;
        while let Some((number, value)) = fields.next() {
            if number == 9 {
                field_9 = Some(value);
            }
        }
        // The first field of a PeerstoreRequest is the varint `type`.
        if field_9.and_then(<[u8]>::first) != Some(&0x08) {
            return Ok(None);
        }
        let Ok(request) = p2pd::JsRequest::decode(frame.clone()) else {
            return Ok(None);
        };
        if request.r#type != Some(Type::PersistentConnUpgrade as i32) {
            return Ok(None);
        }
        const MESSAGE: &str = "PeerstoreRequest";
        let request = required(request.peer_store, "Request", "peerStore")?;
        let peer = required(request.id, MESSAGE, "id").map(PeerId::from_bytes);
        let number = required(request.r#type, MESSAGE, "type")?;
        match peerstore_request::Type::try_from(number) {
            Ok(peerstore_request::Type::GetProtocols) => {
                Ok(Some(Self::GetProtocols(GetProtocols { peer: peer? })))
            }
            Ok(peerstore_request::Type::GetPeerInfo) => {
                Ok(Some(Self::GetPeerInfo(GetPeerInfo { peer: peer? })))
            }
            _ => Err(Error::Unexpected(format!("a {MESSAGE} of type {number}"))),
        }
    }
}

fn encode_peerstore(peer: &PeerId, r#type: peerstore_request::Type) -> Bytes {
    framing::encode_frame(&p2pd::JsRequest {
        // PEERSTORE has the number of the fork's PERSISTENT_CONN_UPGRADE.
        r#type: Some(Type::PersistentConnUpgrade as i32),
        peer_store: Some(p2pd::PeerstoreRequest {
            r#type: Some(r#type as i32),
            id: Some(peer.to_bytes()),
            protos: Vec::new(),
        }),
    })
}

fn response(message: p2pd::PeerstoreResponse) -> p2pd::Response {
    p2pd::Response {
        peer_store: Some(message),
        ..ok()
    }
}
