//! Client and daemon manager for the libp2p daemon (`p2pd`).
//!
//! The map of the crate:
//!
//! - [`core`]: the control protocol without I/O: bytes in, events out. Framing, messages, the
//!   request/response exchange, peer ids, multiaddrs, errors.
//! - [`daemon`]: what it takes to start a daemon, also without I/O: options to arguments, where
//!   the binary may be, what its output means.
//! - `python` (feature `python`): the extension module `p2pclient_rs._native`, which drives the
//!   core from the readiness callbacks of asyncio, uvloop or trio.

pub mod core;
pub mod daemon;

#[cfg(feature = "python")]
mod python;
