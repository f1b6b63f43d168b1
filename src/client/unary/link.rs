//! A persistent connection (hivemind's fork): the protocol's state machine and a socket.
//!
//! A call is encoded and, if the socket takes it, sent by whoever makes it. One task reads: it hands
//! replies to their callers, starts a task for each call of a peer, and sends what did not fit.

use super::{closed, Unary, UnaryCall};
use crate::error::Error;
use crate::socket::Socket;
use crate::{lock, runtime_ended};
use bytes::{Bytes, BytesMut};
use p2pd_protocol::unary::{self, CallId};
use p2pd_protocol::{self as protocol, Output, PeerId, PersistentClient, UnaryEvent};
use std::collections::HashMap;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;
use tokio::sync::{oneshot, Notify};
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, Instant};

type Token = oneshot::Sender<Result<Bytes, Error>>;
type Event = UnaryEvent<Token, Vec<u8>>;
type Core = PersistentClient<Token, Vec<u8>>;

/// A persistent connection.
pub struct Link {
    socket: Socket,
    inner: Mutex<Inner>,
    /// The driver has something to do that no socket tells it of.
    attention: Notify,
    /// There is room in the output, or none is needed any more.
    room: Notify,
}

struct Inner {
    core: Core,
    output: Output<Bytes>,
    /// Where the head of a frame is made.
    head: BytesMut,
    /// The driver is about to flush: the answers to what one read brought go out together.
    corked: bool,
    /// What the driver waits for.
    awaited: Awaited,
    /// The calls of peers at work.
    work: HashMap<CallId, Option<AbortHandle>>,
    /// It cannot be written to any more; what has come is yet to be handed out.
    broken: Option<Error>,
    /// Why it is no more.
    lost: Option<Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Awaited {
    end: bool,
    input: bool,
    room: bool,
    reminder: bool,
    /// Peers are held back, which a timer ends.
    press: bool,
}

impl Link {
    pub fn new(socket: Socket, core: Core) -> Self {
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
            socket,
            inner: Mutex::new(inner),
            attention: Notify::new(),
            room: Notify::new(),
        }
    }

    pub fn is_lost(&self) -> bool {
        lock(&self.inner).is_gone()
    }

    /// Waits until it is lost.
    pub async fn lost(&self) -> Error {
        loop {
            // Told of that, too.
            let room = self.room.notified();
            if let Some(error) = &lock(&self.inner).lost {
                return error.clone();
            }
            room.await;
        }
    }

    /// Waits until another call finds room.
    pub async fn room(&self) {
        loop {
            let room = self.room.notified();
            {
                let inner = lock(&self.inner);
                if inner.is_gone() || inner.output.len() <= unary::HIGH_WATER {
                    return;
                }
            }
            room.await;
        }
    }

    /// Waits until all was sent.
    pub async fn flushed(&self) {
        loop {
            // Told of every step below the low-water mark.
            let room = self.room.notified();
            {
                let inner = lock(&self.inner);
                if inner.is_gone() || inner.output.is_empty() {
                    return;
                }
            }
            room.await;
        }
    }

    /// Sends a request that is answered.
    pub fn ask(
        self: &Arc<Self>,
        payload: &Bytes,
        encode: impl FnOnce(&mut Core, Token, &mut BytesMut) -> Result<CallId, protocol::Error>,
    ) -> Result<Asked, Error> {
        let (token, answer) = oneshot::channel();
        let mut inner = lock(&self.inner);
        if inner.is_gone() {
            return Err(Error::lost("the connection is closed", true));
        }
        let Inner { core, head, .. } = &mut *inner;
        head.clear();
        let id = encode(core, token, head)?;
        if let Err(error) = inner.send(&self.socket, payload) {
            let token = inner.core.forget(&id);
            self.after(inner);
            drop(token);
            // Nothing of it was sent.
            return Err(Error::lost(error, true));
        }
        self.after(inner);
        Ok(Asked {
            link: Arc::clone(self),
            id,
            answer: Some(answer),
        })
    }

    pub async fn register(self: &Arc<Self>, protocol: &str, balanced: bool) -> Result<(), Error> {
        let asked = self.ask(&Bytes::new(), |core, token, head| {
            core.add_handler(protocol, balanced, token, head)
        })?;
        asked.answer().await.map(drop)
    }

    /// Has the protocol encode something that is followed by `payload`, if it says so, and sends it.
    fn tell(&self, payload: &Bytes, encode: impl FnOnce(&mut Inner) -> bool) {
        let mut inner = lock(&self.inner);
        if inner.is_gone() {
            return;
        }
        inner.head.clear();
        let sent = if encode(&mut inner) {
            inner.send(&self.socket, payload)
        } else {
            inner.send(&self.socket, &Bytes::new())
        };
        // What it fails with is kept.
        let _ = sent;
        self.after(inner);
    }

    /// As `tell`, without a payload.
    fn tell_head(&self, encode: impl FnOnce(&mut Core, &mut BytesMut)) {
        self.tell(&Bytes::new(), |inner| {
            encode(&mut inner.core, &mut inner.head);
            false
        });
    }

    /// Says good-bye: Go's daemon does not tell the peers that a client left. What the socket does not
    /// take now is sent if there is time.
    pub fn leave(&self) {
        lock(&self.inner).corked = false;
        self.tell_head(|core, head| core.shut_down("the handler's client was closed", head));
        self.flush();
    }

    fn flush(&self) {
        let mut done = Vec::new();
        let mut rest = Output::default();
        let low = {
            let mut inner = lock(&self.inner);
            if let Err(error) = inner.flush(&self.socket, &mut done) {
                inner.broken = Some(Error::lost(&error, false));
                rest = std::mem::take(&mut inner.output);
            }
            inner.output.len() <= unary::LOW_WATER
        };
        drop((done, rest));
        if low {
            self.room.notify_waiters();
        }
    }

    /// Has the driver know what has changed for it.
    fn after(&self, mut inner: MutexGuard<'_, Inner>) {
        let wanted = inner.wants();
        if wanted != inner.awaited {
            // Told once: until it has looked, it need not be told again.
            inner.awaited = wanted;
            drop(inner);
            self.attention.notify_one();
        }
    }

    /// Ends the connection: everything that is awaited fails now.
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
        // What was sent last must not be overtaken by a reset.
        self.socket.drain();
        self.socket.end();
        for token in pending {
            let _ = token.send(Err(error.clone()));
        }
        for task in work.into_values().flatten() {
            task.abort();
        }
        self.attention.notify_one();
        self.room.notify_waiters();
    }
}

/// What waits for its answer. Dropped before, it is cancelled.
pub struct Asked {
    link: Arc<Link>,
    id: CallId,
    answer: Option<oneshot::Receiver<Result<Bytes, Error>>>,
}

impl Asked {
    pub async fn answer(mut self) -> Result<Bytes, Error> {
        let Some(answer) = &mut self.answer else {
            return Err(closed());
        };
        let outcome = answer.await;
        self.answer = None;
        outcome.unwrap_or_else(|_| Err(closed()))
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        if self.answer.is_some() {
            let mut token = None;
            self.link.tell_head(|core, head| {
                token = core.cancel(&self.id, Instant::now().into_std(), head)
            });
        }
    }
}

impl Inner {
    fn is_gone(&self) -> bool {
        self.broken.is_some() || self.lost.is_some()
    }

    fn wants(&self) -> Awaited {
        Awaited {
            end: self.is_gone(),
            input: self.core.wants_input() && self.output.len() <= unary::MAX_OUTPUT,
            room: !self.output.is_empty() && !self.corked,
            reminder: self.core.has_unconfirmed_cancels(),
            press: !self.core.wants_input(),
        }
    }

    /// Sends the head that was encoded, if any, and the payload; later, what cannot be now. If it
    /// fails, nothing of it was sent, and nothing can be any more.
    fn send(&mut self, socket: &Socket, payload: &Bytes) -> io::Result<()> {
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

    /// Sends what waits, as far as the socket takes it. What is `done` with is not to be dropped under
    /// the lock: its owner may be anything.
    fn flush(&mut self, socket: &Socket, done: &mut Vec<Bytes>) -> io::Result<()> {
        while !self.output.is_empty() && !self.corked {
            match unless_blocked(socket.try_write_vectored(&self.output.slices()))? {
                Some(sent) => done.extend(self.output.sent(sent)),
                None => break,
            }
        }
        Ok(())
    }

    /// Reads what is there, within the bounds of a turn. Says whether there may be more.
    fn read(
        &mut self,
        read: impl Fn(&mut [IoSliceMut<'_>]) -> io::Result<usize>,
        scratch: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        let mut budget = unary::READ_BUDGET;
        loop {
            let (room, wanted, count) = match self.core.payload_buffer() {
                Some(room) => {
                    let behind = &mut scratch[..unary::LOOK_AHEAD];
                    let (len, wanted) = (room.len(), room.len() + behind.len());
                    let mut pieces = [IoSliceMut::new(room), IoSliceMut::new(behind)];
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
            self.core.payload_filled(count.min(room));
            self.poll(&scratch[..count.saturating_sub(room)], events)?;
            budget = budget.saturating_sub(count);
            if count < wanted || !self.wants().input {
                return Ok(false);
            }
            if budget == 0 {
                return Ok(true);
            }
        }
    }

    fn poll(&mut self, mut input: &[u8], events: &mut Vec<Event>) -> Result<(), Error> {
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

/// The task that reads a connection, and writes what nobody else could.
pub struct Driver {
    link: Arc<Link>,
    unary: Weak<Unary>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The runtime has ended, unless this was told before.
        self.link.lose(&runtime_ended());
        if let Some(unary) = self.unary.upgrade() {
            unary.lost_link(&self.link);
        }
    }
}

impl Driver {
    pub fn new(link: Arc<Link>, unary: Weak<Unary>) -> Self {
        Self { link, unary }
    }

    pub async fn run(self, ahead: Bytes) {
        let mut scratch = vec![0; unary::READ_SIZE];
        let mut events = Vec::new();
        let outcome = lock(&self.link.inner).poll(&ahead, &mut events);
        let mut outcome = outcome.map(|()| false);
        let mut timers = Timers::default();
        loop {
            self.hand_out(&mut events);
            match outcome {
                Err(error) => return self.link.lose(&error),
                // Others have their turn, too.
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => {}
            }
            self.uncork().await;
            let awaited = {
                let mut inner = lock(&self.link.inner);
                inner.awaited = inner.wants();
                timers.hold = inner.core.limits().hold;
                inner.awaited
            };
            if awaited.end {
                return self.end(&mut scratch, &mut events);
            }
            timers.set(awaited);
            outcome = tokio::select! {
                biased;
                () = self.link.attention.notified() => Ok(false),
                ready = self.link.socket.readable(), if awaited.input => {
                    self.read(ready, &mut scratch, &mut events)
                }
                ready = self.link.socket.writable(), if awaited.room => {
                    ready.map_err(|error| Error::lost(error, false)).map(|()| {
                        self.link.flush();
                        false
                    })
                }
                () = at(timers.remind) => {
                    timers.remind = None;
                    self.link.tell_head(|core, head| core.repeat_cancels(Instant::now().into_std(), head));
                    Ok(false)
                }
                () = at(timers.press) => {
                    timers.press = None;
                    lock(&self.link.inner).core.stop_back_pressure();
                    Ok(false)
                }
            };
        }
    }

    fn read(
        &self,
        ready: io::Result<()>,
        scratch: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        ready.map_err(|error| Error::lost(error, false))?;
        let outcome = {
            let mut inner = lock(&self.link.inner);
            let socket = &self.link.socket;
            let outcome = inner.read(|pieces| socket.try_read_vectored(pieces), scratch, events);
            // The answers to several are better sent at once, when all of those who were woken have
            // had their turn.
            inner.corked = events.len() > 1;
            outcome
        };
        // While there is always something to read, nothing else would see to it.
        self.link.flush();
        outcome
    }

    /// Sends what was held back, once those who were woken have had their turn.
    async fn uncork(&self) {
        if lock(&self.link.inner).corked {
            tokio::task::yield_now().await;
            lock(&self.link.inner).corked = false;
            self.link.flush();
        }
    }

    /// Loses a connection that cannot be written to, once what had come is handed out.
    fn end(&self, scratch: &mut [u8], events: &mut Vec<Event>) {
        let broken = {
            let mut inner = lock(&self.link.inner);
            if inner.lost.is_some() {
                return;
            }
            // The other side has closed: there is no more than the socket's buffer holds.
            let socket = &self.link.socket;
            for _ in 0..64 {
                let read = inner.read(|pieces| socket.read_now(pieces), scratch, events);
                if !matches!(read, Ok(true)) {
                    break;
                }
            }
            inner.broken.clone()
        };
        self.hand_out(events);
        self.link.lose(&broken.unwrap_or_else(closed));
    }

    fn hand_out(&self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                UnaryEvent::Reply { token, payload } => answer(token, Ok(payload.into())),
                UnaryEvent::Acknowledged { token } => answer(token, Ok(Bytes::new())),
                UnaryEvent::HandlerFailed { token, error } => {
                    let failed = Error::HandlerFailed {
                        message: error,
                        context: Box::default(),
                    };
                    answer(token, Err(failed));
                }
                UnaryEvent::Refused { token, error } => answer(token, Err(Error::refused(error))),
                UnaryEvent::InvalidReply { token, error } => answer(token, Err(error.into())),
                UnaryEvent::Call {
                    id,
                    peer,
                    protocol,
                    payload,
                } => self.serve(id, peer, &protocol, payload.into()),
                UnaryEvent::Cancelled { id } => {
                    let task = lock(&self.link.inner).work.remove(&id);
                    if let Some(Some(task)) = task {
                        task.abort();
                    }
                }
                UnaryEvent::Rejected { id, reason } => self
                    .link
                    .tell_head(|core, head| core.refuse(&id, &reason, head)),
                UnaryEvent::Oversized { token, error } => answer(token, Err(error.into())),
                UnaryEvent::Skipped { error } => {
                    log::warn!("skipped a message of the daemon without a call id: {error}");
                }
            }
        }
    }

    /// Starts the work on a call.
    fn serve(&self, id: CallId, peer: Bytes, protocol: &str, payload: Bytes) {
        let replying = Replying {
            link: Arc::clone(&self.link),
            id,
            replied: false,
        };
        let handler = self.unary.upgrade().and_then(|all| all.handler(protocol));
        let Some(handler) = handler else {
            let words = format!("no handler for the protocol {protocol:?}");
            return replying.reply(Err(words));
        };
        let peer = PeerId::from_bytes(peer);
        {
            let mut inner = lock(&self.link.inner);
            if inner.lost.is_some() {
                // Its work would be for nobody.
                drop(inner);
                return;
            }
            // Known before it can have ended.
            inner.work.insert(id, None);
        }
        // A runtime that is shutting down drops it at once, which takes the lock.
        let task = tokio::spawn(async move {
            let outcome = (handler.serve)(UnaryCall { peer, payload }).await;
            replying.reply(outcome);
        });
        let mut inner = lock(&self.link.inner);
        if inner.lost.is_some() {
            drop(inner);
            task.abort();
        } else if let Some(entry) = inner.work.get_mut(&id) {
            *entry = Some(task.abort_handle());
        }
    }
}

/// Whoever asked may have gone.
fn answer(token: Token, outcome: Result<Bytes, Error>) {
    let _ = token.send(outcome);
}

/// A call of a peer that is to be replied to, whatever becomes of the work on it.
struct Replying {
    link: Arc<Link>,
    id: CallId,
    replied: bool,
}

impl Replying {
    fn reply(mut self, outcome: Result<Bytes, String>) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Result<Bytes, String>) {
        self.replied = true;
        let id = &self.id;
        let (payload, error) = match outcome {
            Ok(payload) => (payload, None),
            Err(words) => (Bytes::new(), Some(words)),
        };
        let len = payload.len();
        self.link.tell(&payload, |inner| {
            let Inner {
                core, head, work, ..
            } = inner;
            work.remove(id);
            match error {
                None => core.reply(id, len, head),
                Some(words) => {
                    core.reply_error(id, &words, head);
                    false
                }
            }
        });
    }
}

impl Drop for Replying {
    fn drop(&mut self) {
        if !self.replied {
            let words = if std::thread::panicking() {
                "the handler panicked"
            } else {
                "the handler was cancelled"
            };
            self.send(Err(words.to_owned()));
        }
    }
}

/// When a driver is to look again by itself.
#[derive(Default)]
struct Timers {
    remind: Option<Instant>,
    press: Option<Instant>,
    /// How long nothing is read before that.
    hold: Option<Duration>,
}

impl Timers {
    fn set(&mut self, awaited: Awaited) {
        if awaited.reminder && self.remind.is_none() {
            self.remind = Some(Instant::now() + unary::CANCEL_INTERVAL);
        }
        if !awaited.press {
            self.press = None;
        } else if self.press.is_none() {
            // A hold that an Instant cannot express never ends.
            self.press = self.hold.and_then(|hold| Instant::now().checked_add(hold));
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
