//! Unary calls between local programs and peers.
