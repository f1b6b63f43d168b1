//! What the node does on its connections for its clients.

mod identify;
mod streams;
mod unary;
