//! Read sizes, water marks and delays that every driver of a persistent connection uses.

use std::time::Duration;

/// Size of one read into the driver's scratch buffer, in bytes.
pub const READ_SIZE: usize = 64 * 1024;

/// Size of the look-ahead, in bytes: the part of a read that goes past the end of a payload. One system
/// call then also returns the next head, and enough of a payload of up to 128 KiB to allocate its buffer.
pub const LOOK_AHEAD: usize = 8 * 1024;

/// Number of bytes read before other tasks may run.
pub const READ_BUDGET: usize = 1024 * 1024;

/// When the unsent output exceeds this many bytes, callers must wait.
pub const HIGH_WATER: usize = 1024 * 1024;
/// Waiting callers continue when the unsent output has shrunk to this many bytes.
pub const LOW_WATER: usize = 256 * 1024;

/// Largest output buffer that is kept for reuse, in bytes: enough for a hundred small calls.
pub const KEPT_OUTPUT: usize = 128 * 1024;

/// Reading stops while the unsent output exceeds this many bytes, since replies to more calls would make
/// it larger still. This limit is far above the other marks, to avoid a deadlock with a daemon that
/// writes before it reads.
pub const MAX_OUTPUT: usize = 64 * 1024 * 1024;

/// Default of [`UnaryLimits::hold`](super::UnaryLimits::hold).
pub const HOLD: Duration = Duration::from_secs(5);

/// Minimum age of a call before a Cancel is sent. hivemind's daemon crashes on a Cancel that arrives
/// while it starts the call (it writes a nil reply).
pub const CANCEL_DELAY: Duration = Duration::from_millis(20);

/// Interval between repeated Cancel messages.
pub const CANCEL_INTERVAL: Duration = Duration::from_millis(50);
