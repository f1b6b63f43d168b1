//! PEERSTORE: what the JS daemon knows of a peer. The Go daemons have no such requests, and
//! hivemind's fork gives their number another meaning, which can end the daemon: see
//! [`is_there`].

use super::pb::p2pd::{self, peerstore_request, request::Type};
use super::request::Expect;
use super::{control, Answer, Error, PeerId, Request};

/// A request of a type that no daemon knows, which tells whether there is a peerstore: the JS
/// daemon alone refuses such a request with words, that it does not support it; the Go daemons
/// close the connection.
///
/// It is to be sent before any other request of this family. hivemind's fork takes them for
/// PERSISTENT_CONN_UPGRADE, and ends once its last persistent connection is closed.
pub fn is_there() -> Request {
    let message = p2pd::JsRequest {
        r#type: Some(i32::MAX),
        peer_store: None,
    };
    Request::encode(&message, Expect::Done)
}

/// Asks for the protocols `peer` speaks: [`Answer::Protocols`].
pub fn get_protocols(peer: &PeerId) -> Request {
    wrap(
        peer,
        peerstore_request::Type::GetProtocols,
        Expect::PeerstoreProtocols,
    )
}

/// Asks for the addresses of `peer`: [`Answer::PeerInfo`].
pub fn get_peer_info(peer: &PeerId) -> Request {
    wrap(
        peer,
        peerstore_request::Type::GetPeerInfo,
        Expect::PeerstorePeer,
    )
}

fn wrap(peer: &PeerId, r#type: peerstore_request::Type, expect: Expect) -> Request {
    let message = p2pd::JsRequest {
        // PEERSTORE has the number of the fork's PERSISTENT_CONN_UPGRADE.
        r#type: Some(Type::PersistentConnUpgrade as i32),
        peer_store: Some(p2pd::PeerstoreRequest {
            r#type: Some(r#type as i32),
            id: Some(peer.to_bytes()),
            protos: Vec::new(),
        }),
    };
    Request::encode(&message, expect)
}

pub(super) fn protocols(response: p2pd::Response) -> Result<Answer, Error> {
    Ok(Answer::Protocols(body(response)?.protos))
}

pub(super) fn peer(response: p2pd::Response) -> Result<Answer, Error> {
    let peer = body(response)?.peer.ok_or(Error::MissingField {
        message: "PeerstoreResponse",
        field: "peer",
    })?;
    Ok(Answer::PeerInfo(control::peer_info(peer)?))
}

fn body(response: p2pd::Response) -> Result<p2pd::PeerstoreResponse, Error> {
    response.peer_store.ok_or(Error::MissingField {
        message: "Response",
        field: "peerStore",
    })
}
