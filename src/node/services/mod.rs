//! What the node does on its connections for its clients.

pub(crate) mod identify;
pub(crate) mod open;
pub(crate) mod peers;
mod registry;
mod round_robin;
pub(crate) mod streams;
pub(crate) mod unary;
