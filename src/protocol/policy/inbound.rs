//! Limits on the inbound streams of one client: the header of each stream, the number of connections
//! without a header, and the rate of log lines about refused connections.
//!
//! Times are [`Duration`]s since an arbitrary moment, the same for all calls.

use std::collections::BTreeMap;
use std::time::Duration;

/// The largest header (StreamInfo) of an inbound stream, in bytes.
pub const MAX_HEADER: usize = 64 * 1024;

/// Time limit for a header, from its first byte on. It does not apply to a connection on which nothing
/// has arrived: jsp2pd connects when a handler is registered, and writes only when a stream arrives.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(30);

/// Number of connections that may lack a complete header, in addition to one for each handler.
pub const MAX_HALF_OPEN: usize = 256;

/// Time that a connection may lack a complete header while that number is exceeded.
pub const HALF_OPEN_PATIENCE: Duration = Duration::from_secs(1);

/// The pause after a failed accept. The process is most likely out of descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Shortest time between two log lines of one kind.
pub const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// What to do before the next connection is accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Accept it.
    Accept,
    /// Call [`HalfOpen::admission`] again after this time, or when a header is complete.
    Wait(Duration),
    /// Close the connection with this number, then call [`HalfOpen::admission`] again.
    Close(u64),
}

/// The accepted connections that have no complete header yet.
#[derive(Debug, Clone)]
pub struct HalfOpen {
    max: usize,
    patience: Duration,
    /// The time at which each was accepted, by number. The oldest comes first.
    since: BTreeMap<u64, Duration>,
    accepted: u64,
}

impl Default for HalfOpen {
    /// Uses [`MAX_HALF_OPEN`] and [`HALF_OPEN_PATIENCE`].
    fn default() -> Self {
        Self::new(MAX_HALF_OPEN, HALF_OPEN_PATIENCE)
    }
}

impl HalfOpen {
    /// Uses other limits than the default ones.
    pub fn new(max: usize, patience: Duration) -> Self {
        Self {
            max,
            patience,
            since: BTreeMap::new(),
            accepted: 0,
        }
    }

    /// Notes a connection accepted at `now`. Returns its number.
    pub fn enter(&mut self, now: Duration) -> u64 {
        let number = self.accepted;
        self.accepted += 1;
        self.since.insert(number, now);
        number
    }

    /// Forgets a connection: its header is complete, or it is closed.
    pub fn leave(&mut self, number: u64) {
        self.since.remove(&number);
    }

    /// Whether a connection is still without a complete header.
    pub fn contains(&self, number: u64) -> bool {
        self.since.contains_key(&number)
    }

    /// Decides whether another connection may be accepted.
    ///
    /// # Arguments
    /// `handlers`: the number of registered handlers.
    pub fn admission(&self, handlers: usize, now: Duration) -> Admission {
        if self.since.len() <= self.max + handlers {
            return Admission::Accept;
        }
        match self.since.first_key_value() {
            None => Admission::Accept,
            Some((number, since)) => match (*since + self.patience).checked_sub(now) {
                Some(wait) if !wait.is_zero() => Admission::Wait(wait),
                _ => Admission::Close(*number),
            },
        }
    }
}

/// Allows one log line of a kind in each [`LOG_INTERVAL`], and counts the suppressed ones.
#[derive(Debug, Clone, Default)]
pub struct LogThrottle {
    last: Option<Duration>,
    suppressed: u64,
}

impl LogThrottle {
    /// Notes that `events` events happened at `now`, which can share one log line.
    ///
    /// # Returns
    /// If the line may be logged: the number of other events since the last line, for which no line is
    /// logged. Otherwise `None`.
    pub fn note(&mut self, events: u64, now: Duration) -> Option<u64> {
        match self.last {
            Some(last) if now.saturating_sub(last) < LOG_INTERVAL => {
                self.suppressed += events;
                None
            }
            _ => {
                self.last = Some(now);
                let suppressed = std::mem::take(&mut self.suppressed);
                Some(suppressed + events.saturating_sub(1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn closes_the_oldest_after_its_patience() {
        let mut half_open = HalfOpen::default();
        let numbers: Vec<_> = (0..=MAX_HALF_OPEN as u32)
            .map(|place| half_open.enter(SECOND * place / 1000))
            .collect();
        // A handler more, and there is room.
        assert_eq!(half_open.admission(1, SECOND / 2), Admission::Accept);
        assert_eq!(
            half_open.admission(0, SECOND / 2),
            Admission::Wait(SECOND / 2)
        );
        assert_eq!(half_open.admission(0, SECOND), Admission::Close(numbers[0]));
        half_open.leave(numbers[0]);
        assert_eq!(half_open.admission(0, SECOND), Admission::Accept);
    }

    #[test]
    fn completed_header_makes_room() {
        let mut half_open = HalfOpen::default();
        let last = (0..=MAX_HALF_OPEN).map(|_| half_open.enter(SECOND)).last();
        assert!(half_open.contains(last.unwrap()));
        half_open.leave(last.unwrap());
        half_open.leave(last.unwrap());
        assert!(!half_open.contains(last.unwrap()));
        assert_eq!(half_open.admission(0, SECOND), Admission::Accept);
    }

    #[test]
    fn logs_one_line_a_second_and_counts_the_others() {
        let mut throttle = LogThrottle::default();
        assert_eq!(throttle.note(1, SECOND), Some(0));
        assert_eq!(throttle.note(1, SECOND), None);
        assert_eq!(throttle.note(3, SECOND * 3 / 2), None);
        assert_eq!(throttle.note(1, SECOND * 2), Some(4));
        assert_eq!(throttle.note(1, SECOND * 2), None);
        assert_eq!(throttle.note(5, SECOND * 4), Some(5));
    }

    proptest! {
        #[test]
        fn keeps_within_the_limit_and_closes_none_early(
            steps in prop::collection::vec((0u64..2000, any::<bool>()), 1..1500),
            handlers in 0usize..4,
        ) {
            let mut half_open = HalfOpen::default();
            let mut open = Vec::new();
            let mut now = Duration::ZERO;
            for (millis, completes) in steps {
                now += Duration::from_micros(millis);
                if completes && !open.is_empty() && millis % 3 == 0 {
                    let (number, _) = open.remove(millis as usize % open.len());
                    half_open.leave(number);
                }
                match half_open.admission(handlers, now) {
                    Admission::Accept => {
                        prop_assert!(open.len() <= MAX_HALF_OPEN + handlers);
                        open.push((half_open.enter(now), now));
                    }
                    Admission::Wait(wait) => {
                        prop_assert!(wait <= HALF_OPEN_PATIENCE);
                        now += wait;
                        let admission = half_open.admission(handlers, now);
                        prop_assert!(matches!(admission, Admission::Close(_)));
                    }
                    Admission::Close(number) => {
                        let (oldest, since) = open.remove(0);
                        prop_assert_eq!(oldest, number);
                        prop_assert!(now - since >= HALF_OPEN_PATIENCE);
                        half_open.leave(number);
                    }
                }
            }
        }

        #[test]
        fn loses_no_event_of_a_throttled_log(
            steps in prop::collection::vec((1u64..5, 0u64..1500), 1..200),
        ) {
            let mut throttle = LogThrottle::default();
            let (mut now, mut noted, mut shown) = (Duration::ZERO, 0, 0);
            for (events, millis) in steps {
                now += Duration::from_millis(millis);
                noted += events;
                shown += throttle.note(events, now).map_or(0, |more| more + 1);
            }
            let more = throttle.note(1, now + LOG_INTERVAL).unwrap();
            prop_assert_eq!(noted + 1, shown + more + 1);
        }
    }
}
