//! The blocking client: it writes the same frames as other clients and counts the bytes that come back. No
//! client on that socket can be faster. It works only with the mock daemon, and panics on every error.

use crate::socket::Socket;
use bytes::BytesMut;
use p2pd_protocol::command::{streams::StreamOpen, unary::Upgrade, Typed as _};
use p2pd_protocol::{EncodedRequest, Multiaddr, PeerId, PersistentClient, UnaryEvent, UnaryLimits};
use std::io::{Read, Write};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Size of reads and writes, in bytes.
pub const CHUNK: usize = 256 << 10;
/// The byte that fills the payloads.
const PAYLOAD: u8 = 7;

/// A connection of the blocking client.
pub struct BlockingClient {
    socket: Socket,
    buffer: Vec<u8>,
}

impl BlockingClient {
    /// Connects.
    pub fn connect(control: &Multiaddr) -> Self {
        let endpoint = control.endpoint().expect("a control address");
        Self {
            socket: Socket::connect(&endpoint).expect("the mock daemon listens"),
            buffer: Vec::new(),
        }
    }

    /// Opens a stream.
    pub fn open(control: &Multiaddr, peer_id: &PeerId, protocol: &str) -> Self {
        let mut floor = Self::connect(control);
        let request = StreamOpen {
            peer: peer_id.clone(),
            protocols: vec![protocol.to_owned()],
            timeout: None,
        }
        .encoded();
        floor.write(request.frame());
        // Reads the answer, whose length is in the first byte, and nothing of the stream.
        floor.read(1);
        floor.read(usize::from(floor.buffer[0]));
        floor
    }

    /// Sends bytes.
    pub fn write(&self, bytes: &[u8]) {
        write(&self.socket, bytes);
    }

    /// Reads `count` bytes. Only those of the last read are kept, for [`last`](Self::last).
    pub fn read(&mut self, count: usize) {
        read(&self.socket, &mut self.buffer, count);
    }

    /// The buffer of the last read.
    pub fn last(&self) -> &[u8] {
        &self.buffer
    }

    /// Sends a request; returns the size of its answer, in bytes.
    pub fn first(&mut self, request: &EncodedRequest) -> usize {
        self.write(request.frame());
        let mut answer = [0; 256];
        let read = (&self.socket).read(&mut answer);
        let read = read.expect("the mock daemon answers");
        // The answers are short and arrive in one piece.
        assert_eq!(read, 1 + usize::from(answer[0]));
        read
    }
}

fn write(mut socket: &Socket, bytes: &[u8]) {
    socket.write_all(bytes).expect("the mock daemon reads");
}

/// Reads `count` bytes; returns the offset of the last one in the buffer.
fn read(mut socket: &Socket, buffer: &mut Vec<u8>, mut count: usize) -> usize {
    buffer.resize(CHUNK, 0);
    let mut last = 0;
    while count > 0 {
        let len = buffer.len().min(count);
        let read = socket.read(&mut buffer[..len]);
        let read = read.expect("the mock daemon answers");
        assert!(read > 0, "the mock daemon is gone");
        count -= read;
        last = read - 1;
    }
    last
}

/// Unary calls of the blocking client, many at once.
pub struct Calls {
    floor: BlockingClient,
    /// Calls that are written at once, the offsets of their ids, and the size of their replies.
    batch: Vec<u8>,
    ids: Vec<usize>,
    replies: usize,
    /// Number of batches in flight.
    window: usize,
    counter: u64,
}

impl Calls {
    /// Connects. The calls have payloads of `size` bytes; at least `parallel` of them are in flight.
    pub fn new(
        control: &Multiaddr,
        peer_id: &PeerId,
        protocol: &str,
        size: usize,
        parallel: usize,
    ) -> Self {
        let mut floor = BlockingClient::connect(control);
        floor.first(&Upgrade.encoded());
        let count = (CHUNK / 4 / size).min(parallel / 4).max(1);
        let mut client = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
        let (mut batch, mut ids) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let mut head = BytesMut::new();
            let peer = peer_id.as_bytes();
            let id = client
                .call(peer, protocol, size, (), Instant::now(), &mut head)
                .expect("it is small enough");
            let place = head.windows(id.len()).position(|bytes| bytes == id);
            ids.push(batch.len() + place.expect("the id is in the head"));
            batch.extend_from_slice(&head);
            batch.resize(batch.len() + size, PAYLOAD);
        }
        // The call id, and two headers around the payload.
        let inner = 1 + prost::length_delimiter_len(size) + size;
        let reply = 18 + 1 + prost::length_delimiter_len(inner) + inner;
        Self {
            floor,
            batch,
            replies: (prost::length_delimiter_len(reply) + reply) * count,
            window: parallel / count,
            ids,
            counter: 0,
        }
    }

    /// Makes at least this many calls; returns the time for exactly that many.
    pub fn run(&mut self, calls: u64) -> Duration {
        let count = self.ids.len() as u64;
        let batches = calls.div_ceil(count);
        let Self {
            floor: BlockingClient { socket, buffer },
            batch,
            ids,
            replies,
            counter,
            ..
        } = self;
        let socket = &*socket;
        let mut call = || {
            for id in &*ids {
                *counter += 1;
                batch[*id..id + 8].copy_from_slice(&counter.to_le_bytes());
            }
            write(socket, batch);
        };
        let (start, mut last) = (Instant::now(), 0);
        if self.window == 1 {
            for _ in 0..batches {
                call();
                last = read(socket, buffer, *replies);
            }
        } else {
            let (replied, may_call) = mpsc::channel();
            (0..self.window).for_each(|_| replied.send(()).expect("it is held below"));
            last = thread::scope(move |scope| {
                scope.spawn(move || {
                    for _ in 0..batches {
                        may_call.recv().expect("it is held below");
                        call();
                    }
                });
                for _ in 0..batches {
                    last = read(socket, buffer, *replies);
                    let _ = replied.send(()); // the last permits are not used
                }
                last
            });
        }
        let elapsed = start.elapsed();
        // The last byte is the end of a payload.
        assert_eq!(self.floor.buffer[last], PAYLOAD, "the reply is no echo");
        per_call(elapsed, calls, batches * count)
    }
}

/// Echoes calls of a protocol until the connection ends.
pub fn serve(mut floor: BlockingClient, protocol: &str, serving: &mpsc::Sender<()>) {
    floor.first(&Upgrade.encoded());
    floor.buffer.resize(CHUNK, 0);
    let mut client = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let asked = client.add_handler(protocol, false, (), &mut out);
    asked.expect("it is small enough");
    loop {
        write(&floor.socket, &out);
        out.clear();
        let mut input = &[][..];
        let read = match client.payload_buffer() {
            Some(buffer) => {
                let read = (&floor.socket).read(buffer).unwrap_or(0);
                client.payload_filled(read);
                read
            }
            None => {
                let read = (&floor.socket).read(&mut floor.buffer).unwrap_or(0);
                input = &floor.buffer[..read];
                read
            }
        };
        if read == 0 {
            return;
        }
        while let Some(event) = client.poll(&mut input).expect("the mock daemon is good") {
            match event {
                UnaryEvent::Acknowledged { .. } => serving.send(()).expect("it is waited for"),
                UnaryEvent::Call { id, payload, .. } => {
                    assert!(client.reply(&id, payload.len(), &mut out));
                    out.extend_from_slice(&payload);
                }
                other => panic!("unexpected event {other:?}"),
            }
        }
    }
}

/// Scales the time of `made` calls to that of `wanted` calls.
pub fn per_call(elapsed: Duration, wanted: u64, made: u64) -> Duration {
    elapsed.mul_f64(wanted as f64 / made as f64)
}
