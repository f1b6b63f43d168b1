//! A libp2p daemon: a host on rust-libp2p, and the server's side of the control protocol.

mod command;
mod config;
mod convert;
pub mod daemon;
mod dial;
mod error;
mod handle;
mod node;
pub mod server;
mod services;
mod stream;
mod swarm;

pub use config::{Config, Security};
pub use error::{DialCause, DialFailure, NodeError};
pub use handle::{
    HandlerError, IncomingCall, NodeHandle, PeerStream, Responder, Substream, UnaryClient,
    UnaryEvent,
};
pub use node::Node;
