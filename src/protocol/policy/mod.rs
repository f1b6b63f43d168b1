//! Decisions that every driver of the protocol makes alike, as values and state machines without
//! I/O. The time and random numbers are arguments.
//!
//! - [`backoff`]: pauses before something is tried again.

pub mod backoff;
