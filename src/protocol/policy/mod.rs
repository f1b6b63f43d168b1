//! Decisions common to all drivers of the protocol, as values and state machines without I/O. Callers
//! pass in the time and random numbers.
//!
//! - [`backoff`]: pauses between attempts.
//! - [`inbound`]: limits on inbound streams that have no header yet, and on log lines about them.
//! - [`persistent`]: the lifecycle of a persistent connection and its handlers.
//! - [`pool`]: which control connection a request uses, and how many requests may run at once.
//! - [`reconnection`]: when to connect to a peer again, and which outcomes to report.
//! - [`refusal`]: why the daemon refused a request.
//! - [`registration`]: how to register a stream handler that the daemon may already have.
//! - [`retry`]: when to send a request again.
//! - [`startup`]: waiting for a spawned daemon to become ready.
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
