//! What the node does on its connections for its clients.

pub(crate) mod identify;
pub(crate) mod streams;
pub(crate) mod unary;
