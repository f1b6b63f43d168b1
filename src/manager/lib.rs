//! Starting a libp2p daemon (`p2pd`), watching and stopping it.
//!
//! - [`P2PDaemon`] (feature `tokio`, on by default), a daemon from its start to its
//!   end.
//! - [`process`]: its process, its files, and what clears up after it; with no event loop. The
//!   Python `Daemon` rests on it too.
//!
//! The rest is without I/O:
//!
//! - [`options`]: one list of options, and the arguments it makes for each daemon.
//! - [`discovery`]: where the binary may be, and why what is there will not do.
//! - [`diagnosis`]: what the daemon's output says, and what its end was caused by.
//! - [`start`]: whether an answer may be believed, and the error of a daemon that does not come up.

#[cfg(feature = "tokio")]
mod daemon;
pub mod diagnosis;
pub mod discovery;
#[cfg(feature = "tokio")]
mod guard;
mod locks;
pub mod options;
pub mod process;
pub mod start;
#[cfg(feature = "tokio")]
mod startup;
#[cfg(feature = "tokio")]
mod supervisor;

#[cfg(feature = "tokio")]
pub use daemon::{Logs, P2PDaemon, P2PDaemonBuilder};
pub use diagnosis::{diagnose, excerpt, Startup};
pub use discovery::{find, NotFound, Search};
pub use options::{
    Bootstrap, BootstrapPeer, ConnectionManager, DaemonOptions, Dht, Flavour, OptionsError, Pubsub,
};
pub use start::{DaemonError, StartError};
