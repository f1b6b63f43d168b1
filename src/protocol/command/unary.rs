//! PERSISTENT_CONN_UPGRADE, which makes a control connection one for unary calls.

use super::family::{family, replies_done};
use super::message::encode;
use super::request::{Answered, Request};
use crate::pb::p2pd::{self, request::Type};
use crate::Error;
use bytes::Bytes;

family!(requests { Upgrade } queries {});

/// Upgrades a control connection to a persistent one. After the answer the connection takes no
/// more requests, but the messages of unary calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upgrade;

impl Request for Upgrade {
    replies_done!();
    const NAME: &'static str = "PERSISTENT_CONN_UPGRADE";
    const ANSWERED: Answered = Answered::ByTakeover;

    fn encode(&self) -> Bytes {
        encode(Type::PersistentConnUpgrade, |request| {
            // The JavaScript daemon takes it for a PEERSTORE request and crashes if field 9 is
            // empty. hivemind's fork ignores that field here. The JavaScript daemon reads numbers
            // wherever it expects them: it finds type 2, GET_PEER_INFO, in the field's length and an
            // unknown field in its content, and answers that it has not implemented that.
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
