//! Waiting for a spawned daemon to become ready: when to probe it, and when to give up.

use super::backoff::Backoff;
use std::time::Duration;

/// Time limit for finding out why no bootstrap peer could be reached.
pub const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(10);

const PROBE_BACKOFF: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(50));

/// What the driver does next for a [`Startup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Send IDENTIFY on a new connection, and pass the outcome to [`Startup::probed`]. Stop waiting
    /// for the reply at [`Startup::deadline`], or when the process ends.
    Probe,
    /// Wait until this time, or until the process ends.
    Wait(Duration),
    /// The daemon is ready.
    Ready,
    /// The daemon has ended, or was not ready in time.
    Failed,
}

/// The startup of a spawned daemon, until it is ready or has failed.
///
/// Times are measured from an arbitrary fixed moment, with a monotonic clock.
///
/// ```
/// use p2pd_protocol::policy::startup::{Startup, Step};
/// use std::time::Duration;
///
/// let mut startup = Startup::new(Duration::ZERO, Duration::from_secs(30));
/// assert_eq!(startup.step(Duration::ZERO), Step::Probe);
/// let now = Duration::from_millis(2);
/// startup.probed(Some("connection refused".into()), now);
/// assert_eq!(startup.step(now), Step::Wait(Duration::from_millis(3)));
/// ```
#[derive(Debug, Clone)]
pub struct Startup {
    deadline: Duration,
    next_probe: Duration,
    backoff: Backoff,
    reason: Option<String>,
    outcome: Option<Step>,
}

impl Startup {
    /// Begins the wait for a daemon that was spawned at `now` and has `limit` to become ready.
    pub fn new(now: Duration, limit: Duration) -> Self {
        Startup {
            deadline: now.saturating_add(limit),
            next_probe: now,
            backoff: PROBE_BACKOFF,
            reason: None,
            outcome: None,
        }
    }

    /// Returns what to do next.
    pub fn step(&self, now: Duration) -> Step {
        match self.outcome {
            Some(outcome) => outcome,
            None if now >= self.deadline => Step::Failed,
            None if now >= self.next_probe => Step::Probe,
            None => Step::Wait(self.next_probe.min(self.deadline)),
        }
    }

    /// Takes the outcome of a probe: `None` if the daemon is ready, otherwise why it is not.
    pub fn probed(&mut self, reason: Option<String>, now: Duration) {
        if self.outcome.is_some() {
            return;
        }
        if reason.is_none() {
            self.outcome = Some(Step::Ready);
            return;
        }
        self.reason = reason;
        self.next_probe = now + self.backoff.next(0);
    }

    /// Notes that the process has ended. The startup then fails, even if the daemon was ready before.
    pub fn ended(&mut self) {
        self.outcome = Some(Step::Failed);
    }

    /// When to stop waiting for the reply to a probe.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Why the last probe did not find the daemon ready.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(1);

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn probes_after_growing_pauses_until_the_daemon_is_ready() {
        let mut startup = Startup::new(ms(0), LIMIT);
        let mut now = ms(0);
        for pause in [1, 2, 4, 8, 16, 32, 50, 50] {
            assert_eq!(startup.step(now), Step::Probe);
            startup.probed(Some("no".into()), now);
            let next = now + ms(pause);
            assert_eq!(startup.step(now), Step::Wait(next));
            now = next;
        }
        assert_eq!(startup.reason(), Some("no"));
        startup.probed(None, now);
        assert_eq!(startup.step(now), Step::Ready);
        assert_eq!(startup.step(LIMIT), Step::Ready);
    }

    #[test]
    fn fails_at_the_deadline_and_never_waits_past_it() {
        let mut startup = Startup::new(ms(5), LIMIT);
        assert_eq!(startup.deadline(), ms(1005));
        for _ in 0..10 {
            startup.probed(Some("no".into()), ms(1000));
        }
        assert_eq!(startup.step(ms(1000)), Step::Wait(ms(1005)));
        assert_eq!(startup.step(ms(1005)), Step::Failed);
    }

    #[test]
    fn fails_when_the_process_ends_even_after_an_answer() {
        let mut startup = Startup::new(ms(0), LIMIT);
        startup.probed(None, ms(1));
        startup.ended();
        assert_eq!(startup.step(ms(1)), Step::Failed);
        startup.probed(None, ms(2));
        assert_eq!(startup.step(ms(2)), Step::Failed);
    }

    #[test]
    fn an_endless_limit_does_not_overflow() {
        let startup = Startup::new(ms(5), Duration::MAX);
        assert_eq!(startup.deadline(), Duration::MAX);
        assert_eq!(startup.step(ms(5)), Step::Probe);
    }
}
