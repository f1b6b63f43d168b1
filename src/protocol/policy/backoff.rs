//! Exponential backoff with jitter: how long to pause before the next attempt.

use std::time::Duration;

/// Pauses that double with each failure, up to a limit.
///
/// ```
/// use p2pd_protocol::policy::backoff::Backoff;
/// use std::time::Duration;
///
/// let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
/// let pause = backoff.next(0x9e37_79b9_7f4a_7c15); // a random number
/// assert!(pause <= Duration::from_secs(1));
/// backoff.reset(); // after a success
/// ```
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    limit: Duration,
    failures: u32,
}

impl Backoff {
    /// Starts at `first` and never exceeds `limit`.
    pub const fn new(first: Duration, limit: Duration) -> Self {
        Backoff {
            first,
            limit,
            failures: 0,
        }
    }

    /// Records a failure and returns the pause before the next attempt, with [`jitter`].
    ///
    /// `random` is a random number; its lowest eight bits are used.
    pub fn next(&mut self, random: u64) -> Duration {
        let factor = 2u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        jitter(self.first.saturating_mul(factor).min(self.limit), random)
    }

    /// Records a success: the next pause is the first one again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// Shortens a pause by up to 25 %, so that clients do not reconnect in lockstep.
///
/// `random` is a random number; its lowest eight bits are used.
pub fn jitter(pause: Duration, random: u64) -> Duration {
    let part = (random % 256) as u32;
    pause - pause / 4 * part / 256
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn doubles_up_to_the_limit_and_starts_over_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        for seconds in [1, 2, 4, 8, 10, 10] {
            assert_eq!(backoff.next(0), Duration::from_secs(seconds));
        }
        assert_eq!(backoff.failures(), 6);
        backoff.reset();
        assert_eq!(backoff.next(0), Duration::from_secs(1));
    }

    #[test]
    fn survives_any_number_of_failures() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::MAX);
        for _ in 0..100 {
            backoff.next(0);
        }
        assert_eq!(backoff.next(0), Duration::from_secs(u32::MAX.into()));
    }

    proptest! {
        #[test]
        fn jitter_takes_at_most_a_quarter(millis in 0u64..1 << 40, random: u64) {
            let pause = Duration::from_millis(millis);
            let jittered = jitter(pause, random);
            prop_assert!(jittered <= pause);
            prop_assert!(jittered >= pause - pause / 4);
        }
    }
}
