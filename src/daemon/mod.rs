//! Starting a libp2p daemon (`p2pd`), watching and stopping it.
//!
//! - [`manager`] (feature `tokio`, on by default): [`P2PDaemon`], a daemon from its start to its
//!   end.
//! - [`process`]: its process, its files, and what clears up after it; with no event loop. The
//!   Python `Daemon` rests on it too.
//!
//! The rest is without I/O:
//!
//! - [`options`]: one list of options, and the arguments it makes for each daemon.
//! - [`discovery`]: where the binary may be, and why what is there will not do.
//! - [`diagnosis`]: what the daemon's output says, and what its end was caused by.
//! - [`retry`]: when to start it, or to connect to a bootstrap peer, again.
//! - [`start`]: whether an answer may be believed, and the error of a daemon that does not come up.

pub mod diagnosis;
pub mod discovery;
#[cfg(feature = "tokio")]
mod keeper;
#[cfg(feature = "tokio")]
pub mod manager;
pub mod options;
#[cfg(feature = "process")]
pub mod process;
#[cfg(feature = "process")]
pub mod retry;
pub mod start;

pub use diagnosis::{diagnose, excerpt, Startup};
pub use discovery::{find, NotFound, Search};
#[cfg(feature = "tokio")]
pub use manager::{Logs, P2PDaemon, P2PDaemonBuilder};
pub use options::{
    Bootstrap, BootstrapPeer, ConnectionManager, DaemonOptions, Dht, Flavour, OptionsError, Pubsub,
};
pub use start::{DaemonError, StartError};
