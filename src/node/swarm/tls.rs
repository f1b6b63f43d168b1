//! TLS 1.3 between peers.
