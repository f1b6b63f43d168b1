//! PUBSUB: topics, their peers, publishing, and the messages of a subscription.

use super::control::message;
use super::pb::p2pd::{self, ps_request, request::Type};
use super::request::Expect;
use super::{Answer, Error, PeerId, Request};
use bytes::Bytes;
use prost::Message as _;

/// A message published to a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PubsubMessage {
    /// The peer that published it, which need not be the one that passed it on.
    pub from: Option<PeerId>,
    /// What was published.
    pub data: Bytes,
    /// The author's sequence number; with `from` it names the message.
    pub seqno: Bytes,
    /// The topics it was published to.
    pub topic_ids: Vec<String>,
    /// The author's signature, if messages are signed.
    pub signature: Bytes,
    /// The author's public key, where `from` does not contain it.
    pub key: Bytes,
}

/// Asks for the topics the daemon is subscribed to.
pub fn get_topics() -> Request {
    wrap(of_type(ps_request::Type::GetTopics), Expect::Topics)
}

/// Asks for the peers known to be subscribed to `topic`.
pub fn list_peers(topic: String) -> Request {
    let request = p2pd::PsRequest {
        topic: Some(topic),
        ..of_type(ps_request::Type::ListPeers)
    };
    wrap(request, Expect::TopicPeers)
}

/// Publishes `data` to `topic`.
pub fn publish(topic: String, data: Bytes) -> Request {
    let request = p2pd::PsRequest {
        topic: Some(topic),
        data: Some(data),
        ..of_type(ps_request::Type::Publish)
    };
    wrap(request, Expect::Done)
}

/// Subscribes to `topic`: on success the connection carries [`PubsubMessage`]s until it is
/// closed, which unsubscribes.
pub fn subscribe(topic: String) -> Request {
    let request = p2pd::PsRequest {
        topic: Some(topic),
        ..of_type(ps_request::Type::Subscribe)
    };
    wrap(request, Expect::Subscription)
}

/// Reads one message of a subscription.
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

/// The peer id; the JS daemon sends its text.
fn sender(bytes: Bytes) -> PeerId {
    let text = std::str::from_utf8(&bytes).ok();
    text.filter(|text| text.starts_with("Qm") || text.starts_with('1'))
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(|| PeerId::from_bytes(bytes))
}

fn of_type(r#type: ps_request::Type) -> p2pd::PsRequest {
    p2pd::PsRequest {
        r#type: Some(r#type as i32),
        ..Default::default()
    }
}

fn wrap(request: p2pd::PsRequest, expect: Expect) -> Request {
    let message = p2pd::Request {
        pubsub: Some(request),
        ..message(Type::Pubsub)
    };
    Request::new(&message, expect)
}

pub(super) fn topics(response: p2pd::Response) -> Result<Answer, Error> {
    Ok(Answer::Topics(body(response)?.topics))
}

pub(super) fn topic_peers(response: p2pd::Response) -> Result<Answer, Error> {
    let peers = body(response)?.peer_i_ds.into_iter();
    Ok(Answer::PeerIds(peers.map(PeerId::from_bytes).collect()))
}

fn body(response: p2pd::Response) -> Result<p2pd::PsResponse, Error> {
    response.pubsub.ok_or(Error::MissingField {
        message: "Response",
        field: "pubsub",
    })
}
