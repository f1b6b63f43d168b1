//! Requests to the DHT. The answer to a query is one value, or BEGIN, any number of values, and END.

use super::control::{decode_peer_info, encode_peer_info};
use super::family::{family, replies_done};
use super::message::{duration, encode, ok, peer_id, required, whole_seconds};
use super::request::{Answered, Query, Request};
use crate::pb::p2pd::{self, dht_request::Type, dht_response, request};
use crate::{Error, PeerId, PeerInfo};
use bytes::Bytes;
use std::time::Duration;

family!(requests { PutValue, Provide }
    queries {
        FindPeer, FindPeersConnectedToPeer, FindProviders, GetClosestPeers, GetPublicKey,
        GetValue, SearchValue,
    }
);

/// Finds a peer's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FindPeer {
    /// The peer.
    pub peer: PeerId,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Finds the peers that are connected to a peer. Current Go daemons do not support it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FindPeersConnectedToPeer {
    /// The peer.
    pub peer: PeerId,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Finds providers of content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FindProviders {
    /// The content's binary CID.
    pub cid: Bytes,
    /// Largest number of providers; 0 means the daemon's default of 20.
    pub count: i32,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Finds the peers closest to a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetClosestPeers {
    /// The key.
    pub key: Bytes,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Gets a peer's public key: a serialised `crypto.pb.PublicKey`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetPublicKey {
    /// The peer.
    pub peer: PeerId,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Gets the best value for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetValue {
    /// The key.
    pub key: Bytes,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Gets better and better values for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchValue {
    /// The key.
    pub key: Bytes,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Stores a value. The daemons accept only `/pk/…` and `/ipns/…` keys with valid values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutValue {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Announces that the daemon's peer provides content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Provide {
    /// The content's binary CID.
    pub cid: Bytes,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

/// Implements [`Query`], given the name, the number and type of the values, and the fields of the
/// request.
macro_rules! query {
    ($name:ident, $text:literal, $answered:ident, $value:ty, $encode:ident, $decode:ident, $($field:ident: $fill:expr),*) => {
        impl Query for $name {
            type Value = $value;
            const NAME: &'static str = $text;
            const ANSWERED: Answered = Answered::$answered;

            fn encode(&self) -> Bytes {
                let fill: fn(&$name, &mut p2pd::DhtRequest) = |query, request| {
                    $(request.$field = Some($fill(query));)*
                };
                encode_dht(Type::$name, self.timeout, |request| fill(self, request))
            }

            fn encode_value(value: &$value) -> p2pd::DhtResponse {
                $encode(value)
            }

            fn decode_value(response: p2pd::DhtResponse) -> Result<$value, Error> {
                $decode(response)
            }
        }
    };
}

query!(FindPeer, "DHT FIND_PEER", WithOneValue, PeerInfo, peer_value, decode_peer,
    peer: |query: &FindPeer| query.peer.to_bytes());
query!(FindPeersConnectedToPeer, "DHT FIND_PEERS_CONNECTED_TO_PEER", WithValues, PeerInfo,
    peer_value, decode_peer,
    peer: |query: &FindPeersConnectedToPeer| query.peer.to_bytes());
query!(FindProviders, "DHT FIND_PROVIDERS", WithValues, PeerInfo, peer_value, decode_peer,
    cid: |query: &FindProviders| query.cid.clone(),
    count: |query: &FindProviders| query.count);
query!(GetClosestPeers, "DHT GET_CLOSEST_PEERS", WithValues, PeerId, peer_id_value, decode_peer_id,
    key: |query: &GetClosestPeers| query.key.clone());
query!(GetPublicKey, "DHT GET_PUBLIC_KEY", WithOneValue, Bytes, bytes_value, decode_bytes,
    peer: |query: &GetPublicKey| query.peer.to_bytes());
query!(GetValue, "DHT GET_VALUE", WithOneValue, Bytes, bytes_value, decode_bytes,
    key: |query: &GetValue| query.key.clone());
query!(SearchValue, "DHT SEARCH_VALUE", WithValues, Bytes, bytes_value, decode_bytes,
    key: |query: &SearchValue| query.key.clone());

impl Request for PutValue {
    replies_done!();
    const NAME: &'static str = "DHT PUT_VALUE";
    const WAITS_FOR_PEERS: bool = true;

    fn encode(&self) -> Bytes {
        encode_dht(Type::PutValue, self.timeout, |request| {
            request.key = Some(self.key.clone());
            request.value = Some(self.value.clone());
        })
    }
}

impl Request for Provide {
    replies_done!();
    const NAME: &'static str = "DHT PROVIDE";
    const WAITS_FOR_PEERS: bool = true;

    fn encode(&self) -> Bytes {
        encode_dht(Type::Provide, self.timeout, |request| {
            request.cid = Some(self.cid.clone());
        })
    }
}

impl Command {
    pub(super) fn decode(
        r#type: request::Type,
        request: &mut p2pd::Request,
    ) -> Result<Option<Self>, Error> {
        if r#type != request::Type::Dht {
            return Ok(None);
        }
        const MESSAGE: &str = "DHTRequest";
        let dht = required(request.dht.take(), "Request", "dht")?;
        let timeout = duration(dht.timeout);
        let (peer, cid, key) = (dht.peer, dht.cid, dht.key);
        let peer = || peer_id(peer, MESSAGE);
        let cid = || required(cid, MESSAGE, "cid");
        let key = || required(key, MESSAGE, "key");
        let number = required(dht.r#type, MESSAGE, "type")?;
        let r#type = Type::try_from(number)
            .map_err(|_| Error::Unexpected(format!("a DHTRequest of unknown type {number}")))?;
        Ok(Some(match r#type {
            Type::FindPeer => Self::FindPeer(FindPeer {
                peer: peer()?,
                timeout,
            }),
            Type::FindPeersConnectedToPeer => {
                Self::FindPeersConnectedToPeer(FindPeersConnectedToPeer {
                    peer: peer()?,
                    timeout,
                })
            }
            Type::FindProviders => Self::FindProviders(FindProviders {
                cid: cid()?,
                count: dht.count.unwrap_or_default(),
                timeout,
            }),
            Type::GetClosestPeers => Self::GetClosestPeers(GetClosestPeers {
                key: key()?,
                timeout,
            }),
            Type::GetPublicKey => Self::GetPublicKey(GetPublicKey {
                peer: peer()?,
                timeout,
            }),
            Type::GetValue => Self::GetValue(GetValue {
                key: key()?,
                timeout,
            }),
            Type::SearchValue => Self::SearchValue(SearchValue {
                key: key()?,
                timeout,
            }),
            Type::PutValue => Self::PutValue(PutValue {
                key: key()?,
                value: required(dht.value, MESSAGE, "value")?,
                timeout,
            }),
            Type::Provide => Self::Provide(Provide {
                cid: cid()?,
                timeout,
            }),
        }))
    }
}

fn encode_dht(
    r#type: Type,
    timeout: Option<Duration>,
    fill: impl FnOnce(&mut p2pd::DhtRequest),
) -> Bytes {
    let mut dht = p2pd::DhtRequest {
        r#type: Some(r#type as i32),
        timeout: whole_seconds(timeout),
        ..Default::default()
    };
    fill(&mut dht);
    encode(request::Type::Dht, |request| request.dht = Some(dht))
}

/// Makes a part of the answer to a query, without a value.
pub fn step(r#type: dht_response::Type) -> p2pd::DhtResponse {
    p2pd::DhtResponse {
        r#type: Some(r#type as i32),
        ..Default::default()
    }
}

/// Makes the Response around the first part of the answer to a query. All later parts are sent without a
/// Response.
pub fn in_response(dht: p2pd::DhtResponse) -> p2pd::Response {
    p2pd::Response {
        dht: Some(dht),
        ..ok()
    }
}

fn value() -> p2pd::DhtResponse {
    step(dht_response::Type::Value)
}

fn peer_value(info: &PeerInfo) -> p2pd::DhtResponse {
    p2pd::DhtResponse {
        peer: Some(encode_peer_info(info)),
        ..value()
    }
}

fn decode_peer(response: p2pd::DhtResponse) -> Result<PeerInfo, Error> {
    decode_peer_info(required(response.peer, "DHTResponse", "peer")?)
}

fn peer_id_value(peer: &PeerId) -> p2pd::DhtResponse {
    bytes_value(&peer.to_bytes())
}

fn decode_peer_id(response: p2pd::DhtResponse) -> Result<PeerId, Error> {
    decode_bytes(response).map(PeerId::from_bytes)
}

fn bytes_value(bytes: &Bytes) -> p2pd::DhtResponse {
    p2pd::DhtResponse {
        value: Some(bytes.clone()),
        ..value()
    }
}

fn decode_bytes(response: p2pd::DhtResponse) -> Result<Bytes, Error> {
    required(response.value, "DHTResponse", "value")
}
