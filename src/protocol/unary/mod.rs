//! Unary calls over the persistent connection of hivemind's fork. Calls and replies go in both
//! directions and in any order; call ids match them.
//!
//! [`client`] and [`server`] are the two ends as state machines. They encode only the head of a frame;
//! the driver sends the payload after it. A large incoming payload is received directly into its final
//! buffer, which the driver provides as a [`Payload`].
//! [`peer`] has the messages of the streams between daemons.

mod call_id;
pub mod client;
mod encode;
mod message;
mod payload;
pub mod peer;
mod reader;
mod scan;
pub mod server;
mod skip;
mod tuning;

pub use call_id::CallId;
pub use client::{PersistentClient, UnaryEvent, UnaryLimits};
pub use payload::Payload;
pub use reader::{Receiving, MAX_PROTOBUF};
#[doc(hidden)] // for the drivers of this workspace
pub use tuning::{
    CANCEL_DELAY, CANCEL_INTERVAL, HIGH_WATER, HOLD, KEPT_OUTPUT, LOOK_AHEAD, LOW_WATER,
    MAX_OUTPUT, READ_BUDGET, READ_SIZE,
};
