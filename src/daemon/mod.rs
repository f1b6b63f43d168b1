//! What it takes to start a libp2p daemon, without starting it.
//!
//! - [`options`]: one list of options, and the arguments it makes for each daemon.
//! - [`discovery`]: where the binary may be, and why what is there will not do.
//! - [`diagnosis`]: what the daemon's output says, and what its end was caused by.
//!
//! The Python `Daemon` and a Rust spawner are both thin layers over these.

pub mod diagnosis;
pub mod discovery;
pub mod options;
#[cfg(feature = "process")]
pub mod process;
pub mod start;

pub use diagnosis::{diagnose, excerpt, Startup};
pub use discovery::{find, NotFound, Search};
pub use options::{ConnectionManager, DaemonOptions, Dht, Flavour, OptionsError, Pubsub};
pub use start::{DaemonError, StartError};
