//! Unary calls: the persistent connection of hivemind's fork, on which calls and replies in both
//! directions are matched by call ids and come in any order.
//!
//! [`client`] and [`server`] are its two ends as state machines. They encode only the head of a frame;
//! the driver sends the payload behind it. A large incoming payload is received straight into its
//! final place, which the driver provides as a [`Payload`].

mod call_id;
pub mod client;
mod encode;
mod message;
mod payload;
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
