//! A daemon that has no peers and answers at once, so that only the cost of a client is seen: it
//! measures clients, not daemons. Rust benchmarks start it in a thread; for others it is a program:
//!
//! ```text
//! $ cargo run --release -p p2pd-test-support --bin mock_daemon /unix/tmp/mock.sock
//! Control socket: /unix/tmp/mock.sock
//! Peer ID: 12D3KooW…
//! Peer Addrs: /ip4/127.0.0.1/tcp/4001
//! ```
//!
//! - IDENTIFY, LIST_PEERS, CONNECT and the like get the same answer every time, any number of them on
//!   one connection. The daemon refuses all other requests, such as those of the DHT.
//! - STREAM_OPEN to any peer: `/echo` sends back, `/source` sends zeros as fast as the client reads
//!   them, `/sink` drops all bytes, and closes at its end. `/framed-source/SIZE` sends hivemind's
//!   messages (a byte, the length as 8 bytes, the body) with bodies of that size, without end.
//!   `/framed-sink` reads such messages, and answers one that begins with a 1 with the number of bytes
//!   of all the bodies so far, again as 8 bytes. Any other protocol is the registered handler's, to
//!   which the daemon connects as a real one does.
//! - Unary calls to any peer: `echo` is answered here, with at most one copy of the payload and one
//!   write for all the calls that one read brought. `load` is answered here too, when its work is done:
//!   its payload is `HANDLER SIZE PARALLEL COUNT`, and the daemon makes that many calls of that
//!   handler, that many at once. The reply is the time that took, in seconds, or an error if a reply of
//!   the handler was not its call's payload. Any other protocol is a handler's, on any persistent
//!   connection.
//!
//! A thread serves each connection, and it waits while a socket is full: a client that does not read
//! while it writes comes to a stop, as with the Go daemons. No lock is held during a write: all bytes
//! for a connection are queued, and the thread that is writing to it also writes what others add.

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

/// A daemon that listens for clients.
pub struct MockDaemon {
    listener: Listener,
    control: Multiaddr,
    shared: Shared,
}

impl MockDaemon {
    /// Listens at `control`; with port 0, at a free port.
    ///
    /// # Errors
    /// If it cannot listen there.
    pub fn bind(control: &Multiaddr) -> io::Result<Self> {
        let endpoint = control.endpoint().map_err(io::Error::other)?;
        let listener = Listener::bind(&endpoint)?;
        Ok(Self {
            control: listener.address(endpoint)?,
            listener,
            shared: Shared::new()?,
        })
    }

    /// Where its clients connect.
    pub fn control_maddr(&self) -> &Multiaddr {
        &self.control
    }

    /// The peer id in its answers.
    pub fn peer_id(&self) -> &PeerId {
        &self.shared.identity.peer_id
    }

    /// Where its peer can be reached, in its answers.
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
    /// If no thread can be started.
    pub fn spawn(self) -> io::Result<()> {
        thread::Builder::new().spawn(|| self.run()).map(drop)
    }
}

/// Serves one connection after another. The threads are kept, since starting one takes longer than
/// answering.
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
        // However it ended, the client must see the end.
        let _ = control::serve(&socket, shared);
        socket.shutdown(Shutdown::Both);
    }
}
