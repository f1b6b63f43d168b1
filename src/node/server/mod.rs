//! The control protocol: requests of clients, carried out by a node.

mod listener;
mod persistent;
mod pipe;
mod session;
