//! CONNMANAGER: tags that decide which connections the daemon keeps. The JavaScript daemon does not have
//! these requests.

use super::family::{family, replies_done};
use super::message::{encode, peer_id, required};
use super::request::Request;
use crate::pb::p2pd::{self, conn_manager_request::Type, request};
use crate::{Error, PeerId};
use bytes::Bytes;

family!(requests { TagPeer, UntagPeer, Trim } queries {});

/// Tags a peer. Connections to peers of greater weight are kept longer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagPeer {
    /// The peer.
    pub peer: PeerId,
    /// The tag's name.
    pub tag: String,
    /// Its weight.
    pub weight: i64,
}

impl Request for TagPeer {
    replies_done!();
    const NAME: &'static str = "CONNMANAGER TAG_PEER";

    fn encode(&self) -> Bytes {
        encode_conn_manager(p2pd::ConnManagerRequest {
            r#type: Some(Type::TagPeer as i32),
            peer: Some(self.peer.to_bytes()),
            tag: Some(self.tag.clone()),
            weight: Some(self.weight),
        })
    }
}

/// Removes a tag from a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UntagPeer {
    /// The peer.
    pub peer: PeerId,
    /// The tag's name.
    pub tag: String,
}

impl Request for UntagPeer {
    replies_done!();
    const NAME: &'static str = "CONNMANAGER UNTAG_PEER";

    fn encode(&self) -> Bytes {
        encode_conn_manager(p2pd::ConnManagerRequest {
            r#type: Some(Type::UntagPeer as i32),
            peer: Some(self.peer.to_bytes()),
            tag: Some(self.tag.clone()),
            ..Default::default()
        })
    }
}

/// Closes connections down to the low-water mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trim;

impl Request for Trim {
    replies_done!();
    const NAME: &'static str = "CONNMANAGER TRIM";

    fn encode(&self) -> Bytes {
        encode_conn_manager(p2pd::ConnManagerRequest {
            r#type: Some(Type::Trim as i32),
            ..Default::default()
        })
    }
}

impl Command {
    pub(super) fn decode(
        r#type: request::Type,
        request: &mut p2pd::Request,
    ) -> Result<Option<Self>, Error> {
        if r#type != request::Type::Connmanager {
            return Ok(None);
        }
        const MESSAGE: &str = "ConnManagerRequest";
        let request = required(request.conn_manager.take(), "Request", "connManager")?;
        let number = required(request.r#type, MESSAGE, "type")?;
        let r#type = Type::try_from(number).map_err(|_| {
            Error::Unexpected(format!("a ConnManagerRequest of unknown type {number}"))
        })?;
        Ok(Some(match r#type {
            Type::TagPeer => Self::TagPeer(TagPeer {
                peer: peer_id(request.peer, MESSAGE)?,
                tag: required(request.tag, MESSAGE, "tag")?,
                weight: required(request.weight, MESSAGE, "weight")?,
            }),
            Type::UntagPeer => Self::UntagPeer(UntagPeer {
                peer: peer_id(request.peer, MESSAGE)?,
                tag: required(request.tag, MESSAGE, "tag")?,
            }),
            Type::Trim => Self::Trim(Trim),
        }))
    }
}

fn encode_conn_manager(message: p2pd::ConnManagerRequest) -> Bytes {
    encode(request::Type::Connmanager, |request| {
        request.conn_manager = Some(message);
    })
}
