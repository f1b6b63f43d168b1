//! The client's end of a persistent connection as a state machine.

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
    empty_reply, reply_too_large, skip_reason, Direction, Head, Message, ADD_HANDLER, CALL, CANCEL,
    INVALID_CALL, REMOVE_HANDLER,
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

/// An incoming call that is not answered yet.
#[derive(Debug)]
struct Incoming {
    /// Size of its payload, in bytes.
    size: usize,
    /// Whether the caller has cancelled it.
    cancelled: bool,
}

/// A call or request that was sent to the daemon and is not answered yet.
#[derive(Debug)]
struct Pending<T> {
    token: T,
    /// Time when it was sent, if it is a call.
    called: Option<Instant>,
}

/// A persistent connection as its client sees it: frames out; bytes in, events out.
///
/// Frames are appended to `out`, which the driver writes to the connection.
///
/// ```
/// use p2pd_protocol::{PersistentClient, UnaryEvent, UnaryLimits};
/// use bytes::BytesMut;
/// use std::time::Instant;
///
/// let mut connection = PersistentClient::<&str, Vec<u8>>::new([7; 32], UnaryLimits::default());
/// let mut out = BytesMut::new();
/// let id = connection.call(b"peer", "echo", 2, "my call", Instant::now(), &mut out)?;
/// out.extend_from_slice(b"hi"); // the payload follows the head
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
    /// The incoming calls. Peers choose the ids, hence the standard hasher.
    unanswered: HashMap<CallId, Incoming>,
    unanswered_bytes: usize,
    /// Whether calls over the limit are refused instead of held back.
    refuses_excess: bool,
    reader: Reader<P>,
}

impl<T, P: Payload> PersistentClient<T, P> {
    /// A connection that was just upgraded. `seed` must be random, and used for no other.
    pub fn new(seed: [u8; 32], limits: UnaryLimits) -> Self {
        Self {
            limits,
            ids: CallIds::new(seed),
            pending: HashMap::default(),
            cancels: Cancels::default(),
            unanswered: HashMap::new(),
            unanswered_bytes: 0,
            refuses_excess: false,
            reader: Reader::new(Direction::ToClient, limits.incoming()),
        }
    }

    /// The limits in effect.
    pub fn limits(&self) -> &UnaryLimits {
        &self.limits
    }

    /// Changes the limits, for messages sent from now on and for frames whose payload has not begun to
    /// arrive. The driver must then call [`wants_input`](Self::wants_input) again.
    pub fn set_limits(&mut self, limits: UnaryLimits) {
        self.limits = limits;
        self.reader.max_incoming = limits.incoming();
        self.refuses_excess &= self.exceeds(1);
    }

    // --- output ---

    /// Calls a peer's handler of `protocol`. Appends the head of the frame to `out`; the payload of `len`
    /// bytes must follow.
    ///
    /// # Errors
    /// [`Error::RequestTooLarge`]; nothing was appended.
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

    /// Appends a request to register a handler of `protocol`. If `balanced`, other clients may share the
    /// name, and calls go to each in turn.
    ///
    /// # Errors
    /// [`Error::RequestTooLarge`]; nothing was appended.
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
        self.request(ADD_HANDLER, &message.encode_to_vec(), token, out)
    }

    /// Appends a request to unregister the handler of `protocol`.
    ///
    /// # Errors
    /// [`Error::RequestTooLarge`]; nothing was appended.
    pub fn remove_handler(
        &mut self,
        protocol: &str,
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        let message = p2pd::RemoveUnaryHandlerRequest {
            proto: Some(protocol.to_owned()),
        };
        self.request(REMOVE_HANDLER, &message.encode_to_vec(), token, out)
    }

    /// Stops waiting for an answer. Cancels a call at the daemon, now or
    /// [later](Self::has_unconfirmed_cancels). Returns `None` if it was already answered.
    pub fn cancel(&mut self, id: &CallId, now: Instant, out: &mut BytesMut) -> Option<T> {
        let pending = self.pending.remove(id)?;
        if let Some(called) = pending.called {
            self.cancels.add(*id, called, now, out);
        }
        Some(pending.token)
    }

    /// Removes a call or request that could not be sent.
    pub fn forget(&mut self, id: &CallId) -> Option<T> {
        self.pending.remove(id).map(|pending| pending.token)
    }

    /// Whether the daemon may not know of some cancelled calls yet.
    pub fn has_unconfirmed_cancels(&self) -> bool {
        !self.cancels.is_empty()
    }

    /// Sends the cancels that are due: delayed ones, and repetitions of those that the daemon may have
    /// missed. The driver calls this every [`CANCEL_INTERVAL`](super::CANCEL_INTERVAL) while
    /// [`has_unconfirmed_cancels`](Self::has_unconfirmed_cancels).
    pub fn repeat_cancels(&mut self, now: Instant, out: &mut BytesMut) {
        self.cancels.repeat(now, out);
    }

    /// Replies to a call, unless it was cancelled. Appends the head of the frame to `out` and returns true
    /// if the payload of `len` bytes must follow. The caller gets an error if the payload is too large.
    pub fn reply(&mut self, id: &CallId, len: usize, out: &mut BytesMut) -> bool {
        if !self.finish(id) {
            return false;
        }
        if reply_len(Direction::ToDaemon, len) > self.limits.max_message {
            let error = reply_too_large(len, self.limits.max_message);
            self.put_error(out, id, &error);
            return false;
        }
        put_reply(out, Direction::ToDaemon, id, len);
        true
    }

    /// Replies to a call with an error, unless it was cancelled.
    pub fn reply_error(&mut self, id: &CallId, error: &str, out: &mut BytesMut) {
        if self.finish(id) {
            self.put_error(out, id, error);
        }
    }

    /// Refuses a [rejected](UnaryEvent::Rejected) call.
    pub fn refuse(&self, id: &CallId, reason: &str, out: &mut BytesMut) {
        self.put_error(out, id, reason);
    }

    /// Prepares to close the connection: replies to all unanswered calls with `error`, and cancels all
    /// of this client's calls, even those younger than [`CANCEL_DELAY`](super::CANCEL_DELAY). The calls
    /// stay [pending](Self::take_pending).
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

    // --- input ---

    /// Returns the next event, and removes its bytes from the front of `input`. `None` if all of `input`
    /// was read and more is needed.
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
            if let Some(event) = self.on_message(message) {
                return Ok(Some(event));
            }
        }
    }

    /// The unfilled part of the payload that is being received. The driver may read into it directly, and
    /// then must call [`payload_filled`](Self::payload_filled).
    pub fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        self.reader.payload_buffer()
    }

    /// Notes that `count` bytes were read into [`payload_buffer`](Self::payload_buffer).
    pub fn payload_filled(&mut self, count: usize) {
        self.reader.payload_filled(count);
    }

    /// The error to report if the connection ends now.
    pub fn end_of_file(&self) -> Error {
        Error::Closed {
            mid_message: self.reader.is_mid_message(),
        }
    }

    /// Whether to read more: not while too many calls are unanswered, unless this client itself waits
    /// for an answer. Those calls may depend on that answer.
    pub fn wants_input(&self) -> bool {
        self.refuses_excess || !self.pending.is_empty() || !self.exceeds(1)
    }

    /// Stops the back-pressure: input is wanted again, and further calls over the limit are refused.
    /// Otherwise the driver would never see the cancels, or the end of the connection, behind them.
    pub fn stop_back_pressure(&mut self) {
        self.refuses_excess = self.exceeds(1);
    }

    /// Number of calls and requests that are not answered yet.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Number of incoming calls that are not answered yet.
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// Tokens of all pending calls and requests.
    pub fn tokens(&self) -> impl Iterator<Item = &T> {
        self.pending.values().map(|pending| &pending.token)
    }

    /// Removes all pending calls and requests, since the connection is lost.
    pub fn take_pending(&mut self) -> Vec<T> {
        let pending = self.pending.drain();
        pending.map(|(_, pending)| pending.token).collect()
    }

    // --- internals ---

    fn expect(&mut self, token: T, called: Option<Instant>) -> CallId {
        let id = self.ids.next();
        self.pending.insert(id, Pending { token, called });
        id
    }

    fn request(
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

    /// Removes an incoming call; returns whether its caller still waits for the reply.
    fn finish(&mut self, id: &CallId) -> bool {
        let Some(call) = self.unanswered.remove(id) else {
            return false;
        };
        self.unanswered_bytes -= call.size;
        self.refuses_excess &= self.exceeds(1);
        !call.cancelled
    }

    fn put_error(&self, out: &mut BytesMut, id: &CallId, error: &str) {
        put_handler_error(out, Direction::ToDaemon, id, error, self.limits.max_message);
    }

    fn exceeds(&self, times: usize) -> bool {
        self.unanswered.len() >= self.limits.max_unanswered.saturating_mul(times)
            || self.unanswered_bytes >= self.limits.max_unanswered_bytes.saturating_mul(times)
    }

    /// Turns a message into an event, if it is one for the driver.
    #[inline]
    fn on_message(&mut self, message: Message<P>) -> Option<UnaryEvent<T, P>> {
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
            } => Some(self.on_call(id, peer, protocol, payload, size)),
            other => self.on_other_message(other),
        }
    }

    /// Returns the event of a reply, if its call is pending.
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

    /// Like `on_message`, for messages other than calls and replies.
    fn on_other_message(&mut self, message: Message<P>) -> Option<UnaryEvent<T, P>> {
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
                Some(field) if field == u64::from(CANCEL) => self.on_cancel(id),
                Some(_) => {
                    self.cancels.confirm(&id);
                    let error = Fields::new(&content).last(1).unwrap_or_default();
                    self.refused(&id, String::from_utf8_lossy(error).into_owned())
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
            Message::Reply { .. } | Message::Call { .. } => None, // see `on_message`
        }
    }

    /// Returns the event of a frame that was skipped.
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
            let reason = Cow::Owned(skip_reason(&error));
            return Some(UnaryEvent::Rejected { id, reason });
        }
        if field == Some(u64::from(CANCEL)) {
            return self.on_cancel(id);
        }
        self.cancels.confirm(&id);
        let Pending { token, called } = self.pending.remove(&id)?;
        Some(if field.is_none() && called.is_none() && is_sound {
            UnaryEvent::Acknowledged { token }
        } else {
            UnaryEvent::Oversized { token, error }
        })
    }

    /// Handles a cancel from the daemon, of one of this client's calls or of a peer's.
    fn on_cancel(&mut self, id: CallId) -> Option<UnaryEvent<T, P>> {
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
            // The Go daemon sends this if the peer's message was not a reply.
            let error = Error::MissingField {
                message: "PersistentConnectionResponse",
                field: "callUnaryResponse",
            };
            UnaryEvent::InvalidReply { token, error }
        } else {
            UnaryEvent::Acknowledged { token }
        })
    }

    /// Accepts or rejects a peer's call.
    fn on_call(
        &mut self,
        id: CallId,
        peer: Bytes,
        protocol: String,
        payload: P,
        size: usize,
    ) -> UnaryEvent<T, P> {
        if self.exceeds(if self.refuses_excess { 1 } else { 4 }) {
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
