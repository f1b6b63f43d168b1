//! When to try again: pauses that grow, without I/O and without a clock.

use p2pd_protocol::policy::backoff::{jitter, Backoff};
use p2pd_sockets::random;
use std::time::Duration;

/// How long a bootstrap peer that is connected is left alone.
const LOOK_AGAIN: Duration = Duration::from_secs(15);
/// What lives as long has not died because of its start.
const QUICK_DEATH: Duration = Duration::from_secs(10);

/// When to connect to a bootstrap peer that need not be reachable, and what to tell of it.
///
/// It is connected to also when it is connected: then the daemon has nothing to do, and what was
/// lost meanwhile is found again. (LIST_PEERS would say more, but can crash jsp2pd.)
#[derive(Debug, Clone)]
pub struct Reconnection {
    backoff: Backoff,
    connected: bool,
    told: Option<String>,
}

impl Default for Reconnection {
    fn default() -> Self {
        Reconnection {
            backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            connected: false,
            told: None,
        }
    }
}

impl Reconnection {
    /// How long CONNECT may take.
    pub const TIMEOUT: Duration = Duration::from_secs(30);

    /// It is connected. Gives the pause until the next time, and whether this is news.
    pub fn connected(&mut self) -> (Duration, bool) {
        self.backoff.reset();
        self.told = None;
        let news = !std::mem::replace(&mut self.connected, true);
        (jitter(LOOK_AGAIN, random(0)), news)
    }

    /// It could not be connected to. Gives the pause until the next time, and whether this is news.
    pub fn failed(&mut self, reason: &str) -> (Duration, bool) {
        // That the daemon has not even tried is not why.
        let repeated = self.told.is_some() && reason.contains("dial backoff");
        let news = !repeated && self.told.as_deref() != Some(reason);
        if news {
            self.told = Some(reason.into());
        }
        self.connected = false;
        (self.backoff.next(random(0)), news)
    }
}

/// When a daemon that died is started again.
#[derive(Debug, Clone)]
pub struct Restarts {
    limit: u32,
    deaths: u32,
    backoff: Backoff,
}

impl Restarts {
    /// How many quick deaths in a row there are by default until it is given up.
    pub const LIMIT: u32 = 10;

    /// It is given up after so many quick deaths in a row.
    pub fn new(limit: u32) -> Self {
        Restarts {
            limit,
            deaths: 0,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(30)),
        }
    }

    /// It has died, having `lived` so long. Gives the pause until it is started again; nothing if
    /// it is given up, having died as often within 10 seconds of its start, time after time.
    pub fn died(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= QUICK_DEATH {
            *self = Restarts::new(self.limit);
        }
        self.deaths = self.deaths.saturating_add(1);
        let pause = self.backoff.next(random(0));
        (self.deaths < self.limit || lived >= QUICK_DEATH).then_some(pause)
    }

    /// How often it has died in a row.
    pub fn deaths(&self) -> u32 {
        self.deaths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_secs(1);

    /// Whether a pause is one of that length, or somewhat less.
    fn is_about(pause: Duration, seconds: f64) -> bool {
        let pause = pause.as_secs_f64();
        pause <= seconds && pause > 0.7 * seconds
    }

    #[test]
    fn pauses_grow_up_to_a_limit_and_begin_anew_after_a_success() {
        let mut peer = Reconnection::default();
        for seconds in [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0] {
            assert!(is_about(peer.failed("no").0, seconds));
        }
        for _ in 0..100 {
            assert!(is_about(peer.failed("no").0, 60.0));
        }
        assert!(is_about(peer.connected().0, 15.0));
        assert!(is_about(peer.failed("no").0, 1.0));
    }

    #[test]
    fn pauses_differ() {
        let pauses: std::collections::HashSet<_> = (0..100)
            .map(|_| Reconnection::default().failed("no").0)
            .collect();
        assert!(pauses.len() > 20, "{pauses:?}");
    }

    #[test]
    fn only_what_is_new_is_told() {
        let mut peer = Reconnection::default();
        assert!(peer.failed("connection refused").1);
        assert!(!peer.failed("connection refused").1);
        assert!(!peer.failed("all dials failed: dial backoff").1);
        assert!(peer.failed("no route").1);
        assert!(peer.connected().1 && !peer.connected().1);
        assert!(peer.failed("dial backoff").1);
        assert!(peer.connected().1);
    }

    #[test]
    fn quick_deaths_are_counted_and_others_begin_anew() {
        let mut restarts = Restarts::new(3);
        assert!(is_about(restarts.died(SHORT).unwrap(), 0.1));
        assert!(is_about(restarts.died(SHORT).unwrap(), 0.2));
        assert!(is_about(restarts.died(QUICK_DEATH).unwrap(), 0.1));
        assert!(is_about(restarts.died(SHORT).unwrap(), 0.2));
        assert_eq!(restarts.died(SHORT), None);
        assert_eq!(restarts.deaths(), 3);
    }

    #[test]
    fn the_pauses_before_restarts_are_bounded() {
        let mut once = Restarts::new(1);
        assert_eq!(once.died(SHORT), None);
        let mut patient = Restarts::new(100);
        let pauses: Vec<_> = (0..99).map(|_| patient.died(SHORT).unwrap()).collect();
        assert!(is_about(pauses[98], 30.0));
    }
}
