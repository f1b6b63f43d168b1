//! Daemons of both kinds for the tests, connected to each other, and raw control connections.
#![allow(dead_code)] // not every test program uses everything

use p2pd_client::Client;
use p2pd_manager::{P2PDaemon, P2PDaemonBuilder};
use p2pd_protocol::pb::p2pd::{
    persistent_connection_request::Message, persistent_connection_response::Message as Answer,
    AddUnaryHandlerRequest, PersistentConnectionRequest, PersistentConnectionResponse,
};
use p2pd_protocol::{framing, Multiaddr};
use p2pd_test_support::{bare_daemon, keep};
use prost::Message as _;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_p2pd-rs");

/// Kind of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Native,
    Go,
}
use Kind::{Go, Native};

/// The kinds of a caller's daemon and of its peer's.
pub const PAIRINGS: [(Kind, Kind); 4] = [(Native, Native), (Native, Go), (Go, Native), (Go, Go)];

/// The pairings with a native daemon, which the tests of its own behaviour need.
pub const WITH_NATIVE: [(Kind, Kind); 3] = [(Native, Native), (Native, Go), (Go, Native)];

/// A daemon that is not started yet.
pub fn builder(kind: Kind) -> P2PDaemonBuilder {
    match kind {
        Native => P2PDaemon::builder().binary(PROGRAM),
        Go => bare_daemon(),
    }
}

/// Starts a daemon, which stays although its clients go.
pub async fn start(kind: Kind) -> P2PDaemon {
    let daemon = builder(kind).spawn().await.unwrap();
    keep(&daemon);
    daemon
}

/// Two daemons, a client of each, and a connection between the daemons.
pub struct Two {
    pub near: P2PDaemon,
    pub far: P2PDaemon,
    /// A client of the near daemon.
    pub caller: Client,
    /// A client of the far daemon.
    pub server: Client,
}

impl Two {
    pub async fn connected((near, far): (Kind, Kind)) -> Self {
        let (near, far) = (start(near).await, start(far).await);
        let caller = near.client().await.unwrap();
        let server = far.client().await.unwrap();
        caller.connect(far.peer_id(), far.addrs()).await.unwrap();
        Self {
            near,
            far,
            caller,
            server,
        }
    }
}

/// A control connection without the client under test.
pub fn dial(control: &Multiaddr) -> UnixStream {
    let control = control.to_string();
    let socket = UnixStream::connect(control.strip_prefix("/unix").unwrap()).unwrap();
    let limit = Some(Duration::from_secs(20));
    socket.set_read_timeout(limit).unwrap();
    socket
}

/// Reads one message, without its length prefix.
pub fn read_frame(mut socket: &UnixStream) -> io::Result<Vec<u8>> {
    let (mut length, mut shift) = (0, 0);
    loop {
        let mut byte = [0];
        socket.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] < 0x80 {
            break;
        }
    }
    let mut frame = vec![0; length];
    socket.read_exact(&mut frame)?;
    Ok(frame)
}

/// A persistent connection that a test drives by hand, like a client that can be killed.
pub struct RawClient(pub UnixStream);

impl RawClient {
    pub fn connect(control: &Multiaddr) -> Self {
        let mut socket = dial(control);
        socket.write_all(&[2, 8, 9]).unwrap(); // Request{PERSISTENT_CONN_UPGRADE}
        assert_eq!(read_frame(&socket).unwrap(), [8, 0]); // Response{OK}
        Self(socket)
    }

    pub fn send(&self, id: [u8; 16], message: Message) {
        let request = PersistentConnectionRequest {
            call_id: Some(id.to_vec().into()),
            message: Some(message),
        };
        let frame = framing::encode_frame(&request);
        (&self.0).write_all(&frame).unwrap();
    }

    pub fn receive(&self) -> (Vec<u8>, Option<Answer>) {
        let frame = read_frame(&self.0).unwrap();
        let response = PersistentConnectionResponse::decode(&frame[..]).unwrap();
        (response.call_id.unwrap().to_vec(), response.message)
    }

    pub fn add_handler(&self, protocol: &str, balanced: bool) {
        let message = Message::AddUnaryHandler(AddUnaryHandlerRequest {
            proto: Some(protocol.to_owned()),
            balanced: Some(balanced),
        });
        self.send([1; 16], message);
        assert_eq!(self.receive(), (vec![1; 16], None));
    }
}
