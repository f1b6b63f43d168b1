//! IDENTIFY, CONNECT, DISCONNECT, LIST_PEERS.

use super::family::{family, replies_done};
use super::message::{duration, encode, multiaddrs, ok, peer_id, required, whole_seconds};
use super::request::{Answered, Request};
use crate::pb::p2pd::{self, request::Type};
use crate::{Error, Multiaddr, PeerId};
use bytes::Bytes;
use std::time::Duration;

family!(requests { Identify, Connect, Disconnect, ListPeers } queries {});

/// A peer and its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// The peer.
    pub peer_id: PeerId,
    /// Its addresses.
    pub addrs: Vec<Multiaddr>,
}

/// Requests the daemon's peer id and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identify;

/// A daemon's peer id and addresses: the reply to [`Identify`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Its peer id.
    pub peer_id: PeerId,
    /// Addresses at which it listens for peers.
    pub addrs: Vec<Multiaddr>,
}

impl Identity {
    /// Makes the reply to [`Identify`].
    pub fn new(peer_id: PeerId, addrs: Vec<Multiaddr>) -> Self {
        Self { peer_id, addrs }
    }
}

impl Request for Identify {
    type Reply = Identity;
    const NAME: &'static str = "IDENTIFY";
    const ANSWERED: Answered = Answered::AtOnce;

    fn encode(&self) -> Bytes {
        encode(Type::Identify, |_| {})
    }

    fn encode_reply(reply: &Identity) -> p2pd::Response {
        p2pd::Response {
            identify: Some(p2pd::IdentifyResponse {
                id: Some(reply.peer_id.to_bytes()),
                addrs: reply.addrs.iter().map(Multiaddr::to_bytes).collect(),
            }),
            ..ok()
        }
    }

    fn decode_reply(response: p2pd::Response) -> Result<Identity, Error> {
        let identify = required(response.identify, "Response", "identify")?;
        let id = required(identify.id, "IdentifyResponse", "id")?;
        Ok(Identity {
            peer_id: PeerId::from_bytes(id),
            addrs: multiaddrs(identify.addrs),
        })
    }
}

/// Connects to a peer at any of its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// The peer.
    pub peer: PeerId,
    /// Its addresses. Without any, the daemon uses the addresses that it knows.
    pub addrs: Vec<Multiaddr>,
    /// Time after which the daemon gives up; 60 s if `None`.
    pub timeout: Option<Duration>,
}

impl Request for Connect {
    replies_done!();
    const NAME: &'static str = "CONNECT";
    const WAITS_FOR_PEERS: bool = true;

    fn encode(&self) -> Bytes {
        encode(Type::Connect, |request| {
            request.connect = Some(p2pd::ConnectRequest {
                peer: Some(self.peer.to_bytes()),
                addrs: self.addrs.iter().map(Multiaddr::to_bytes).collect(),
                timeout: whole_seconds(self.timeout),
            });
        })
    }
}

/// Closes every connection to a peer. The JavaScript daemon has no such request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disconnect {
    /// The peer.
    pub peer: PeerId,
}

impl Request for Disconnect {
    replies_done!();
    const NAME: &'static str = "DISCONNECT";

    fn encode(&self) -> Bytes {
        encode(Type::Disconnect, |request| {
            request.disconnect = Some(p2pd::DisconnectRequest {
                peer: Some(self.peer.to_bytes()),
            });
        })
    }
}

/// Requests the connected peers: one entry per connection, so a peer can appear twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListPeers;

impl Request for ListPeers {
    type Reply = Vec<PeerInfo>;
    const NAME: &'static str = "LIST_PEERS";
    const ANSWERED: Answered = Answered::AtOnce;

    fn encode(&self) -> Bytes {
        encode(Type::ListPeers, |_| {})
    }

    fn encode_reply(reply: &Vec<PeerInfo>) -> p2pd::Response {
        p2pd::Response {
            peers: reply.iter().map(encode_peer_info).collect(),
            ..ok()
        }
    }

    fn decode_reply(response: p2pd::Response) -> Result<Vec<PeerInfo>, Error> {
        response.peers.into_iter().map(decode_peer_info).collect()
    }
}

impl Command {
    pub(super) fn decode(r#type: Type, request: &mut p2pd::Request) -> Result<Option<Self>, Error> {
        Ok(Some(match r#type {
            Type::Connect => {
                let connect = required(request.connect.take(), "Request", "connect")?;
                Self::Connect(Connect {
                    peer: peer_id(connect.peer, "ConnectRequest")?,
                    addrs: multiaddrs(connect.addrs),
                    timeout: duration(connect.timeout),
                })
            }
            Type::Disconnect => {
                let disconnect = required(request.disconnect.take(), "Request", "disconnect")?;
                Self::Disconnect(Disconnect {
                    peer: peer_id(disconnect.peer, "DisconnectRequest")?,
                })
            }
            Type::ListPeers => Self::ListPeers(ListPeers),
            Type::Identify => Self::Identify(Identify),
            _ => return Ok(None),
        }))
    }
}

/// Encodes a peer and its addresses as a message.
pub(super) fn encode_peer_info(info: &PeerInfo) -> p2pd::PeerInfo {
    p2pd::PeerInfo {
        id: Some(info.peer_id.to_bytes()),
        addrs: info.addrs.iter().map(Multiaddr::to_bytes).collect(),
    }
}

/// Reads a peer and its addresses.
pub(super) fn decode_peer_info(info: p2pd::PeerInfo) -> Result<PeerInfo, Error> {
    Ok(PeerInfo {
        peer_id: PeerId::from_bytes(required(info.id, "PeerInfo", "id")?),
        addrs: multiaddrs(info.addrs),
    })
}
