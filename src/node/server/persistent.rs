//! Serves one persistent connection: unary calls in both directions.
//!
//! One task owns the connection. It adds, removes and cancels in the order of arrival; each call of the
//! client runs in a task of its own. It takes calls for the client's handlers only while the client
//! reads; the node refuses or skips those that then do not fit the client's queue.

use super::shared::Shared;
use super::socket::Socket;
use crate::error::NodeError;
use crate::handle::{HandlerError, IncomingCall, Responder, UnaryClient, UnaryEvent};
use bytes::Bytes;
use futures::FutureExt as _;
use p2pd_protocol::unary::server::{PersistentServer, ServerEvent, ServerLimits};
use p2pd_protocol::unary::{
    CallId, Payload, HIGH_WATER, KEPT_OUTPUT, LOOK_AHEAD, MAX_OUTPUT, READ_BUDGET, READ_SIZE,
};
use p2pd_protocol::{Error, Output, PeerId};
use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSliceMut};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::task::{AbortHandle, Id, JoinError, JoinSet};

/// Largest number of events, or of results, that are taken between two writes.
const BATCH: usize = 64;

/// A payload in a buffer of its own.
#[derive(Debug)]
struct Buffer(Vec<u8>);

impl Payload for Buffer {
    fn with_len(len: usize) -> Option<Self> {
        let mut buffer = Vec::new();
        buffer.try_reserve_exact(len).ok()?;
        buffer.resize(len, 0);
        Some(Self(buffer))
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl From<Buffer> for Bytes {
    fn from(buffer: Buffer) -> Self {
        buffer.0.into()
    }
}

/// A peer's call that the client handles.
#[derive(Debug)]
struct Token {
    number: u64,
    responder: Responder,
}

type CallResult = Result<Result<Bytes, HandlerError>, NodeError>;

struct Connection {
    socket: Socket,
    shared: Arc<Shared>,
    server: PersistentServer<Token, Buffer>,
    output: Output<Bytes>,
    /// The client's handlers, and the calls of peers to them.
    client: UnaryClient,
    /// Ids under which the client knows those calls, by their number.
    handled: HashMap<u64, CallId>,
    /// The client's own calls.
    calls: JoinSet<(CallId, CallResult)>,
    aborts: HashMap<CallId, AbortHandle>,
}

/// Serves a connection that was just upgraded, until it ends. `first` was already read from it.
pub(super) async fn serve(socket: Socket, first: Bytes, shared: Arc<Shared>) {
    let open = Open::new(shared.clone());
    let mut seed = [0; 32];
    if let Err(error) = getrandom::fill(&mut seed) {
        log::error!("cannot get random numbers: {error}");
        return;
    }
    let limits = ServerLimits::default().with_max_message(shared.config.max_message);
    let mut connection = Connection {
        client: shared.node.register_unary_client(),
        socket,
        shared,
        server: PersistentServer::new(seed, limits),
        output: Output::keeping(KEPT_OUTPUT),
        handled: HashMap::new(),
        calls: JoinSet::new(),
        aborts: HashMap::new(),
    };
    let result = connection.run(&first).await;
    let socket = connection.end();
    drop(open);
    match result {
        Ok(()) => socket.finish().await,
        Err(error) => log::debug!("a persistent connection failed: {error}"),
    }
}

impl Connection {
    async fn run(&mut self, first: &[u8]) -> io::Result<()> {
        let mut scratch = vec![0; READ_SIZE];
        self.receive(&mut &first[..])?;
        loop {
            self.write()?;
            let queued = self.output.len();
            let interest = match queued {
                0 => Interest::READABLE,
                1..=MAX_OUTPUT => Interest::READABLE | Interest::WRITABLE,
                _ => Interest::WRITABLE,
            };
            tokio::select! {
                ready = self.socket.ready(interest) => {
                    let ready = ready?;
                    if queued <= MAX_OUTPUT && ready.is_readable() && !self.read(&mut scratch)? {
                        return Ok(());
                    }
                }
                event = self.client.next_event(), if queued < HIGH_WATER => match event {
                    Some(event) => self.on_events(event),
                    None => return Ok(()), // the node has stopped
                },
                Some(result) = self.calls.join_next_with_id() => {
                    self.on_result(result);
                    for _ in 1..BATCH {
                        let Some(result) = self.calls.try_join_next_with_id() else { break };
                        self.on_result(result);
                    }
                }
            }
        }
    }

    /// Removes the client's handlers, resets the streams of their callers, and cancels the client's own
    /// calls, by dropping them.
    fn end(self) -> Socket {
        self.socket
    }

    /// Writes what fits.
    fn write(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.socket.try_write_vectored(&self.output.slices()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.output.sent(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads the available bytes. Returns false at the end of the connection.
    fn read(&mut self, scratch: &mut [u8]) -> io::Result<bool> {
        let mut total = 0;
        while total < READ_BUDGET {
            let payload = self.server.payload_buffer().filter(|rest| !rest.is_empty());
            let payload_len = payload.as_ref().map_or(0, |rest| rest.len());
            let read = match payload {
                Some(rest) => self.socket.try_read_vectored(&mut [
                    IoSliceMut::new(rest),
                    IoSliceMut::new(&mut scratch[..LOOK_AHEAD]),
                ]),
                None => self
                    .socket
                    .try_read_vectored(&mut [IoSliceMut::new(scratch)]),
            };
            let count = match read {
                Ok(0) => return Ok(false),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            total += count;
            let direct = count.min(payload_len);
            self.server.payload_filled(direct);
            self.receive(&mut &scratch[..count - direct])?;
            if self.output.len() > HIGH_WATER {
                break; // writes first
            }
        }
        Ok(true)
    }

    fn receive(&mut self, input: &mut &[u8]) -> io::Result<()> {
        loop {
            match self.server.poll(input) {
                Ok(Some(event)) => self.on_request(event),
                Ok(None) => return Ok(()),
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn on_request(&mut self, event: ServerEvent<Token, Buffer>) {
        match event {
            ServerEvent::AddHandler {
                id,
                protocol,
                balanced,
            } => self.settle(&id, self.client.add_handler(&protocol, balanced)),
            ServerEvent::RemoveHandler { id, protocol } => {
                self.settle(&id, self.client.remove_handler(&protocol));
            }
            ServerEvent::Call {
                id,
                peer,
                protocol,
                payload,
            } => self.call(id, PeerId::from_bytes(peer), protocol, payload.into()),
            ServerEvent::Cancelled { id } => {
                if let Some(call) = self.aborts.remove(&id) {
                    call.abort();
                }
                self.output
                    .append(|out| self.server.confirm_cancel(&id, out));
            }
            ServerEvent::Reply { token, payload } => {
                self.handled.remove(&token.number);
                token.responder.reply(payload.into());
            }
            ServerEvent::HandlerFailed { token, error } => {
                self.handled.remove(&token.number);
                token.responder.fail(error);
            }
            ServerEvent::InvalidReply { token, error } => {
                self.handled.remove(&token.number);
                token.responder.fail(invalid_reply(&error));
            }
            ServerEvent::Rejected { id, reason } => self.refuse(&id, &reason),
            ServerEvent::Skipped { error } => log::warn!("skipped a client's message: {error}"),
            other => log::warn!("no support for {other:?}"),
        }
    }

    /// Answers a request to add or remove a handler.
    fn settle(&mut self, id: &CallId, result: Result<(), NodeError>) {
        match result {
            Ok(()) => self.output.append(|out| self.server.acknowledge(id, out)),
            Err(error) => self.refuse(id, &error.to_string()),
        }
    }

    fn refuse(&mut self, id: &CallId, words: &str) {
        self.output.append(|out| self.server.refuse(id, words, out));
    }

    /// Starts a call of the client.
    fn call(&mut self, id: CallId, peer: PeerId, protocol: String, payload: Bytes) {
        let node = self.shared.node.clone();
        let call = async move { (id, node.call(&peer, &protocol, payload).await) };
        self.aborts.insert(id, self.calls.spawn(call));
    }

    /// Answers a call of the client.
    fn on_result(&mut self, result: Result<(Id, (CallId, CallResult)), JoinError>) {
        let (task, (id, result)) = match result {
            Ok(result) => result,
            Err(error) if error.is_cancelled() => return,
            Err(error) => return self.on_panic(&error),
        };
        // The call may have been cancelled after it had ended, and a later one may have its id.
        if self.aborts.get(&id).map(AbortHandle::id) != Some(task) {
            return;
        }
        self.aborts.remove(&id);
        match result {
            Ok(Ok(payload)) => {
                let has_payload = self
                    .output
                    .append(|out| self.server.reply(&id, payload.len(), out));
                if has_payload {
                    self.output.push_shared(payload, 0);
                }
            }
            Ok(Err(error)) => self
                .output
                .append(|out| self.server.reply_error(&id, &error.0, out)),
            Err(error) => self.refuse(&id, &error.to_string()),
        }
    }

    /// Refuses the call of a task that has panicked.
    fn on_panic(&mut self, error: &JoinError) {
        log::error!("a call panicked: {error}");
        let mut calls = self.aborts.iter();
        let call = calls.find(|(_, task)| task.id() == error.id());
        if let Some(id) = call.map(|(id, _)| *id) {
            self.aborts.remove(&id);
            self.refuse(&id, "the daemon failed; see its log");
        }
    }

    /// Passes peers' calls to the client: the first event, and those that have arrived as well.
    fn on_events(&mut self, first: UnaryEvent) {
        let mut next = Some(first);
        let mut count = 0;
        while let Some(event) = next {
            match event {
                UnaryEvent::Call(call) => self.handle(call),
                UnaryEvent::Cancelled(number) => {
                    if let Some(id) = self.handled.remove(&number) {
                        drop(self.output.append(|out| self.server.cancel(&id, out)));
                    }
                }
            }
            count += 1;
            if count == BATCH || self.output.len() >= HIGH_WATER {
                return;
            }
            next = self.client.next_event().now_or_never().flatten();
        }
    }

    fn handle(&mut self, call: IncomingCall) {
        let IncomingCall {
            number,
            peer,
            protocol,
            payload,
            responder,
        } = call;
        let token = Token { number, responder };
        let caller = peer.as_bytes();
        let sent = self.output.append(|out| {
            self.server
                .handle(caller, &protocol, payload.len(), token, out)
        });
        match sent {
            Ok(id) => {
                self.output.push_shared(payload, 0);
                self.handled.insert(number, id);
            }
            // The token was dropped, which resets the caller's stream.
            Err(error) => log::warn!("a call of {protocol} does not fit: {error}"),
        }
    }
}

/// Explains to the caller why a handler's reply is not passed on.
fn invalid_reply(error: &Error) -> String {
    match error {
        Error::ReplyTooLarge { size, limit } => {
            format!("the handler's reply of {size} bytes exceeds the limit of {limit} bytes")
        }
        error => format!("the handler's reply is invalid: {error}"),
    }
}

/// Counts a connection as open until it is dropped.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: Arc<Shared>) -> Self {
        shared.persistent.send_modify(|count| {
            count.open += 1;
            count.opened += 1;
        });
        Self(shared)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.persistent.send_modify(|count| count.open -= 1);
    }
}
