//! A daemon that has no peers and answers at once, so that only the cost of a client is seen: it
//! measures clients, not daemons. The benches here include it as a module; for others it is a program:
//!
//! ```text
//! $ cargo run --release --example mock_daemon /unix/tmp/mock.sock
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

use bytes::Bytes;
use p2pd_protocol::command::{connmgr, control, streams, unary::Upgrade, Command, Request as _};
use p2pd_protocol::framing::encode_frame;
use p2pd_protocol::multiaddr::{Endpoint, Host};
use p2pd_protocol::unary::server::{Offered, PersistentServer, ServerEvent, ServerLimits};
use p2pd_protocol::unary::{CallId, Payload, Receiving};
use p2pd_protocol::{
    Error, Identity, Limits, Multiaddr, Output, PeerId, PeerInfo, ServerExchange, StreamInfo,
};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
#[cfg(unix)]
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// The largest message taken, in bytes.
const MAX_FRAME: usize = 16 << 20;
/// How much one read takes, in bytes: little until a read was filled.
const FIRST_READ: usize = 4 << 10;
const READ: usize = 256 << 10;
/// Where one read begins: the kernel copies to other places at up to half the speed.
const ALIGN: usize = 4 << 10;
/// Size of a connection's queue at which it is written, in bytes.
const BATCH: usize = 256 << 10;
/// Payloads of at least this many bytes are written from where they were received.
const SHARED: usize = 128 << 10;
/// Size of a connection's queue at which other threads wait for the one that writes, in bytes.
const MAX_QUEUED: usize = 64 << 20;
/// Bounds on connections, handlers, and the calls that one load has under way.
const MAX_CONNECTIONS: usize = 4096;
const MAX_HANDLERS: usize = 1024;
const MAX_PARALLEL: u64 = 64 << 10;

/// The protocol of streams that echo.
pub const STREAM_ECHO: &str = "/echo";
/// The protocol of streams that send zeros.
pub const STREAM_SOURCE: &str = "/source";
/// The protocol of streams that drop all bytes.
pub const STREAM_SINK: &str = "/sink";
/// The protocol of streams that send hivemind's messages, followed by the size of the bodies.
pub const FRAMED_SOURCE: &str = "/framed-source/";
/// The protocol of streams that read hivemind's messages.
pub const FRAMED_SINK: &str = "/framed-sink";
/// The protocol of unary calls answered with their payload.
pub const UNARY_ECHO: &str = "echo";
/// The protocol of unary calls that have a handler called.
pub const UNARY_LOAD: &str = "load";

/// Size of the head of hivemind's messages: whether the sink must answer, and the body's length.
pub const FRAME_HEAD: usize = 9;
/// The byte that the bodies consist of.
pub const FRAME_BODY: u8 = 7;

/// The head of one of hivemind's messages.
pub fn frame_head(is_last: bool, len: u64) -> [u8; FRAME_HEAD] {
    let mut head = [u8::from(is_last); FRAME_HEAD];
    head[1..].copy_from_slice(&len.to_be_bytes());
    head
}

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
    #[allow(dead_code)] // the program does not use it
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
        let _ = serve(&socket, shared);
        socket.shutdown(Shutdown::Both);
    }
}

#[allow(dead_code)] // the benches do not use it
fn main() -> Result<(), Failure> {
    let control = std::env::args()
        .nth(1)
        .ok_or("usage: mock_daemon CONTROL_MADDR")?;
    let daemon = MockDaemon::bind(&control.parse()?)?;
    println!("Control socket: {}", daemon.control_maddr());
    println!("Peer ID: {}", daemon.peer_id());
    println!("Peer Addrs: {}", daemon.shared.identity.addrs[0]);
    Ok(daemon.run()?)
}

// --- what the connections share ---

struct Shared {
    identity: Identity,
    /// The reply to IDENTIFY, encoded once: that would be a part of every benchmark's round trip.
    identify: Bytes,
    peers: Vec<PeerInfo>,
    /// Number of threads that serve, and of those that wait for a connection.
    threads: AtomicUsize,
    idle: AtomicUsize,
    /// Number of the next persistent connection.
    next: AtomicU64,
    stream_handlers: Mutex<HashMap<String, Multiaddr>>,
    handlers: Mutex<HashMap<String, Handlers>>,
}

impl Shared {
    fn new() -> io::Result<Self> {
        let peer_id = PeerId::from_bytes([&[0, 36, 8, 1, 18, 32][..], &[7; 32]].concat());
        let addr = "/ip4/127.0.0.1/tcp/4001".parse();
        let identity = Identity::new(peer_id, vec![addr.map_err(io::Error::other)?]);
        Ok(Self {
            peers: vec![PeerInfo {
                peer_id: identity.peer_id.clone(),
                addrs: identity.addrs.clone(),
            }],
            identify: encode_frame(&control::Identify::encode_reply(&identity)),
            identity,
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            stream_handlers: Mutex::default(),
            handlers: Mutex::default(),
        })
    }
}

/// Why a connection ended.
type Failure = Box<dyn std::error::Error>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

// --- control connections ---

/// Serves a connection to its end.
fn serve(mut socket: &Socket, shared: &Shared) -> Result<(), Failure> {
    use connmgr::Command as ConnManager;
    use control::Command as Control;
    use streams::Command as Streams;
    let mut exchange = ServerExchange::new(Limits::default().with_max_frame(MAX_FRAME));
    let mut input = Input::default();
    loop {
        let command = match exchange.poll() {
            Ok(Some(command)) => command,
            Ok(None) => {
                if input.fill(socket, &mut [])? == 0 {
                    return Ok(());
                }
                exchange.receive(input.take());
                continue;
            }
            Err(error @ Error::UnknownRequest(_)) => {
                socket.write_all(&exchange.refuse(&error.to_string())?)?;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let answer = match command {
            Command::Control(Control::Identify(_)) => {
                exchange.replied::<control::Identify>()?;
                shared.identify.clone()
            }
            Command::Control(Control::ListPeers(_)) => {
                exchange.reply::<control::ListPeers>(&shared.peers)?
            }
            Command::Control(Control::Connect(_)) => exchange.reply::<control::Connect>(&())?,
            Command::Control(Control::Disconnect(_)) => {
                exchange.reply::<control::Disconnect>(&())?
            }
            Command::ConnManager(ConnManager::TagPeer(_)) => {
                exchange.reply::<connmgr::TagPeer>(&())?
            }
            Command::ConnManager(ConnManager::UntagPeer(_)) => {
                exchange.reply::<connmgr::UntagPeer>(&())?
            }
            Command::ConnManager(ConnManager::Trim(_)) => exchange.reply::<connmgr::Trim>(&())?,
            Command::Streams(Streams::StreamOpen(open)) => {
                match Service::find(&open.protocols, shared) {
                    Ok((service, info)) => {
                        socket.write_all(&exchange.reply::<streams::StreamOpen>(&info)?)?;
                        return service.run(socket, Input::of(&exchange.into_remainder()));
                    }
                    Err(words) => exchange.refuse(&words)?,
                }
            }
            Command::Streams(Streams::StreamHandler(request)) => {
                let mut handlers = lock(&shared.stream_handlers);
                if handlers.len() + request.protocols.len() > MAX_HANDLERS {
                    exchange.refuse("too many handlers")?
                } else {
                    let names = request.protocols.into_iter();
                    handlers.extend(names.map(|name| (name, request.addr.clone())));
                    exchange.reply::<streams::StreamHandler>(&())?
                }
            }
            Command::Streams(Streams::RemoveStreamHandler(request)) => {
                let mut handlers = lock(&shared.stream_handlers);
                handlers.retain(|name, _| !request.protocols.contains(name));
                exchange.reply::<streams::RemoveStreamHandler>(&())?
            }
            Command::Unary(_) => {
                socket.write_all(&exchange.reply::<Upgrade>(&())?)?;
                let input = Input::of(&exchange.into_remainder());
                return serve_persistent(socket.try_clone()?, shared, input);
            }
            other => exchange.refuse(&format!("the mock daemon has no {}", other.name()))?,
        };
        socket.write_all(&answer)?;
    }
}

/// What a stream does.
enum Service {
    Echo,
    Source,
    Sink,
    FramedSource(u64),
    FramedSink,
    Handler(Socket),
}

impl Service {
    /// The service of the first of `protocols` that has one, or a refusal.
    fn find(protocols: &[String], shared: &Shared) -> Result<(Self, StreamInfo), String> {
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

    /// Serves a stream to its end.
    fn run(self, mut socket: &Socket, mut input: Input) -> Result<(), Failure> {
        match self {
            Self::Echo => loop {
                socket.write_all(input.take())?;
                if input.fill(socket, &mut [])? == 0 {
                    return Ok(());
                }
            },
            Self::Source => {
                let zeros = vec![0; BATCH];
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
    first.resize(FRAME_HEAD + size.min(BATCH as u64) as usize, FRAME_BODY);
    let body = vec![FRAME_BODY; BATCH];
    loop {
        socket.write_all(&first)?;
        let mut left = size - (first.len() - FRAME_HEAD) as u64;
        while left > 0 {
            let count = left.min(BATCH as u64);
            socket.write_all(&body[..count as usize])?;
            left -= count;
        }
    }
}

/// Reads hivemind's messages to the end of the stream, and answers those that ask for it.
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

/// Copies between two sockets, both ways, until both have ended.
fn pipe(near: &Socket, far: &Socket) -> io::Result<()> {
    fn pass(from: &Socket, mut to: &Socket) {
        let mut input = Input::default();
        // On an error one of them is gone, and the other sees an end.
        while input.fill(from, &mut []).unwrap_or(0) > 0 && to.write_all(input.take()).is_ok() {}
        to.shutdown(Shutdown::Write);
    }
    thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, || pass(near, far))?;
        pass(far, near);
        Ok(())
    })
}

// --- persistent connections ---

/// The connections that serve a handler's name.
#[derive(Default)]
struct Handlers {
    /// At least one; more than one only if they are balanced.
    connections: Vec<Arc<Connection>>,
    balanced: bool,
    turn: usize,
}

/// A persistent connection. Any thread appends to its output; one at a time writes it.
struct Connection {
    socket: Socket,
    state: Mutex<State>,
    /// Notified when a part of the output was written.
    written: Condvar,
}

struct State {
    server: PersistentServer<Token, Buffer>,
    output: Output<Buffer>,
    /// The output that was written last, whose room is used again.
    spare: Output<Buffer>,
    is_writing: bool,
    /// How many threads wait for the one that writes.
    waiting: usize,
    is_closed: bool,
    /// The client's calls that a handler serves.
    forwarded: HashMap<CallId, Forwarded>,
}

/// A call that the client handles.
enum Token {
    /// It is this client's call.
    Call(Arc<Connection>, CallId),
    /// It is the load's call of this number, and whether its reply is right.
    Load(Arc<Load>, u64, bool),
}

/// What serves a call.
enum Forwarded {
    /// The call of this id, which another client handles.
    Call(Arc<Connection>, CallId),
    Load(Arc<Load>),
}

impl State {
    /// Replies to a call, if the client still waits.
    fn reply(&mut self, id: &CallId, payload: Buffer) {
        self.forwarded.remove(id);
        let server = &mut self.server;
        if self
            .output
            .append(|out| server.reply(id, payload.0.len(), out))
        {
            push(&mut self.output, payload);
        }
    }

    /// Replies to a call with a handler's error, if the client still waits.
    fn reply_error(&mut self, id: &CallId, error: &str) {
        self.forwarded.remove(id);
        let server = &mut self.server;
        self.output.append(|out| server.reply_error(id, error, out));
    }

    /// Refuses a call, if the client still waits.
    fn refuse(&mut self, id: &CallId, words: &str) {
        if self.server.is_under_way(id) {
            self.forwarded.remove(id);
            self.refuse_request(id, words);
        }
    }

    fn refuse_request(&mut self, id: &CallId, words: &str) {
        let server = &mut self.server;
        self.output.append(|out| server.refuse(id, words, out));
    }

    fn acknowledge(&mut self, id: &CallId) {
        self.output.append(|out| self.server.acknowledge(id, out));
    }

    /// Gives the client a call with a payload of `len` bytes, which `push` adds to the output.
    fn handle(
        &mut self,
        (peer, protocol, len): (&[u8], &str, usize),
        token: Token,
        push: impl FnOnce(&mut Output<Buffer>),
    ) -> Result<CallId, String> {
        if self.is_closed {
            return Err(LEFT.to_owned());
        }
        let server = &mut self.server;
        let handled = self
            .output
            .append(|out| server.handle(peer, protocol, len, token, out));
        let id = handled.map_err(|error| error.to_string())?;
        push(&mut self.output);
        Ok(id)
    }
}

/// Queues a payload. Copying one of 64 KiB costs less than a piece of its own.
fn push(output: &mut Output<Buffer>, payload: Buffer) {
    if payload.0.len() < SHARED {
        output.push_copied(payload.as_ref());
    } else {
        output.push_shared(payload, 0);
    }
}

/// Why a call fails whose handler's connection has ended.
const LEFT: &str = "the handler's client left";

impl Connection {
    /// Writes the output, unless another thread does. Waits for that only if very much is queued.
    fn flush(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        while state.is_writing && state.output.len() > MAX_QUEUED {
            state.waiting += 1;
            let waited = self.written.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        if state.is_writing {
            return Ok(());
        }
        let mut result = Ok(());
        while !state.output.is_empty() && !state.is_closed {
            let spare = std::mem::take(&mut state.spare);
            let mut output = std::mem::replace(&mut state.output, spare);
            state.is_writing = true;
            drop(state);
            result = self.write(&mut output);
            state = lock(&self.state);
            state.is_writing = false;
            if result.is_err() {
                // The thread that reads sees the end, and tells those who wait for the client.
                state.is_closed = true;
                self.socket.shutdown(Shutdown::Both);
            }
            if state.output.is_empty() {
                // The room that is in the CPU's cache is used next.
                std::mem::swap(&mut state.output, &mut output);
            }
            state.spare = output;
            if state.waiting > 0 {
                self.written.notify_all(); // a system call
            }
        }
        if state.is_closed {
            state.output = Output::default();
        }
        result
    }

    fn write(&self, output: &mut Output<Buffer>) -> io::Result<()> {
        while !output.is_empty() {
            let written = match &output.slices()[..] {
                [all] => (&self.socket).write(all), // cheaper
                slices => (&self.socket).write_vectored(slices),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(output.sent(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The thread that serves a persistent connection.
struct Server<'a> {
    shared: &'a Shared,
    own: Arc<Connection>,
    /// The other connections for which there is output since the last flush.
    others: Vec<Arc<Connection>>,
    /// One of the outputs holds a batch.
    is_full: bool,
}

fn serve_persistent(socket: Socket, shared: &Shared, input: Input) -> Result<(), Failure> {
    // Predictable call ids are good enough here.
    let mut seed = [0; 32];
    let number = shared.next.fetch_add(1, Ordering::Relaxed);
    seed[..8].copy_from_slice(&number.to_le_bytes());
    let mut limits = ServerLimits::default();
    limits.max_message = MAX_FRAME;
    let state = State {
        server: PersistentServer::new(seed, limits),
        output: Output::keeping(MAX_FRAME),
        spare: Output::keeping(MAX_FRAME),
        is_writing: false,
        waiting: 0,
        is_closed: false,
        forwarded: HashMap::new(),
    };
    let own = Arc::new(Connection {
        socket,
        state: Mutex::new(state),
        written: Condvar::new(),
    });
    let mut server = Server {
        shared,
        own,
        others: Vec::new(),
        is_full: false,
    };
    let served = server.run(input);
    server.leave();
    served
}

/// Answers an echo, and checks the reply to a load's call, without a copy of them.
fn look<'a>(offered: Offered<'a, '_, Token>) -> Option<&'a [u8]> {
    match offered {
        Offered::Call {
            protocol: UNARY_ECHO,
            payload,
            ..
        } => Some(payload),
        Offered::Reply {
            token: Token::Load(load, number, is_right),
            payload,
        } => {
            *is_right = load.is_echo(*number, payload);
            is_right.then_some(&[])
        }
        _ => None,
    }
}

impl Server<'_> {
    fn run(&mut self, mut input: Input) -> Result<(), Failure> {
        let own = self.own.clone();
        let mut receiving = None;
        loop {
            let mut bytes = input.take();
            let mut state = lock(&own.state);
            if let Some(receiving) = receiving.take() {
                state.server.resume(receiving);
            }
            loop {
                let State { server, output, .. } = &mut *state;
                let polled = output.append(|out| server.poll_in_place(&mut bytes, out, look));
                let Some(event) = polled? else { break };
                drop(state);
                self.handle(event);
                if self.is_full {
                    self.flush()?;
                }
                state = lock(&own.state);
            }
            // A large payload is read into its place, without the lock.
            receiving = state.server.take_receiving();
            drop(state);
            self.flush()?;
            let room = receiving.as_mut().map(Receiving::room);
            let count = input.fill(&own.socket, room.unwrap_or_default())?;
            if count == 0 {
                return Ok(());
            }
            if let Some(receiving) = &mut receiving {
                receiving.filled(count);
            }
        }
    }

    fn update_own<R>(&mut self, update: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&self.own.state);
        let result = update(&mut state);
        self.is_full |= state.output.len() >= BATCH;
        result
    }

    /// Changes the state of a connection and remembers to flush it.
    fn update<R>(&mut self, target: &Arc<Connection>, update: impl FnOnce(&mut State) -> R) -> R {
        let mut state = lock(&target.state);
        let result = update(&mut state);
        self.is_full |= state.output.len() >= BATCH;
        drop(state);
        let is_known = |known: &Arc<Connection>| Arc::ptr_eq(known, target);
        if !is_known(&self.own) && !self.others.iter().any(is_known) {
            self.others.push(target.clone());
        }
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        self.is_full = false;
        for other in self.others.drain(..) {
            // On an error, its own thread sees the end.
            let _ = other.flush();
        }
        self.own.flush()
    }

    fn handle(&mut self, event: ServerEvent<Token, Buffer>) {
        match event {
            ServerEvent::AddHandler {
                id,
                protocol,
                balanced,
            } => {
                let added = self.add_handler(protocol, balanced);
                self.update_own(|state| match added {
                    Ok(()) => state.acknowledge(&id),
                    Err(words) => state.refuse_request(&id, words),
                });
            }
            ServerEvent::RemoveHandler { id, protocol } => {
                self.remove_handlers(Some(&protocol));
                self.update_own(|state| state.acknowledge(&id));
            }
            ServerEvent::Call {
                id,
                peer,
                protocol,
                payload,
            } => {
                let served = match protocol.as_str() {
                    UNARY_ECHO => {
                        self.update_own(|state| state.reply(&id, payload));
                        Ok(())
                    }
                    UNARY_LOAD => self.start_load(id, &payload.0),
                    name => self.forward(id, &peer, name, payload),
                };
                if let Err(words) = served {
                    self.update_own(|state| state.refuse(&id, &words));
                }
            }
            ServerEvent::Cancelled { id } => {
                let forwarded = lock(&self.own.state).forwarded.remove(&id);
                self.cancel(forwarded);
            }
            ServerEvent::Reply {
                token: Token::Call(caller, id),
                payload,
            } => self.update(&caller, |state| state.reply(&id, payload)),
            ServerEvent::HandlerFailed {
                token: Token::Call(caller, id),
                error,
            } => self.update(&caller, |state| state.reply_error(&id, &error)),
            ServerEvent::InvalidReply {
                token: Token::Call(caller, id),
                error,
            } => self.update(&caller, |state| state.refuse(&id, &error.to_string())),
            ServerEvent::Reply {
                token: Token::Load(load, number, is_right),
                payload,
            } => load.go_on(is_right || load.is_echo(number, &payload.0), self),
            ServerEvent::HandlerFailed {
                token: Token::Load(load, ..),
                ..
            }
            | ServerEvent::InvalidReply {
                token: Token::Load(load, ..),
                ..
            } => load.go_on(false, self),
            ServerEvent::Rejected { id, reason } => {
                self.update_own(|state| state.refuse_request(&id, &reason));
            }
            ServerEvent::Skipped { error } => eprintln!("skipped a message: {error}"),
            _ => {}
        }
    }

    fn add_handler(&self, name: String, balanced: bool) -> Result<(), &'static str> {
        let mut all = lock(&self.shared.handlers);
        let known = all.get(&name);
        if known.is_some_and(|handlers| !(balanced && handlers.balanced)) {
            return Err("handler for the protocol already set");
        }
        if all.values().map(|of| of.connections.len()).sum::<usize>() >= MAX_HANDLERS {
            return Err("too many handlers");
        }
        let handlers = all.entry(name).or_default();
        handlers.balanced = balanced;
        handlers.connections.push(self.own.clone());
        Ok(())
    }

    /// Removes this connection from the handlers of a name, or of all names.
    fn remove_handlers(&self, of: Option<&str>) {
        lock(&self.shared.handlers).retain(|name, handlers| {
            if of.is_none_or(|of| of == name) {
                let connections = &mut handlers.connections;
                connections.retain(|connection| !Arc::ptr_eq(connection, &self.own));
            }
            !handlers.connections.is_empty()
        });
    }

    /// The connection whose turn it is to serve a call.
    fn handler(&self, name: &str) -> Option<Arc<Connection>> {
        let mut all = lock(&self.shared.handlers);
        let handlers = all.get_mut(name)?;
        handlers.turn = (handlers.turn + 1) % handlers.connections.len();
        Some(handlers.connections[handlers.turn].clone())
    }

    /// Has a handler serve a call of this client.
    fn forward(
        &mut self,
        id: CallId,
        peer: &[u8],
        name: &str,
        payload: Buffer,
    ) -> Result<(), String> {
        let handler = self.handler(name).ok_or("protocols not supported")?;
        let token = Token::Call(self.own.clone(), id);
        let forwarded = self.update(&handler, |state| {
            state.handle((peer, name, payload.0.len()), token, |output| {
                push(output, payload);
            })
        })?;
        let mut state = lock(&self.own.state);
        // The handler may have replied already.
        if state.server.is_under_way(&id) {
            let forwarded = Forwarded::Call(handler, forwarded);
            state.forwarded.insert(id, forwarded);
        }
        Ok(())
    }

    /// Begins to call a handler as the payload of a call says.
    fn start_load(&mut self, id: CallId, payload: &[u8]) -> Result<(), String> {
        let words = String::from_utf8_lossy(payload);
        let mut words = words.split(' ');
        let name = words.next().unwrap_or_default();
        let numbers: Vec<u64> = words.flat_map(str::parse).collect();
        let &[size, parallel, count] = &numbers[..] else {
            return Err("not HANDLER SIZE PARALLEL COUNT".to_owned());
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let (Some(handler), 8..MAX_FRAME, 1..=MAX_PARALLEL, 1..) =
            (self.handler(name), size, parallel, count)
        else {
            return Err("no such handler, or not that large".to_owned());
        };
        let load = Arc::new(Load {
            id,
            caller: self.own.clone(),
            handler,
            name: name.to_owned(),
            payload: vec![7; size],
            parallel,
            progress: Mutex::new(Progress {
                left: count,
                done: 0,
                begun: Instant::now(),
            }),
            count,
        });
        let mut state = lock(&self.own.state);
        let forwarded = Forwarded::Load(load.clone());
        state.forwarded.insert(id, forwarded);
        drop(state);
        for _ in 0..parallel {
            let next = load.next(&mut lock(&load.progress));
            let Some(number) = next else { break };
            load.call(number, self);
            if self.is_full {
                // If the connection has ended, the next read says so.
                let _ = self.flush();
            }
        }
        Ok(())
    }

    /// Tells those who wait for this connection, or work for it, that it has ended.
    fn leave(&mut self) {
        self.remove_handlers(None);
        let mut state = lock(&self.own.state);
        state.is_closed = true;
        state.server.take_calls();
        let tokens = state.server.take_handled();
        let forwarded = std::mem::take(&mut state.forwarded);
        drop(state);
        for token in tokens {
            match token {
                Token::Call(caller, id) => {
                    self.update(&caller, |state| state.refuse(&id, LEFT));
                }
                Token::Load(load, ..) => load.fail(LEFT, self),
            }
        }
        self.cancel(forwarded.into_values());
        let _ = self.flush();
    }

    /// Cancels calls and loads.
    fn cancel(&mut self, forwarded: impl IntoIterator<Item = Forwarded>) {
        for forwarded in forwarded {
            match forwarded {
                Forwarded::Call(handler, id) => {
                    self.update(&handler, |State { server, output, .. }| {
                        output.append(|out| server.cancel(&id, out));
                    });
                }
                Forwarded::Load(load) => load.stop(self),
            }
        }
    }
}

/// Calls that the daemon makes.
struct Load {
    /// The call that asked for them, and its client's connection.
    id: CallId,
    caller: Arc<Connection>,
    handler: Arc<Connection>,
    name: String,
    /// The payload, whose first 8 bytes are replaced by the number of the call.
    payload: Vec<u8>,
    parallel: u64,
    count: u64,
    progress: Mutex<Progress>,
}

struct Progress {
    /// How many calls are still to be made.
    left: u64,
    done: u64,
    begun: Instant,
}

impl Load {
    /// The number of the next call, if one is left.
    fn next(&self, progress: &mut Progress) -> Option<u64> {
        let number = self.count - progress.left;
        progress.left = progress.left.checked_sub(1)?;
        Some(number)
    }

    /// Makes a call.
    fn call(self: &Arc<Self>, number: u64, server: &mut Server<'_>) {
        let peer = server.shared.identity.peer_id.as_bytes();
        let call = (peer, self.name.as_str(), self.payload.len());
        let token = Token::Load(self.clone(), number, false);
        let made = server.update(&self.handler, |state| {
            state.handle(call, token, |output| {
                output.push_copied(&number.to_le_bytes());
                output.push_copied(&self.payload[8..]);
            })
        });
        if let Err(words) = made {
            self.fail(&words, server);
        }
    }

    /// Whether a reply is its call's payload. Those to the first calls are compared in whole, and of
    /// the rest only the length and the number, so that the handler's time is measured.
    fn is_echo(&self, number: u64, reply: &[u8]) -> bool {
        reply.len() == self.payload.len()
            && reply[..8] == number.to_le_bytes()
            && (number >= self.parallel || reply[8..] == self.payload[8..])
    }

    /// Notes whether the reply to a call was right, and makes the next call.
    fn go_on(self: &Arc<Self>, is_right: bool, server: &mut Server<'_>) {
        if !is_right {
            return self.fail("the handler's reply is no echo", server);
        }
        let mut progress = lock(&self.progress);
        progress.done += 1;
        let is_done = progress.done == self.count;
        let (next, begun) = (self.next(&mut progress), progress.begun);
        drop(progress);
        if is_done {
            let seconds = begun.elapsed().as_secs_f64().to_string();
            let reply = Buffer::copy_from(seconds.as_bytes());
            server.update(&self.caller, |state| state.reply(&self.id, reply));
        } else if let Some(number) = next {
            self.call(number, server);
        }
    }

    /// Cancels the calls under way, and makes no more.
    fn stop(&self, server: &mut Server<'_>) {
        lock(&self.progress).left = 0;
        let is_own =
            |token: &Token| matches!(token, Token::Load(load, ..) if std::ptr::eq(self, &**load));
        server.update(&self.handler, |State { server, output, .. }| {
            output.append(|out| server.cancel_all(is_own, out));
        });
    }

    fn fail(&self, words: &str, server: &mut Server<'_>) {
        self.stop(server);
        server.update(&self.caller, |state| state.refuse(&self.id, words));
    }
}

// --- sockets ---

/// Does the same with either kind of socket.
macro_rules! either {
    ($self:expr, $socket:ident => $result:expr) => {
        match $self {
            #[cfg(unix)]
            Socket::Unix($socket) => $result,
            Socket::Tcp($socket) => $result,
        }
    };
}

/// Bytes that were read and not yet taken.
#[derive(Default)]
struct Input {
    room: Vec<u8>,
    start: usize,
    end: usize,
    /// A read filled all the room there was.
    was_filled: bool,
}

impl Input {
    /// Begins with these bytes.
    fn of(bytes: &[u8]) -> Self {
        Self {
            room: bytes.to_vec(),
            end: bytes.len(),
            ..Self::default()
        }
    }

    /// Takes all of it.
    fn take(&mut self) -> &[u8] {
        let start = std::mem::replace(&mut self.start, self.end);
        &self.room[start..self.end]
    }

    fn peek(&self) -> &[u8] {
        &self.room[self.start..self.end]
    }

    /// Takes all but the last `count` bytes.
    fn keep(&mut self, count: usize) {
        self.start = self.end - count;
    }

    /// Reads once, first into `front`; returns how much, which is nothing at the end.
    fn fill(&mut self, mut socket: &Socket, front: &mut [u8]) -> io::Result<usize> {
        let wanted = if self.was_filled { READ } else { FIRST_READ };
        let left = self.end - self.start;
        if self.room.len() < left + wanted + ALIGN {
            self.room.resize(left + wanted + ALIGN, 0);
        }
        let begin = self.room.as_ptr().align_offset(ALIGN) % ALIGN;
        self.room.copy_within(self.start..self.end, begin);
        (self.start, self.end) = (begin, begin + left);
        let (before, room) = (front.len(), &mut self.room[self.end..][..wanted]);
        let mut slices = [IoSliceMut::new(front), IoSliceMut::new(room)];
        let count = loop {
            let read = match before {
                0 => socket.read(&mut slices[1]),
                _ => socket.read_vectored(&mut slices),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.was_filled |= count == before + wanted;
        self.end += count.saturating_sub(before);
        Ok(count)
    }
}

thread_local! {
    /// Room of payloads that this thread is done with.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Size of payloads whose room a thread keeps, in bytes, and the number of them.
const REUSED: usize = 16 << 10;
const MAX_SPARE: usize = 8;

/// A payload. The room of a large one is used again: allocating and zeroing it costs more than copying.
struct Buffer(Vec<u8>);

impl Payload for Buffer {
    fn with_len(len: usize) -> Option<Self> {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        let spare = spare.filter(|room| room.len() == len);
        Some(Self(spare.unwrap_or_else(|| vec![0; len])))
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.len() >= REUSED {
            let room = std::mem::take(&mut self.0);
            // It fails in a thread that is ending.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                spare.truncate(MAX_SPARE - 1);
                spare.push(room);
            });
        }
    }
}

enum Listener {
    #[cfg(unix)]
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => UnixListener::bind(path).map(Self::Unix),
            Endpoint::Tcp { host, port } => {
                TcpListener::bind((host.to_string(), *port)).map(Self::Tcp)
            }
            #[cfg(not(unix))]
            Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// The address of a listener that was bound to `endpoint`.
    fn address(&self, endpoint: Endpoint) -> io::Result<Multiaddr> {
        Ok(Multiaddr::from(&match self {
            Self::Tcp(listener) => listener.local_addr()?.into(),
            #[cfg(unix)]
            Self::Unix(_) => endpoint,
        }))
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            #[cfg(unix)]
            Self::Unix(listener) => Ok(Socket::Unix(listener.accept()?.0)),
            Self::Tcp(listener) => Socket::tcp(listener.accept()?.0),
        }
    }
}

/// A blocking socket.
pub enum Socket {
    /// A Unix socket.
    #[cfg(unix)]
    Unix(UnixStream),
    /// A TCP socket.
    Tcp(TcpStream),
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// If it cannot connect.
    pub fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            #[cfg(unix)]
            Endpoint::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Endpoint::Tcp { host, port } => match host {
                Host::Ip4(ip) => Self::tcp(TcpStream::connect((*ip, *port))?),
                host => Self::tcp(TcpStream::connect((host.to_string(), *port))?),
            },
            #[cfg(not(unix))]
            Endpoint::Unix(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn tcp(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        Ok(Self::Tcp(socket))
    }

    fn try_clone(&self) -> io::Result<Self> {
        match self {
            #[cfg(unix)]
            Self::Unix(socket) => socket.try_clone().map(Self::Unix),
            Self::Tcp(socket) => socket.try_clone().map(Self::Tcp),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // It fails if the other side has closed already.
        let _ = either!(self, socket => socket.shutdown(how));
    }
}

impl Read for &Socket {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).read(room))
    }

    fn read_vectored(&mut self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).read_vectored(slices))
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).write(bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, socket => (&mut &*socket).write_vectored(slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
