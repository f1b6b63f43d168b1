//! CONNMANAGER: which connections to keep. (The JS daemon has no such requests.)

use super::control::message;
use super::pb::p2pd::{self, conn_manager_request, request::Type};
use super::request::Expect;
use super::{PeerId, Request};

/// Tags `peer` with `tag`; connections to peers with more weight are kept longer.
pub fn tag_peer(peer: &PeerId, tag: String, weight: i64) -> Request {
    wrap(p2pd::ConnManagerRequest {
        peer: Some(peer.to_bytes()),
        tag: Some(tag),
        weight: Some(weight),
        ..of_type(conn_manager_request::Type::TagPeer)
    })
}

/// Takes `tag` off `peer`.
pub fn untag_peer(peer: &PeerId, tag: String) -> Request {
    wrap(p2pd::ConnManagerRequest {
        peer: Some(peer.to_bytes()),
        tag: Some(tag),
        ..of_type(conn_manager_request::Type::UntagPeer)
    })
}

/// Closes connections down to the low-water mark.
pub fn trim() -> Request {
    wrap(of_type(conn_manager_request::Type::Trim))
}

fn of_type(r#type: conn_manager_request::Type) -> p2pd::ConnManagerRequest {
    p2pd::ConnManagerRequest {
        r#type: Some(r#type as i32),
        ..Default::default()
    }
}

fn wrap(request: p2pd::ConnManagerRequest) -> Request {
    let message = p2pd::Request {
        conn_manager: Some(request),
        ..message(Type::Connmanager)
    };
    Request::new(&message, Expect::Done)
}
