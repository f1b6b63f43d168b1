//! Serves streams, or forwards them to registered handlers.

use super::input::Input;
use super::shared::{Failure, Shared};
use crate::lock::lock;
use crate::socket::Socket;
use p2pd_protocol::command::streams;
use p2pd_protocol::{Multiaddr, StreamInfo};
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::thread;

/// The protocol of streams that echo.
pub const STREAM_ECHO: &str = "/echo";
/// The protocol of streams that send zeros.
pub const STREAM_SOURCE: &str = "/source";
/// The protocol of streams that drop all bytes.
pub const STREAM_SINK: &str = "/sink";
/// Prefix of the protocol of streams that send hivemind's messages; the size of the bodies follows.
pub const FRAMED_SOURCE: &str = "/framed-source/";
/// The protocol of streams that read hivemind's messages.
pub const FRAMED_SINK: &str = "/framed-sink";

/// Size of the head of hivemind's messages: a byte that says whether the sink must answer, and the body's
/// length.
pub const FRAME_HEAD: usize = 9;
/// The byte that fills the bodies.
pub const FRAME_BODY: u8 = 7;

/// Encodes the head of one of hivemind's messages.
pub fn frame_head(is_last: bool, len: u64) -> [u8; FRAME_HEAD] {
    let mut head = [u8::from(is_last); FRAME_HEAD];
    head[1..].copy_from_slice(&len.to_be_bytes());
    head
}

/// Size of one write, in bytes.
const CHUNK: usize = 256 << 10;

/// Service of a stream.
pub(super) enum Service {
    Echo,
    Source,
    Sink,
    FramedSource(u64),
    FramedSink,
    Handler(Socket),
}

impl Service {
    /// Finds the service of the first supported protocol, or returns an error message.
    pub(super) fn find(
        protocols: &[String],
        shared: &Shared,
    ) -> Result<(Self, StreamInfo), String> {
        for protocol in protocols {
            let info = StreamInfo {
                peer_id: shared.identity.peer_id.clone(),
                addr: shared.identity.addrs[0].clone(),
                protocol: protocol.clone(),
            };
            let size = protocol.strip_prefix(FRAMED_SOURCE);
            let service = match (protocol.as_str(), size.and_then(|size| size.parse().ok())) {
                (STREAM_ECHO, _) => Self::Echo,
                (STREAM_SOURCE, _) => Self::Source,
                (STREAM_SINK, _) => Self::Sink,
                (FRAMED_SINK, _) => Self::FramedSink,
                (_, Some(size)) => Self::FramedSource(size),
                _ => match lock(&shared.stream_handlers).get(protocol).cloned() {
                    Some(addr) => Self::handler(&addr, &info)
                        .map_err(|error| format!("the handler at {addr}: {error}"))?,
                    None => continue,
                },
            };
            return Ok((service, info));
        }
        Err(format!("protocols not supported: {protocols:?}"))
    }

    /// Connects to a registered handler.
    fn handler(addr: &Multiaddr, info: &StreamInfo) -> Result<Self, Failure> {
        let handler = Socket::connect(&addr.endpoint()?)?;
        (&handler).write_all(&streams::encode_stream_info(info))?;
        Ok(Self::Handler(handler))
    }

    /// Serves a stream until it ends.
    pub(super) fn run(self, mut socket: &Socket, mut input: Input) -> Result<(), Failure> {
        match self {
            Self::Echo => loop {
                socket.write_all(input.take())?;
                if input.fill(socket, &mut [])? == 0 {
                    return Ok(());
                }
            },
            Self::Source => {
                let zeros = vec![0; CHUNK];
                loop {
                    socket.write_all(&zeros)?;
                }
            }
            Self::Sink => loop {
                input.take();
                if input.fill(socket, &mut [])? == 0 {
                    return Ok(());
                }
            },
            Self::FramedSource(size) => send_messages(socket, size)?,
            Self::FramedSink => take_messages(socket, &mut input)?,
            Self::Handler(handler) => {
                (&handler).write_all(input.take())?;
                pipe(socket, &handler)?;
            }
        }
        Ok(())
    }
}

/// Sends hivemind's messages until the client closes.
fn send_messages(mut socket: &Socket, size: u64) -> io::Result<()> {
    let mut first = frame_head(false, size).to_vec();
    first.resize(FRAME_HEAD + size.min(CHUNK as u64) as usize, FRAME_BODY);
    let body = vec![FRAME_BODY; CHUNK];
    loop {
        socket.write_all(&first)?;
        let mut left = size - (first.len() - FRAME_HEAD) as u64;
        while left > 0 {
            let count = left.min(CHUNK as u64);
            socket.write_all(&body[..count as usize])?;
            left -= count;
        }
    }
}

/// Reads hivemind's messages until the stream ends, and answers those that request it.
fn take_messages(mut socket: &Socket, input: &mut Input) -> io::Result<()> {
    let (mut bodies, mut left, mut is_last) = (0, 0, false);
    loop {
        let mut bytes = input.peek();
        loop {
            let body = left.min(bytes.len() as u64);
            left -= body;
            bodies += body;
            bytes = &bytes[body as usize..];
            if left == 0 && is_last {
                socket.write_all(&u64::to_be_bytes(bodies))?;
                is_last = false;
            }
            if left > 0 {
                break;
            }
            let Some((head, rest)) = bytes.split_first_chunk::<FRAME_HEAD>() else {
                break;
            };
            is_last = head[0] == 1;
            left = head[1..]
                .iter()
                .fold(0, |len, byte| len << 8 | u64::from(*byte));
            bytes = rest;
        }
        let rest = bytes.len();
        input.keep(rest);
        if input.fill(socket, &mut [])? == 0 {
            return Ok(());
        }
    }
}

/// Copies between two sockets in both directions until both have ended.
fn pipe(near: &Socket, far: &Socket) -> io::Result<()> {
    fn pass(from: &Socket, mut to: &Socket) {
        let mut input = Input::default();
        // On an error one of them is closed, and the other must see the end.
        while input.fill(from, &mut []).unwrap_or(0) > 0 && to.write_all(input.take()).is_ok() {}
        to.shutdown(Shutdown::Write);
    }
    thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, || pass(near, far))?;
        pass(far, near);
        Ok(())
    })
}
