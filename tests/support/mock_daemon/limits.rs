//! Limits of the daemon.

/// Largest message, in bytes.
pub(super) const MAX_FRAME: usize = 16 << 20;
/// Largest number of handlers, of streams and of calls each.
pub(super) const MAX_HANDLERS: usize = 1024;
/// Largest number of connections.
pub(super) const MAX_CONNECTIONS: usize = 4096;
