//! The phases of a daemon's shutdown.

use std::time::{Duration, Instant};

/// How long to wait for a killed process, which may be in an uninterruptible system call.
pub(super) const LAST_WAIT: Duration = Duration::from_secs(5);
/// How long to wait for processes that were killed with a wrapper script.
#[cfg(unix)]
pub(super) const LEFT_BEHIND: Duration = Duration::from_millis(500);

/// The state of a shutdown. The default has not begun.
#[derive(Debug, Default)]
pub(super) struct Shutdown {
    phase: Phase,
    /// When this phase began.
    begun: Option<Instant>,
}

/// What a shutdown waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Phase {
    /// The daemon, which is killed.
    #[default]
    Daemon,
    /// Processes that a wrapper script left behind, which may hold the control socket.
    #[cfg(unix)]
    Socket,
    /// The watchdog, which is killed unless there are files left for it to remove.
    #[cfg(unix)]
    Watchdog,
    /// Nothing more.
    Done,
}

impl Shutdown {
    pub(super) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Returns the phase and how long it has lasted. The first call begins the shutdown.
    pub(super) fn waiting_for(&mut self) -> (Phase, Duration) {
        let begun = self.begun.get_or_insert_with(Instant::now);
        (self.phase, begun.elapsed())
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.begun = Some(Instant::now());
    }
}
