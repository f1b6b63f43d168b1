//! Decisions that every driver of the protocol makes alike, as values and state machines without
//! I/O. The time and random numbers are arguments.
//!
//! - [`backoff`]: pauses before something is tried again.
//! - [`persistent`]: the lifecycle of a persistent connection and its handlers.

pub mod backoff;
pub mod persistent;
