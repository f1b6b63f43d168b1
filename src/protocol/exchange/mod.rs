//! One control connection as a state machine: [`client`] sends requests and reads replies,
//! [`server`] reads requests and sends replies.

pub mod client;
pub mod server;

/// State of a control connection, the same for both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is ready for a request.
    Ready,
    /// A request is not answered yet.
    Busy,
    /// It has become a stream, a subscription or a persistent connection, and takes no more requests.
    Consumed,
    /// The protocol was violated, or the connection was lost.
    Failed,
}
