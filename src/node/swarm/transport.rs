//! TCP with noise or TLS, and yamux.
