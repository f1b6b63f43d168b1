//! The network: transports, connections and the negotiation of streams.

mod host;
mod muxer;
mod negotiate;
mod socket;
mod tls;
mod transport;
mod yamux;

pub use host::{Connection, Host, HostEvent, Service, Substream};
pub use negotiate::OpenError;
pub(crate) use transport::build;

#[cfg(test)]
mod tests;
