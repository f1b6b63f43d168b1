//! One control connection of a client.
