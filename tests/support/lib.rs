//! Daemons, clients and helpers that the Rust tests and benchmarks share. Not published.
//!
//! - [`mock_daemon`]: a fast daemon without peers, for benchmarks; also the program `mock_daemon`.
//! - [`blocking_client`]: the fastest possible client, as a floor for benchmarks.
//! - [`fake_daemon`]: a daemon that the test scripts message by message, to inject faults.
//! - [`real_daemon`]: hivemind's p2pd.
//! - [`deadline`]: deadlines of tests.
//! - [`handlers`]: handlers of streams and calls.
//! - [`socket`]: blocking sockets.

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
