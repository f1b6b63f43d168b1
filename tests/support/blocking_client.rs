//! The blocking client: it writes the same frames as the clients do and counts the bytes that come
//! back. No client on that socket can be faster. It talks to the mock daemon alone, and panics where
//! that is not there.

use crate::socket::Socket;
use bytes::BytesMut;
use p2pd_protocol::command::{streams::StreamOpen, unary::Upgrade, Typed as _};
use p2pd_protocol::{EncodedRequest, Multiaddr, PeerId, PersistentClient, UnaryEvent, UnaryLimits};
use std::io::{Read, Write};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How much is read and written at a time, in bytes.
pub const CHUNK: usize = 256 << 10;
/// What the payloads of calls are full of.
const PAYLOAD: u8 = 7;

/// A connection of the blocking client.
pub struct BlockingClient {
    socket: Socket,
    room: Vec<u8>,
}

impl BlockingClient {
    /// Connects.
    pub fn connect(control: &Multiaddr) -> Self {
        let endpoint = control.endpoint().expect("a control address");
        Self {
            socket: Socket::connect(&endpoint).expect("the mock daemon listens"),
            room: Vec::new(),
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
        // The answer, of which the length is in the first byte, and nothing of the stream.
        floor.read(1);
        floor.read(usize::from(floor.room[0]));
        floor
    }

    /// Sends bytes.
    pub fn write(&self, bytes: &[u8]) {
        write(&self.socket, bytes);
    }

    /// Reads so many bytes and drops them, but for the last read's.
    pub fn read(&mut self, count: usize) {
        read(&self.socket, &mut self.room, count);
    }

    /// What was read last, from its beginning on.
    #[allow(dead_code)] // by the criterion benches
    pub fn last(&self) -> &[u8] {
        &self.room
    }

    /// Sends a request, and returns how long its answer is.
    pub fn first(&mut self, request: &EncodedRequest) -> usize {
        self.write(request.frame());
        let mut answer = [0; 256];
        let read = (&self.socket).read(&mut answer);
        let read = read.expect("the mock daemon answers");
        // Short as the answers are, they come in one piece.
        assert_eq!(read, 1 + usize::from(answer[0]));
        read
    }
}

fn write(mut socket: &Socket, bytes: &[u8]) {
    socket.write_all(bytes).expect("the mock daemon reads");
}

/// Reads so many bytes; where in the room the last of them is.
fn read(mut socket: &Socket, room: &mut Vec<u8>, mut count: usize) -> usize {
    room.resize(CHUNK, 0);
    let mut last = 0;
    while count > 0 {
        let len = room.len().min(count);
        let read = socket.read(&mut room[..len]);
        let read = read.expect("the mock daemon answers");
        assert!(read > 0, "the mock daemon is gone");
        count -= read;
        last = read - 1;
    }
    last
}

/// Unary calls of the blocking client, so many at once.
pub struct Calls {
    floor: BlockingClient,
    /// Some calls that are written at once, where their ids are, and how long their replies are.
    batch: Vec<u8>,
    ids: Vec<usize>,
    replies: usize,
    /// How many batches are under way.
    window: usize,
    counter: u64,
}

impl Calls {
    /// Connects, to call a protocol with payloads of a size, at least so many of them at once.
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
        let mut core = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
        let (mut batch, mut ids) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let mut head = BytesMut::new();
            let peer = peer_id.as_bytes();
            let id = core
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

    /// Makes at least so many calls; how long each took.
    pub fn run(&mut self, calls: u64) -> Duration {
        let count = self.ids.len() as u64;
        let batches = calls.div_ceil(count);
        let Self {
            floor: BlockingClient { socket, room },
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
                last = read(socket, room, *replies);
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
                    last = read(socket, room, *replies);
                    let _ = replied.send(()); // the last ones are for nobody
                }
                last
            });
        }
        let elapsed = start.elapsed();
        // What came last is the end of a payload.
        assert_eq!(self.floor.room[last], PAYLOAD, "the reply is no echo");
        per_call(elapsed, calls, batches * count)
    }
}

/// Serves calls of a protocol with their data, to the end of the connection: `PersistentClient` on a blocking
/// socket.
pub fn serve(mut floor: BlockingClient, protocol: &str, serving: &mpsc::Sender<()>) {
    floor.first(&Upgrade.encoded());
    floor.room.resize(CHUNK, 0);
    let mut core = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let asked = core.add_handler(protocol, false, (), &mut out);
    asked.expect("it is small enough");
    loop {
        write(&floor.socket, &out);
        out.clear();
        let mut input = &[][..];
        let read = match core.payload_buffer() {
            Some(room) => {
                let read = (&floor.socket).read(room).unwrap_or(0);
                core.payload_filled(read);
                read
            }
            None => {
                let read = (&floor.socket).read(&mut floor.room).unwrap_or(0);
                input = &floor.room[..read];
                read
            }
        };
        if read == 0 {
            return;
        }
        while let Some(event) = core.poll(&mut input).expect("the mock daemon is good") {
            match event {
                UnaryEvent::Acknowledged { .. } => serving.send(()).expect("it is waited for"),
                UnaryEvent::Call { id, payload, .. } => {
                    assert!(core.reply(&id, payload.len(), &mut out));
                    out.extend_from_slice(&payload);
                }
                other => panic!("nobody sent {other:?}"),
            }
        }
    }
}

/// What `wanted` of them took, of which `made` were made.
pub fn per_call(elapsed: Duration, wanted: u64, made: u64) -> Duration {
    elapsed.mul_f64(wanted as f64 / made as f64)
}
