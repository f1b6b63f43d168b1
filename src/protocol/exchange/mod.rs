//! One control connection as a state machine: [`client`] sends requests and reads replies,
//! [`server`] reads requests and sends replies.

pub mod client;
pub mod server;

/// Where a connection stands, seen from either end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It can take a request.
    Ready,
    /// A request is not answered yet.
    Busy,
    /// It carries a stream, a subscription or unary calls, and takes no more requests.
    Consumed,
    /// The protocol was violated or the connection lost.
    Failed,
}
