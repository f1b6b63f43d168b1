//! Unary calls: the persistent connection of hivemind's fork, on which calls and replies in both
//! directions are matched by call ids and come in any order.
//!
//! Payloads never pass through here when they go out: what is encoded is the head of a frame, and
//! the payload is its tail. Coming in, a large one is received straight into its final place, which
//! the driver provides as a [`Payload`].

mod skip;

use super::pb::p2pd::{
    self, call_unary_response, persistent_connection_request as request, request::Type,
};
use super::request::Expect;
use super::{control, framing, Error, Request};
use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{encoded_len_varint, key_len, WireType};
use prost::Message as _;
use sha2::{Digest, Sha256};
use skip::Skip;
use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::time::{Duration, Instant};
use unsigned_varint::encode;

/// What matches a reply to its call.
pub type CallId = [u8; 16];

/// A payload of at least this many bytes is received straight into its final place.
const DIRECT: usize = 16 * 1024;

/// Room is made for a payload when one part in so many of it has come: what was announced alone
/// takes none.
const EARNED: usize = 16;

/// How much of a frame may come before the payload in it, in bytes, for that.
const MAX_HEAD: usize = 1024;

/// How much of a handler's error is passed on, in bytes.
const MAX_ERROR: usize = 16 * 1024;

/// How often the daemon is told of a cancelled call, if it does not answer.
const MAX_TOLD: u32 = 7;

/// Of how many cancelled calls it is told later, or again.
const MAX_CANCELLED: usize = 64 * 1024;

/// How much one read takes that is not into a payload's own place, in bytes.
pub const READ: usize = 64 * 1024;

/// What is read behind a payload in the same system call, so that the next head comes with it, and
/// enough of a payload of 64 KiB, or of twice that, for room to be made for it.
pub const BEHIND: usize = 8 * 1024;

/// How much is read before others get a turn, in bytes.
pub const TURN: usize = 1024 * 1024;

/// While more than this waits to be sent, in bytes, callers wait, …
pub const HIGH_WATER: usize = 1024 * 1024;
/// … until no more than this does.
pub const LOW_WATER: usize = 256 * 1024;

/// How much room for what waits to be sent is kept, in bytes: for a hundred small calls.
pub const KEPT_OUTPUT: usize = 128 * 1024;

/// While more than this waits to be sent, in bytes, nothing is read: the replies to more calls
/// would only wait too. Far above the rest, for a daemon that writes before it reads on would
/// otherwise wait for us as we for it.
pub const MAX_OUTPUT: usize = 64 * 1024 * 1024;

/// Default of [`UnaryLimits::hold`].
pub const HOLD: Duration = Duration::from_secs(5);

/// Largest message that protobuf can have, in bytes. A longer one that exceeds
/// [`UnaryLimits::max_incoming`], too, ends the connection.
pub const MAX_PROTOBUF: usize = i32::MAX as usize;

/// Difference between the largest message to send and the largest one taken, in bytes: the daemon
/// checks what a peer sent before it replaces our peer id with the caller's.
const INCOMING_ALLOWANCE: usize = 64 << 10;

/// The frame buffer is kept for the next frame unless more bytes than these were in it: the share of a
/// payload of 4 MiB that comes before there is room for it, and the head.
const KEPT_BUFFER: usize = (4 << 20) / EARNED + MAX_HEAD;

/// How old a call is, at the least, when the daemon is told to cancel it: hivemind's crashes on a
/// cancel that it takes while it begins the call (it writes a reply that is nil).
pub const SETTLE: Duration = Duration::from_millis(20);

/// How often what is to be said of cancelled calls is.
pub const REMIND: Duration = Duration::from_millis(50);

/// Upgrades a control connection to a persistent one. After the answer it takes no requests any
/// more but the messages of a [`Persistent`].
pub fn upgrade() -> Request {
    // The JS daemon takes it for a peerstore request, and one without contents makes it crash. What
    // the field is in hivemind's fork, it has no use for here; the JS daemon, which reads numbers
    // wherever it expects them, finds `type` = 2 in the length, GET_PEER_INFO, and in the text an
    // unknown field: it answers that it has not implemented that.
    let read_otherwise_by_js = p2pd::RemoveStreamHandlerRequest {
        addr: Some(Bytes::from_static(b"\x78\x00")),
        proto: Vec::new(),
    };
    let message = p2pd::Request {
        remove_stream_handler: Some(read_otherwise_by_js),
        ..control::message(Type::PersistentConnUpgrade)
    };
    Request::new(&message, Expect::Persistent)
}

/// Limits of a persistent connection. [`Persistent::set_limits`] changes them at any time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnaryLimits {
    /// Largest message to send, without its length prefix, in bytes. The daemon closes the
    /// connection on a larger one (its `-persistentConnMaxMsgSize`). Default: 4 MiB.
    pub max_message: usize,
    /// Largest message to receive, in bytes. A larger one is skipped and fails its call alone.
    /// Default: `None`, which is `max_message` and 64 KiB. [`MAX_PROTOBUF`] for no limit.
    pub max_incoming: Option<usize>,
    /// Number of incoming calls in progress above which no more are read. Default: 4096; `usize::MAX`
    /// for no limit.
    pub max_unanswered: usize,
    /// Size of their payloads, in bytes, above which no more are read. Default: 64 MiB;
    /// `usize::MAX` for no limit.
    pub max_unanswered_bytes: usize,
    /// Time that reading may pause because of the two limits above. After that the calls over the
    /// limits are refused, so that cancels and the end of the connection behind them are seen.
    /// Default: 5 s; `None` never refuses.
    pub hold: Option<Duration>,
}

impl Default for UnaryLimits {
    fn default() -> Self {
        Self {
            max_message: 4 << 20,
            max_incoming: None,
            max_unanswered: 4096,
            max_unanswered_bytes: 64 << 20,
            hold: Some(HOLD),
        }
    }
}

impl UnaryLimits {
    /// Largest message taken, in bytes.
    fn incoming(&self) -> usize {
        let default = self.max_message.saturating_add(INCOMING_ALLOWANCE);
        self.max_incoming.unwrap_or(default)
    }
}

/// Where the bytes of a payload end up.
pub trait Payload: Sized {
    /// Room for `len` bytes, which are going to be written; `None` if there is no memory for it.
    fn with_len(len: usize) -> Option<Self>;
    /// These bytes.
    fn copy_from(bytes: &[u8]) -> Self;
    /// The room.
    fn as_mut(&mut self) -> &mut [u8];
}

impl Payload for Vec<u8> {
    fn with_len(len: usize) -> Option<Self> {
        Some(vec![0; len])
    }

    fn copy_from(bytes: &[u8]) -> Self {
        bytes.to_vec()
    }

    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

/// What came of the bytes received. `T` is the driver's token of a call, `P` a payload.
#[derive(Debug, PartialEq, Eq)]
pub enum UnaryEvent<T, P> {
    /// The reply to a call.
    Reply {
        /// The call.
        token: T,
        /// What the handler returned.
        payload: P,
    },
    /// A handler was added or removed.
    Acknowledged {
        /// The request to do so.
        token: T,
    },
    /// The peer's handler failed, in these words.
    HandlerFailed {
        /// The call.
        token: T,
        /// The words.
        error: String,
    },
    /// The daemon refused a call, or to add or remove a handler, in these words.
    Refused {
        /// The call.
        token: T,
        /// The words.
        error: String,
    },
    /// The answer is none. The connection is good still: it is the peer that sent it.
    Broken {
        /// The call.
        token: T,
        /// What is wrong with it.
        error: Error,
    },
    /// A peer calls.
    Call {
        /// What the reply must carry.
        id: CallId,
        /// The caller.
        peer: Bytes,
        /// The handler.
        protocol: String,
        /// What it is called with.
        payload: P,
    },
    /// Whoever made the call with this id is gone: there is nobody to reply to. The call counts as
    /// at work until it is replied to all the same, which sends nothing.
    Cancelled {
        /// The call.
        id: CallId,
    },
    /// A peer calls, and is to be [refused](Persistent::refuse).
    Unserved {
        /// The call.
        id: CallId,
        /// Why.
        reason: Cow<'static, str>,
    },
    /// The answer was too large, and was skipped. The connection stays usable.
    Oversized {
        /// The call.
        token: T,
        /// [`Error::ReplyTooLarge`] or [`Error::NoMemory`].
        error: Error,
    },
    /// A message that was too large was skipped, and no call id was found in it. The driver logs it.
    Skipped {
        /// As in [`UnaryEvent::Oversized`].
        error: Error,
    },
}

/// Unpredictable call ids: the daemons match replies by the id alone, so a peer that could guess
/// the next ones could take replies that are not for it.
#[derive(Debug)]
struct CallIds {
    seed: [u8; 32],
    counter: u64,
    spare: Option<CallId>,
}

impl CallIds {
    fn next(&mut self) -> CallId {
        if let Some(id) = self.spare.take() {
            return id;
        }
        let mut hash = Sha256::new();
        hash.update(self.seed);
        hash.update(self.counter.to_le_bytes());
        self.counter += 1;
        let hash = hash.finalize();
        let (first, second) = hash.split_at(16);
        self.spare = second.try_into().ok();
        first.try_into().expect("half of 32 bytes")
    }
}

/// For keys that are random already.
#[derive(Debug, Default)]
struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk::<8>() {
            self.0 = u64::from_ne_bytes(*first);
        }
    }

    fn write_usize(&mut self, _: usize) {} // the length of the id
}

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

/// What is still to be said of a call that was cancelled.
#[derive(Debug)]
struct Cancelled {
    /// When the daemon is to be told.
    due: Instant,
    /// How often it was, but can have taken the cancel before the call, and then does not know it.
    told: u32,
}

impl Cancelled {
    /// Tells the daemon, if it is time; twice as long after each time.
    fn tell(&mut self, id: &CallId, now: Instant, out: &mut BytesMut) {
        if self.due <= now {
            put_cancel(out, id);
            self.due = now + REMIND * (1 << self.told);
            self.told += 1;
        }
    }
}

/// A frame whose head was read and whose rest is still to come.
#[derive(Debug)]
enum Body<P> {
    None,
    Payload(Partial<P>),
    /// Its bytes are dropped as they come.
    Skipped(Box<Skip>),
}

/// A payload on its way, and what it belongs to.
#[derive(Debug)]
struct Partial<P> {
    head: Head,
    payload: P,
    filled: usize,
    len: usize,
}

/// What comes before the payload of a frame that is read without waiting for the whole of it.
#[derive(Debug, PartialEq, Eq)]
enum Head {
    Reply {
        id: CallId,
    },
    Call {
        id: CallId,
        peer: Bytes,
        protocol: String,
    },
}

/// How far the head of a frame could be read.
#[derive(Debug, PartialEq, Eq)]
enum Scan {
    /// The payload is all from this offset on.
    Payload(Head, usize),
    /// There is more to come before the payload.
    Incomplete,
    /// It is laid out in another way, or has no payload.
    Other,
}

/// A persistent connection: frames out, bytes in, events out.
///
/// ```
/// use p2pclient_rs::core::{Persistent, UnaryEvent, UnaryLimits};
/// use bytes::BytesMut;
/// use std::time::Instant;
///
/// let mut connection = Persistent::<&str, Vec<u8>>::new([7; 32], UnaryLimits::default());
/// let mut out = BytesMut::new();
/// let id = connection.call(b"peer", "echo", 2, "my call", Instant::now(), &mut out)?;
/// out.extend_from_slice(b"hi"); // the payload goes right behind the head
///
/// let mut reply = vec![24, 10, 16];
/// reply.extend_from_slice(&id);
/// reply.extend_from_slice(&[18, 4, 10, 2, b'h', b'o']);
/// let event = connection.poll(&mut &reply[..])?;
/// assert_eq!(event, Some(UnaryEvent::Reply { token: "my call", payload: b"ho".to_vec() }));
/// # Ok::<(), p2pclient_rs::core::Error>(())
/// ```
#[derive(Debug)]
pub struct Persistent<T, P> {
    limits: UnaryLimits,
    /// [`UnaryLimits::incoming`].
    max_incoming: usize,
    ids: CallIds,
    pending: HashMap<CallId, Pending<T>, BuildHasherDefault<IdHasher>>,
    /// The calls that were cancelled and the daemon may not know it.
    cancelled: HashMap<CallId, Cancelled, BuildHasherDefault<IdHasher>>,
    /// The incoming calls at work. The ids are the peers' choice, hence the standard hasher.
    unanswered: HashMap<CallId, Incoming>,
    unanswered_bytes: usize,
    /// Calls over the limit are refused, not held back.
    pressed: bool,
    /// The beginning of a frame.
    buffer: BytesMut,
    body: Body<P>,
}

impl<T, P: Payload> Persistent<T, P> {
    /// A connection that was just upgraded. `seed` is random and used for no other.
    pub fn new(seed: [u8; 32], limits: UnaryLimits) -> Self {
        Self {
            limits,
            max_incoming: limits.incoming(),
            ids: CallIds {
                seed,
                counter: 0,
                spare: None,
            },
            pending: HashMap::default(),
            cancelled: HashMap::default(),
            unanswered: HashMap::new(),
            unanswered_bytes: 0,
            pressed: false,
            buffer: BytesMut::new(),
            body: Body::None,
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
        self.max_incoming = limits.incoming();
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
        let inner = field_len(1, peer.len()) + field_len(2, protocol.len()) + field_len(3, len);
        let size = 18 + field_len(3, inner);
        self.check_size(size)?;
        let id = self.expect(token, Some(now));
        begin(out, size, &id, 3, inner);
        put_field(out, 1, peer);
        put_field(out, 2, protocol.as_bytes());
        put_header(out, 3, len);
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
        self.ask(request::Message::AddUnaryHandler(message), token, out)
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
        self.ask(request::Message::RemoveUnaryHandler(message), token, out)
    }

    /// Gives up waiting for an answer. If it was a call, the daemon is told, now or
    /// [later](Self::has_cancelled). `None` if the answer came before.
    pub fn cancel(&mut self, id: &CallId, now: Instant, out: &mut BytesMut) -> Option<T> {
        let pending = self.pending.remove(id)?;
        if let Some(called) = pending.called {
            let due = called + SETTLE;
            let mut cancelled = Cancelled { due, told: 0 };
            cancelled.tell(id, now, out);
            if self.cancelled.len() < MAX_CANCELLED {
                self.cancelled.insert(*id, cancelled);
            }
        }
        Some(pending.token)
    }

    /// Gives up on what could not be sent.
    pub fn forget(&mut self, id: &CallId) -> Option<T> {
        self.pending.remove(id).map(|pending| pending.token)
    }

    /// Whether there are cancelled calls of which the daemon has not said that it knows.
    pub fn has_cancelled(&self) -> bool {
        !self.cancelled.is_empty()
    }

    /// To be called every [`REMIND`] while [`has_cancelled`](Self::has_cancelled): cancels what was
    /// too young for it, and again what the daemon may not have understood.
    pub fn remind(&mut self, now: Instant, out: &mut BytesMut) {
        self.cancelled.retain(|id, cancelled| {
            cancelled.tell(id, now, out);
            cancelled.told < MAX_TOLD
        });
    }

    /// Replies to a call, if the caller is still there. Appends to `out` the head of the frame and
    /// returns true if the payload of `len` bytes is to follow: one that is too large becomes an
    /// error at the caller.
    pub fn reply(&mut self, id: &CallId, len: usize, out: &mut BytesMut) -> bool {
        if !self.finish(id) {
            return false;
        }
        let inner = field_len(1, len);
        let size = 18 + field_len(4, inner);
        if self.check_size(size).is_err() {
            let limit = self.limits.max_message;
            let words =
                format!("the reply of {len} bytes exceeds the message size limit of {limit} bytes");
            self.put_error(out, id, &words);
            return false;
        }
        begin(out, size, id, 4, inner);
        put_header(out, 1, len);
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
    pub fn leave(&mut self, error: &str, out: &mut BytesMut) {
        let unanswered = std::mem::take(&mut self.unanswered);
        for (id, _) in unanswered.iter().filter(|(_, call)| !call.cancelled) {
            self.put_error(out, id, error);
        }
        self.unanswered_bytes = 0;
        let calls = self.pending.iter();
        for (id, _) in calls.filter(|(_, pending)| pending.called.is_some()) {
            put_cancel(out, id);
        }
        for (id, _) in self
            .cancelled
            .drain()
            .filter(|(_, cancelled)| cancelled.told == 0)
        {
            put_cancel(out, &id);
        }
    }

    // --- in ---

    /// The next event. Takes what it needs off the front of `input`; `None` if it has taken it all
    /// and more is to come. After an error the connection is of no more use.
    pub fn poll(&mut self, input: &mut &[u8]) -> Result<Option<UnaryEvent<T, P>>, Error> {
        loop {
            match &mut self.body {
                Body::None => {}
                Body::Payload(partial) => {
                    let count = input.len().min(partial.len - partial.filled);
                    partial.payload.as_mut()[partial.filled..partial.filled + count]
                        .copy_from_slice(&input[..count]);
                    partial.filled += count;
                    *input = &input[count..];
                    if partial.filled < partial.len {
                        return Ok(None);
                    }
                    let body = std::mem::replace(&mut self.body, Body::None);
                    if let Body::Payload(Partial {
                        head, payload, len, ..
                    }) = body
                    {
                        if let Some(event) = self.arrived(head, payload, len) {
                            return Ok(Some(event));
                        }
                    }
                    continue;
                }
                Body::Skipped(skip) => {
                    skip.take(input);
                    if !skip.is_over() {
                        return Ok(None);
                    }
                    let body = std::mem::replace(&mut self.body, Body::None);
                    if let Body::Skipped(skip) = body {
                        if let Some(event) = self.skipped(*skip) {
                            return Ok(Some(event));
                        }
                    }
                    continue;
                }
            }
            if self.buffer.is_empty() {
                // Most frames come whole: those are not copied here.
                match self.frame(input)? {
                    Frame::Whole { prefix, end } => {
                        let (frame, rest) = input.split_at(end);
                        *input = rest;
                        if let Some(event) = self.whole(&frame[prefix..])? {
                            return Ok(Some(event));
                        }
                        continue;
                    }
                    Frame::Large(partial) => {
                        self.body = Body::Payload(partial);
                        *input = &[];
                        return Ok(None);
                    }
                    Frame::Skip { prefix, skip } => {
                        *input = &input[prefix..];
                        self.body = Body::Skipped(skip);
                        continue;
                    }
                    Frame::Needs(_) => {
                        self.buffer.extend_from_slice(input);
                        *input = &[];
                        return Ok(None);
                    }
                }
            }
            // No further than the frame's end, or than its head may reach.
            match self.frame(&self.buffer)? {
                Frame::Whole { prefix, end } => {
                    let frame = if end > KEPT_BUFFER && end == self.buffer.len() {
                        std::mem::take(&mut self.buffer)
                    } else {
                        self.buffer.split_to(end)
                    };
                    if let Some(event) = self.whole(&frame[prefix..])? {
                        return Ok(Some(event));
                    }
                }
                Frame::Large(partial) => {
                    self.body = Body::Payload(partial);
                    self.clear_buffer();
                }
                Frame::Skip { prefix, mut skip } => {
                    skip.take(&mut &self.buffer[prefix..]);
                    self.clear_buffer();
                    self.body = Body::Skipped(skip);
                }
                Frame::Needs(count) => {
                    if input.is_empty() {
                        return Ok(None);
                    }
                    let (some, rest) = input.split_at(count.min(input.len()));
                    self.buffer.extend_from_slice(some);
                    *input = rest;
                }
            }
        }
    }

    /// The rest of the room for the payload being received, which can be read right into, with
    /// [`payload_filled`](Self::payload_filled) to follow.
    pub fn payload_room(&mut self) -> Option<&mut [u8]> {
        let Body::Payload(partial) = &mut self.body else {
            return None;
        };
        let filled = partial.filled;
        Some(&mut partial.payload.as_mut()[filled..partial.len])
    }

    /// Tells that `count` bytes were read into [`payload_room`](Self::payload_room).
    pub fn payload_filled(&mut self, count: usize) {
        if let Body::Payload(partial) = &mut self.body {
            partial.filled = partial.len.min(partial.filled + count);
        }
    }

    /// What is to be said of the end of the connection, seen now.
    pub fn end_of_file(&self) -> Error {
        Error::Closed {
            mid_message: !matches!(self.body, Body::None) || !self.buffer.is_empty(),
        }
    }

    /// Whether more input is to be read: not while too many calls are at work, unless something of
    /// ours is waited for, on which these might depend.
    pub fn wants_input(&self) -> bool {
        self.pressed || !self.pending.is_empty() || !self.exceeds(1)
    }

    /// Input was not wanted for long enough. From now on it is: calls over the limit are refused,
    /// for the sake of what comes behind them, as cancels, or the end.
    pub fn press_on(&mut self) {
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

    fn check_size(&self, size: usize) -> Result<(), Error> {
        let limit = self.limits.max_message;
        if size > limit {
            return Err(Error::RequestTooLarge { size, limit });
        }
        Ok(())
    }

    fn expect(&mut self, token: T, called: Option<Instant>) -> CallId {
        let id = self.ids.next();
        self.pending.insert(id, Pending { token, called });
        id
    }

    fn ask(
        &mut self,
        message: request::Message,
        token: T,
        out: &mut BytesMut,
    ) -> Result<CallId, Error> {
        self.check_size(message.encoded_len() + 18)?;
        let id = self.expect(token, None);
        put_message(out, &id, message);
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
        let limit = self.limits.max_message.saturating_sub(64).min(MAX_ERROR);
        let mut end = words.len().min(limit);
        while !words.is_char_boundary(end) {
            end -= 1;
        }
        let words = Bytes::copy_from_slice(&words.as_bytes()[..end]);
        let response = p2pd::CallUnaryResponse {
            result: Some(call_unary_response::Result::Error(words)),
        };
        put_message(out, id, request::Message::UnaryResponse(response));
    }

    fn exceeds(&self, times: usize) -> bool {
        self.unanswered.len() >= self.limits.max_unanswered.saturating_mul(times)
            || self.unanswered_bytes >= self.limits.max_unanswered_bytes.saturating_mul(times)
    }

    fn clear_buffer(&mut self) {
        if self.buffer.len() > KEPT_BUFFER {
            self.buffer = BytesMut::new();
        } else {
            self.buffer.clear();
        }
    }

    /// What of a frame is at the front of `bytes`.
    fn frame(&self, bytes: &[u8]) -> Result<Frame<P>, Error> {
        let (prefix, len) = match framing::split_length(bytes, self.max_incoming) {
            Ok(Some(split)) => split,
            Ok(None) => return Ok(Frame::Needs(1)),
            Err(error) => return self.oversized(bytes, error),
        };
        // With no limit to speak of, the length alone may be all that a usize holds.
        let end = prefix.saturating_add(len);
        if bytes.len() >= end {
            return Ok(Frame::Whole { prefix, end });
        }
        let missing = end - bytes.len();
        if len < DIRECT {
            return Ok(Frame::Needs(missing));
        }
        match scan(&bytes[prefix..], len) {
            Scan::Payload(head, offset) => {
                let len = len - offset;
                let there = &bytes[prefix + offset..];
                if there.len() < len / EARNED {
                    return Ok(Frame::Needs(len / EARNED - there.len()));
                }
                let Some(mut payload) = P::with_len(len) else {
                    let error = Error::NoMemory { size: len };
                    let skip = Box::new(Skip::new(end - prefix, error));
                    return Ok(Frame::Skip { prefix, skip });
                };
                payload.as_mut()[..there.len()].copy_from_slice(there);
                let partial = Partial {
                    head,
                    payload,
                    filled: there.len(),
                    len,
                };
                Ok(Frame::Large(partial))
            }
            Scan::Incomplete if bytes.len() < MAX_HEAD => {
                Ok(Frame::Needs(missing.min(MAX_HEAD - bytes.len())))
            }
            _ => Ok(Frame::Needs(missing)),
        }
    }

    /// A frame whose length was refused with this error: it is skipped, if protobuf can have it.
    #[cold]
    fn oversized(&self, bytes: &[u8], error: Error) -> Result<Frame<P>, Error> {
        match framing::split_length(bytes, MAX_PROTOBUF) {
            Ok(Some((prefix, size))) => {
                let limit = self.max_incoming;
                let error = Error::ReplyTooLarge { size, limit };
                let skip = Box::new(Skip::new(size, error));
                Ok(Frame::Skip { prefix, skip })
            }
            _ => Err(error),
        }
    }

    /// The event of a frame that was skipped.
    fn skipped(&mut self, skip: Skip) -> Option<UnaryEvent<T, P>> {
        let Some(id) = skip.call_id() else {
            return Some(UnaryEvent::Skipped { error: skip.error });
        };
        match skip.content() {
            Some(3) => {
                let reason = match skip.error {
                    Error::ReplyTooLarge { size, limit } => format!(
                        "the call of {size} bytes exceeds the message size limit of {limit} bytes"
                    ),
                    error => error.to_string(),
                };
                let reason = Cow::Owned(reason);
                Some(UnaryEvent::Unserved { id, reason })
            }
            Some(5) => self.cancel_came(id),
            content => {
                self.cancelled.remove(&id);
                let Pending { token, called } = self.pending.remove(&id)?;
                Some(
                    if content.is_none() && called.is_none() && skip.is_sound() {
                        UnaryEvent::Acknowledged { token }
                    } else {
                        let error = skip.error;
                        UnaryEvent::Oversized { token, error }
                    },
                )
            }
        }
    }

    /// Reads a whole message.
    fn whole(&mut self, message: &[u8]) -> Result<Option<UnaryEvent<T, P>>, Error> {
        if let Scan::Payload(head, offset) = scan(message, message.len()) {
            let payload = &message[offset..];
            // An answer that nobody waits for is not worth a copy.
            return Ok(match head {
                Head::Reply { id } if !self.pending.contains_key(&id) => {
                    self.cancelled.remove(&id);
                    None
                }
                head => self.arrived(head, P::copy_from(payload), payload.len()),
            });
        }
        let malformed = |reason: &str| Error::Malformed {
            message: "PersistentConnectionResponse",
            reason: reason.to_owned(),
        };
        let (mut id, mut content) = (None, None);
        let mut fields = Fields(message);
        while let Some((number, value)) = fields.next() {
            match number {
                1 => id = Some(value),
                2..=5 => content = Some((number, value)),
                _ => {}
            }
        }
        if !fields.0.is_empty() {
            return Err(malformed("its fields cannot be told apart"));
        }
        let id = id.ok_or(Error::MissingField {
            message: "PersistentConnectionResponse",
            field: "callId",
        })?;
        let id: CallId = id
            .try_into()
            .map_err(|_| Error::Unexpected(format!("a call id of {} bytes", id.len())))?;
        Ok(match content {
            Some((5, _)) => self.cancel_came(id),
            content => self.answer_came(id, content),
        })
    }

    fn answer_came(
        &mut self,
        id: CallId,
        content: Option<(u64, &[u8])>,
    ) -> Option<UnaryEvent<T, P>> {
        self.cancelled.remove(&id);
        match content {
            None => self.acknowledged(id),
            Some((2, reply)) => self.replied(id, Fields(reply)),
            Some((3, call)) => self.called(id, Fields(call)),
            Some((_, error)) => {
                let words = Fields(error).last(1).unwrap_or_default();
                self.refused(&id, String::from_utf8_lossy(words).into_owned())
            }
        }
    }

    /// The daemon says that a call was cancelled: one of ours, or a peer's.
    fn cancel_came(&mut self, id: CallId) -> Option<UnaryEvent<T, P>> {
        self.cancelled.remove(&id);
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

    /// A CallUnaryRequest. A peer wrote it, and the connection is not to suffer for that.
    fn called(&mut self, id: CallId, mut fields: Fields<'_>) -> Option<UnaryEvent<T, P>> {
        let (mut peer, mut protocol, mut data) = (None, None, None);
        while let Some((number, value)) = fields.next() {
            match number {
                1 => peer = Some(value),
                2 => protocol = Some(value),
                3 => data = Some(value),
                _ => {}
            }
        }
        let (Some(peer), Some(protocol), Some(data)) = (peer, protocol, data) else {
            let reason = Cow::Borrowed("the call has no peer, protocol or data");
            return Some(UnaryEvent::Unserved { id, reason });
        };
        let head = Head::Call {
            id,
            peer: Bytes::copy_from_slice(peer),
            protocol: String::from_utf8_lossy(protocol).into_owned(),
        };
        self.arrived(head, P::copy_from(data), data.len())
    }

    fn acknowledged(&mut self, id: CallId) -> Option<UnaryEvent<T, P>> {
        let Pending { token, called } = self.pending.remove(&id)?;
        Some(if called.is_some() {
            // What Go's daemon makes of a peer that replied with something else.
            let error = Error::MissingField {
                message: "PersistentConnectionResponse",
                field: "callUnaryResponse",
            };
            UnaryEvent::Broken { token, error }
        } else {
            UnaryEvent::Acknowledged { token }
        })
    }

    /// A CallUnaryResponse. A peer wrote it, too.
    fn replied(&mut self, id: CallId, mut fields: Fields<'_>) -> Option<UnaryEvent<T, P>> {
        let Pending { token, called } = self.pending.remove(&id)?;
        if called.is_none() {
            let error = Error::Unexpected("a reply to what is no call".to_owned());
            return Some(UnaryEvent::Broken { token, error });
        }
        let mut result = None;
        while let Some((number, value)) = fields.next() {
            if number == 1 || number == 2 {
                result = Some((number, value));
            }
        }
        Some(match result {
            Some((1, data)) => UnaryEvent::Reply {
                token,
                payload: P::copy_from(data),
            },
            Some((_, words)) => UnaryEvent::HandlerFailed {
                token,
                error: String::from_utf8_lossy(words).into_owned(),
            },
            None => {
                let error = Error::MissingField {
                    message: "CallUnaryResponse",
                    field: "response",
                };
                UnaryEvent::Broken { token, error }
            }
        })
    }

    fn arrived(&mut self, head: Head, payload: P, len: usize) -> Option<UnaryEvent<T, P>> {
        match head {
            Head::Reply { id } => {
                self.cancelled.remove(&id);
                let Pending { token, called } = self.pending.remove(&id)?;
                Some(if called.is_some() {
                    UnaryEvent::Reply { token, payload }
                } else {
                    let error = Error::Unexpected("a reply to what is no call".to_owned());
                    UnaryEvent::Broken { token, error }
                })
            }
            Head::Call { id, peer, protocol } => {
                if self.exceeds(if self.pressed { 1 } else { 4 }) {
                    let reason = Cow::Borrowed("busy: too many calls at once");
                    return Some(UnaryEvent::Unserved { id, reason });
                }
                if self.unanswered.contains_key(&id) {
                    let reason = Cow::Borrowed("a call with the same id is at work");
                    return Some(UnaryEvent::Unserved { id, reason });
                }
                let call = Incoming {
                    size: len,
                    cancelled: false,
                };
                self.unanswered.insert(id, call);
                self.unanswered_bytes += len;
                Some(UnaryEvent::Call {
                    id,
                    peer,
                    protocol,
                    payload,
                })
            }
        }
    }
}

enum Frame<P> {
    /// All of it is there: where the message begins and ends.
    Whole { prefix: usize, end: usize },
    /// Its payload is to be received on its own. It has all the bytes there were.
    Large(Partial<P>),
    /// It is too large: all after its length prefix is skipped.
    Skip { prefix: usize, skip: Box<Skip> },
    /// So many bytes more.
    Needs(usize),
}

/// Looks for the payload in a message of `len` bytes of which `bytes` are there, if it is laid out
/// as Go and prost do it: fields in the order of their numbers, the payload last.
fn scan(bytes: &[u8], len: usize) -> Scan {
    let mut at = Cursor {
        bytes,
        offset: 0,
        end: len,
    };
    let scanned = (|| {
        let id: CallId = at.value(1)?.try_into().map_err(|_| Scan::Other)?;
        let head = match at.key()? {
            2 => {
                at.enter_last()?;
                Head::Reply { id }
            }
            3 => {
                at.enter_last()?;
                let peer = Bytes::copy_from_slice(at.value(1)?);
                let protocol = std::str::from_utf8(at.value(2)?).map_err(|_| Scan::Other)?;
                Head::Call {
                    id,
                    peer,
                    protocol: protocol.to_owned(),
                }
            }
            _ => return Err(Scan::Other),
        };
        let payload = if matches!(head, Head::Reply { .. }) {
            1
        } else {
            3
        };
        if at.key()? != payload {
            return Err(Scan::Other);
        }
        at.enter_last()?;
        Ok(Scan::Payload(head, at.offset))
    })();
    scanned.unwrap_or_else(|stopped| stopped)
}

/// Reads length-delimited fields.
struct Cursor<'a> {
    bytes: &'a [u8],
    offset: usize,
    end: usize,
}

impl<'a> Cursor<'a> {
    fn byte(&mut self) -> Result<u8, Scan> {
        let byte = self.bytes.get(self.offset).ok_or(Scan::Incomplete)?;
        self.offset += 1;
        Ok(*byte)
    }

    /// The number of a length-delimited field, below 16.
    fn key(&mut self) -> Result<u8, Scan> {
        match self.byte()? {
            key if key & 0x87 == 2 => Ok(key >> 3),
            _ => Err(Scan::Other),
        }
    }

    fn length(&mut self) -> Result<usize, Scan> {
        let mut length = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            length |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(length);
            }
        }
        Err(Scan::Other)
    }

    fn value(&mut self, number: u8) -> Result<&'a [u8], Scan> {
        if self.key()? != number {
            return Err(Scan::Other);
        }
        let end = self.length()? + self.offset;
        if end > self.end {
            return Err(Scan::Other);
        }
        let value = self.bytes.get(self.offset..end).ok_or(Scan::Incomplete)?;
        self.offset = end;
        Ok(value)
    }

    /// Enters a field that must reach to the end.
    fn enter_last(&mut self) -> Result<(), Scan> {
        if self.length()? + self.offset == self.end {
            return Ok(());
        }
        Err(Scan::Other)
    }
}

fn field_len(number: u32, len: usize) -> usize {
    key_len(number) + encoded_len_varint(len as u64) + len
}

/// The key and length of a field with a number under 16, at once: prost puts them byte by byte, and
/// every call has six of them.
fn put_header(out: &mut BytesMut, number: u32, len: usize) {
    debug_assert!(number < 16);
    let mut buffer = encode::u64_buffer();
    let len = encode::u64(len as u64, &mut buffer);
    let mut header = [0; 11];
    header[0] = (number << 3) as u8 | WireType::LengthDelimited as u8;
    header[1..=len.len()].copy_from_slice(len);
    out.put_slice(&header[..=len.len()]);
}

fn put_field(out: &mut BytesMut, number: u32, value: &[u8]) {
    put_header(out, number, value.len());
    out.put_slice(value);
}

/// The length of a message of `size` bytes, its call id, and the header of the field `number`,
/// which is the rest of it.
fn begin(out: &mut BytesMut, size: usize, id: &CallId, number: u32, len: usize) {
    out.put_slice(encode::u64(size as u64, &mut encode::u64_buffer()));
    put_field(out, 1, id);
    put_header(out, number, len);
}

fn put_message(out: &mut BytesMut, id: &CallId, message: request::Message) {
    let message = p2pd::PersistentConnectionRequest {
        call_id: Some(Bytes::copy_from_slice(id)),
        message: Some(message),
    };
    message
        .encode_length_delimited(out)
        .expect("a BytesMut grows as needed");
}

fn put_cancel(out: &mut BytesMut, id: &CallId) {
    put_message(out, id, request::Message::Cancel(p2pd::Cancel {}));
}

/// The length-delimited fields of a message, one after the other; others are skipped, and groups
/// with all that is in them. It ends before what it cannot read, which stays.
///
/// prost will not do: the Go daemon passes on what a peer added to a message and it does not know,
/// as groups in groups, that prost takes for reason enough to fail.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Option<(u64, &'a [u8])> {
        let mut bytes = self.0;
        // In how many groups.
        let mut depth = 0_usize;
        loop {
            let (key, rest) = framing::decode_varint(bytes).ok()?;
            let (value, rest) = match key & 7 {
                0 => (None, framing::decode_varint(rest).ok()?.1),
                1 => (None, rest.get(8..)?),
                2 => {
                    let (len, rest) = framing::decode_varint(rest).ok()?;
                    let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
                    (Some(value), rest)
                }
                3 => {
                    depth += 1;
                    (None, rest)
                }
                4 => {
                    depth = depth.checked_sub(1)?;
                    (None, rest)
                }
                5 => (None, rest.get(4..)?),
                _ => return None,
            };
            bytes = rest;
            if depth == 0 {
                self.0 = rest;
                if let Some(value) = value {
                    return Some((key >> 3, value));
                }
            }
        }
    }

    /// The last one with that number.
    fn last(mut self, number: u64) -> Option<&'a [u8]> {
        let mut last = None;
        while let Some((found, value)) = self.next() {
            if found == number {
                last = Some(value);
            }
        }
        last
    }
}

#[cfg(test)]
mod tests;
