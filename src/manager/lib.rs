//! Finds, starts, supervises and stops a libp2p daemon (`p2pd`).
//!
//! - [`P2PDaemon`] (feature `tokio`, on by default): a daemon, from its start to its end.
//! - [`process`]: its process, its files, and the watchdog that cleans up after it. Needs no event
//!   loop; the Python `Daemon` uses it, too.
//!
//! Without I/O:
//!
//! - [`options`]: the options, and the arguments that they become for each daemon.
//! - [`discovery`]: the search for the binary, and why a path was rejected.
//! - [`diagnosis`]: what the daemon's output says, and why it ended.
//! - [`start`]: whether a spawned daemon is ready, and the errors of a failed start.

#[cfg(feature = "tokio")]
mod daemon;
pub mod diagnosis;
pub mod discovery;
#[cfg(feature = "tokio")]
mod guard;
mod locks;
#[cfg(feature = "tokio")]
mod logs;
pub mod options;
pub mod process;
pub mod start;
#[cfg(feature = "tokio")]
mod startup;
#[cfg(feature = "tokio")]
mod supervisor;

#[cfg(feature = "tokio")]
pub use daemon::{P2PDaemon, P2PDaemonBuilder};
pub use diagnosis::{diagnose, excerpt, Startup};
pub use discovery::{find, NotFound, Search};
#[cfg(feature = "tokio")]
pub use logs::Logs;
pub use options::{
    Bootstrap, BootstrapPeer, ConnectionManager, DaemonOptions, Dht, Flavour, OptionsError, Pubsub,
};
pub use start::{DaemonError, StartError};
