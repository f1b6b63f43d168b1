//! PUBSUB: topics, their peers, publishing, and the messages of a subscription.

use super::family::{family, replies_done};
use super::message::{encode, ok, required};
use super::request::{Answered, Request};
use crate::pb::p2pd::{self, ps_request::Type, request};
use crate::{framing, Error, PeerId};
use bytes::Bytes;
use prost::Message as _;

family!(requests { GetTopics, ListTopicPeers, Publish, Subscribe } queries {});

/// A message published to a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PubsubMessage {
    /// The peer that published it, which may differ from the peer that relayed it.
    pub from: Option<PeerId>,
    /// The published data.
    pub data: Bytes,
    /// The publisher's sequence number; with `from` it identifies the message.
    pub seqno: Bytes,
    /// The topics to which it was published.
    pub topic_ids: Vec<String>,
    /// The publisher's signature, if messages are signed.
    pub signature: Bytes,
    /// The publisher's public key, if `from` does not contain it.
    pub key: Bytes,
}

/// Requests the topics to which the daemon is subscribed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GetTopics;

impl Request for GetTopics {
    type Reply = Vec<String>;
    const NAME: &'static str = "PUBSUB GET_TOPICS";
    const ANSWERED: Answered = Answered::AtOnce;

    fn encode(&self) -> Bytes {
        encode_pubsub(Type::GetTopics, |_| {})
    }

    fn encode_reply(reply: &Vec<String>) -> p2pd::Response {
        response(p2pd::PsResponse {
            topics: reply.clone(),
            ..Default::default()
        })
    }

    fn decode_reply(response: p2pd::Response) -> Result<Vec<String>, Error> {
        Ok(required(response.pubsub, "Response", "pubsub")?.topics)
    }
}

/// Requests the peers that are known to be subscribed to a topic: PUBSUB LIST_PEERS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListTopicPeers {
    /// The topic.
    pub topic: String,
}

impl Request for ListTopicPeers {
    type Reply = Vec<PeerId>;
    const NAME: &'static str = "PUBSUB LIST_PEERS";
    const ANSWERED: Answered = Answered::AtOnce;

    fn encode(&self) -> Bytes {
        encode_pubsub(Type::ListPeers, |request| {
            request.topic = Some(self.topic.clone());
        })
    }

    fn encode_reply(reply: &Vec<PeerId>) -> p2pd::Response {
        response(p2pd::PsResponse {
            peer_i_ds: reply.iter().map(PeerId::to_bytes).collect(),
            ..Default::default()
        })
    }

    fn decode_reply(response: p2pd::Response) -> Result<Vec<PeerId>, Error> {
        let peers = required(response.pubsub, "Response", "pubsub")?.peer_i_ds;
        Ok(peers.into_iter().map(PeerId::from_bytes).collect())
    }
}

/// Publishes data to a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// The topic.
    pub topic: String,
    /// The data.
    pub data: Bytes,
}

impl Request for Publish {
    replies_done!();
    const NAME: &'static str = "PUBSUB PUBLISH";

    fn encode(&self) -> Bytes {
        encode_pubsub(Type::Publish, |request| {
            request.topic = Some(self.topic.clone());
            request.data = Some(self.data.clone());
        })
    }
}

/// Subscribes to a topic. On success the connection carries [`PubsubMessage`]s until the client
/// closes it, which unsubscribes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// The topic.
    pub topic: String,
}

impl Request for Subscribe {
    replies_done!();
    const NAME: &'static str = "PUBSUB SUBSCRIBE";
    const ANSWERED: Answered = Answered::ByTakeover;

    fn encode(&self) -> Bytes {
        encode_pubsub(Type::Subscribe, |request| {
            request.topic = Some(self.topic.clone());
        })
    }
}

impl Command {
    pub(super) fn decode(
        r#type: request::Type,
        request: &mut p2pd::Request,
    ) -> Result<Option<Self>, Error> {
        if r#type != request::Type::Pubsub {
            return Ok(None);
        }
        const MESSAGE: &str = "PSRequest";
        let request = required(request.pubsub.take(), "Request", "pubsub")?;
        let number = required(request.r#type, MESSAGE, "type")?;
        let r#type = Type::try_from(number)
            .map_err(|_| Error::Unexpected(format!("a PSRequest of unknown type {number}")))?;
        let topic = || required(request.topic, MESSAGE, "topic");
        Ok(Some(match r#type {
            Type::GetTopics => Self::GetTopics(GetTopics),
            Type::ListPeers => Self::ListTopicPeers(ListTopicPeers { topic: topic()? }),
            Type::Publish => Self::Publish(Publish {
                topic: topic()?,
                data: request.data.unwrap_or_default(),
            }),
            Type::Subscribe => Self::Subscribe(Subscribe { topic: topic()? }),
        }))
    }
}

/// Encodes a message of a subscription, with its length prefix.
pub fn encode_message(message: &PubsubMessage) -> Bytes {
    let present = |bytes: &Bytes| (!bytes.is_empty()).then(|| bytes.clone());
    framing::encode_frame(&p2pd::PsMessage {
        from: message.from.as_ref().map(PeerId::to_bytes),
        data: Some(message.data.clone()),
        seqno: present(&message.seqno),
        topic_i_ds: message.topic_ids.clone(),
        signature: present(&message.signature),
        key: present(&message.key),
    })
}

/// Reads a message of a subscription, without its length prefix.
///
/// # Errors
/// It is not a PSMessage.
pub fn decode_message(frame: &[u8]) -> Result<PubsubMessage, Error> {
    let message = p2pd::PsMessage::decode(frame).map_err(|e| Error::malformed("PSMessage", &e))?;
    Ok(PubsubMessage {
        from: message.from.map(sender),
        data: message.data.unwrap_or_default(),
        seqno: message.seqno.unwrap_or_default(),
        topic_ids: message.topic_i_ds,
        signature: message.signature.unwrap_or_default(),
        key: message.key.unwrap_or_default(),
    })
}

/// Reads the publisher's peer id. The JavaScript daemon sends it as text instead of bytes.
fn sender(bytes: Bytes) -> PeerId {
    let text = std::str::from_utf8(&bytes).ok();
    text.filter(|text| text.starts_with("Qm") || text.starts_with('1'))
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| PeerId::from_bytes(bytes))
}

fn encode_pubsub(r#type: Type, fill: impl FnOnce(&mut p2pd::PsRequest)) -> Bytes {
    let mut message = p2pd::PsRequest {
        r#type: Some(r#type as i32),
        ..Default::default()
    };
    fill(&mut message);
    encode(request::Type::Pubsub, |request| {
        request.pubsub = Some(message);
    })
}

fn response(message: p2pd::PsResponse) -> p2pd::Response {
    p2pd::Response {
        pubsub: Some(message),
        ..ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_textual_sender_of_the_javascript_daemon() {
        for text in [
            "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",
            "12D3KooWPzHkwrq8suTFQL9KmawM8h6rgmov7h7riBoSi7abAKgb",
        ] {
            let author: PeerId = text.parse().unwrap();
            for from in [author.to_bytes(), Bytes::from(text)] {
                let message = p2pd::PsMessage {
                    from: Some(from),
                    ..Default::default()
                };
                let read = decode_message(&message.encode_to_vec()).unwrap();
                assert_eq!(read.from, Some(author.clone()));
            }
        }
        // In neither form, the bytes are kept unchanged.
        for bytes in [&b"Qm"[..], b"1", b"Qm0OIl", b"\x12\x20", b"other"] {
            let from = Bytes::copy_from_slice(bytes);
            assert_eq!(sender(from.clone()), PeerId::from_bytes(from));
        }
    }
}
