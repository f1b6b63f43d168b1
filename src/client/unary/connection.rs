//! A persistent connection (hivemind's fork): the protocol's state machine and a socket.
//!
//! Callers encode their calls and write as much as the socket accepts. The [reader](super::reader)
//! writes the rest.

use crate::error::Error;
use crate::lock;
use crate::socket::Socket;
use bytes::{Bytes, BytesMut};
use p2pd_protocol::policy::persistent::ConnectionId;
use p2pd_protocol::unary::{self, CallId};
use p2pd_protocol::{self as protocol, Output, PersistentClient, UnaryEvent};
use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{oneshot, Notify};
use tokio::task::AbortHandle;
use tokio::time::Instant;

pub type Event = UnaryEvent<Token, Vec<u8>>;
pub type Core = PersistentClient<Token, Vec<u8>>;

/// Recipient of an answer of the daemon.
#[derive(Debug)]
pub enum Token {
    Call(oneshot::Sender<Result<Bytes, Error>>),
    /// Registers the handler of this name.
    Register(String),
    /// Unregisters the handler of this name.
    Unregister(String),
}

/// A persistent connection.
pub struct Connection {
    pub id: ConnectionId,
    pub(super) socket: Socket,
    pub(super) inner: Mutex<Inner>,
    /// Wakes the reader for a change other than a ready socket.
    pub(super) wanted_changed: Notify,
    /// Notified when the output has shrunk or the connection is lost.
    output_shrunk: Notify,
}

pub(super) struct Inner {
    pub core: Core,
    output: Output<Bytes>,
    /// Buffer for the head of a frame.
    head: BytesMut,
    /// Whether messages are held back until the reader flushes. One read may wake several tasks; this
    /// way their messages are written together.
    pub corked: bool,
    /// The events that the reader waits for.
    pub awaited: Awaited,
    /// The tasks of incoming calls.
    pub work: HashMap<CallId, Option<AbortHandle>>,
    /// The error of a failed write. The reader still handles the input that has arrived.
    pub broken: Option<Error>,
    /// Why the connection was lost.
    pub lost: Option<Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Awaited {
    pub end: bool,
    pub input: bool,
    pub output: bool,
    pub cancel_timer: bool,
    /// Limits the time of back-pressure on peers.
    pub hold_timer: bool,
}

impl Connection {
    pub fn new(id: ConnectionId, socket: Socket, core: Core) -> Self {
        let inner = Inner {
            core,
            output: Output::keeping(unary::KEPT_OUTPUT),
            head: BytesMut::new(),
            corked: false,
            awaited: Awaited::default(),
            work: HashMap::new(),
            broken: None,
            lost: None,
        };
        Self {
            id,
            socket,
            inner: Mutex::new(inner),
            wanted_changed: Notify::new(),
            output_shrunk: Notify::new(),
        }
    }

    /// Waits until the connection is lost.
    pub async fn lost(&self) -> Error {
        self.until(|inner| inner.lost.clone()).await
    }

    /// Waits until there is room for another call.
    pub async fn wait_for_room(&self) {
        let has_room = |inner: &Inner| inner.is_gone() || inner.output.len() <= unary::HIGH_WATER;
        self.until(|inner| has_room(inner).then_some(())).await;
    }

    /// Waits until the output is empty.
    pub async fn flushed(&self) {
        let is_flushed = |inner: &Inner| inner.is_gone() || inner.output.is_empty();
        self.until(|inner| is_flushed(inner).then_some(())).await;
    }

    /// Waits until `done` returns a value.
    async fn until<T>(&self, done: impl Fn(&Inner) -> Option<T>) -> T {
        loop {
            let changed = self.output_shrunk.notified();
            if let Some(value) = done(&lock(&self.inner)) {
                return value;
            }
            changed.await;
        }
    }

    /// Sends a call. `encode` appends its head to the buffer; `payload` follows.
    ///
    /// # Errors
    /// No part of the call was sent.
    pub fn call(
        self: &Arc<Self>,
        payload: &Bytes,
        encode: impl FnOnce(&mut Core, Token, &mut BytesMut) -> Result<CallId, protocol::Error>,
    ) -> Result<PendingCall, Error> {
        let (sender, reply) = oneshot::channel();
        let id = self.request(Token::Call(sender), payload, encode)?;
        Ok(PendingCall {
            connection: Arc::clone(self),
            id,
            reply: Some(reply),
        })
    }

    /// Sends a request. The reader gets `token` with the answer.
    ///
    /// # Errors
    /// No part of the request was sent.
    pub fn request(
        &self,
        token: Token,
        payload: &Bytes,
        encode: impl FnOnce(&mut Core, Token, &mut BytesMut) -> Result<CallId, protocol::Error>,
    ) -> Result<CallId, Error> {
        let mut inner = lock(&self.inner);
        if inner.is_gone() {
            return Err(Error::lost("the connection is closed", true));
        }
        let Inner { core, head, .. } = &mut *inner;
        head.clear();
        let id = encode(core, token, head)?;
        if let Err(error) = inner.write(&self.socket, payload) {
            let token = inner.core.forget(&id);
            self.changed(inner);
            drop(token);
            return Err(Error::lost(error, true));
        }
        self.changed(inner);
        Ok(id)
    }

    /// Replies to an incoming call, unless its caller is gone.
    pub fn reply(&self, id: &CallId, outcome: Result<Bytes, String>) {
        let (payload, error) = match outcome {
            Ok(payload) => (payload, None),
            Err(error) => (Bytes::new(), Some(error)),
        };
        let len = payload.len();
        self.send(&payload, |inner| {
            let Inner {
                core, head, work, ..
            } = inner;
            work.remove(id);
            match error {
                None => core.reply(id, len, head),
                Some(error) => {
                    core.reply_error(id, &error, head);
                    false
                }
            }
        });
    }

    /// Sends the message that `encode` appends to the buffer, which has no payload.
    pub fn send_head(&self, encode: impl FnOnce(&mut Core, &mut BytesMut)) {
        self.send(&Bytes::new(), |inner| {
            encode(&mut inner.core, &mut inner.head);
            false
        });
    }

    /// Sends the message that `encode` appends to the buffer, followed by `payload` if it returns true.
    fn send(&self, payload: &Bytes, encode: impl FnOnce(&mut Inner) -> bool) {
        let mut inner = lock(&self.inner);
        if inner.is_gone() {
            return;
        }
        inner.head.clear();
        let sent = if encode(&mut inner) {
            inner.write(&self.socket, payload)
        } else {
            inner.write(&self.socket, &Bytes::new())
        };
        // The reader finds the error in `broken`.
        let _ = sent;
        self.changed(inner);
    }

    /// Cancels all calls, in both directions: Go's daemon does not tell peers that a client left.
    pub fn shut_down(&self) {
        lock(&self.inner).corked = false;
        self.send_head(|core, head| core.shut_down("the handler's client was closed", head));
        self.flush();
    }

    /// Closes the connection. After a failed write the reader closes it, once it has handled the
    /// input that has arrived.
    pub fn close(&self) {
        self.shut_down();
        let is_broken = lock(&self.inner).broken.is_some();
        if !is_broken {
            self.lose(&Error::closed());
        }
    }

    /// Writes as much of the output as the socket accepts.
    pub fn flush(&self) {
        let mut sent = Vec::new();
        let mut rest = Output::default();
        let low = {
            let mut inner = lock(&self.inner);
            if let Err(error) = inner.flush(&self.socket, &mut sent) {
                inner.broken = Some(Error::lost(&error, false));
                rest = std::mem::take(&mut inner.output);
            }
            inner.output.len() <= unary::LOW_WATER
        };
        drop((sent, rest));
        if low {
            self.output_shrunk.notify_waiters();
        }
    }

    /// Wakes the reader if the set of events that it must wait for has changed.
    fn changed(&self, mut inner: MutexGuard<'_, Inner>) {
        let wanted = inner.wants();
        if wanted != inner.awaited {
            inner.awaited = wanted;
            drop(inner);
            self.wanted_changed.notify_one();
        }
    }

    /// Ends the connection: all calls fail, and all handlers are cancelled.
    pub fn lose(&self, error: &Error) {
        let (pending, work, output) = {
            let mut inner = lock(&self.inner);
            if inner.lost.is_some() {
                return;
            }
            inner.lost = Some(error.clone());
            let pending = inner.core.take_pending();
            let work = std::mem::take(&mut inner.work);
            (pending, work, std::mem::take(&mut inner.output))
        };
        drop(output);
        // Closing a socket with unread input resets it, and the daemon would lose the last messages.
        self.socket.drain();
        self.socket.end();
        for token in pending {
            // The session fails its own requests when it learns of the loss.
            if let Token::Call(sender) = token {
                complete(sender, Err(error.clone()));
            }
        }
        for task in work.into_values().flatten() {
            task.abort();
        }
        self.wanted_changed.notify_one();
        self.output_shrunk.notify_waiters();
    }
}

/// Gives the outcome of a call to its caller, unless that has cancelled the call.
pub fn complete(sender: oneshot::Sender<Result<Bytes, Error>>, outcome: Result<Bytes, Error>) {
    let _ = sender.send(outcome);
}

/// A call that waits for its reply. Dropping it cancels the call.
pub struct PendingCall {
    connection: Arc<Connection>,
    id: CallId,
    reply: Option<oneshot::Receiver<Result<Bytes, Error>>>,
}

impl PendingCall {
    pub async fn reply(mut self) -> Result<Bytes, Error> {
        let Some(reply) = &mut self.reply else {
            return Err(Error::closed());
        };
        let outcome = reply.await;
        self.reply = None;
        outcome.unwrap_or_else(|_| Err(Error::closed()))
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        if self.reply.is_some() {
            // Dropped after the lock is released.
            let mut token = None;
            self.connection.send_head(|core, head| {
                token = core.cancel(&self.id, Instant::now().into_std(), head)
            });
        }
    }
}

impl Inner {
    pub fn is_gone(&self) -> bool {
        self.broken.is_some() || self.lost.is_some()
    }

    pub fn wants(&self) -> Awaited {
        Awaited {
            end: self.is_gone(),
            input: self.core.wants_input() && self.output.len() <= unary::MAX_OUTPUT,
            output: !self.output.is_empty() && !self.corked,
            cancel_timer: self.core.has_unconfirmed_cancels(),
            hold_timer: !self.core.wants_input(),
        }
    }

    /// Writes the encoded head, if any, and the payload. Queues the part that the socket does not
    /// accept. After an error the connection cannot be written to.
    fn write(&mut self, socket: &Socket, payload: &Bytes) -> io::Result<()> {
        if self.head.is_empty() {
            return Ok(());
        }
        let mut sent = 0;
        if self.output.is_empty() && !self.corked {
            let pieces = [IoSlice::new(&self.head), IoSlice::new(payload)];
            match unless_blocked(socket.try_write_vectored(&pieces)) {
                Ok(count) => sent = count.unwrap_or(0),
                Err(error) => {
                    self.broken = Some(Error::lost(&error, false));
                    return Err(error);
                }
            }
            if sent == self.head.len() + payload.len() {
                return Ok(());
            }
        }
        let of_head = sent.min(self.head.len());
        self.output.push_copied(&self.head[of_head..]);
        self.output.push_shared(payload.clone(), sent - of_head);
        Ok(())
    }

    /// Writes as much of the output as the socket accepts. Adds the written payloads to `sent`. The
    /// caller drops them after it has released the lock, because that can run any code.
    fn flush(&mut self, socket: &Socket, sent: &mut Vec<Bytes>) -> io::Result<()> {
        while !self.output.is_empty() && !self.corked {
            match unless_blocked(socket.try_write_vectored(&self.output.slices()))? {
                Some(count) => sent.extend(self.output.sent(count)),
                None => break,
            }
        }
        Ok(())
    }

    /// Reads up to the read budget. Returns whether there may be more input.
    pub fn read(
        &mut self,
        read: impl Fn(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
        scratch: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        let mut budget = unary::READ_BUDGET;
        loop {
            let (payload, wanted, count) = match self.core.payload_buffer() {
                Some(buffer) => {
                    let ahead = &mut scratch[..unary::LOOK_AHEAD];
                    let (len, wanted) = (buffer.len(), buffer.len() + ahead.len());
                    let mut pieces = [IoSliceMut::new(buffer), IoSliceMut::new(ahead)];
                    (len, wanted, read(&mut pieces))
                }
                None => {
                    let mut pieces = [IoSliceMut::new(scratch)];
                    (0, unary::READ_SIZE, read(&mut pieces))
                }
            };
            let count = match unless_blocked(count) {
                Ok(Some(0)) => return Err(self.core.end_of_file().into()),
                Ok(Some(count)) => count,
                Ok(None) => return Ok(false),
                Err(error) => return Err(Error::lost(error, false)),
            };
            self.core.payload_filled(count.min(payload));
            self.poll(&scratch[..count.saturating_sub(payload)], events)?;
            budget = budget.saturating_sub(count);
            if count < wanted || !self.wants().input {
                return Ok(false);
            }
            if budget == 0 {
                return Ok(true);
            }
        }
    }

    pub fn poll(&mut self, mut input: &[u8], events: &mut Vec<Event>) -> Result<(), Error> {
        while let Some(event) = self.core.poll(&mut input)? {
            events.push(event);
        }
        Ok(())
    }
}

fn unless_blocked(outcome: io::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
