//! Client and daemon manager for the libp2p daemon (`p2pd`).
//!
//! A daemon is a libp2p node that programs control over a socket. [`P2PDaemon`] starts one,
//! and a [`Client`] has it connect to peers, open and accept streams, query the DHT, publish and
//! subscribe, and call and serve hivemind's unary handlers.
//!
//! ```no_run
//! use p2pclient_rs::{daemon::Dht, P2PDaemon};
//!
//! # #[cfg(feature = "tokio")]
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let daemon = P2PDaemon::builder().dht(Dht::Server).relay(true).spawn().await?;
//! let client = daemon.client().await?;
//! for peer in client.list_peers().await? {
//!     println!("{} at {:?}", peer.peer_id, peer.addrs);
//! }
//! # Ok(()) }
//! ```
//!
//! # The map of the crate
//!
//! - [`client`] (feature `tokio`, on by default): the client for tokio, a driver of the core.
//! - [`daemon`]: a daemon's start, life and end: [`P2PDaemon`] for tokio, and what
//!   it takes to start one with no event loop.
//! - [`core`]: the control protocol without I/O: bytes in, events out. Framing, messages, the
//!   request/response exchange, peer ids, multiaddrs, errors.
//! - `python` (feature `python`): the extension module `p2pclient_rs._native`, which drives the
//!   core from the readiness callbacks of asyncio, uvloop or trio.

#![cfg_attr(
    not(feature = "tokio"),
    // What it speaks of is not there.
    allow(rustdoc::broken_intra_doc_links)
)]

pub mod core;
pub mod daemon;

#[cfg(feature = "tokio")]
pub mod client;
#[cfg(feature = "python")]
mod python;
#[cfg(feature = "process")]
// Without a driver there is little need of it.
#[cfg_attr(
    not(any(feature = "tokio", feature = "python")),
    allow(dead_code, unused_imports)
)]
mod sockets;

#[cfg(feature = "tokio")]
pub use client::Client;
#[cfg(feature = "tokio")]
pub use daemon::P2PDaemon;

// The guide's programs compile.
#[cfg(all(doctest, feature = "tokio"))]
#[doc = include_str!("../docs/rust.md")]
struct Guide;
