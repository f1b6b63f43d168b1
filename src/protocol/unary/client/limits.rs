//! Limits of a persistent connection, as its client sees it.

use crate::unary::tuning::HOLD;
use std::time::Duration;

/// Default difference between the largest message to receive and the largest one to send, in bytes. The
/// daemon checks the size of a peer's call before it adds the peer's id to it.
const INCOMING_ALLOWANCE: usize = 64 << 10;

/// Limits of a persistent connection. [`PersistentClient::set_limits`](super::PersistentClient::set_limits) changes them at any time.
///
/// ```
/// use p2pd_protocol::UnaryLimits;
///
/// // Messages of up to 16 MiB, and at most 100 incoming calls at once.
/// let limits = UnaryLimits::default()
///     .with_max_message(16 << 20)
///     .with_max_unanswered(100);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnaryLimits {
    /// Largest message to send, without its length prefix, in bytes. The daemon closes the
    /// connection on a larger one (its `-persistentConnMaxMsgSize`). Default: 4 MiB.
    pub max_message: usize,
    /// Largest message to receive, in bytes. A larger one is skipped; only its call fails. Default:
    /// `None`, which means `max_message` plus 64 KiB. [`MAX_PROTOBUF`](crate::unary::MAX_PROTOBUF) means
    /// no limit.
    pub max_incoming: Option<usize>,
    /// Number of incoming calls in progress above which no more are read. Default: 4096; `usize::MAX`
    /// for no limit.
    pub max_unanswered: usize,
    /// Total payload size of the incoming calls in progress, in bytes, above which no more are read.
    /// Default: 64 MiB; `usize::MAX` for no limit.
    pub max_unanswered_bytes: usize,
    /// Time that reading may pause because of the two limits above. After that, calls over the limits
    /// are refused, so that the cancels and the end of the connection behind them can be read. Default:
    /// 5 s; `None` never refuses.
    pub hold: Option<Duration>,
}

impl Default for UnaryLimits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_incoming: None,
            max_unanswered: 4096,
            max_unanswered_bytes: 64 << 20,
            hold: Some(HOLD),
        }
    }
}

impl UnaryLimits {
    /// Sets [`max_message`](Self::max_message), in bytes.
    #[must_use]
    pub fn with_max_message(mut self, bytes: usize) -> Self {
        self.max_message = bytes;
        self
    }

    /// Sets [`max_incoming`](Self::max_incoming), in bytes.
    #[must_use]
    pub fn with_max_incoming(mut self, bytes: impl Into<Option<usize>>) -> Self {
        self.max_incoming = bytes.into();
        self
    }

    /// Sets [`max_unanswered`](Self::max_unanswered), a number of calls.
    #[must_use]
    pub fn with_max_unanswered(mut self, calls: usize) -> Self {
        self.max_unanswered = calls;
        self
    }

    /// Sets [`max_unanswered_bytes`](Self::max_unanswered_bytes).
    #[must_use]
    pub fn with_max_unanswered_bytes(mut self, bytes: usize) -> Self {
        self.max_unanswered_bytes = bytes;
        self
    }

    /// Sets [`hold`](Self::hold).
    #[must_use]
    pub fn with_hold(mut self, hold: impl Into<Option<Duration>>) -> Self {
        self.hold = hold.into();
        self
    }

    /// Largest message to receive, in bytes.
    pub(super) fn incoming(&self) -> usize {
        let default = self.max_message.saturating_add(INCOMING_ALLOWANCE);
        self.max_incoming.unwrap_or(default)
    }
}
