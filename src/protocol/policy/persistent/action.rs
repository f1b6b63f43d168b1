//! Actions that the lifecycle requests, and the outcomes that the driver reports.

use std::time::Duration;

/// Identifies a connection from the attempt to open it until it is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionId(pub u64);

/// Request to the driver.
#[derive(Debug, PartialEq, Eq)]
pub enum Action<T, E> {
    /// Open a connection, and report [`Lifecycle::opened`](super::Lifecycle::opened) or [`Lifecycle::open_failed`](super::Lifecycle::open_failed).
    Open(ConnectionId),
    /// Stop opening the connection. No report is needed.
    CancelOpen(ConnectionId),
    /// Close the connection, unless it is lost.
    Close,
    /// The connection can be used for calls.
    Ready,
    /// Pass the calls for `name` to the handler that was added with `token`.
    Serve {
        /// Name of the handler.
        name: String,
        /// Token of [`Lifecycle::add`](super::Lifecycle::add).
        token: T,
    },
    /// Drop the handler of this name.
    Forget(String),
    /// Send a request to register the handler, and report [`Lifecycle::registered`](super::Lifecycle::registered).
    Register {
        /// Name of the handler.
        name: String,
        /// Whether several clients may serve the name.
        balanced: bool,
    },
    /// Send a request to unregister the handler, and report [`Lifecycle::unregistered`](super::Lifecycle::unregistered).
    Unregister(String),
    /// Tell the user that a handler was dropped: another client has taken its name.
    Report {
        /// Name of the handler.
        name: String,
        /// The daemon's refusal.
        error: E,
    },
    /// Complete these operations.
    Complete {
        /// Tokens of the operations.
        tokens: Vec<T>,
        /// Their result.
        outcome: Result<(), Failure<E>>,
    },
}

/// Reason why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure<E> {
    /// An error that the driver reported.
    Driver(E),
    /// This client already serves the name.
    AlreadyRegistered,
    /// This client does not serve the name.
    NotRegistered,
    /// The connection could not be opened within this time.
    TimedOut(Duration),
    /// The client was closed.
    Closed,
}

/// Outcome of a request to register a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Registration<E> {
    /// The daemon acknowledged it.
    Accepted,
    /// The daemon refused it.
    Refused(E),
    /// The connection was lost before the whole request was sent.
    Unsent(E),
    /// There is no valid reply: the daemon may have carried it out.
    Failed(E),
}

impl<E> Registration<E> {
    pub(super) fn into_result(self) -> Result<(), E> {
        match self {
            Self::Accepted => Ok(()),
            Self::Refused(error) | Self::Unsent(error) | Self::Failed(error) => Err(error),
        }
    }
}
