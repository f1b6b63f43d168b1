//! The task that reads a persistent connection. It passes replies to their callers, starts a task for
//! each incoming call, and writes the output that the socket did not accept at once.

use super::connection::{complete, Awaited, Connection, Event, Token};
use super::handler::{Handler, Reply, UnaryCall};
use crate::error::Error;
use crate::lock;
use bytes::Bytes;
use p2pd_protocol::unary::{self, CallId};
use p2pd_protocol::{PeerId, UnaryEvent};
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::{sleep_until, Instant};

/// The owner of a connection and its handlers: the session.
pub trait Owner: Send + Sync {
    /// Returns the handler for incoming calls of a name.
    fn handler(&self, protocol: &str) -> Option<Arc<Handler>>;

    /// The daemon has answered a request to register a handler.
    fn registered(self: Arc<Self>, connection: &Connection, name: &str, outcome: Result<(), Error>);

    /// The daemon has answered a request to unregister a handler.
    fn unregistered(self: Arc<Self>, connection: &Connection, name: &str);

    /// The connection is lost.
    fn lost(self: Arc<Self>, connection: &Connection, error: Error);
}

/// Reads a connection until it is lost.
pub struct Reader {
    connection: Arc<Connection>,
    owner: Weak<dyn Owner>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Has an effect only if the task was dropped with its runtime.
        self.connection.lose(&Error::runtime_ended());
        let error = lock(&self.connection.inner).lost.clone();
        if let (Some(owner), Some(error)) = (self.owner.upgrade(), error) {
            owner.lost(&self.connection, error);
        }
    }
}

impl Reader {
    pub fn new(connection: Arc<Connection>, owner: Weak<dyn Owner>) -> Self {
        Self { connection, owner }
    }

    /// Reads until the connection is lost. `ahead` is the input that arrived after the reply to the
    /// upgrade.
    pub async fn run(self, ahead: Bytes) {
        let connection = &self.connection;
        let mut scratch = vec![0; unary::READ_SIZE];
        let mut events = Vec::new();
        let outcome = lock(&connection.inner).poll(&ahead, &mut events);
        let mut outcome = outcome.map(|()| false);
        let mut timers = Timers::default();
        loop {
            self.hand_out(&mut events);
            match outcome {
                Err(error) => return connection.lose(&error),
                // Fairness to other tasks.
                Ok(true) => tokio::task::yield_now().await,
                Ok(false) => {}
            }
            self.uncork().await;
            let awaited = {
                let mut inner = lock(&connection.inner);
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
                () = connection.wanted_changed.notified() => Ok(false),
                ready = connection.socket.readable(), if awaited.input => {
                    self.read(ready, &mut scratch, &mut events)
                }
                ready = connection.socket.writable(), if awaited.output => {
                    ready.map_err(|error| Error::lost(error, false)).map(|()| {
                        connection.flush();
                        false
                    })
                }
                () = at(timers.repeat_cancels) => {
                    timers.repeat_cancels = None;
                    let now = Instant::now().into_std();
                    connection.send_head(|core, head| core.repeat_cancels(now, head));
                    Ok(false)
                }
                () = at(timers.stop_back_pressure) => {
                    timers.stop_back_pressure = None;
                    lock(&connection.inner).core.stop_back_pressure();
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
            let mut inner = lock(&self.connection.inner);
            let socket = &self.connection.socket;
            let outcome = inner.read(|pieces| socket.try_read_vectored(pieces), scratch, events);
            // If several tasks are woken, their messages are written together.
            inner.corked = events.len() > 1;
            outcome
        };
        // Writes here too: under constant input, the loop never gets to poll `writable`.
        self.connection.flush();
        outcome
    }

    /// Writes the messages that were held back, after the woken tasks have run.
    async fn uncork(&self) {
        if lock(&self.connection.inner).corked {
            tokio::task::yield_now().await;
            lock(&self.connection.inner).corked = false;
            self.connection.flush();
        }
    }

    /// Handles the input that has arrived, then ends a connection that cannot be written to.
    fn end(&self, scratch: &mut [u8], events: &mut Vec<Event>) {
        let broken = {
            let mut inner = lock(&self.connection.inner);
            if inner.lost.is_some() {
                return;
            }
            // The daemon has closed it, so this ends with the socket's buffer.
            let socket = &self.connection.socket;
            for _ in 0..64 {
                let read = inner.read(|pieces| socket.read_now(pieces), scratch, events);
                if !matches!(read, Ok(true)) {
                    break;
                }
            }
            inner.broken.clone()
        };
        self.hand_out(events);
        self.connection.lose(&broken.unwrap_or_else(Error::closed));
    }

    fn hand_out(&self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            match event {
                UnaryEvent::Reply { token, payload } => self.answer(token, Ok(payload.into())),
                UnaryEvent::Acknowledged { token } => self.answer(token, Ok(Bytes::new())),
                UnaryEvent::HandlerFailed { token, error } => {
                    let failed = Error::HandlerFailed {
                        message: error,
                        context: Box::default(),
                    };
                    self.answer(token, Err(failed));
                }
                UnaryEvent::Refused { token, error } => {
                    self.answer(token, Err(Error::refused(error)));
                }
                UnaryEvent::InvalidReply { token, error }
                | UnaryEvent::Oversized { token, error } => {
                    self.answer(token, Err(error.into()));
                }
                UnaryEvent::Call {
                    id,
                    peer,
                    protocol,
                    payload,
                } => self.serve(id, peer, &protocol, payload.into()),
                UnaryEvent::Cancelled { id } => {
                    let task = lock(&self.connection.inner).work.remove(&id);
                    if let Some(Some(task)) = task {
                        task.abort();
                    }
                }
                UnaryEvent::Rejected { id, reason } => self
                    .connection
                    .send_head(|core, head| core.refuse(&id, &reason, head)),
                UnaryEvent::Skipped { error } => {
                    log::warn!("skipped a message of the daemon without a call id: {error}");
                }
            }
        }
    }

    /// Passes an answer of the daemon to the sender of the request.
    fn answer(&self, token: Token, outcome: Result<Bytes, Error>) {
        let name = match token {
            Token::Call(sender) => return complete(sender, outcome),
            Token::Register(ref name) | Token::Unregister(ref name) => name,
        };
        let Some(owner) = self.owner.upgrade() else {
            return;
        };
        if let Token::Register(_) = token {
            owner.registered(&self.connection, name, outcome.map(drop));
        } else {
            owner.unregistered(&self.connection, name);
        }
    }

    /// Starts a task for a call.
    fn serve(&self, id: CallId, peer: Bytes, protocol: &str, payload: Bytes) {
        let reply = Reply::new(Arc::clone(&self.connection), id);
        let owner = self.owner.upgrade();
        let Some(handler) = owner.and_then(|owner| owner.handler(protocol)) else {
            return reply.send(Err(format!("no handler for the protocol {protocol:?}")));
        };
        let peer = PeerId::from_bytes(peer);
        {
            let mut inner = lock(&self.connection.inner);
            if inner.lost.is_some() {
                drop(inner); // dropping the reply takes the lock
                return;
            }
            // Inserted before the task exists, because the task's reply removes the entry.
            inner.work.insert(id, None);
        }
        // Without the lock: a runtime that shuts down drops the task, and so the reply, at once.
        let task = tokio::spawn(async move {
            let outcome = handler.handle(UnaryCall { peer, payload }).await;
            reply.send(outcome);
        });
        let mut inner = lock(&self.connection.inner);
        if inner.lost.is_some() {
            drop(inner);
            task.abort();
        } else if let Some(entry) = inner.work.get_mut(&id) {
            *entry = Some(task.abort_handle());
        }
    }
}

/// Timers of the reader.
#[derive(Default)]
struct Timers {
    repeat_cancels: Option<Instant>,
    stop_back_pressure: Option<Instant>,
    /// Maximum time of back-pressure.
    hold: Option<Duration>,
}

impl Timers {
    fn set(&mut self, awaited: Awaited) {
        if awaited.cancel_timer && self.repeat_cancels.is_none() {
            self.repeat_cancels = Some(Instant::now() + unary::CANCEL_INTERVAL);
        }
        if !awaited.hold_timer {
            self.stop_back_pressure = None;
        } else if self.stop_back_pressure.is_none() {
            // A time that an Instant cannot express is no limit.
            self.stop_back_pressure = self.hold.and_then(|hold| Instant::now().checked_add(hold));
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
