//! Client and daemon manager for the libp2p daemon (`p2pd`).
//!
//! The map of the crate:
//!
//! - [`client`] (feature `tokio`, on by default): the client for tokio, a driver of the core.
//! - [`daemon`]: starting and watching a daemon: [`P2PDaemon`](daemon::P2PDaemon) for tokio, and what it takes to
//!   start one without any event loop.
//! - [`core`]: the control protocol without I/O: bytes in, events out. Framing, messages, the
//!   request/response exchange, peer ids, multiaddrs, errors.
//! - `python` (feature `python`): the extension module `p2pclient_rs._native`, which drives the
//!   core from the readiness callbacks of asyncio, uvloop or trio.

pub mod core;
pub mod daemon;

#[cfg(feature = "tokio")]
pub mod client;
#[cfg(feature = "python")]
mod python;
#[cfg(feature = "process")]
// Without a driver there is little need of it.
#[cfg_attr(not(any(feature = "tokio", feature = "python")), allow(dead_code))]
mod sockets;

#[cfg(feature = "tokio")]
pub use client::Client;
