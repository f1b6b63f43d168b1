//! Passes bytes between a peer's stream and a client's socket.
