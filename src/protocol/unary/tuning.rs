//! Read sizes, water marks and delays, the same for every driver of a persistent connection.

use std::time::Duration;

/// How much one read takes that is not into a payload's own place, in bytes.
pub const READ_SIZE: usize = 64 * 1024;

/// What is read behind a payload in the same system call, so that the next head comes with it, and
/// enough of a payload of 64 KiB, or of twice that, for room to be made for it.
pub const LOOK_AHEAD: usize = 8 * 1024;

/// How much is read before others get a turn, in bytes.
pub const READ_BUDGET: usize = 1024 * 1024;

/// While more than this waits to be sent, in bytes, callers wait, …
pub const HIGH_WATER: usize = 1024 * 1024;
/// … until no more than this does.
pub const LOW_WATER: usize = 256 * 1024;

/// How much room for what waits to be sent is kept, in bytes: for a hundred small calls.
pub const KEPT_OUTPUT: usize = 128 * 1024;

/// While more than this waits to be sent, in bytes, nothing is read: the replies to more calls
/// would only wait too. Far above the rest, for a daemon that writes before it reads on would
/// otherwise wait for us as we for it.
pub const MAX_OUTPUT: usize = 64 * 1024 * 1024;

/// Default of [`UnaryLimits::hold`].
pub const HOLD: Duration = Duration::from_secs(5);

/// How old a call is, at the least, when the daemon is told to cancel it: hivemind's crashes on a
/// cancel that it takes while it begins the call (it writes a reply that is nil).
pub const CANCEL_DELAY: Duration = Duration::from_millis(20);

/// How often what is to be said of cancelled calls is.
pub const CANCEL_INTERVAL: Duration = Duration::from_millis(50);
