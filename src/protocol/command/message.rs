//! Message helpers that several families of requests share.

use crate::pb::p2pd::{self, request::Type, response};
use crate::{framing, Error, Multiaddr, PeerId};
use bytes::Bytes;
use std::time::Duration;

/// The response OK, to which a reply adds its fields.
pub(crate) fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

/// The response to a refused request, with an error message.
pub fn refusal(message: &str) -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Error as i32),
        error: Some(p2pd::ErrorResponse {
            msg: Some(Bytes::copy_from_slice(message.as_bytes())),
        }),
        ..Default::default()
    }
}

/// Encodes a request of a type, with its length prefix. `fill` sets its fields.
pub(super) fn encode(r#type: Type, fill: impl FnOnce(&mut p2pd::Request)) -> Bytes {
    let mut request = p2pd::Request {
        r#type: Some(r#type as i32),
        ..Default::default()
    };
    fill(&mut request);
    framing::encode_frame(&request)
}

/// Returns a required field of a message, or an error if it is missing.
pub(crate) fn required<T>(
    value: Option<T>,
    message: &'static str,
    field: &'static str,
) -> Result<T, Error> {
    value.ok_or(Error::MissingField { message, field })
}

pub(super) fn peer_id(value: Option<Bytes>, message: &'static str) -> Result<PeerId, Error> {
    required(value, message, "peer").map(PeerId::from_bytes)
}

pub(super) fn multiaddrs(addrs: Vec<Bytes>) -> Vec<Multiaddr> {
    addrs.into_iter().map(Multiaddr::from_bytes).collect()
}

/// Converts a timeout to whole seconds, rounded up. Never returns 0, which would mean the daemon's
/// default of 60 s.
pub(super) fn whole_seconds(timeout: Option<Duration>) -> Option<i64> {
    timeout.map(|timeout| {
        let partial = u64::from(timeout.subsec_nanos() > 0);
        let seconds = timeout.as_secs().saturating_add(partial);
        // At most a century, because the Go daemons multiply the seconds by 10^9 in 64 bits.
        i64::try_from(seconds.clamp(1, 100 * 366 * 86_400)).unwrap_or(i64::MAX)
    })
}

/// Reads a timeout; `None` means the daemon's default.
pub(super) fn duration(seconds: Option<i64>) -> Option<Duration> {
    let seconds = u64::try_from(seconds?).ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}
