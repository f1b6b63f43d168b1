//! Lifecycle of a client's persistent connection: when it is opened, which handlers are registered
//! on it, and which operations wait for that.
//!
//! [`Lifecycle`] is a state machine without I/O. A driver reports events through its methods, takes
//! [`Action`]s from [`Lifecycle::poll`] until there are none, and calls [`Lifecycle::time`] at
//! [`Lifecycle::deadline`].
//!
//! - All operations that need a connection share one attempt to open it.
//! - A lost connection is replaced by the next operation, and, while there are handlers, by attempts
//!   with exponential backoff. A connection is ready when all handlers are registered on it again.
//! - Changes of one name follow one another, because the daemon does not keep the order of requests.
//! - A registration is sent a second time only if the first was not sent, and only once.

mod action;
mod handlers;
mod lifecycle;
mod reconnect;

pub use action::{Action, ConnectionId, Failure, Registration};
pub use lifecycle::Lifecycle;
pub use reconnect::Timing;
