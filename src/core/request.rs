//! A request, encoded, and what its answer will look like.

use super::{framing, pb::p2pd};
use bytes::Bytes;

/// One request to the daemon, made by a function of its family ([`control`](super::control),
/// [`streams`](super::streams), [`dht`](super::dht), …).
#[derive(Debug, Clone)]
pub struct Request {
    pub(super) frame: Bytes,
    pub(super) expect: Expect,
    pub(super) waits_for_peers: bool,
}

/// How many results a DHT query has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Results {
    /// Exactly one.
    One,
    /// Any number.
    Many,
}

/// How the answer to a request is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expect {
    /// Nothing but OK.
    Done,
    Identity,
    Peers,
    /// OK with a StreamInfo; then the connection is the stream.
    Stream,
    /// OK; then the connection carries PSMessages.
    Subscription,
    /// OK; then the connection carries the messages of unary calls.
    Persistent,
    Topics,
    TopicPeers,
    PeerstoreProtocols,
    PeerstorePeer,
    /// DHT values: `one` exactly, or any number.
    Dht {
        value: DhtValue,
        one: bool,
    },
}

impl Expect {
    pub(super) fn is_query(self) -> bool {
        use Expect::{Identity, Peers, TopicPeers, Topics};
        matches!(self, Identity | Peers | Topics | TopicPeers)
    }
}

/// What a DHT query's values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DhtValue {
    PeerInfo,
    PeerId,
    Bytes,
}

impl Request {
    pub(super) fn new(message: &p2pd::Request, expect: Expect) -> Self {
        let asks_peers =
            message.connect.is_some() || message.stream_open.is_some() || message.dht.is_some();
        Self {
            waits_for_peers: asks_peers,
            ..Self::encode(message, expect)
        }
    }

    pub(super) fn encode(message: &impl prost::Message, expect: Expect) -> Self {
        Self {
            frame: framing::encode_frame(message),
            expect,
            waits_for_peers: false,
        }
    }

    /// How many results a DHT query has, which come as [`Event::Item`](super::Event::Item)s;
    /// `None` for every other request.
    pub fn results(&self) -> Option<Results> {
        match self.expect {
            Expect::Dht { one: true, .. } => Some(Results::One),
            Expect::Dht { one: false, .. } => Some(Results::Many),
            _ => None,
        }
    }

    /// Whether the daemon asks other peers before it answers. That can take as long as the
    /// request's timeout, in which a connection serves nothing else.
    pub fn waits_for_peers(&self) -> bool {
        self.waits_for_peers
    }

    /// Whether it only asks what the daemon knows and answers at once, in one message. Such requests
    /// may follow each other on a connection before they are answered.
    pub fn is_query(&self) -> bool {
        self.expect.is_query()
    }

    /// The request as it goes over the wire, length first.
    pub fn frame(&self) -> &Bytes {
        &self.frame
    }
}

/// A timeout as the protocol has it: whole seconds, rounded up; a zero would mean the daemon's
/// default of 60 s.
pub(super) fn whole_seconds(timeout: Option<std::time::Duration>) -> Option<i64> {
    timeout.map(|timeout| {
        let partial = u64::from(timeout.subsec_nanos() > 0);
        let seconds = timeout.as_secs().saturating_add(partial);
        // The daemon multiplies by 10^9 in 64 bits; more than a century is as good as for ever.
        i64::try_from(seconds.clamp(1, 100 * 366 * 86_400)).unwrap_or(i64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn timeouts_are_rounded_up_to_whole_seconds_and_never_zero() {
        assert_eq!(whole_seconds(None), None);
        assert_eq!(whole_seconds(Some(Duration::ZERO)), Some(1));
        assert_eq!(whole_seconds(Some(Duration::from_millis(1))), Some(1));
        assert_eq!(whole_seconds(Some(Duration::from_millis(1500))), Some(2));
        assert_eq!(whole_seconds(Some(Duration::from_secs(2))), Some(2));
        assert!(whole_seconds(Some(Duration::MAX)).unwrap() < i64::MAX / 1_000_000_000);
    }
}
