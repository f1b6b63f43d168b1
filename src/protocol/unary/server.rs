//! The daemon's end of a persistent connection as a state machine.

use super::call_id::{CallId, CallIds, IdHasher};
use super::encode::{
    call_len, check_size, cut, head_len, put_call, put_cancel, put_handler_error, put_message,
    put_reply, reply_len,
};
use super::message::{
    empty_reply, reply_too_large, skip_reason, Direction, Head, Message, ADD_HANDLER, CALL, CANCEL,
    INVALID_CALL, REMOVE_HANDLER,
};
use super::payload::Payload;
use super::reader::{Reader, Receiving};
use crate::command::required;
use crate::pb::p2pd;
use crate::Error;
use bytes::{Bytes, BytesMut};
use prost::Message as _;
use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;

/// The field that holds a refusal.
const DAEMON_ERROR: u32 = 4;

/// Limits of a persistent connection, as its daemon sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerLimits {
    /// Largest message to receive and to send, in bytes. If one is larger, only its call fails. Default:
    /// 4 MiB.
    pub max_message: usize,
    /// Largest number of unanswered calls of the client. More are refused. Default: 65,536.
    pub max_calls: usize,
    /// Total payload size of those calls, in bytes, above which more are refused. Default: 1 GiB.
    pub max_call_bytes: usize,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_calls: 64 * 1024,
            max_call_bytes: 1 << 30,
        }
    }
}

impl ServerLimits {
    /// Sets [`max_message`](Self::max_message), in bytes.
    #[must_use]
    pub fn with_max_message(mut self, bytes: usize) -> Self {
        self.max_message = bytes;
        self
    }

    /// Sets [`max_calls`](Self::max_calls).
    #[must_use]
    pub fn with_max_calls(mut self, calls: usize) -> Self {
        self.max_calls = calls;
        self
    }

    /// Sets [`max_call_bytes`](Self::max_call_bytes).
    #[must_use]
    pub fn with_max_call_bytes(mut self, bytes: usize) -> Self {
        self.max_call_bytes = bytes;
        self
    }
}

/// An event of a persistent connection, decoded from the bytes received. `T` is the driver's token of a
/// call that the client handles, `P` a payload.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerEvent<T, P> {
    /// The client wants to handle calls of a protocol. [Acknowledge](PersistentServer::acknowledge) or
    /// [refuse](PersistentServer::refuse) it.
    AddHandler {
        /// The request.
        id: CallId,
        /// The handler's name.
        protocol: String,
        /// Whether several clients may serve the name in turn.
        balanced: bool,
    },
    /// The client no longer wants to handle calls of a protocol. Answer it in the same way as
    /// `AddHandler`.
    RemoveHandler {
        /// The request.
        id: CallId,
        /// The handler's name.
        protocol: String,
    },
    /// The client calls a peer's handler. [Reply](PersistentServer::reply), reply with an
    /// [error](PersistentServer::reply_error), or [refuse](PersistentServer::refuse) it.
    Call {
        /// The call.
        id: CallId,
        /// The peer.
        peer: Bytes,
        /// The handler's name.
        protocol: String,
        /// Argument of the call.
        payload: P,
    },
    /// The client has cancelled its call. A reply to it sends nothing.
    Cancelled {
        /// The call.
        id: CallId,
    },
    /// The client's handler has returned.
    Reply {
        /// The call that the client handles.
        token: T,
        /// Result of the handler.
        payload: P,
    },
    /// The client's handler failed.
    HandlerFailed {
        /// The call that the client handles.
        token: T,
        /// The handler's error message.
        error: String,
    },
    /// The client's reply is invalid or too large. Only this call fails.
    InvalidReply {
        /// The call that the client handles.
        token: T,
        /// Error in the reply.
        error: Error,
    },
    /// A call or request that the driver must [refuse](PersistentServer::refuse).
    Rejected {
        /// The call or request.
        id: CallId,
        /// Reason to send to the client.
        reason: Cow<'static, str>,
    },
    /// A message was too large and was skipped, and it had no call id. The driver should log it.
    Skipped {
        /// Why the message was skipped.
        error: Error,
    },
}

/// A call or reply that the driver may inspect in place, before any of it is copied.
#[derive(Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Offered<'a, 't, T> {
    /// A call. The driver returns the payload of its reply, or `None` to get the call as an event.
    Call {
        /// The peer.
        peer: &'a [u8],
        /// The handler's name.
        protocol: &'a str,
        /// Argument of the call.
        payload: &'a [u8],
    },
    /// A reply. The driver returns the part of the payload for the event, or `None` for all of it.
    Reply {
        /// The call that the client handles.
        token: &'t mut T,
        /// Result of the handler.
        payload: &'a [u8],
    },
}

/// A persistent connection as its daemon sees it: bytes in, events out; frames out.
///
/// Every [`Call`](ServerEvent::Call) gets exactly one reply, error or refusal, unless the client
/// cancels it. Frames are appended to `out`, which the driver writes to the connection.
///
/// ```
/// use bytes::BytesMut;
/// use p2pd_protocol::unary::server::{PersistentServer, ServerEvent, ServerLimits};
/// use p2pd_protocol::{PersistentClient, UnaryEvent, UnaryLimits};
/// use std::time::Instant;
///
/// let mut server = PersistentServer::<(), Vec<u8>>::new([1; 32], ServerLimits::default());
/// let mut client = PersistentClient::<&str, Vec<u8>>::new([2; 32], UnaryLimits::default());
///
/// let mut out = BytesMut::new();
/// client.call(b"peer", "echo", 2, "my call", Instant::now(), &mut out)?;
/// out.extend_from_slice(b"hi");
///
/// let Some(ServerEvent::Call { id, payload, .. }) = server.poll(&mut &out[..])? else { panic!() };
/// let mut out = BytesMut::new();
/// if server.reply(&id, payload.len(), &mut out) {
///     out.extend_from_slice(&payload); // the payload follows the head
/// }
/// let event = client.poll(&mut &out[..])?;
/// assert_eq!(event, Some(UnaryEvent::Reply { token: "my call", payload: b"hi".to_vec() }));
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct PersistentServer<T, P> {
    limits: ServerLimits,
    reader: Reader<P>,
    /// The client's unanswered calls, with the sizes of their payloads. The client chooses the ids, hence
    /// the standard hasher.
    calls: HashMap<CallId, usize>,
    call_bytes: usize,
    ids: CallIds,
    /// The calls that the client handles.
    handled: HashMap<CallId, T, BuildHasherDefault<IdHasher>>,
}

impl<T, P: Payload> PersistentServer<T, P> {
    /// A connection that was just upgraded. `seed` must be random, and used for no other.
    pub fn new(seed: [u8; 32], limits: ServerLimits) -> Self {
        Self {
            limits,
            reader: Reader::new(Direction::ToDaemon, limits.max_message),
            calls: HashMap::new(),
            call_bytes: 0,
            ids: CallIds::new(seed),
            handled: HashMap::default(),
        }
    }

    // --- output ---

    /// Acknowledges that a handler was added or removed.
    pub fn acknowledge(&self, id: &CallId, out: &mut BytesMut) {
        put_acknowledgement(out, id);
    }

    /// Refuses a call, or to add or remove a handler, with an error message.
    pub fn refuse(&mut self, id: &CallId, message: &str, out: &mut BytesMut) {
        self.finish(id);
        let error = p2pd::DaemonError {
            message: Some(Bytes::copy_from_slice(
                cut(message, self.limits.max_message).as_bytes(),
            )),
        };
        put_message(out, id, DAEMON_ERROR, &error.encode_to_vec());
    }

    /// Replies to a call, unless it was cancelled. Appends the head of the frame to `out` and returns true
    /// if the payload of `len` bytes must follow. The client gets an error if the payload is too large.
    pub fn reply(&mut self, id: &CallId, len: usize, out: &mut BytesMut) -> bool {
        if !self.calls.contains_key(id) {
            return false;
        }
        if reply_len(Direction::ToClient, len) > self.limits.max_message {
            let message = reply_too_large(len, self.limits.max_message);
            self.refuse(id, &message, out);
            return false;
        }
        self.finish(id);
        put_reply(out, Direction::ToClient, id, len);
        true
    }

    /// Replies to a call with the error of a peer's handler, unless it was cancelled.
    pub fn reply_error(&mut self, id: &CallId, error: &str, out: &mut BytesMut) {
        if self.finish(id) {
            put_handler_error(out, Direction::ToClient, id, error, self.limits.max_message);
        }
    }

    /// Confirms that a call of the client was [cancelled](ServerEvent::Cancelled), so that the client does
    /// not repeat its request to cancel it.
    pub fn confirm_cancel(&self, id: &CallId, out: &mut BytesMut) {
        put_cancel(out, id);
    }

    /// Passes a peer's call to the client. Appends the head of the frame to `out`; the payload of `len`
    /// bytes must follow. The call gets a new id, so that peers cannot choose ids that collide.
    ///
    /// # Errors
    /// [`Error::RequestTooLarge`]; nothing was sent.
    pub fn handle(
        &mut self,
        caller: &[u8],
        protocol: &str,
        len: usize,
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        let size = head_len(CALL, call_len(caller, protocol, len));
        check_size(size, self.limits.max_message)?;
        let id = self.ids.next();
        self.handled.insert(id, token);
        put_call(out, &id, (caller, protocol), len);
        Ok(id)
    }

    /// Cancels a call that the client handles. Returns `None` if the client has already replied.
    pub fn cancel(&mut self, id: &CallId, out: &mut BytesMut) -> Option<T> {
        let token = self.handled.remove(id)?;
        put_cancel(out, id);
        Some(token)
    }

    /// [Cancels](Self::cancel) all calls for whose token `unwanted` returns true.
    pub fn cancel_all(&mut self, unwanted: impl Fn(&T) -> bool, out: &mut BytesMut) {
        self.handled.retain(|id, token| {
            let unwanted = unwanted(token);
            if unwanted {
                put_cancel(out, id);
            }
            !unwanted
        });
    }

    // --- input ---

    /// Returns the next event, and removes its bytes from the front of `input`. `None` if all of `input`
    /// was read and more is needed.
    ///
    /// # Errors
    /// The protocol was violated. The connection must be closed.
    pub fn poll(&mut self, input: &mut &[u8]) -> Result<Option<ServerEvent<T, P>>, Error> {
        self.poll_in_place(input, &mut BytesMut::new(), |_| None)
    }

    /// Like [`poll`](Self::poll), but offers calls and replies to `look` first, without copying them. If
    /// `look` answers a call, the whole reply is appended to `out`, and there is no event. Messages whose
    /// frames arrive in pieces are not offered.
    ///
    /// # Errors
    /// Those of [`poll`](Self::poll).
    pub fn poll_in_place(
        &mut self,
        input: &mut &[u8],
        out: &mut BytesMut,
        mut look: impl for<'a, 't> FnMut(Offered<'a, 't, T>) -> Option<&'a [u8]>,
    ) -> Result<Option<ServerEvent<T, P>>, Error> {
        loop {
            let Self {
                limits,
                reader,
                calls,
                handled,
                ..
            } = self;
            let message = reader.poll(input, |head, payload| match head {
                Head::Reply { id } => {
                    let token = handled.get_mut(&id)?;
                    Some(look(Offered::Reply { token, payload }).unwrap_or(payload))
                }
                // Not offered: its reply would answer the other call with this id.
                Head::Call { id, .. } if calls.contains_key(&id) => Some(payload),
                Head::Call { id, peer, protocol } => {
                    let call = Offered::Call {
                        peer,
                        protocol,
                        payload,
                    };
                    let reply = look(call).filter(|reply| {
                        reply_len(Direction::ToClient, reply.len()) <= limits.max_message
                    });
                    let Some(reply) = reply else {
                        return Some(payload);
                    };
                    put_reply(out, Direction::ToClient, &id, reply.len());
                    out.extend_from_slice(reply);
                    None
                }
            })?;
            let Some(message) = message else {
                return Ok(None);
            };
            if let Some(event) = self.on_message(message)? {
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

    /// Takes out the payload that is being received, so that a driver with several threads can read into it
    /// without a lock. [`resume`](Self::resume) must follow before the next [`poll`](Self::poll).
    pub fn take_receiving(&mut self) -> Option<Receiving<P>> {
        self.reader.take_receiving()
    }

    /// Puts back the payload that [`take_receiving`](Self::take_receiving) took out.
    pub fn resume(&mut self, receiving: Receiving<P>) {
        self.reader.resume(receiving);
    }

    /// The error to report if the connection ends now.
    pub fn end_of_file(&self) -> Error {
        Error::Closed {
            mid_message: self.reader.is_mid_message(),
        }
    }

    /// Whether a call of the client is neither answered nor cancelled.
    pub fn is_unanswered(&self, id: &CallId) -> bool {
        self.calls.contains_key(id)
    }

    /// Number of the client's unanswered calls.
    pub fn calls(&self) -> usize {
        self.calls.len()
    }

    /// Number of calls that the client handles.
    pub fn handled(&self) -> usize {
        self.handled.len()
    }

    /// Removes the calls that the client handles, since the connection has ended. The driver must send
    /// their callers an error.
    pub fn take_handled(&mut self) -> Vec<T> {
        self.handled.drain().map(|(_, token)| token).collect()
    }

    /// Removes the client's own calls, since the connection has ended. The driver must cancel them at
    /// the peers.
    pub fn take_calls(&mut self) -> Vec<CallId> {
        self.call_bytes = 0;
        self.calls.drain().map(|(id, _)| id).collect()
    }

    // --- internals ---

    /// Removes a call of the client; returns whether the client still waited for the answer.
    fn finish(&mut self, id: &CallId) -> bool {
        let size = self.calls.remove(id);
        self.call_bytes -= size.unwrap_or_default();
        size.is_some()
    }

    /// Turns a message into an event, if it is one for the driver.
    #[inline]
    fn on_message(&mut self, message: Message<P>) -> Result<Option<ServerEvent<T, P>>, Error> {
        Ok(match message {
            Message::Call {
                id,
                peer,
                protocol,
                payload,
                size,
            } => Some(self.on_call(id, peer, protocol, payload, size)),
            Message::InvalidCall { id } => Some(self.reject(id, INVALID_CALL)),
            Message::Reply { id, payload } => {
                let token = self.handled.remove(&id);
                token.map(|token| ServerEvent::Reply { token, payload })
            }
            Message::HandlerError { id, error } => {
                let token = self.handled.remove(&id);
                token.map(|token| ServerEvent::HandlerFailed { token, error })
            }
            Message::EmptyReply { id } => {
                let error = empty_reply();
                let token = self.handled.remove(&id);
                token.map(|token| ServerEvent::InvalidReply { token, error })
            }
            Message::UnwantedReply { .. } => None,
            Message::Other { id, field, content } => self.other(id, field, content)?,
            Message::Skipped {
                id: None, error, ..
            } => Some(ServerEvent::Skipped { error }),
            Message::Skipped {
                id: Some(id),
                field,
                error,
                ..
            } => self.skipped(id, field, error),
        })
    }

    fn on_call(
        &mut self,
        id: CallId,
        peer: Bytes,
        protocol: String,
        payload: P,
        size: usize,
    ) -> ServerEvent<T, P> {
        if self.calls.len() >= self.limits.max_calls
            || self.call_bytes.saturating_add(size) > self.limits.max_call_bytes
        {
            return self.reject(id, "too many calls at once");
        }
        if self.calls.contains_key(&id) {
            return self.reject(id, "a call with the same id is under way");
        }
        self.calls.insert(id, size);
        self.call_bytes += size;
        ServerEvent::Call {
            id,
            peer,
            protocol,
            payload,
        }
    }

    fn other(
        &mut self,
        id: CallId,
        field: Option<u64>,
        content: Bytes,
    ) -> Result<Option<ServerEvent<T, P>>, Error> {
        Ok(match field.and_then(|field| u32::try_from(field).ok()) {
            Some(ADD_HANDLER) => {
                const MESSAGE: &str = "AddUnaryHandlerRequest";
                let add = p2pd::AddUnaryHandlerRequest::decode(content)
                    .map_err(|e| Error::malformed(MESSAGE, &e))?;
                Some(ServerEvent::AddHandler {
                    id,
                    protocol: required(add.proto, MESSAGE, "proto")?,
                    balanced: add.balanced.unwrap_or(false),
                })
            }
            Some(REMOVE_HANDLER) => {
                const MESSAGE: &str = "RemoveUnaryHandlerRequest";
                let remove = p2pd::RemoveUnaryHandlerRequest::decode(content)
                    .map_err(|e| Error::malformed(MESSAGE, &e))?;
                let protocol = required(remove.proto, MESSAGE, "proto")?;
                Some(ServerEvent::RemoveHandler { id, protocol })
            }
            Some(CANCEL) => {
                let waited = self.finish(&id);
                waited.then_some(ServerEvent::Cancelled { id })
            }
            _ => Some(self.reject(id, "the message has no content")),
        })
    }

    /// Returns the event of a frame that was skipped.
    fn skipped(
        &mut self,
        id: CallId,
        field: Option<u64>,
        error: Error,
    ) -> Option<ServerEvent<T, P>> {
        if field == Some(u64::from(Direction::ToDaemon.reply())) {
            let token = self.handled.remove(&id)?;
            return Some(ServerEvent::InvalidReply { token, error });
        }
        if field == Some(u64::from(CANCEL)) {
            return self.finish(&id).then_some(ServerEvent::Cancelled { id });
        }
        Some(self.reject(id, skip_reason(&error)))
    }

    /// Rejects a message. One with the id of an unanswered call is skipped instead, since a refusal
    /// would answer that call.
    fn reject(&self, id: CallId, reason: impl Into<Cow<'static, str>>) -> ServerEvent<T, P> {
        let reason = reason.into();
        if self.calls.contains_key(&id) {
            let error = Error::Unexpected(format!("{reason}; its id is that of another call"));
            return ServerEvent::Skipped { error };
        }
        ServerEvent::Rejected { id, reason }
    }
}

/// Appends a message that has only a call id.
fn put_acknowledgement(out: &mut BytesMut, id: &CallId) {
    let message = p2pd::PersistentConnectionResponse {
        call_id: Some(Bytes::copy_from_slice(id)),
        message: None,
    };
    message
        .encode_length_delimited(out)
        .expect("a BytesMut grows as needed");
}

#[cfg(test)]
mod tests;
