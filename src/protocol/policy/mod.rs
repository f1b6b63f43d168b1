//! Decisions that every driver of the protocol makes alike, as values and state machines without
//! I/O. The time and random numbers are arguments.
//!
//! - [`backoff`]: pauses before something is tried again.
//! - [`inbound`]: limits on inbound streams that have no header yet, and on log lines about them.
//! - [`persistent`]: the lifecycle of a persistent connection and its handlers.
//! - [`pool`]: which control connection a request uses, and how many requests may run at once.
//! - [`reconnection`]: when to connect to a peer again, and which outcomes to report.
//! - [`refusal`]: what the daemon means by refusing a request.
//! - [`registration`]: how a stream handler is registered where the daemon may have it already.
//! - [`retry`]: when a request is sent again.
//! - [`startup`]: the wait for a daemon that was spawned to become ready.
//! - [`supervision`]: restarts of a daemon, and connections to its bootstrap peers.

pub mod backoff;
pub mod inbound;
pub mod persistent;
pub mod pool;
pub mod reconnection;
pub mod refusal;
pub mod registration;
pub mod retry;
pub mod startup;
pub mod supervision;
