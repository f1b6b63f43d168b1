//! Reconnection to a peer: when to send CONNECT again, and which outcomes to report.

use super::backoff::{jitter, Backoff};
use std::time::Duration;

/// Time limit for a CONNECT to a bootstrap peer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Interval between CONNECTs to a connected peer, in case its connection was lost.
pub(super) const INTERVAL: Duration = Duration::from_secs(15);

/// Keeps up the connection to one peer, or to any of several, that may be unreachable.
///
/// The driver repeats CONNECT even while the peer is connected. If the connection still exists, the
/// daemon does nothing; if it was lost, the daemon connects again. (LIST_PEERS would show the loss, but
/// can crash jsp2pd.)
///
/// ```
/// use p2pd_protocol::policy::reconnection::Reconnection;
/// use std::time::Duration;
///
/// let mut reconnection = Reconnection::default();
/// let (pause, is_news) = reconnection.failed("connection refused", 0);
/// assert_eq!((pause, is_news), (Duration::from_secs(1), true));
/// let (pause, is_news) = reconnection.failed("connection refused", 0);
/// assert_eq!((pause, is_news), (Duration::from_secs(2), false));
/// ```
#[derive(Debug, Clone)]
pub struct Reconnection {
    backoff: Backoff,
    connected: bool,
    /// The last failure that was reported.
    reported: Option<String>,
}

impl Default for Reconnection {
    fn default() -> Self {
        Reconnection {
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            connected: false,
            reported: None,
        }
    }
}

impl Reconnection {
    /// Notes that the peer is connected. Returns the pause before the next CONNECT, and whether to
    /// report the connection.
    ///
    /// `random` is a random number, for the jitter.
    pub fn connected(&mut self, random: u64) -> (Duration, bool) {
        self.backoff.reset();
        self.reported = None;
        let is_news = !std::mem::replace(&mut self.connected, true);
        (jitter(INTERVAL, random), is_news)
    }

    /// Notes that the CONNECT failed. Returns the pause before the next CONNECT, and whether to report
    /// the failure.
    ///
    /// `random` is a random number, for the jitter.
    pub fn failed(&mut self, reason: &str, random: u64) -> (Duration, bool) {
        self.connected = false;
        let pause = self.backoff.next(random);
        // "Dial backoff" means that the daemon did not even try; the first reason still holds.
        let repeated = self.reported.is_some() && reason.contains("dial backoff");
        let is_news = !repeated && self.reported.as_deref() != Some(reason);
        if is_news {
            self.reported = Some(reason.into());
        }
        (pause, is_news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute_and_start_over_after_a_success() {
        let mut peer = Reconnection::default();
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            assert_eq!(peer.failed("no", 0).0, Duration::from_secs(seconds));
        }
        for _ in 0..100 {
            assert_eq!(peer.failed("no", 0).0, Duration::from_secs(60));
        }
        assert_eq!(peer.connected(0).0, INTERVAL);
        assert_eq!(peer.failed("no", 0).0, Duration::from_secs(1));
    }

    #[test]
    fn jitter_makes_pauses_differ() {
        let pause = |random| {
            let mut peer = Reconnection::default();
            (peer.failed("no", random).0, peer.connected(random).0)
        };
        let pauses: std::collections::HashSet<_> = (0..100).map(pause).collect();
        assert!(pauses.len() > 20, "{pauses:?}");
    }

    #[test]
    fn reports_only_what_changed() {
        let mut peer = Reconnection::default();
        assert!(peer.failed("connection refused", 0).1);
        assert!(!peer.failed("connection refused", 0).1);
        assert!(!peer.failed("all dials failed: dial backoff", 0).1);
        assert!(peer.failed("no route", 0).1);
        assert!(peer.connected(0).1 && !peer.connected(0).1);
        assert!(peer.failed("dial backoff", 0).1);
        assert!(peer.connected(0).1);
    }
}
