//! The live connections, and the protocols that this node serves.
