//! What the Rust tests and benchmarks share. Not published.
//!
//! - [`mock_daemon`]: a daemon that answers at once, for benchmarks; also the program `mock_daemon`.
//! - [`blocking_client`]: the client that no other can be faster than.
//! - [`fake_daemon`]: a daemon whose part the test plays, for faults.
//! - [`real_daemon`]: hivemind's p2pd.
//! - [`deadline`]: an end to every test.
//! - [`handlers`]: handlers of streams and calls.

pub mod blocking_client;
#[cfg(unix)]
pub mod deadline;
#[cfg(unix)]
pub mod fake_daemon;
#[cfg(unix)]
pub mod handlers;
mod lock;
pub mod mock_daemon;
#[cfg(unix)]
pub mod real_daemon;
pub mod socket;

#[cfg(unix)]
pub use {deadline::*, handlers::*, real_daemon::*};
