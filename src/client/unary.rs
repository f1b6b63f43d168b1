//! Unary calls over a persistent connection (hivemind's fork): the core's state machine and a socket.
//!
//! A call is encoded and, if the socket takes it, sent by whoever makes it. One task reads: it hands
//! replies to their callers, starts a task for each call of a peer, and sends what did not fit.

use super::connector::Connector;
use super::error::{Context, Error};
use super::socket::Socket;
use super::{lock, Client};
use crate::core::unary::{self, CallId};
use crate::core::{self, Output, PeerId, Persistent, UnaryEvent, UnaryLimits};
use bytes::{Bytes, BytesMut};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use tokio::sync::{oneshot, Notify};
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, Instant};

/// How long what was sent last may take to leave when the client is closed.
const GOODBYE: std::time::Duration = std::time::Duration::from_secs(1);

/// A call of a peer, given to a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnaryCall {
    /// The caller.
    pub peer: PeerId,
    /// What it is called with.
    pub payload: Bytes,
}

impl Client {
    /// Calls a peer's handler and returns its reply.
    ///
    /// The first call opens the persistent connection; when that is lost, all that waits for it fails
    /// at once, and the next call opens another one. Dropping the future, or running out of time,
    /// cancels the handler. hivemind's daemon ends when its last persistent connection is closed.
    ///
    /// # Errors
    /// [`Error::HandlerFailed`] if the handler failed, or the peer's client has none of that name;
    /// [`Error::Refused`] if the peer cannot be reached or serves no calls of that name;
    /// [`Error::MessageTooLarge`] if the request exceeds
    /// [`UnaryLimits::max_message`](crate::core::UnaryLimits);
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn call_unary(
        &self,
        peer: &PeerId,
        protocol: &str,
        payload: impl Into<Bytes>,
    ) -> Result<Bytes, Error> {
        let payload = payload.into();
        let about = Context::new("CALL_UNARY").peer(peer).protocol(protocol);
        self.within(about, self.unary().call(peer, protocol, payload))
            .await
    }

    /// Serves the peers' calls of a name, until [`remove_unary_handler`](Self::remove_unary_handler)
    /// or [`close`](Self::close).
    ///
    /// Each call runs in a task of its own, which is dropped if the caller is gone. An error reaches
    /// the caller as its text. With `balanced`, several clients may serve the name in turn. When the
    /// connection was lost, the next call or registration opens another one, and registers the
    /// handlers there.
    ///
    /// A handler that holds a clone of its own client keeps it open until `close`.
    ///
    /// ```no_run
    /// use p2pclient_rs::client::UnaryCall;
    ///
    /// # async fn example(client: p2pclient_rs::Client) -> Result<(), p2pclient_rs::client::Error> {
    /// client
    ///     .add_unary_handler("double", false, |call: UnaryCall| async move {
    ///         let text = std::str::from_utf8(&call.payload).map_err(|e| e.to_string())?;
    ///         let number: u32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    ///         Ok::<_, String>((2 * number).to_string())
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if this client serves the name, [`Error::Refused`] if another one
    /// does, [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn add_unary_handler<H, F, R, E>(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
        handler: H,
    ) -> Result<(), Error>
    where
        H: Fn(UnaryCall) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, E>> + Send + 'static,
        R: Into<Bytes>,
        E: fmt::Display,
    {
        let protocol = protocol.into();
        let about = Context::new("ADD_UNARY_HANDLER").protocol(&protocol);
        let serve = move |call| -> Work {
            let work = handler(call);
            Box::pin(async move {
                match work.await {
                    Ok(reply) => Ok(reply.into()),
                    Err(error) => Err(error.to_string()),
                }
            })
        };
        let handler = Arc::new(Handler {
            balanced,
            serve: Box::new(serve),
        });
        self.within(about, self.unary().add(protocol, handler))
            .await
    }

    /// Takes back [`add_unary_handler`](Self::add_unary_handler). Calls at work are finished.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this client does not serve the name.
    pub async fn remove_unary_handler(&self, protocol: &str) -> Result<(), Error> {
        let about = Context::new("REMOVE_UNARY_HANDLER").protocol(protocol);
        self.within(about, self.unary().remove(protocol)).await
    }

    /// The names of the unary handlers that this client serves. One that the daemon would not take
    /// again, when the connection was lost, is no longer among them.
    pub fn unary_handlers(&self) -> Vec<String> {
        lock(&self.unary().handlers).keys().cloned().collect()
    }

    /// Closes the idle connections and the persistent one: calls at work, of either side, fail, and
    /// the unary handlers are forgotten. Streams, subscriptions and [`IncomingStreams`] live on, and
    /// a later call opens connections again.
    ///
    /// [`IncomingStreams`]: super::IncomingStreams
    pub async fn close(&self) {
        self.connector().close_idle();
        self.unary().close().await;
    }

    fn unary(&self) -> &Arc<Unary> {
        &self.shared.unary
    }
}

type Work = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>>;
type Token = oneshot::Sender<Result<Bytes, Error>>;
type Event = UnaryEvent<Token, Vec<u8>>;
type Core = Persistent<Token, Vec<u8>>;

struct Handler {
    balanced: bool,
    serve: Box<dyn Fn(UnaryCall) -> Work + Send + Sync>,
}

type Handlers = Mutex<HashMap<String, Arc<Handler>>>;

/// The persistent connection of a client, if it is open, and what is served on it.
pub struct Unary {
    connector: Arc<Connector>,
    limits: UnaryLimits,
    handlers: Arc<Handlers>,
    link: Mutex<Option<Arc<Link>>>,
    /// Held while the connection is opened, or what is registered changes: the daemon does not keep
    /// the order of what it is told.
    changing: tokio::sync::Mutex<()>,
}

impl Unary {
    pub fn new(connector: Arc<Connector>, limits: UnaryLimits) -> Self {
        Self {
            connector,
            limits,
            handlers: Arc::default(),
            link: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    async fn call(&self, peer: &PeerId, protocol: &str, payload: Bytes) -> Result<Bytes, Error> {
        let mut retried = false;
        loop {
            let link = match self.open_link() {
                Some(link) => link,
                None => {
                    let _changing = self.changing.lock().await;
                    self.opened().await?
                }
            };
            link.room().await;
            let len = payload.len();
            let asked = link.ask(payload.clone(), |core, token, head| {
                core.call(peer.as_bytes(), protocol, len, token, head)
            });
            match asked {
                // The daemon may be there again, and cannot have seen this call.
                Err(error) if error.is_unexecuted() && !retried => retried = true,
                Err(error) => return Err(error),
                Ok(asked) => return asked.answer().await,
            }
        }
    }

    /// In a task of its own: a caller who gives up must not leave a handler behind that nobody knows
    /// of, nor one be registered while the daemon forgets it.
    async fn add(self: &Arc<Self>, protocol: String, handler: Arc<Handler>) -> Result<(), Error> {
        let this = Arc::clone(self);
        let (waiting, outcome) = oneshot::channel();
        tokio::spawn(async move {
            let _changing = this.changing.lock().await;
            if waiting.is_closed() {
                return;
            }
            let added = this.try_add(&protocol, handler).await;
            let registered = added.is_ok();
            if waiting.send(added).is_err() && registered {
                let _ = this.try_remove(&protocol).await;
            }
        });
        outcome.await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    async fn try_add(&self, protocol: &str, handler: Arc<Handler>) -> Result<(), Error> {
        if lock(&self.handlers).contains_key(protocol) {
            let context = Box::default();
            return Err(Error::AlreadyRegistered { context });
        }
        let mut retried = false;
        loop {
            let link = self.opened().await?;
            // In place before the daemon has it: a call can come sooner than its answer.
            lock(&self.handlers).insert(protocol.to_owned(), Arc::clone(&handler));
            let Err(error) = link.register(protocol, handler.balanced).await else {
                return Ok(());
            };
            lock(&self.handlers).remove(protocol);
            if retried || !error.is_unexecuted() {
                return Err(error);
            }
            retried = true;
        }
    }

    async fn remove(self: &Arc<Self>, protocol: &str) -> Result<(), Error> {
        let this = Arc::clone(self);
        let protocol = protocol.to_owned();
        let removing = tokio::spawn(async move {
            let _changing = this.changing.lock().await;
            this.try_remove(&protocol).await
        });
        removing.await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    async fn try_remove(&self, protocol: &str) -> Result<(), Error> {
        if !lock(&self.handlers).contains_key(protocol) {
            let context = Box::default();
            return Err(Error::NotRegistered { context });
        }
        // It serves the calls that come until the daemon has forgotten it, which it has, too, if the
        // connection is lost.
        if let Some(link) = self.open_link() {
            let asked = link.ask(Bytes::new(), |core, token, head| {
                core.remove_handler(protocol, token, head)
            });
            if let Ok(asked) = asked {
                let _ = asked.answer().await;
            }
        }
        lock(&self.handlers).remove(protocol);
        Ok(())
    }

    fn open_link(&self) -> Option<Arc<Link>> {
        let mut link = lock(&self.link);
        if link.as_ref().is_some_and(|link| link.is_lost()) {
            *link = None;
        }
        link.clone()
    }

    /// The connection, opened and with all handlers registered. `changing` is held.
    async fn opened(&self) -> Result<Arc<Link>, Error> {
        if let Some(link) = self.open_link() {
            return Ok(link);
        }
        let (socket, ahead) = self.connector.upgrade().await?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| Error::lost(error, true))?;
        let link = Arc::new(Link::new(socket, Persistent::new(seed, self.limits)));
        // Closed again, unless all goes well.
        let opening = Opening(Some(Arc::clone(&link)));
        let driver = Driver {
            link: Arc::clone(&link),
            handlers: Arc::downgrade(&self.handlers),
        };
        tokio::spawn(driver.run(ahead));
        let handlers: Vec<_> = {
            let handlers = lock(&self.handlers);
            let entries = handlers.iter();
            entries
                .map(|(name, h)| (name.clone(), h.balanced))
                .collect()
        };
        for (protocol, balanced) in handlers {
            match link.register(&protocol, balanced).await {
                // Taken by another client meanwhile: no reason to do without the rest.
                Err(Error::Refused { .. }) => drop(lock(&self.handlers).remove(&protocol)),
                outcome => outcome?,
            }
        }
        opening.done();
        *lock(&self.link) = Some(Arc::clone(&link));
        Ok(link)
    }

    async fn close(&self) {
        lock(&self.handlers).clear();
        let link = lock(&self.link).take();
        if let Some(link) = link {
            link.leave();
            let _ = tokio::time::timeout(GOODBYE, link.flushed()).await;
            link.lose(&closed());
        }
    }
}

impl Drop for Unary {
    fn drop(&mut self) {
        if let Some(link) = lock(&self.link).take() {
            link.leave();
            link.lose(&closed());
        }
    }
}

fn closed() -> Error {
    Error::lost("the client was closed", false)
}

fn runtime_ended() -> Error {
    Error::lost("its tokio runtime has ended", false)
}

/// A connection on its way.
struct Opening(Option<Arc<Link>>);

impl Opening {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(link) = self.0.take() {
            link.lose(&closed());
        }
    }
}

/// A persistent connection.
struct Link {
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
    /// Why it is no more.
    lost: Option<Error>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Awaited {
    input: bool,
    room: bool,
    reminder: bool,
}

impl Link {
    fn new(socket: Socket, core: Core) -> Self {
        let inner = Inner {
            core,
            output: Output::default(),
            head: BytesMut::new(),
            corked: false,
            awaited: Awaited::default(),
            work: HashMap::new(),
            lost: None,
        };
        Self {
            socket,
            inner: Mutex::new(inner),
            attention: Notify::new(),
            room: Notify::new(),
        }
    }

    fn is_lost(&self) -> bool {
        lock(&self.inner).lost.is_some()
    }

    /// Waits until another call finds room.
    async fn room(&self) {
        loop {
            let room = self.room.notified();
            {
                let inner = lock(&self.inner);
                if inner.lost.is_some() || inner.output.len() <= unary::HIGH_WATER {
                    return;
                }
            }
            room.await;
        }
    }

    /// Waits until all was sent.
    async fn flushed(&self) {
        loop {
            // Told of every step below the low-water mark.
            let room = self.room.notified();
            {
                let inner = lock(&self.inner);
                if inner.lost.is_some() || inner.output.is_empty() {
                    return;
                }
            }
            room.await;
        }
    }

    /// Sends a request that is answered.
    fn ask(
        self: &Arc<Self>,
        payload: Bytes,
        encode: impl FnOnce(&mut Core, Token, &mut BytesMut) -> Result<CallId, core::Error>,
    ) -> Result<Asked, Error> {
        let (token, answer) = oneshot::channel();
        let mut inner = lock(&self.inner);
        if inner.lost.is_some() {
            return Err(Error::lost("the connection is closed", true));
        }
        let Inner { core, head, .. } = &mut *inner;
        head.clear();
        let id = encode(core, token, head)?;
        let asked = Asked {
            link: Arc::clone(self),
            id,
            answer: Some(answer),
        };
        match inner.send(&self.socket, payload) {
            Ok(()) => self.after(inner),
            Err(error) => {
                drop(inner);
                self.break_off(&error);
                // Nothing of it was sent.
                return Err(Error::lost(error, true));
            }
        }
        Ok(asked)
    }

    async fn register(self: &Arc<Self>, protocol: &str, balanced: bool) -> Result<(), Error> {
        let asked = self.ask(Bytes::new(), |core, token, head| {
            core.add_handler(protocol, balanced, token, head)
        })?;
        asked.answer().await.map(drop)
    }

    /// Has the core encode something that is followed by `payload`, if it says so, and sends it.
    fn tell(&self, payload: Bytes, encode: impl FnOnce(&mut Core, &mut BytesMut) -> bool) {
        let mut inner = lock(&self.inner);
        if inner.lost.is_some() {
            return;
        }
        let Inner { core, head, .. } = &mut *inner;
        head.clear();
        let follows = encode(core, head);
        let payload = if follows { payload } else { Bytes::new() };
        match inner.send(&self.socket, payload) {
            Ok(()) => self.after(inner),
            Err(error) => {
                drop(inner);
                self.break_off(&error);
            }
        }
    }

    /// As `tell`, without a payload.
    fn tell_head(&self, encode: impl FnOnce(&mut Core, &mut BytesMut)) {
        self.tell(Bytes::new(), |core, head| {
            encode(core, head);
            false
        });
    }

    /// Says good-bye: Go's daemon does not tell the peers that a client left.
    fn leave(&self) {
        lock(&self.inner).corked = false;
        self.tell_head(|core, head| core.leave("the handler's client was closed", head));
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

    fn break_off(&self, error: &io::Error) {
        self.lose(&Error::lost(error, false));
    }

    /// Ends the connection: everything that is awaited fails now.
    fn lose(&self, error: &Error) {
        let (pending, work) = {
            let mut inner = lock(&self.inner);
            if inner.lost.is_some() {
                return;
            }
            inner.lost = Some(error.clone());
            inner.output = Output::default();
            (inner.core.take_pending(), std::mem::take(&mut inner.work))
        };
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
struct Asked {
    link: Arc<Link>,
    id: CallId,
    answer: Option<oneshot::Receiver<Result<Bytes, Error>>>,
}

impl Asked {
    async fn answer(mut self) -> Result<Bytes, Error> {
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
            self.link
                .tell_head(|core, head| token = core.cancel(&self.id, head));
        }
    }
}

impl Inner {
    fn wants(&self) -> Awaited {
        Awaited {
            input: self.core.wants_input() && self.output.len() <= unary::MAX_OUTPUT,
            room: !self.output.is_empty() && !self.corked,
            reminder: self.core.has_cancelled(),
        }
    }

    /// Sends the head that was encoded, if any, and the payload; later, what cannot be now.
    fn send(&mut self, socket: &Socket, payload: Bytes) -> io::Result<()> {
        if self.head.is_empty() {
            return Ok(());
        }
        let mut sent = 0;
        if self.output.is_empty() && !self.corked {
            let pieces = [IoSlice::new(&self.head), IoSlice::new(&payload)];
            sent = unless_blocked(socket.try_write_vectored(&pieces))?.unwrap_or(0);
            if sent == self.head.len() + payload.len() {
                return Ok(());
            }
        }
        let of_head = sent.min(self.head.len());
        self.output.push_copied(&self.head[of_head..]);
        self.output.push_shared(payload, sent - of_head);
        Ok(())
    }

    fn flush(&mut self, socket: &Socket) -> io::Result<()> {
        while !self.output.is_empty() {
            match unless_blocked(socket.try_write_vectored(&self.output.slices()))? {
                Some(sent) => self.output.sent(sent),
                None => break,
            }
        }
        Ok(())
    }

    /// Reads what is there, within the bounds of a turn. Says whether there may be more.
    fn read(
        &mut self,
        socket: &Socket,
        scratch: &mut [u8],
        events: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        let mut budget = unary::TURN;
        loop {
            let (room, wanted, read) = match self.core.payload_room() {
                Some(room) => {
                    let behind = &mut scratch[..unary::BEHIND];
                    let (len, wanted) = (room.len(), room.len() + behind.len());
                    let mut pieces = [IoSliceMut::new(room), IoSliceMut::new(behind)];
                    (len, wanted, socket.try_read_vectored(&mut pieces))
                }
                None => (0, scratch.len(), socket.try_read(scratch)),
            };
            let count = match unless_blocked(read) {
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
struct Driver {
    link: Arc<Link>,
    handlers: Weak<Handlers>,
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The runtime has ended, unless this was told before.
        self.link.lose(&runtime_ended());
    }
}

impl Driver {
    async fn run(self, ahead: Bytes) {
        let mut scratch = vec![0; unary::READ];
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
                if inner.lost.is_some() {
                    return;
                }
                inner.awaited = inner.wants();
                inner.awaited
            };
            timers.set(awaited);
            outcome = tokio::select! {
                biased;
                () = self.link.attention.notified() => Ok(false),
                ready = self.link.socket.readable(), if awaited.input => {
                    self.read(ready, &mut scratch, &mut events)
                }
                ready = self.link.socket.writable(), if awaited.room => self.flush(ready),
                () = at(timers.remind) => {
                    timers.remind = None;
                    self.link.tell_head(Persistent::remind);
                    Ok(false)
                }
                () = at(timers.press) => {
                    timers.press = None;
                    lock(&self.link.inner).core.press_on();
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
        let mut inner = lock(&self.link.inner);
        let outcome = inner.read(&self.link.socket, scratch, events);
        // The answers to several are better sent at once, when all of those who were woken have had
        // their turn.
        inner.corked = events.len() > 1;
        outcome
    }

    fn flush(&self, ready: io::Result<()>) -> Result<bool, Error> {
        let mut inner = lock(&self.link.inner);
        let flushed = ready.and_then(|()| inner.flush(&self.link.socket));
        flushed.map_err(|error| Error::lost(error, false))?;
        if inner.output.len() <= unary::LOW_WATER {
            self.link.room.notify_waiters();
        }
        Ok(false)
    }

    /// Sends what was held back, once those who were woken have had their turn.
    async fn uncork(&self) {
        if lock(&self.link.inner).corked {
            tokio::task::yield_now().await;
            lock(&self.link.inner).corked = false;
            if let Err(error) = self.flush(Ok(())) {
                self.link.lose(&error);
            }
        }
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
                UnaryEvent::Broken { token, error } => answer(token, Err(error.into())),
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
                UnaryEvent::Unserved { id, reason } => self
                    .link
                    .tell_head(|core, head| core.refuse(&id, reason, head)),
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
        let handlers = self.handlers.upgrade();
        let handler = handlers.and_then(|all| lock(&all).get(protocol).cloned());
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
        self.replied = true;
        lock(&self.link.inner).work.remove(&self.id);
        let id = &self.id;
        match outcome {
            Ok(reply) => {
                let len = reply.len();
                self.link
                    .tell(reply, |core, head| core.reply(id, len, head));
            }
            Err(words) => self
                .link
                .tell_head(|core, head| core.reply_error(id, &words, head)),
        }
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
            lock(&self.link.inner).work.remove(&self.id);
            self.link
                .tell_head(|core, head| core.reply_error(&self.id, words, head));
        }
    }
}

/// When a driver is to look again by itself.
#[derive(Default)]
struct Timers {
    remind: Option<Instant>,
    press: Option<Instant>,
}

impl Timers {
    fn set(&mut self, awaited: Awaited) {
        if awaited.reminder && self.remind.is_none() {
            self.remind = Some(Instant::now() + unary::REMIND);
        }
        if awaited.input {
            self.press = None;
        } else if self.press.is_none() {
            self.press = Some(Instant::now() + unary::HOLD);
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
