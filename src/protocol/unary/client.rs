//! The client's end of a persistent connection.

mod cancel;
mod event;
mod limits;

pub use event::UnaryEvent;
pub use limits::UnaryLimits;

use super::call_id::{CallId, CallIds, IdHasher};
use super::encode::{
    call_len, check_size, head_len, put_call, put_cancel, put_handler_error, put_message,
    put_reply, reply_len,
};
use super::message::{
    empty_reply, too_large_a_reply, why_skipped, Direction, Head, Message, ADD_HANDLER, CALL,
    CANCEL, INVALID_CALL, REMOVE_HANDLER,
};
use super::payload::Payload;
use super::reader::Reader;
use crate::fields::Fields;
use crate::pb::p2pd;
use crate::Error;
use bytes::{Bytes, BytesMut};
use cancel::Cancels;
use prost::Message as _;
use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::time::Instant;

/// An incoming call.
#[derive(Debug)]
struct Incoming {
    /// Of its payload, in bytes.
    size: usize,
    /// The caller is gone.
    cancelled: bool,
}

#[derive(Debug)]
struct Pending<T> {
    token: T,
    /// When it was sent, if it is a call.
    called: Option<Instant>,
}

/// A persistent connection: frames out, bytes in, events out.
///
/// ```
/// use p2pd_protocol::{PersistentClient, UnaryEvent, UnaryLimits};
/// use bytes::BytesMut;
/// use std::time::Instant;
///
/// let mut connection = PersistentClient::<&str, Vec<u8>>::new([7; 32], UnaryLimits::default());
/// let mut out = BytesMut::new();
/// let id = connection.call(b"peer", "echo", 2, "my call", Instant::now(), &mut out)?;
/// out.extend_from_slice(b"hi"); // the payload goes right behind the head
///
/// let mut reply = vec![24, 10, 16];
/// reply.extend_from_slice(&id);
/// reply.extend_from_slice(&[18, 4, 10, 2, b'h', b'o']);
/// let event = connection.poll(&mut &reply[..])?;
/// assert_eq!(event, Some(UnaryEvent::Reply { token: "my call", payload: b"ho".to_vec() }));
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct PersistentClient<T, P> {
    limits: UnaryLimits,
    ids: CallIds,
    pending: HashMap<CallId, Pending<T>, BuildHasherDefault<IdHasher>>,
    cancels: Cancels,
    /// The incoming calls at work. The ids are the peers' choice, hence the standard hasher.
    unanswered: HashMap<CallId, Incoming>,
    unanswered_bytes: usize,
    /// Calls over the limit are refused, not held back.
    pressed: bool,
    reader: Reader<P>,
}

impl<T, P: Payload> PersistentClient<T, P> {
    /// A connection that was just upgraded. `seed` is random and used for no other.
    pub fn new(seed: [u8; 32], limits: UnaryLimits) -> Self {
        Self {
            limits,
            ids: CallIds::new(seed),
            pending: HashMap::default(),
            cancels: Cancels::default(),
            unanswered: HashMap::new(),
            unanswered_bytes: 0,
            pressed: false,
            reader: Reader::new(Direction::ToClient, limits.incoming()),
        }
    }

    /// The limits in effect.
    pub fn limits(&self) -> &UnaryLimits {
        &self.limits
    }

    /// Changes the limits for messages sent from now on, and for every frame whose payload has not
    /// begun to arrive. The driver then asks [`wants_input`](Self::wants_input) again.
    pub fn set_limits(&mut self, limits: UnaryLimits) {
        self.limits = limits;
        self.reader.max_incoming = limits.incoming();
        self.pressed &= self.exceeds(1);
    }

    // --- out ---

    /// Calls the handler of `protocol` at a peer. Appends to `out` the head of the frame, which the
    /// payload of `len` bytes is to follow.
    pub fn call(
        &mut self,
        peer: &[u8],
        protocol: &str,
        len: usize,
        token: T,
        now: Instant,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        check_size(
            head_len(CALL, call_len(peer, protocol, len)),
            self.limits.max_message,
        )?;
        let id = self.expect(token, Some(now));
        put_call(out, &id, (peer, protocol), len);
        Ok(id)
    }

    /// Asks for calls of `protocol`; `balanced` if others may serve it in turn.
    pub fn add_handler(
        &mut self,
        protocol: &str,
        balanced: bool,
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        let message = p2pd::AddUnaryHandlerRequest {
            proto: Some(protocol.to_owned()),
            balanced: Some(balanced),
        };
        self.ask(ADD_HANDLER, &message.encode_to_vec(), token, out)
    }

    /// Asks for no more calls of `protocol`.
    pub fn remove_handler(
        &mut self,
        protocol: &str,
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        let message = p2pd::RemoveUnaryHandlerRequest {
            proto: Some(protocol.to_owned()),
        };
        self.ask(REMOVE_HANDLER, &message.encode_to_vec(), token, out)
    }

    /// Gives up waiting for an answer. If it was a call, the daemon is told, now or
    /// [later](Self::has_unconfirmed_cancels). `None` if the answer came before.
    pub fn cancel(&mut self, id: &CallId, now: Instant, out: &mut BytesMut) -> Option<T> {
        let pending = self.pending.remove(id)?;
        if let Some(called) = pending.called {
            self.cancels.add(*id, called, now, out);
        }
        Some(pending.token)
    }

    /// Gives up on what could not be sent.
    pub fn forget(&mut self, id: &CallId) -> Option<T> {
        self.pending.remove(id).map(|pending| pending.token)
    }

    /// Whether there are cancelled calls of which the daemon has not said that it knows.
    pub fn has_unconfirmed_cancels(&self) -> bool {
        !self.cancels.is_empty()
    }

    /// To be called every [`CANCEL_INTERVAL`] while [`has_unconfirmed_cancels`](Self::has_unconfirmed_cancels): cancels what was
    /// too young for it, and again what the daemon may not have understood.
    pub fn repeat_cancels(&mut self, now: Instant, out: &mut BytesMut) {
        self.cancels.repeat(now, out);
    }

    /// Replies to a call, if the caller is still there. Appends to `out` the head of the frame and
    /// returns true if the payload of `len` bytes is to follow: one that is too large becomes an
    /// error at the caller.
    pub fn reply(&mut self, id: &CallId, len: usize, out: &mut BytesMut) -> bool {
        if !self.finish(id) {
            return false;
        }
        if reply_len(Direction::ToDaemon, len) > self.limits.max_message {
            let words = too_large_a_reply(len, self.limits.max_message);
            self.put_error(out, id, &words);
            return false;
        }
        put_reply(out, Direction::ToDaemon, id, len);
        true
    }

    /// Replies to a call with an error, if the caller is still there.
    pub fn reply_error(&mut self, id: &CallId, error: &str, out: &mut BytesMut) {
        if self.finish(id) {
            self.put_error(out, id, error);
        }
    }

    /// Refuses a call that was not taken.
    pub fn refuse(&self, id: &CallId, reason: &str, out: &mut BytesMut) {
        self.put_error(out, id, reason);
    }

    /// Says good-bye: replies to all calls at work with an error, and tells of all of ours that
    /// nobody waits any more, however young: there is no later. Those that wait stay
    /// [pending](Self::take_pending).
    pub fn shut_down(&mut self, error: &str, out: &mut BytesMut) {
        let unanswered = std::mem::take(&mut self.unanswered);
        for (id, _) in unanswered.iter().filter(|(_, call)| !call.cancelled) {
            self.put_error(out, id, error);
        }
        self.unanswered_bytes = 0;
        let calls = self.pending.iter();
        for (id, _) in calls.filter(|(_, pending)| pending.called.is_some()) {
            put_cancel(out, id);
        }
        self.cancels.finish(out);
    }

    // --- in ---

    /// The next event. Takes what it needs off the front of `input`; `None` if it has taken all
    /// and more must come.
    ///
    /// # Errors
    /// The protocol was violated. The connection must be closed.
    pub fn poll(&mut self, input: &mut &[u8]) -> Result<Option<UnaryEvent<T, P>>, Error> {
        loop {
            let pending = &self.pending;
            let message = self.reader.poll(input, |head, payload| match head {
                Head::Reply { id } => pending.contains_key(&id).then_some(payload),
                Head::Call { .. } => Some(payload),
            })?;
            let Some(message) = message else {
                return Ok(None);
            };
            if let Some(event) = self.came(message) {
                return Ok(Some(event));
            }
        }
    }

    /// The rest of the room for the payload being received, which the driver may read into
    /// directly. [`payload_filled`](Self::payload_filled) must follow.
    pub fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        self.reader.payload_buffer()
    }

    /// Notes that `count` bytes were read into [`payload_buffer`](Self::payload_buffer).
    pub fn payload_filled(&mut self, count: usize) {
        self.reader.payload_filled(count);
    }

    /// The error for an end of the connection that is seen now.
    pub fn end_of_file(&self) -> Error {
        Error::Closed {
            mid_message: self.reader.is_mid_message(),
        }
    }

    /// Whether more input is to be read: not while too many calls are at work, unless something of
    /// ours is waited for, on which these might depend.
    pub fn wants_input(&self) -> bool {
        self.pressed || !self.pending.is_empty() || !self.exceeds(1)
    }

    /// Input was not wanted for long enough. From now on it is: calls over the limit are refused,
    /// for the sake of what comes behind them, as cancels, or the end.
    pub fn stop_back_pressure(&mut self) {
        self.pressed = self.exceeds(1);
    }

    /// How many answers are awaited.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// How many incoming calls are at work.
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// The tokens of everything that is awaited, for a driver that visits them.
    pub fn tokens(&self) -> impl Iterator<Item = &T> {
        self.pending.values().map(|pending| &pending.token)
    }

    /// Gives up on everything that is awaited, since the connection is lost.
    pub fn take_pending(&mut self) -> Vec<T> {
        let pending = self.pending.drain();
        pending.map(|(_, pending)| pending.token).collect()
    }

    // --- within ---

    fn expect(&mut self, token: T, called: Option<Instant>) -> CallId {
        let id = self.ids.next();
        self.pending.insert(id, Pending { token, called });
        id
    }

    fn ask(
        &mut self,
        number: u32,
        content: &[u8],
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        check_size(head_len(number, content.len()), self.limits.max_message)?;
        let id = self.expect(token, None);
        put_message(out, &id, number, content);
        Ok(id)
    }

    /// The work on a call is done; says whether somebody waits for the reply.
    fn finish(&mut self, id: &CallId) -> bool {
        let Some(call) = self.unanswered.remove(id) else {
            return false;
        };
        self.unanswered_bytes -= call.size;
        self.pressed &= self.exceeds(1);
        !call.cancelled
    }

    fn put_error(&self, out: &mut BytesMut, id: &CallId, words: &str) {
        put_handler_error(out, Direction::ToDaemon, id, words, self.limits.max_message);
    }

    fn exceeds(&self, times: usize) -> bool {
        self.unanswered.len() >= self.limits.max_unanswered.saturating_mul(times)
            || self.unanswered_bytes >= self.limits.max_unanswered_bytes.saturating_mul(times)
    }

    /// What follows from a message.
    #[inline]
    fn came(&mut self, message: Message<P>) -> Option<UnaryEvent<T, P>> {
        match message {
            Message::Reply { id, payload } => {
                self.replied(&id, |token| UnaryEvent::Reply { token, payload })
            }
            Message::Call {
                id,
                peer,
                protocol,
                payload,
                size,
            } => Some(self.called(id, peer, protocol, payload, size)),
            other => self.rarely(other),
        }
    }

    /// The event of a reply, if its call is still awaited.
    #[inline]
    fn replied(
        &mut self,
        id: &CallId,
        event: impl FnOnce(T) -> UnaryEvent<T, P>,
    ) -> Option<UnaryEvent<T, P>> {
        self.cancels.confirm(id);
        let Pending { token, called } = self.pending.remove(id)?;
        if called.is_none() {
            let error = Error::Unexpected("a reply to what is no call".to_owned());
            return Some(UnaryEvent::InvalidReply { token, error });
        }
        Some(event(token))
    }

    /// As `came`, for all messages that are no calls and no replies.
    fn rarely(&mut self, message: Message<P>) -> Option<UnaryEvent<T, P>> {
        match message {
            Message::InvalidCall { id } => {
                let reason = Cow::Borrowed(INVALID_CALL);
                Some(UnaryEvent::Rejected { id, reason })
            }
            Message::HandlerError { id, error } => {
                self.replied(&id, |token| UnaryEvent::HandlerFailed { token, error })
            }
            Message::EmptyReply { id } => self.replied(&id, |token| UnaryEvent::InvalidReply {
                token,
                error: empty_reply(),
            }),
            Message::Other { id, field, content } => match field {
                None => {
                    self.cancels.confirm(&id);
                    self.acknowledged(id)
                }
                Some(field) if field == u64::from(CANCEL) => self.cancel_came(id),
                Some(_) => {
                    self.cancels.confirm(&id);
                    let words = Fields::new(&content).last(1).unwrap_or_default();
                    self.refused(&id, String::from_utf8_lossy(words).into_owned())
                }
            },
            Message::Skipped {
                id,
                field,
                is_sound,
                error,
            } => self.skipped(id, field, is_sound, error),
            Message::UnwantedReply { id } => {
                self.cancels.confirm(&id);
                None
            }
            Message::Reply { .. } | Message::Call { .. } => None, // see `came`
        }
    }

    /// The event of a frame that was skipped.
    fn skipped(
        &mut self,
        id: Option<CallId>,
        field: Option<u64>,
        is_sound: bool,
        error: Error,
    ) -> Option<UnaryEvent<T, P>> {
        let Some(id) = id else {
            return Some(UnaryEvent::Skipped { error });
        };
        if field == Some(u64::from(CALL)) {
            let reason = Cow::Owned(why_skipped(&error));
            return Some(UnaryEvent::Rejected { id, reason });
        }
        if field == Some(u64::from(CANCEL)) {
            return self.cancel_came(id);
        }
        self.cancels.confirm(&id);
        let Pending { token, called } = self.pending.remove(&id)?;
        Some(if field.is_none() && called.is_none() && is_sound {
            UnaryEvent::Acknowledged { token }
        } else {
            UnaryEvent::Oversized { token, error }
        })
    }

    /// The daemon says that a call was cancelled: one of ours, or a peer's.
    fn cancel_came(&mut self, id: CallId) -> Option<UnaryEvent<T, P>> {
        self.cancels.confirm(&id);
        if self.pending.contains_key(&id) {
            return self.refused(&id, "the call was cancelled".to_owned());
        }
        let call = self.unanswered.get_mut(&id)?;
        let first = !std::mem::replace(&mut call.cancelled, true);
        first.then_some(UnaryEvent::Cancelled { id })
    }

    fn refused(&mut self, id: &CallId, error: String) -> Option<UnaryEvent<T, P>> {
        let Pending { token, .. } = self.pending.remove(id)?;
        Some(UnaryEvent::Refused { token, error })
    }

    fn acknowledged(&mut self, id: CallId) -> Option<UnaryEvent<T, P>> {
        let Pending { token, called } = self.pending.remove(&id)?;
        Some(if called.is_some() {
            // What Go's daemon makes of a peer that replied with something else.
            let error = Error::MissingField {
                message: "PersistentConnectionResponse",
                field: "callUnaryResponse",
            };
            UnaryEvent::InvalidReply { token, error }
        } else {
            UnaryEvent::Acknowledged { token }
        })
    }

    /// A peer calls.
    fn called(
        &mut self,
        id: CallId,
        peer: Bytes,
        protocol: String,
        payload: P,
        size: usize,
    ) -> UnaryEvent<T, P> {
        if self.exceeds(if self.pressed { 1 } else { 4 }) {
            let reason = Cow::Borrowed("busy: too many calls at once");
            return UnaryEvent::Rejected { id, reason };
        }
        if self.unanswered.contains_key(&id) {
            let reason = Cow::Borrowed("a call with the same id is at work");
            return UnaryEvent::Rejected { id, reason };
        }
        let call = Incoming {
            size,
            cancelled: false,
        };
        self.unanswered.insert(id, call);
        self.unanswered_bytes += size;
        UnaryEvent::Call {
            id,
            peer,
            protocol,
            payload,
        }
    }
}

#[cfg(test)]
mod tests;
