//! A daemon that has no peers and answers at once, so that what a client costs is seen alone: it
//! measures clients, not daemons. For the benches here as a module, for others as a program:
//!
//! ```text
//! $ cargo run --release --example mock_daemon /unix/tmp/mock.sock
//! Control socket: /unix/tmp/mock.sock
//! Peer ID: 12D3KooW…
//! Peer Addrs: /ip4/127.0.0.1/tcp/4001
//! ```
//!
//! - IDENTIFY, LIST_PEERS, CONNECT and the like: the same answer every time, any number of them on
//!   one connection. What it does not have, as a DHT, it refuses.
//! - STREAM_OPEN to whatever peer: `/echo` sends back, `/source` sends zeros as fast as they are
//!   taken, `/sink` drops what it reads, and closes at its end. `/framed-source/SIZE` sends hivemind's
//!   messages (a byte, the length as 8 bytes, the body) with bodies of that size, without end, and
//!   `/framed-sink` takes such messages, and answers one that begins with a 1 with the number of bytes
//!   of all the bodies so far, again as 8 bytes. Any other protocol is the registered handler's, which
//!   is dialled as a daemon does.
//! - Unary calls to whatever peer: `echo` is answered here, with one copy of the payload and one
//!   write for all the calls that one read brought. `load` is answered here too, when its work is done:
//!   its payload says `HANDLER SIZE PARALLEL COUNT`, and that handler gets so many calls, so many
//!   at once, from here. The reply is the time that took, in seconds, or what was wrong with the
//!   echo of one. Any other protocol is a handler's, on any persistent connection, and its replies
//!   find their way back by their call id.
//!
//! A thread serves each connection, and it waits while a socket is full: a client that does
//! not read while it writes comes to a stop, as at the Go daemons.

use p2pclient_rs::core::multiaddr::{Endpoint, Host};
use p2pclient_rs::core::pb::p2pd::{self, request::Type, response};
use p2pclient_rs::core::unary::CallId;
use p2pclient_rs::core::{framing, Multiaddr, PeerId};
use prost::Message as _;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
#[cfg(unix)]
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// The largest message taken, in bytes.
const MAX_FRAME: usize = 16 << 20;
/// How much one read takes at the least, in bytes: little, until there is more to be read.
const FIRST_READ: usize = 4 << 10;
const READ: usize = 256 << 10;
/// How much is kept for one write, in bytes, and what comes on top of it at once.
const BATCH: usize = 256 << 10;
/// How many connections, handlers, and calls on their way there may be.
const MAX_CONNECTIONS: usize = 4096;
const MAX_HANDLERS: usize = 1024;
const MAX_CALLS: usize = 64 << 10;

/// The protocol of streams that are sent back, …
pub const STREAM_ECHO: &str = "/echo";
/// … of streams full of zeros, …
pub const STREAM_SOURCE: &str = "/source";
/// … of streams that nobody looks at, …
pub const STREAM_SINK: &str = "/sink";
/// … of streams full of hivemind's messages, with the size of their bodies behind it, …
pub const FRAMED_SOURCE: &str = "/framed-source/";
/// … of streams to which they are sent, …
pub const FRAMED_SINK: &str = "/framed-sink";
/// … of unary calls answered with their data, …
pub const UNARY_ECHO: &str = "echo";
/// … and of the one that has a handler called.
pub const UNARY_LOAD: &str = "load";

/// What is in front of a message of hivemind's: whether the sink is to answer it, and its length.
pub const FRAME_HEAD: usize = 9;
/// What the bodies are full of.
pub const FRAME_BODY: u8 = 7;

/// The head of a message of hivemind's.
pub fn frame_head(is_last: bool, len: u64) -> [u8; FRAME_HEAD] {
    let mut head = [u8::from(is_last); FRAME_HEAD];
    head[1..].copy_from_slice(&len.to_be_bytes());
    head
}

/// A daemon that listens.
pub struct MockDaemon {
    listener: Listener,
    control: Multiaddr,
    shared: Shared,
}

impl MockDaemon {
    /// Listens at `control`; with port 0, wherever there is room.
    ///
    /// # Errors
    /// If that is no address to listen at.
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

    /// Who it says it is.
    pub fn peer_id(&self) -> &PeerId {
        &self.shared.peer_id
    }

    /// Serves for ever, or until the listener fails.
    ///
    /// # Errors
    /// What it failed with.
    pub fn run(self) -> io::Result<()> {
        work(&Arc::new(self))
    }

    /// Serves in threads of this process, as long as that lasts.
    ///
    /// # Errors
    /// If there is no thread to be had.
    #[allow(dead_code)] // by the program
    pub fn spawn(self) -> io::Result<()> {
        thread::Builder::new().spawn(|| self.run()).map(drop)
    }
}

/// Serves one connection after the other. The threads that do so are kept: to start one takes
/// longer than to answer.
fn work(daemon: &Arc<MockDaemon>) -> io::Result<()> {
    let shared = &daemon.shared;
    loop {
        shared.idle.fetch_add(1, Ordering::Relaxed);
        let socket = daemon.listener.accept()?;
        if shared.idle.fetch_sub(1, Ordering::Relaxed) == 1 {
            // One has to be there for the next connection, unless there are too many.
            if shared.threads.fetch_add(1, Ordering::Relaxed) < MAX_CONNECTIONS {
                let daemon = daemon.clone();
                thread::Builder::new().spawn(move || work(&daemon))?;
            } else {
                shared.threads.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // Whatever ends a connection, the client sees its end.
        let _ = serve(&socket, shared);
        socket.shutdown(Shutdown::Both);
    }
}

#[allow(dead_code)] // by the benches
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let control = std::env::args()
        .nth(1)
        .ok_or("usage: mock_daemon CONTROL_MADDR")?;
    let daemon = MockDaemon::bind(&control.parse()?)?;
    println!("Control socket: {}", daemon.control_maddr());
    println!("Peer ID: {}", daemon.peer_id());
    println!("Peer Addrs: {}", daemon.shared.addr);
    Ok(daemon.run()?)
}

// --- what the connections share ---

struct Shared {
    peer_id: PeerId,
    addr: Multiaddr,
    /// The answers that are always the same, encoded.
    ok: Vec<u8>,
    identity: Vec<u8>,
    peers: Vec<u8>,
    /// The threads that serve, and those of them that wait for a connection.
    threads: AtomicUsize,
    idle: AtomicUsize,
    /// The number of the next persistent connection.
    next: AtomicU64,
    stream_handlers: Mutex<HashMap<String, Multiaddr>>,
    routes: Mutex<Routes>,
}

/// Who serves and who called.
#[derive(Default)]
struct Routes {
    handlers: HashMap<Vec<u8>, Handlers>,
    calls: HashMap<CallId, Call>,
}

impl Routes {
    fn count_handlers(&self) -> usize {
        let handlers = self.handlers.values();
        handlers.map(|handlers| handlers.persistents.len()).sum()
    }

    /// Forgets what a connection serves, or what it serves of one name.
    fn remove_handlers(&mut self, own: &Persistent, of: Option<&[u8]>) {
        self.handlers.retain(|name, handlers| {
            if of.is_none_or(|of| of == name) {
                let others = |other: &Arc<Persistent>| other.number != own.number;
                handlers.persistents.retain(others);
            }
            !handlers.persistents.is_empty()
        });
    }
}

#[derive(Default)]
struct Handlers {
    /// At least one; more than one only if they are balanced.
    persistents: Vec<Arc<Persistent>>,
    balanced: bool,
    turn: usize,
}

struct Call {
    caller: Arc<Persistent>,
    handler: Arc<Persistent>,
    /// What it is a part of, if it was made here.
    load: Option<Arc<Load>>,
}

/// Calls that are made here.
struct Load {
    /// Of the call that asked for them, who made it, and who is called.
    id: CallId,
    caller: Arc<Persistent>,
    handler: Arc<Persistent>,
    /// A call up to its payload, and the payload, which begins with the number of the call.
    head: Vec<u8>,
    payload: Vec<u8>,
    parallel: u64,
    count: u64,
    progress: Mutex<Progress>,
}

struct Progress {
    made: u64,
    done: u64,
    begun: Instant,
}

/// The way out to a persistent connection.
struct Persistent {
    number: u64,
    socket: Mutex<Socket>,
}

impl Shared {
    fn new() -> io::Result<Self> {
        let peer_id = PeerId::from_bytes([&[0, 36, 8, 1, 18, 32][..], &[7; 32]].concat());
        let addr: Multiaddr = "/ip4/127.0.0.1/tcp/4001"
            .parse()
            .map_err(io::Error::other)?;
        let identify = p2pd::IdentifyResponse {
            id: Some(peer_id.to_bytes()),
            addrs: vec![addr.to_bytes()],
        };
        let peer = p2pd::PeerInfo {
            id: Some(peer_id.to_bytes()),
            addrs: vec![addr.to_bytes()],
        };
        Ok(Self {
            ok: encode(ok()),
            identity: encode(p2pd::Response {
                identify: Some(identify),
                ..ok()
            }),
            peers: encode(p2pd::Response {
                peers: vec![peer],
                ..ok()
            }),
            peer_id,
            addr,
            threads: AtomicUsize::new(1),
            idle: AtomicUsize::new(0),
            next: AtomicU64::new(0),
            stream_handlers: Mutex::default(),
            routes: Mutex::default(),
        })
    }

    fn stream_info(&self, protocol: &str) -> p2pd::StreamInfo {
        p2pd::StreamInfo {
            peer: Some(self.peer_id.to_bytes()),
            addr: Some(self.addr.to_bytes()),
            proto: Some(protocol.to_owned()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn encode(response: p2pd::Response) -> Vec<u8> {
    response.encode_length_delimited_to_vec()
}

fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

fn refusal(words: String) -> Vec<u8> {
    encode(p2pd::Response {
        r#type: Some(response::Type::Error as i32),
        error: Some(p2pd::ErrorResponse {
            msg: Some(words.into()),
        }),
        ..Default::default()
    })
}

// --- control connections ---

/// Serves a connection to its end.
fn serve(mut socket: &Socket, shared: &Shared) -> io::Result<()> {
    let mut input = Input::new();
    loop {
        let Some(frame) = input.frame()? else {
            if !input.fill(socket)? {
                return Ok(());
            }
            continue;
        };
        let request = p2pd::Request::decode(frame)?;
        match request
            .r#type
            .and_then(|number| Type::try_from(number).ok())
        {
            Some(Type::Identify) => socket.write_all(&shared.identity)?,
            Some(Type::ListPeers) => socket.write_all(&shared.peers)?,
            Some(Type::Connect | Type::Disconnect | Type::Connmanager) => {
                socket.write_all(&shared.ok)?;
            }
            Some(Type::StreamOpen) => {
                let protocols = request.stream_open.unwrap_or_default().proto;
                if serve_stream(socket, shared, &protocols, &mut input)? {
                    return Ok(());
                }
            }
            Some(Type::StreamHandler) => {
                let request = request.stream_handler.unwrap_or_default();
                let addr = Multiaddr::from_bytes(request.addr.unwrap_or_default());
                let mut handlers = lock(&shared.stream_handlers);
                let answer = if handlers.len() + request.proto.len() > MAX_HANDLERS {
                    refusal("too many handlers".to_owned())
                } else {
                    handlers.extend(request.proto.into_iter().map(|name| (name, addr.clone())));
                    shared.ok.clone()
                };
                drop(handlers);
                socket.write_all(&answer)?;
            }
            Some(Type::RemoveStreamHandler) => {
                let request = request.remove_stream_handler.unwrap_or_default();
                let mut handlers = lock(&shared.stream_handlers);
                handlers.retain(|name, _| !request.proto.contains(name));
                drop(handlers);
                socket.write_all(&shared.ok)?;
            }
            Some(Type::PersistentConnUpgrade) => {
                socket.write_all(&shared.ok)?;
                return serve_persistent(socket, shared, &mut input);
            }
            _ => socket.write_all(&refusal("the mock daemon has none of this".to_owned()))?,
        }
    }
}

/// Opens the first of `protocols` that there is, and serves it to its end; false if there is none.
fn serve_stream(
    mut socket: &Socket,
    shared: &Shared,
    protocols: &[String],
    input: &mut Input,
) -> io::Result<bool> {
    let opened = |protocol: &str| {
        let stream_info = Some(shared.stream_info(protocol));
        encode(p2pd::Response {
            stream_info,
            ..ok()
        })
    };
    for protocol in protocols {
        match protocol.as_str() {
            STREAM_ECHO => {
                socket.write_all(&opened(protocol))?;
                loop {
                    socket.write_all(input.take())?;
                    if !input.fill(socket)? {
                        return Ok(true);
                    }
                }
            }
            STREAM_SOURCE => {
                socket.write_all(&opened(protocol))?;
                let zeros = vec![0; BATCH];
                loop {
                    socket.write_all(&zeros)?;
                }
            }
            STREAM_SINK => {
                socket.write_all(&opened(protocol))?;
                loop {
                    input.take();
                    if !input.fill(socket)? {
                        return Ok(true);
                    }
                }
            }
            FRAMED_SINK => {
                socket.write_all(&opened(protocol))?;
                return take_messages(socket, input).map(|()| true);
            }
            other => {
                let size = other.strip_prefix(FRAMED_SOURCE);
                if let Some(size) = size.and_then(|size| size.parse().ok()) {
                    socket.write_all(&opened(protocol))?;
                    send_messages(socket, size)?;
                }
            }
        }
        let Some(addr) = lock(&shared.stream_handlers).get(protocol).cloned() else {
            continue;
        };
        let handler = match addr
            .endpoint()
            .map_err(io::Error::other)
            .and_then(|e| Socket::connect(&e))
        {
            Ok(handler) => handler,
            Err(error) => {
                socket.write_all(&refusal(format!("the handler at {addr}: {error}")))?;
                return Ok(false);
            }
        };
        (&handler).write_all(
            &shared
                .stream_info(protocol)
                .encode_length_delimited_to_vec(),
        )?;
        socket.write_all(&opened(protocol))?;
        (&handler).write_all(input.take())?;
        return pipe(socket, &handler).map(|()| true);
    }
    socket.write_all(&refusal(format!("protocols not supported: {protocols:?}")))?;
    Ok(false)
}

/// Sends hivemind's messages until nobody takes them.
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

/// Takes hivemind's messages to the end of the stream, and answers those that ask for it.
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
        if !input.fill(socket)? {
            return Ok(());
        }
    }
}

/// Passes on what either side sends, until both have ended.
fn pipe(near: &Socket, far: &Socket) -> io::Result<()> {
    fn pass(from: &Socket, mut to: &Socket) {
        let mut input = Input::new();
        // On an error one of them is gone, and the other is told so.
        while input.fill(from).unwrap_or(false) && to.write_all(input.take()).is_ok() {}
        to.shutdown(Shutdown::Write);
    }
    thread::scope(|scope| {
        thread::Builder::new().spawn_scoped(scope, || pass(near, far))?;
        pass(far, near);
        Ok(())
    })
}

// --- persistent connections ---

/// What goes out after one read, to each connection that it concerns.
#[derive(Default)]
struct Outputs {
    own: Vec<u8>,
    others: Vec<(Arc<Persistent>, Vec<u8>)>,
}

impl Outputs {
    fn to(&mut self, own: &Persistent, target: &Arc<Persistent>) -> &mut Vec<u8> {
        if target.number == own.number {
            return &mut self.own;
        }
        let known = |(other, _): &(Arc<Persistent>, Vec<u8>)| other.number == target.number;
        let place = self.others.iter().position(known).unwrap_or_else(|| {
            self.others.push((target.clone(), Vec::new()));
            self.others.len() - 1
        });
        &mut self.others[place].1
    }

    fn flush(&mut self, own: &Persistent) -> io::Result<()> {
        for (target, out) in &mut self.others {
            if !out.is_empty() && target.send(out).is_err() {
                // Its own thread sees the end, and tells those who wait for it.
                lock(&target.socket).shutdown(Shutdown::Both);
            }
            out.clear();
        }
        // As many as there are connections at the most, but those that ended are let go of.
        self.others
            .retain(|(target, _)| Arc::strong_count(target) > 1);
        if !self.own.is_empty() {
            own.send(&self.own)?;
            self.own.clear();
        }
        Ok(())
    }

    fn is_full(&self) -> bool {
        self.own.len() >= BATCH || self.others.iter().any(|(_, out)| out.len() >= BATCH)
    }
}

impl Persistent {
    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        (&*lock(&self.socket)).write_all(bytes)
    }
}

fn serve_persistent(socket: &Socket, shared: &Shared, input: &mut Input) -> io::Result<()> {
    let own = Arc::new(Persistent {
        number: shared.next.fetch_add(1, Ordering::Relaxed),
        socket: Mutex::new(socket.try_clone()?),
    });
    let mut outputs = Outputs::default();
    let served = (|| loop {
        while let Some(message) = input.frame()? {
            answer(message, &own, shared, &mut outputs)?;
            if outputs.is_full() {
                outputs.flush(&own)?;
            }
        }
        outputs.flush(&own)?;
        if !input.fill(socket)? {
            return Ok(());
        }
    })();
    leave(&own, shared, &mut outputs);
    outputs.own.clear(); // for which there is nobody any more
    outputs.flush(&own)?;
    served
}

/// Does as one message says.
fn answer(
    message: &[u8],
    own: &Arc<Persistent>,
    shared: &Shared,
    outputs: &mut Outputs,
) -> io::Result<()> {
    let mut fields = Fields(message);
    let (Some((1, id)), Some((number, content))) = (fields.next(), fields.next()) else {
        return Err(malformed("a call id and a message"));
    };
    let id: CallId = id
        .try_into()
        .map_err(|_| malformed("a call id of 16 bytes"))?;
    match number {
        2 => {
            let request = p2pd::AddUnaryHandlerRequest::decode(content)?;
            let balanced = request.balanced.unwrap_or_default();
            let mut routes = lock(&shared.routes);
            let name = request.proto.unwrap_or_default().into_bytes();
            let known = routes.handlers.get(&name);
            if known.is_some_and(|handlers| !(balanced && handlers.balanced)) {
                put_daemon_error(
                    &mut outputs.own,
                    &id,
                    "handler for the protocol already set",
                );
            } else if routes.count_handlers() >= MAX_HANDLERS {
                put_daemon_error(&mut outputs.own, &id, "too many handlers");
            } else {
                let handlers = routes.handlers.entry(name).or_default();
                handlers.balanced = balanced;
                handlers.persistents.push(own.clone());
                put_response(&mut outputs.own, &id, None);
            }
        }
        3 => {
            let mut call = Fields(content);
            let (Some((1, _)), Some((2, name)), Some((3, data))) =
                (call.next(), call.next(), call.next())
            else {
                return Err(malformed("a call's peer, protocol and data"));
            };
            if name == UNARY_LOAD.as_bytes() {
                return start_load(id, data, own, shared, outputs);
            }
            if name == UNARY_ECHO.as_bytes() {
                let len = header_len(data.len()) + data.len();
                put_response(&mut outputs.own, &id, Some((2, len)));
                put_field(&mut outputs.own, 1, data);
                return Ok(());
            }
            match route(id, name, own, shared) {
                Ok(handler) => {
                    let out = outputs.to(own, &handler);
                    put_response(out, &id, Some((3, content.len())));
                    out.extend_from_slice(content);
                }
                Err(words) => put_daemon_error(&mut outputs.own, &id, words),
            }
        }
        4 => {
            let call = lock(&shared.routes).calls.remove(&id);
            if let Some(Call { caller, load, .. }) = call {
                if let Some(load) = load {
                    load.go_on(&id, content, own, shared, outputs);
                } else {
                    let out = outputs.to(own, &caller);
                    put_response(out, &id, Some((2, content.len())));
                    out.extend_from_slice(content);
                }
            }
        }
        5 => {
            if let Some(call) = lock(&shared.routes).calls.remove(&id) {
                put_response(outputs.to(own, &call.handler), &id, Some((5, 0)));
            }
        }
        6 => {
            let (_, name) = Fields(content).next().unwrap_or_default();
            lock(&shared.routes).remove_handlers(own, Some(name));
            put_response(&mut outputs.own, &id, None);
        }
        _ => return Err(malformed("a message of a known kind")),
    }
    Ok(())
}

/// Whose turn it is to take a call; or why nobody's.
fn route(
    id: CallId,
    name: &[u8],
    caller: &Arc<Persistent>,
    shared: &Shared,
) -> Result<Arc<Persistent>, &'static str> {
    let mut routes = lock(&shared.routes);
    if routes.calls.len() >= MAX_CALLS {
        return Err("too many calls at once");
    }
    let handlers = routes
        .handlers
        .get_mut(name)
        .ok_or("protocols not supported")?;
    handlers.turn = (handlers.turn + 1) % handlers.persistents.len();
    let handler = handlers.persistents[handlers.turn].clone();
    let call = Call {
        caller: caller.clone(),
        handler: handler.clone(),
        load: None,
    };
    routes.calls.insert(id, call);
    Ok(handler)
}

/// Begins to call a handler, as the payload of a call says.
fn start_load(
    id: CallId,
    data: &[u8],
    own: &Arc<Persistent>,
    shared: &Shared,
    outputs: &mut Outputs,
) -> io::Result<()> {
    let words = String::from_utf8_lossy(data).into_owned();
    let words: Vec<&str> = words.split(' ').collect();
    let numbers: Vec<u64> = words.iter().skip(1).flat_map(|word| word.parse()).collect();
    let (name, &[size, parallel, count]) = (words[0], &numbers[..]) else {
        put_daemon_error(&mut outputs.own, &id, "not HANDLER SIZE PARALLEL COUNT");
        return Ok(());
    };
    let handlers = lock(&shared.routes);
    let handler = handlers.handlers.get(name.as_bytes());
    let handler = handler.map(|handlers| handlers.persistents[0].clone());
    drop(handlers);
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let (Some(handler), 8..MAX_FRAME, 1..) = (handler, size, parallel) else {
        put_daemon_error(&mut outputs.own, &id, "no such handler, or not that large");
        return Ok(());
    };
    let mut head = Vec::new();
    put_field(&mut head, 1, &shared.peer_id.to_bytes());
    put_field(&mut head, 2, name.as_bytes());
    put_header(&mut head, 3, size);
    let load = Arc::new(Load {
        id,
        caller: own.clone(),
        handler,
        head,
        payload: vec![7; size],
        parallel,
        count,
        progress: Mutex::new(Progress {
            made: 0,
            done: 0,
            begun: Instant::now(),
        }),
    });
    for _ in 0..parallel.min(count) {
        load.call(own, shared, outputs);
        if outputs.is_full() {
            outputs.flush(own)?;
        }
    }
    Ok(())
}

impl Load {
    /// Makes the next call.
    fn call(self: &Arc<Self>, own: &Persistent, shared: &Shared, outputs: &mut Outputs) {
        let mut progress = lock(&self.progress);
        let number = progress.made.to_le_bytes();
        progress.made += 1;
        drop(progress);
        let mut id = self.id;
        id[8..].copy_from_slice(&number);
        let call = Call {
            caller: self.caller.clone(),
            handler: self.handler.clone(),
            load: Some(self.clone()),
        };
        lock(&shared.routes).calls.insert(id, call);
        let out = outputs.to(own, &self.handler);
        put_response(out, &id, Some((3, self.head.len() + self.payload.len())));
        out.extend_from_slice(&self.head);
        out.extend_from_slice(&number);
        out.extend_from_slice(&self.payload[8..]);
    }

    /// Whether that is a call's data. The first replies are looked at in whole, and of all the rest
    /// the length and the number, so that it is the handler's time that is measured.
    fn is_echo(&self, id: &CallId, reply: &[u8], done: u64) -> bool {
        reply.len() == self.payload.len()
            && reply[..8] == id[8..]
            && (done > self.parallel || reply[8..] == self.payload[8..])
    }

    /// Takes the reply to a call, and makes the next one.
    fn go_on(
        self: &Arc<Self>,
        id: &CallId,
        content: &[u8],
        own: &Persistent,
        shared: &Shared,
        outputs: &mut Outputs,
    ) {
        let mut progress = lock(&self.progress);
        progress.done += 1;
        let (made, done, elapsed) = (progress.made, progress.done, progress.begun.elapsed());
        drop(progress);
        let reply = Fields(content).next();
        if !reply.is_some_and(|(kind, data)| kind == 1 && self.is_echo(id, data, done)) {
            // Whatever else comes is for nobody any more.
            let is_other =
                |call: &Call| !call.load.as_ref().is_some_and(|of| Arc::ptr_eq(of, self));
            lock(&shared.routes).calls.retain(|_, call| is_other(call));
            let words = "the handler's reply is no echo";
            put_daemon_error(outputs.to(own, &self.caller), &self.id, words);
        } else if made < self.count {
            self.call(own, shared, outputs);
        } else if done == self.count {
            let seconds = elapsed.as_secs_f64().to_string();
            let len = header_len(seconds.len()) + seconds.len();
            let out = outputs.to(own, &self.caller);
            put_response(out, &self.id, Some((2, len)));
            put_field(out, 1, seconds.as_bytes());
        }
    }
}

/// Tells those who wait for a connection that ended, or work for it.
fn leave(own: &Arc<Persistent>, shared: &Shared, outputs: &mut Outputs) {
    let mut routes = lock(&shared.routes);
    routes.remove_handlers(own, None);
    routes.calls.retain(|id, call| {
        if call.handler.number == own.number {
            // More than once for calls that were made here; whoever asked for them knows but one.
            put_daemon_error(
                outputs.to(own, &call.caller),
                call.load.as_ref().map_or(id, |load| &load.id),
                "the handler's client left",
            );
        } else if call.caller.number == own.number {
            put_response(outputs.to(own, &call.handler), id, Some((5, 0)));
        }
        call.handler.number != own.number && call.caller.number != own.number
    });
}

fn malformed(wanted: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("expected {wanted}"))
}

/// The length-delimited fields of a message, in the order in which they come; it ends before any
/// other. The clients write theirs in the order of their numbers.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<(u64, &'a [u8])> {
        let (key, rest) = unsigned_varint::decode::u64(self.0).ok()?;
        let (len, rest) = unsigned_varint::decode::usize(rest).ok()?;
        let (value, rest) = rest.split_at_checked(len)?;
        self.0 = rest;
        (key & 7 == 2).then_some((key >> 3, value))
    }
}

fn put_varint(out: &mut Vec<u8>, number: usize) {
    let mut buffer = unsigned_varint::encode::usize_buffer();
    out.extend_from_slice(unsigned_varint::encode::usize(number, &mut buffer));
}

/// How long the header of a field with a number below 16 is.
fn header_len(len: usize) -> usize {
    1 + prost::length_delimiter_len(len)
}

fn put_header(out: &mut Vec<u8>, number: u8, len: usize) {
    out.push(number << 3 | 2);
    put_varint(out, len);
}

fn put_field(out: &mut Vec<u8>, number: u8, value: &[u8]) {
    put_header(out, number, value.len());
    out.extend_from_slice(value);
}

/// A PersistentConnectionResponse up to its content, which is the field of that number and length;
/// without, an acknowledgement.
fn put_response(out: &mut Vec<u8>, id: &CallId, content: Option<(u8, usize)>) {
    let content_len = content.map_or(0, |(_, len)| header_len(len) + len);
    put_varint(out, header_len(id.len()) + id.len() + content_len);
    put_field(out, 1, id);
    if let Some((number, len)) = content {
        put_header(out, number, len);
    }
}

fn put_daemon_error(out: &mut Vec<u8>, id: &CallId, words: &str) {
    put_response(out, id, Some((4, header_len(words.len()) + words.len())));
    put_field(out, 1, words.as_bytes());
}

// --- sockets ---

/// What was read and not yet taken. Its room is written to once and used again.
struct Input {
    room: Vec<u8>,
    wanted: usize,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self {
            room: Vec::new(),
            wanted: FIRST_READ,
            start: 0,
            end: 0,
        }
    }

    /// All of it.
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

    /// The next message, if it is all there.
    fn frame(&mut self) -> io::Result<Option<&[u8]>> {
        let input = &self.room[self.start..self.end];
        let split = framing::split_length(input, MAX_FRAME).map_err(io::Error::other)?;
        let Some((prefix, len)) = split else {
            return Ok(None);
        };
        let begin = self.start + prefix;
        if begin + len > self.end {
            let missing = begin + len - self.end;
            self.make_room(missing);
            return Ok(None);
        }
        self.start = begin + len;
        Ok(Some(&self.room[begin..begin + len]))
    }

    /// Reads once; false at the end.
    fn fill(&mut self, mut socket: &Socket) -> io::Result<bool> {
        self.make_room(self.wanted);
        let room = &mut self.room[self.end..];
        loop {
            match socket.read(room) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => {
                    let count = read?;
                    if count == room.len() {
                        self.wanted = READ;
                    }
                    self.end += count;
                    return Ok(count > 0);
                }
            }
        }
    }

    fn make_room(&mut self, count: usize) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.room.len() - self.end >= count {
            return;
        }
        self.room.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.room.len() - self.end < count {
            self.room.resize(self.end + count, 0);
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

    /// Where it listens, having been asked to listen at `endpoint`.
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

/// A connection, blocking.
pub enum Socket {
    /// Through a file.
    #[cfg(unix)]
    Unix(UnixStream),
    /// Through the network.
    Tcp(TcpStream),
}

impl Socket {
    /// Connects.
    ///
    /// # Errors
    /// If nobody listens there.
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
        // It fails where the other side was first.
        let _ = match self {
            #[cfg(unix)]
            Self::Unix(socket) => socket.shutdown(how),
            Self::Tcp(socket) => socket.shutdown(how),
        };
    }
}

impl Read for &Socket {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            #[cfg(unix)]
            Socket::Unix(socket) => (&mut &*socket).read(room),
            Socket::Tcp(socket) => (&mut &*socket).read(room),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            #[cfg(unix)]
            Socket::Unix(socket) => (&mut &*socket).write(bytes),
            Socket::Tcp(socket) => (&mut &*socket).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
