//! Client and daemon manager for the libp2p daemon (`p2pd`).
//!
//! A daemon is a libp2p node that programs control over a socket. [`P2PDaemon`] starts one, and a
//! [`Client`] has it connect to peers, open and accept streams, query the DHT, publish and subscribe,
//! and call and serve hivemind's unary handlers.
//!
//! ```no_run
//! use p2pclient_rs::{manager::Dht, P2PDaemon};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let daemon = P2PDaemon::builder().dht(Dht::Server).relay(true).spawn().await?;
//! let client = daemon.client().await?;
//! for peer in client.list_peers().await? {
//!     println!("{} at {:?}", peer.peer_id, peer.addrs);
//! }
//! # Ok(()) }
//! ```
//!
//! # The map
//!
//! Each folder of `src/` is a crate, and each crate depends only on those above it:
//!
//! - [`protocol`]: the control protocol without I/O, both ends of it: bytes in, events out.
//! - `sockets`: listening sockets and private directories, without an event loop.
//! - [`client`]: the client for tokio.
//! - [`manager`]: finds, starts, watches and stops a daemon.
//! - `python`: the extension module `p2pclient_rs._native`, which drives the protocol from the
//!   readiness callbacks of asyncio, uvloop or trio.

#[doc(inline)]
pub use p2pd_client as client;
#[doc(inline)]
pub use p2pd_manager as manager;
#[doc(inline)]
pub use p2pd_protocol as protocol;

pub use client::Client;
pub use manager::P2PDaemon;

// The programs in the guide compile.
#[cfg(doctest)]
#[doc = include_str!("../docs/rust.md")]
struct Guide;
