//! A fake daemon that the test scripts: the test accepts each connection and answers each request.

use crate::deadline::{within, Limit};
use bytes::{Buf as _, Bytes, BytesMut};
use p2pd_client::Client;
use p2pd_protocol::command::dht::{self, step};
use p2pd_protocol::command::{control, streams, Query as _, Request as _};
use p2pd_protocol::pb::p2pd::{self, request::Type};
use p2pd_protocol::{framing, Identity, Multiaddr, PeerId, PeerInfo, StreamInfo};
use prost::Message;
use socket2::SockRef;
use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{UnixListener, UnixStream};

/// A daemon that the test scripts.
pub struct FakeDaemon {
    listener: UnixListener,
    directory: TempDir,
    _limit: Limit,
}

impl FakeDaemon {
    /// Listens at a unix socket in a new directory.
    #[allow(clippy::new_without_default)] // it binds a socket
    pub fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("p2p-").tempdir().unwrap();
        Self {
            listener: UnixListener::bind(directory.path().join("control.sock")).unwrap(),
            directory,
            _limit: Limit::new(),
        }
    }

    /// Address at which clients connect.
    pub fn control(&self) -> Multiaddr {
        let path = self.directory.path().join("control.sock");
        format!("/unix{}", path.display()).parse().unwrap()
    }

    /// A client of this daemon.
    pub fn client(&self) -> Client {
        Client::new(self.control()).unwrap()
    }

    /// Accepts the next connection.
    pub async fn accept(&self) -> Connection {
        let (socket, _) = within("a connection", self.listener.accept())
            .await
            .unwrap();
        Connection::new(socket)
    }

    /// Asserts that no client has connected.
    pub fn nobody_connects(&self) {
        // Asks the operating system, since tokio may not know yet.
        let listener = self.listener.as_fd().try_clone_to_owned().unwrap();
        let accepted = std::os::unix::net::UnixListener::from(listener).accept();
        assert_eq!(accepted.unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    /// Limits the accept queue to one connection.
    pub fn is_busy(&self) {
        SockRef::from(&self.listener).listen(0).unwrap();
    }

    /// Restarts the daemon at the same address.
    pub fn restart(self) -> Self {
        let Self {
            listener,
            directory,
            _limit,
        } = self;
        drop(listener);
        let path = directory.path().join("control.sock");
        std::fs::remove_file(&path).unwrap();
        Self {
            listener: UnixListener::bind(path).unwrap(),
            directory,
            _limit,
        }
    }
}

/// The daemon's end of a connection.
pub struct Connection {
    socket: UnixStream,
    input: BytesMut,
}

impl Connection {
    /// A connection over this socket.
    pub fn new(socket: UnixStream) -> Self {
        let input = BytesMut::new();
        Self { socket, input }
    }

    /// Reads the next message; `None` at the end of the connection.
    pub async fn frame(&mut self) -> Option<Bytes> {
        loop {
            let frame = framing::split_frame(&mut self.input, 16 << 20).unwrap();
            if frame.is_some() {
                return frame;
            }
            let read = self.socket.read_buf(&mut self.input);
            if within("a message", read).await.unwrap() == 0 {
                assert!(self.input.is_empty(), "it ended in a message");
                return None;
            }
        }
    }

    /// Reads the next message, and panics at the end of the connection.
    pub async fn message<T: Message + Default>(&mut self) -> T {
        let frame = self.frame().await.expect("the client has closed");
        T::decode(frame).unwrap()
    }

    /// Reads the next request, and panics at the end of the connection.
    pub async fn request(&mut self) -> p2pd::Request {
        self.message().await
    }

    /// Sends bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        within("room", self.socket.write_all(bytes)).await.unwrap();
    }

    /// Sends a message.
    pub async fn answer(&mut self, message: impl Message) {
        self.send(&framing::encode_frame(&message)).await;
    }

    /// Sends at once, without letting other tasks run.
    pub fn push(&mut self, bytes: &[u8]) {
        assert_eq!(self.socket.try_write(bytes).unwrap(), bytes.len());
    }

    /// Answers an IDENTIFY request.
    pub async fn identifies(&mut self) {
        assert_eq!(self.request().await.r#type, Some(Type::Identify as i32));
        self.answer(identity()).await;
    }

    /// Answers all requests with success until the client closes.
    pub async fn oblige(mut self) {
        while let Some(frame) = self.frame().await {
            let request = p2pd::Request::decode(frame).unwrap();
            let is_identify = request.r#type == Some(Type::Identify as i32);
            self.answer(if is_identify { identity() } else { ok() })
                .await;
        }
    }

    /// Waits until the client closes, and panics if it sends anything.
    pub async fn ended(mut self) {
        let frame = self.frame().await;
        assert_eq!(frame, None, "the client sent something");
    }

    /// Waits for the client to close or reset the connection; false if it sends something instead.
    pub async fn is_closed(&mut self) -> bool {
        let read = within("the end", self.socket.read(&mut [0])).await;
        !matches!(read, Ok(1))
    }

    /// Waits until bytes arrive, and does not read them.
    pub async fn readable(&self) {
        let peek = || SockRef::from(&self.socket).peek(&mut [MaybeUninit::uninit()]);
        let peeked = self.socket.async_io(Interest::READABLE, peek);
        assert_eq!(within("a byte", peeked).await.unwrap(), 1);
    }

    /// Closes the daemon's write side.
    pub async fn end(&mut self) {
        // Fails if the client closed first.
        let _ = self.socket.shutdown().await;
    }

    /// Reads the next `count` bytes, such as the data of a stream.
    pub async fn bytes(&mut self, count: usize) -> Bytes {
        while self.input.len() < count {
            let read = self.socket.read_buf(&mut self.input);
            assert_ne!(within("bytes", read).await.unwrap(), 0, "the end");
        }
        self.input.copy_to_bytes(count)
    }
}

/// The peer in all replies.
pub fn peer() -> PeerId {
    PeerId::from_bytes([&[0, 36, 8, 1, 18, 32][..], &[7; 32]].concat())
}

/// The address in all replies.
pub fn addr() -> Multiaddr {
    "/ip4/127.0.0.1/tcp/4001".parse().unwrap()
}

/// The peer with its address.
pub fn peer_info() -> p2pd::PeerInfo {
    let info = PeerInfo {
        peer_id: peer(),
        addrs: vec![addr()],
    };
    control::ListPeers::encode_reply(&vec![info])
        .peers
        .remove(0)
}

/// The response to a request that succeeded.
pub fn ok() -> p2pd::Response {
    control::Connect::encode_reply(&())
}

/// The response to IDENTIFY.
pub fn identity() -> p2pd::Response {
    control::Identify::encode_reply(&Identity::new(peer(), vec![addr()]))
}

/// The header of a stream of `protocol`.
pub fn stream_info(protocol: &str) -> p2pd::StreamInfo {
    let info = StreamInfo {
        peer_id: peer(),
        addr: addr(),
        protocol: protocol.to_owned(),
    };
    let opened = streams::StreamOpen::encode_reply(&info);
    opened.stream_info.expect("a stream was opened")
}

/// A part of the answer to a DHT query.
pub fn dht(r#type: p2pd::dht_response::Type, value: &'static str) -> p2pd::DhtResponse {
    match (r#type, value) {
        (p2pd::dht_response::Type::Value, value) if !value.is_empty() => {
            dht::SearchValue::encode_value(&value.into())
        }
        (r#type, _) => step(r#type),
    }
}
