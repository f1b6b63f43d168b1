//! Lifecycle of a client's persistent connection: when it is opened, and which handlers are
//! registered on it.
//!
//! [`Lifecycle`] is a state machine without I/O. After each method call, the driver carries out the
//! [`Action`]s of [`Lifecycle::poll`]. It calls [`Lifecycle::time`] at [`Lifecycle::deadline`].
//!
//! - All operations that need a connection share one attempt to open it.
//! - The next operation replaces a lost connection. While there are handlers, the lifecycle also
//!   replaces it by itself, with exponential backoff. A connection is ready when all handlers are
//!   registered on it again.
//! - Requests about one name are sent one after another, because the daemon does not keep their order.
//! - A registration is sent again only if it could not be sent the first time, and only once.

mod action;
mod handlers;
mod lifecycle;
mod reconnect;

pub use action::{Action, ConnectionId, Failure, Registration};
pub use lifecycle::Lifecycle;
pub use reconnect::Timing;
