//! The sockets on which clients connect.
