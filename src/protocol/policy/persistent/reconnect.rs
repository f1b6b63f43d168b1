//! Schedule for replacing a lost connection, if no operation needs one earlier.

use crate::policy::backoff::Backoff;
use std::time::{Duration, Instant};

/// Pauses between attempts to replace a lost connection.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(5));

/// Time in which a connection must be opened, with all handlers registered.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that lasted this long resets the backoff.
const STABLE: Duration = Duration::from_secs(1);

/// Timing of attempts to open a connection.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Timing {
    /// Time in which a connection must be opened, with all handlers registered. Default: 30 s.
    pub open_timeout: Duration,
    /// Pauses between attempts to replace a lost connection. Default: from 50 ms to 5 s.
    pub backoff: Backoff,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            open_timeout: OPEN_TIMEOUT,
            backoff: BACKOFF,
        }
    }
}

/// Schedule of the attempts to replace a lost connection.
#[derive(Debug)]
pub struct Reconnect {
    backoff: Backoff,
    random: u64,
    at: Option<Instant>,
}

impl Reconnect {
    /// `random` is a random number, used for jitter.
    pub fn new(backoff: Backoff, random: u64) -> Self {
        Reconnect {
            backoff,
            random,
            at: None,
        }
    }

    /// Time of the next attempt.
    pub fn at(&self) -> Option<Instant> {
        self.at
    }

    pub fn is_due(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// Schedules an attempt, unless one is already scheduled for later.
    pub fn schedule(&mut self, now: Instant) {
        if self.at.is_none_or(|at| at <= now) {
            // Knuth's linear congruential generator. Its upper bits are the better ones.
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            self.at = Some(now + self.backoff.next(self.random >> 33));
        }
    }

    pub fn cancel(&mut self) {
        self.at = None;
    }

    /// Notes the loss of a connection that was ready for this long.
    pub fn lost_after(&mut self, lasted: Duration) {
        if lasted >= STABLE {
            self.backoff.reset();
        }
    }
}
