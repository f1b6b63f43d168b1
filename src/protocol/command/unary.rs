//! PERSISTENT_CONN_UPGRADE, which turns a control connection into a persistent connection.

use super::family::{family, replies_done};
use super::message::encode;
use super::request::{Answered, Request};
use crate::pb::p2pd::{self, request::Type};
use crate::Error;
use bytes::Bytes;

family!(requests { Upgrade } queries {});

/// Upgrades a control connection to a persistent connection, which carries unary calls and no more requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upgrade;

impl Request for Upgrade {
    replies_done!();
    const NAME: &'static str = "PERSISTENT_CONN_UPGRADE";
    const ANSWERED: Answered = Answered::ByTakeover;

    fn encode(&self) -> Bytes {
        encode(Type::PersistentConnUpgrade, |request| {
            // The JavaScript daemon takes this for a PEERSTORE request, and would crash without field 9.
            // It reads the length of `addr` as type 2, GET_PEER_INFO, and the content of `addr` as an
            // unknown field. It then replies that the request is not implemented. hivemind's fork
            // ignores the field.
            request.remove_stream_handler = Some(p2pd::RemoveStreamHandlerRequest {
                addr: Some(Bytes::from_static(b"\x78\x00")),
                proto: Vec::new(),
            });
        })
    }
}

impl Command {
    pub(super) fn decode(r#type: Type, _: &mut p2pd::Request) -> Result<Option<Self>, Error> {
        Ok((r#type == Type::PersistentConnUpgrade).then_some(Self::Upgrade(Upgrade)))
    }
}
