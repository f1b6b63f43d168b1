//! A daemon without peers that answers at once, so that a benchmark measures only the client. Rust benchmarks
//! start it in a thread; for others it is a program:
//!
//! ```text
//! $ cargo run --release -p p2pd-test-support --bin mock_daemon /unix/tmp/mock.sock
//! Control socket: /unix/tmp/mock.sock
//! Peer ID: 12D3KooW…
//! Peer Addrs: /ip4/127.0.0.1/tcp/4001
//! ```
//!
//! - IDENTIFY, LIST_PEERS, CONNECT and similar requests get a fixed answer. The daemon refuses all other
//!   requests, such as those of the DHT.
//! - STREAM_OPEN to any peer, by protocol:
//!   - `/echo` echoes.
//!   - `/source` sends zeros as fast as the client reads.
//!   - `/sink` drops all bytes, and closes when the client does.
//!   - `/framed-source/SIZE` sends an endless sequence of hivemind's messages (a byte, the length in 8
//!     bytes, the body) with bodies of that size.
//!   - `/framed-sink` reads such messages. It answers each one that begins with a 1 with the total size of
//!     all bodies so far, in 8 bytes.
//!   - For any other protocol the daemon connects to the registered handler, as a real one does.
//! - Unary calls to any peer, by protocol:
//!   - `echo` replies with the payload. The daemon copies it at most once, and writes the replies to all
//!     calls of one read together.
//!   - `load` has the payload `HANDLER SIZE PARALLEL COUNT`. The daemon makes COUNT calls of that handler
//!     with payloads of SIZE bytes, PARALLEL at once. It replies with the time for these, in seconds, or
//!     with an error if a reply was not an echo.
//!   - Calls of any other protocol go to the registered handler, on any persistent connection.
//!
//! Each connection has a thread, which blocks while the socket is full: a client that does not read while it
//! writes deadlocks, as with the Go daemons. No lock is held during a write: other threads queue bytes for
//! the connection, and the thread that is writing to it writes these too.

mod buffer;
mod connection;
mod control;
mod input;
mod limits;
mod load;
mod shared;
mod streams;
mod unary;

pub use streams::{
    frame_head, FRAMED_SINK, FRAMED_SOURCE, FRAME_BODY, FRAME_HEAD, STREAM_ECHO, STREAM_SINK,
    STREAM_SOURCE,
};
pub use unary::{UNARY_ECHO, UNARY_LOAD};

use crate::socket::Listener;
use limits::MAX_CONNECTIONS;
use p2pd_protocol::{Multiaddr, PeerId};
use shared::Shared;
use std::io;
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread;

/// A mock daemon.
pub struct MockDaemon {
    listener: Listener,
    control: Multiaddr,
    shared: Shared,
}

impl MockDaemon {
    /// Listens at `control`; with port 0, at a free port.
    ///
    /// # Errors
    /// The error of `bind`.
    pub fn bind(control: &Multiaddr) -> io::Result<Self> {
        let endpoint = control.endpoint().map_err(io::Error::other)?;
        let listener = Listener::bind(&endpoint)?;
        Ok(Self {
            control: listener.address(endpoint)?,
            listener,
            shared: Shared::new()?,
        })
    }

    /// Address at which clients connect.
    pub fn control_maddr(&self) -> &Multiaddr {
        &self.control
    }

    /// Peer id in the answers.
    pub fn peer_id(&self) -> &PeerId {
        &self.shared.identity.peer_id
    }

    /// Peer address in the answers.
    pub fn peer_addr(&self) -> &Multiaddr {
        &self.shared.identity.addrs[0]
    }

    /// Serves until the listener fails.
    ///
    /// # Errors
    /// The listener's error.
    pub fn run(self) -> io::Result<()> {
        work(&Arc::new(self))
    }

    /// Serves in threads of this process until it exits.
    ///
    /// # Errors
    /// The error of starting a thread.
    pub fn spawn(self) -> io::Result<()> {
        thread::Builder::new().spawn(|| self.run()).map(drop)
    }
}

/// Serves one connection after another. Threads are reused, since starting one takes longer than answering.
fn work(daemon: &Arc<MockDaemon>) -> io::Result<()> {
    let shared = &daemon.shared;
    loop {
        shared.idle.fetch_add(1, Ordering::Relaxed);
        let socket = daemon.listener.accept()?;
        if shared.idle.fetch_sub(1, Ordering::Relaxed) == 1 {
            // One thread must be idle for the next connection, unless there are too many.
            if shared.threads.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS {
                let daemon = daemon.clone();
                thread::Builder::new().spawn(move || work(&daemon))?;
            } else {
                shared.threads.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // The client must see the end of the connection, also after an error.
        let _ = control::serve(&socket, shared);
        socket.shutdown(Shutdown::Both);
    }
}
