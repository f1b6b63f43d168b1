//! A libp2p daemon: a host on rust-libp2p, and the server's side of the control protocol.

pub mod daemon;
mod error;
mod handle;
mod node;
pub mod server;
mod services;
mod swarm;

pub use error::{DialCause, DialFailure, NodeError};
pub use handle::{
    HandlerError, IncomingCall, NodeHandle, PeerStream, Responder, Substream, UnaryClient,
    UnaryEvent,
};
pub use node::{Config, Node, Security};
