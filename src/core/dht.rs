//! DHT requests. Those that can have many results answer BEGIN, then VALUE by VALUE, then END.

use super::control::{self, message};
use super::pb::p2pd::{self, dht_request, dht_response, request::Type};
use super::request::{whole_seconds, DhtValue, Expect};
use super::{Answer, Error, PeerId, Request};
use bytes::Bytes;
use std::time::Duration;

/// Finds the addresses of `peer`: one [`Answer::PeerInfo`].
pub fn find_peer(peer: &PeerId, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        peer: Some(peer.to_bytes()),
        ..query(dht_request::Type::FindPeer, timeout)
    };
    one(query, DhtValue::PeerInfo)
}

/// Finds the peers connected to `peer`. Today's Go daemons refuse it as not supported.
pub fn find_peers_connected_to_peer(peer: &PeerId, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        peer: Some(peer.to_bytes()),
        ..query(dht_request::Type::FindPeersConnectedToPeer, timeout)
    };
    many(query, DhtValue::PeerInfo)
}

/// Finds at most `count` providers of the content with the binary CID `cid` (0: the daemon's
/// default of 20).
pub fn find_providers(cid: Bytes, count: i32, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        cid: Some(cid),
        count: Some(count),
        ..query(dht_request::Type::FindProviders, timeout)
    };
    many(query, DhtValue::PeerInfo)
}

/// Finds the peers closest to `key`: [`Answer::PeerId`]s.
pub fn get_closest_peers(key: Bytes, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        key: Some(key),
        ..query(dht_request::Type::GetClosestPeers, timeout)
    };
    many(query, DhtValue::PeerId)
}

/// Gets the public key of `peer`: one [`Answer::Value`], a serialised crypto.pb.PublicKey.
pub fn get_public_key(peer: &PeerId, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        peer: Some(peer.to_bytes()),
        ..query(dht_request::Type::GetPublicKey, timeout)
    };
    one(query, DhtValue::Bytes)
}

/// Gets the best value for `key`: one [`Answer::Value`].
pub fn get_value(key: Bytes, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        key: Some(key),
        ..query(dht_request::Type::GetValue, timeout)
    };
    one(query, DhtValue::Bytes)
}

/// Gets ever better values for `key`: [`Answer::Value`]s.
pub fn search_value(key: Bytes, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        key: Some(key),
        ..query(dht_request::Type::SearchValue, timeout)
    };
    many(query, DhtValue::Bytes)
}

/// Puts a record. The daemons accept only `/pk/…` and `/ipns/…` keys with valid values.
pub fn put_value(key: Bytes, value: Bytes, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        key: Some(key),
        value: Some(value),
        ..query(dht_request::Type::PutValue, timeout)
    };
    Request::new(&wrap(query), Expect::Done)
}

/// Announces that this peer provides the content with the binary CID `cid`.
pub fn provide(cid: Bytes, timeout: Option<Duration>) -> Request {
    let query = p2pd::DhtRequest {
        cid: Some(cid),
        ..query(dht_request::Type::Provide, timeout)
    };
    Request::new(&wrap(query), Expect::Done)
}

fn query(r#type: dht_request::Type, timeout: Option<Duration>) -> p2pd::DhtRequest {
    p2pd::DhtRequest {
        r#type: Some(r#type as i32),
        timeout: whole_seconds(timeout),
        ..Default::default()
    }
}

fn wrap(query: p2pd::DhtRequest) -> p2pd::Request {
    p2pd::Request {
        dht: Some(query),
        ..message(Type::Dht)
    }
}

fn one(query: p2pd::DhtRequest, value: DhtValue) -> Request {
    Request::new(&wrap(query), Expect::Dht { value, one: true })
}

fn many(query: p2pd::DhtRequest, value: DhtValue) -> Request {
    Request::new(&wrap(query), Expect::Dht { value, one: false })
}

/// One DHTResponse of a query's answer.
pub(super) enum Step {
    Begin,
    Value(Answer),
    End,
}

pub(super) fn step(response: p2pd::DhtResponse, value: DhtValue) -> Result<Step, Error> {
    let missing = |field| Error::MissingField {
        message: "DHTResponse",
        field,
    };
    let r#type = response.r#type.ok_or(missing("type"))?;
    match dht_response::Type::try_from(r#type) {
        Ok(dht_response::Type::Begin) => Ok(Step::Begin),
        Ok(dht_response::Type::End) => Ok(Step::End),
        Ok(dht_response::Type::Value) => Ok(Step::Value(match value {
            DhtValue::PeerInfo => {
                Answer::PeerInfo(control::peer_info(response.peer.ok_or(missing("peer"))?)?)
            }
            DhtValue::PeerId => {
                Answer::PeerId(PeerId::from_bytes(response.value.ok_or(missing("value"))?))
            }
            DhtValue::Bytes => Answer::Value(response.value.ok_or(missing("value"))?),
        })),
        Err(_) => Err(Error::Unexpected(format!(
            "DHTResponse of unknown type {type}"
        ))),
    }
}
