//! The network: transports, connections and the negotiation of streams.

mod host;
mod muxer;
mod negotiate;
mod tls;
mod transport;
mod yamux;

pub use host::{Connection, Host, HostEvent, OpenError, Service, Substream};
pub(crate) use transport::build;
