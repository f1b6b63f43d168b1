//! The messages of a persistent connection as bytes, for both ends.
//!
//! A call and its reply have the same content in both directions; only the number of the field that
//! holds the reply differs.

use super::skip::Skip;
use crate::fields::Fields;
use crate::{framing, Error};
use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{encoded_len_varint, key_len, WireType};
use sha2::{Digest, Sha256};
use std::hash::Hasher;

/// Matches a reply to its call.
pub type CallId = [u8; 16];

/// Payloads of at least this many bytes are received straight into their final place.
pub(super) const DIRECT: usize = 16 * 1024;

/// The buffer for a payload is allocated only after 1/16 of it has arrived, so that a declared
/// length alone costs no memory.
const EARNED: usize = 16;

/// How much of a frame may come before its payload for that, in bytes.
const MAX_HEAD: usize = 1024;

/// The frame buffer is kept for the next frame unless more bytes than these were in it: the share of
/// a payload of 4 MiB that comes before there is room for it, and the head.
pub(super) const KEPT_BUFFER: usize = (4 << 20) / EARNED + MAX_HEAD;

/// How much of an error's text is sent, in bytes.
const MAX_ERROR: usize = 16 * 1024;

/// Largest message that protobuf can have, in bytes. A longer one that exceeds the limit on
/// incoming messages, too, ends the connection.
pub const MAX_PROTOBUF: usize = i32::MAX as usize;

/// The field that holds a call, in both directions.
pub(super) const CALL: u32 = 3;
/// The fields of a client's requests, which have no payload.
pub(super) const ADD_HANDLER: u32 = 2;
pub(super) const REMOVE_HANDLER: u32 = 6;
/// The field of a cancel, in both directions.
pub(super) const CANCEL: u32 = 5;

/// Why a [`Message::InvalidCall`] is refused.
pub(super) const INVALID_CALL: &str = "the call has no peer, protocol or data";

/// The error of a [`Message::EmptyReply`].
pub(super) fn empty_reply() -> Error {
    Error::MissingField {
        message: "CallUnaryResponse",
        field: "response",
    }
}

/// Why a call that was skipped is refused.
pub(super) fn why_skipped(error: &Error) -> String {
    match error {
        Error::ReplyTooLarge { size, limit } => {
            format!("the call of {size} bytes exceeds the message size limit of {limit} bytes")
        }
        error => error.to_string(),
    }
}

/// The error that is sent for a reply of `len` bytes that is too large.
pub(super) fn too_large_a_reply(len: usize, limit: usize) -> String {
    format!("the reply of {len} bytes exceeds the message size limit of {limit} bytes")
}

/// Checks that a message of `size` bytes may be sent.
pub(super) fn check_size(size: usize, limit: usize) -> Result<(), Error> {
    if size > limit {
        return Err(Error::RequestTooLarge { size, limit });
    }
    Ok(())
}

pub(super) fn put_cancel(out: &mut BytesMut, id: &CallId) {
    put_message(out, id, CANCEL, &[]);
}

/// Which way messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// `PersistentConnectionRequest`: from the client to the daemon.
    ToDaemon,
    /// `PersistentConnectionResponse`: from the daemon to the client.
    ToClient,
}

impl Direction {
    /// The field that holds the reply to a call.
    pub(super) fn reply(self) -> u32 {
        match self {
            Self::ToDaemon => 4,
            Self::ToClient => 2,
        }
    }

    /// Whether a field says what the message is.
    pub(super) fn is_content(self, field: u64) -> bool {
        match self {
            Self::ToDaemon => (2..=6).contains(&field),
            Self::ToClient => (2..=5).contains(&field),
        }
    }

    fn message(self) -> &'static str {
        match self {
            Self::ToDaemon => "PersistentConnectionRequest",
            Self::ToClient => "PersistentConnectionResponse",
        }
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

/// A message that has arrived. `P` is a payload.
#[derive(Debug)]
pub(super) enum Message<P> {
    /// A call.
    Call {
        id: CallId,
        peer: Bytes,
        protocol: String,
        payload: P,
        /// Size of the payload, in bytes.
        size: usize,
    },
    /// A call without a peer, a protocol or data. A peer wrote it, so only that call fails.
    InvalidCall { id: CallId },
    /// What a handler returned.
    Reply { id: CallId, payload: P },
    /// A handler's error.
    HandlerError { id: CallId, error: String },
    /// A reply that has neither.
    EmptyReply { id: CallId },
    /// A reply that is not wanted, and was not copied.
    UnwantedReply { id: CallId },
    /// Another message: the field that says which, if any, and its content.
    Other {
        id: CallId,
        field: Option<u64>,
        content: Bytes,
    },
    /// A message that was too large, and was skipped.
    Skipped {
        id: Option<CallId>,
        field: Option<u64>,
        /// Whether all of its fields could be told apart.
        is_sound: bool,
        error: Error,
    },
}

/// Reads messages out of bytes that arrive in pieces of any size.
#[derive(Debug)]
pub(super) struct Reader<P> {
    direction: Direction,
    /// Largest message taken, in bytes. Larger ones are skipped.
    pub(super) max_incoming: usize,
    /// The beginning of a frame.
    pub(super) buffer: BytesMut,
    body: Body<P>,
}

/// A frame whose head was read and whose rest is still to come.
#[derive(Debug)]
enum Body<P> {
    None,
    Payload(Receiving<P>),
    /// Its bytes are dropped as they come.
    Skipped(Box<Skip>),
}

/// A payload of which a part has arrived, and the head of its frame.
#[derive(Debug)]
pub struct Receiving<P> {
    head: Head<Bytes, String>,
    payload: P,
    filled: usize,
    len: usize,
}

impl<P: Payload> Receiving<P> {
    /// The bytes that are missing: the driver reads into the front of them.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.payload.as_mut()[self.filled..self.len]
    }

    /// Notes that `count` bytes were read into [`room`](Self::room).
    pub fn filled(&mut self, count: usize) {
        self.filled = self.len.min(self.filled + count);
    }
}

/// The part of a frame in front of its payload. `B` is bytes and `S` a string, borrowed from the frame
/// or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head<B, S> {
    Reply { id: CallId },
    Call { id: CallId, peer: B, protocol: S },
}

/// A head that borrows from its frame.
pub(super) type HeadRef<'a> = Head<&'a [u8], &'a str>;

/// How far the head of a frame could be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Scan<'a> {
    /// The payload is all from this offset on.
    Payload(HeadRef<'a>, usize),
    /// There is more to come before the payload.
    Incomplete,
    /// It is laid out in another way, or has no payload.
    Other,
}

impl<P: Payload> Reader<P> {
    pub fn new(direction: Direction, max_incoming: usize) -> Self {
        Self {
            direction,
            max_incoming,
            buffer: BytesMut::new(),
            body: Body::None,
        }
    }

    /// The next message. Takes what it needs off the front of `input`; `None` if it has taken all
    /// and more must come. `wanted` is given the head and the payload of each call and reply that
    /// comes whole and in the usual layout, and returns the part of the payload to copy. If that is
    /// `None`, a call is dropped, and nothing of a reply is copied.
    #[inline]
    pub fn poll(
        &mut self,
        input: &mut &[u8],
        mut wanted: impl for<'a> FnMut(HeadRef<'a>, &'a [u8]) -> Option<&'a [u8]>,
    ) -> Result<Option<Message<P>>, Error> {
        loop {
            match &mut self.body {
                Body::None => {}
                Body::Payload(receiving) => {
                    let room = receiving.room();
                    let count = input.len().min(room.len());
                    room[..count].copy_from_slice(&input[..count]);
                    receiving.filled(count);
                    *input = &input[count..];
                    if receiving.filled < receiving.len {
                        return Ok(None);
                    }
                    let body = std::mem::replace(&mut self.body, Body::None);
                    if let Body::Payload(Receiving {
                        head, payload, len, ..
                    }) = body
                    {
                        return Ok(Some(head.with(payload, len)));
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
                        return Ok(Some(Message::Skipped {
                            id: skip.call_id(),
                            field: skip.content(),
                            is_sound: skip.is_sound(),
                            error: skip.error,
                        }));
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
                        match self.whole(&frame[prefix..], &mut wanted)? {
                            None => continue,
                            message => return Ok(message),
                        }
                    }
                    Frame::Large(receiving) => {
                        self.body = Body::Payload(receiving);
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
                    match self.whole(&frame[prefix..], &mut wanted)? {
                        None => continue,
                        message => return Ok(message),
                    }
                }
                Frame::Large(receiving) => {
                    self.body = Body::Payload(receiving);
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

    /// The rest of the room for the payload being received, which the driver may read into
    /// directly. [`payload_filled`](Self::payload_filled) must follow.
    pub fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        match &mut self.body {
            Body::Payload(receiving) => Some(receiving.room()),
            _ => None,
        }
    }

    /// Notes that `count` bytes were read into [`payload_buffer`](Self::payload_buffer).
    pub fn payload_filled(&mut self, count: usize) {
        if let Body::Payload(receiving) = &mut self.body {
            receiving.filled(count);
        }
    }

    /// Takes out the payload being received. [`resume`](Self::resume) must follow.
    pub fn take_receiving(&mut self) -> Option<Receiving<P>> {
        match std::mem::replace(&mut self.body, Body::None) {
            Body::Payload(receiving) => Some(receiving),
            other => {
                self.body = other;
                None
            }
        }
    }

    /// Puts back the payload that was taken out.
    pub fn resume(&mut self, receiving: Receiving<P>) {
        self.body = Body::Payload(receiving);
    }

    /// Whether a part of a message has arrived.
    pub fn is_mid_message(&self) -> bool {
        !matches!(self.body, Body::None) || !self.buffer.is_empty()
    }

    fn clear_buffer(&mut self) {
        if self.buffer.len() > KEPT_BUFFER {
            self.buffer = BytesMut::new();
        } else {
            self.buffer.clear();
        }
    }

    /// How much of a frame is at the front of `bytes`.
    fn frame(&self, bytes: &[u8]) -> Result<Frame<P>, Error> {
        let (prefix, len) = match framing::split_length(bytes, self.max_incoming) {
            Ok(Some(split)) => split,
            Ok(None) => return Ok(Frame::Needs(1)),
            Err(error) => return self.oversized(bytes, error),
        };
        // Without a limit, the length alone can be the largest that a usize holds.
        let end = prefix.saturating_add(len);
        if bytes.len() >= end {
            return Ok(Frame::Whole { prefix, end });
        }
        let missing = end - bytes.len();
        if len < DIRECT {
            return Ok(Frame::Needs(missing));
        }
        match scan(&bytes[prefix..], len, self.direction) {
            Scan::Payload(head, offset) => {
                let len = len - offset;
                let there = &bytes[prefix + offset..];
                if there.len() < len / EARNED {
                    return Ok(Frame::Needs(len / EARNED - there.len()));
                }
                let Some(mut payload) = P::with_len(len) else {
                    let error = Error::NoMemory { size: len };
                    let skip = Box::new(Skip::new(end - prefix, self.direction, error));
                    return Ok(Frame::Skip { prefix, skip });
                };
                payload.as_mut()[..there.len()].copy_from_slice(there);
                Ok(Frame::Large(Receiving {
                    head: head.to_owned(),
                    payload,
                    filled: there.len(),
                    len,
                }))
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
                let skip = Box::new(Skip::new(size, self.direction, error));
                Ok(Frame::Skip { prefix, skip })
            }
            _ => Err(error),
        }
    }

    /// Reads a whole message; `None` if it is a call that is not wanted.
    fn whole(
        &self,
        message: &[u8],
        wanted: &mut impl for<'a> FnMut(HeadRef<'a>, &'a [u8]) -> Option<&'a [u8]>,
    ) -> Result<Option<Message<P>>, Error> {
        if let Scan::Payload(head, offset) = scan(message, message.len(), self.direction) {
            let payload = &message[offset..];
            return Ok(match (wanted(head, payload), head) {
                (Some(part), _) => {
                    let head = head.to_owned();
                    Some(head.with(P::copy_from(part), payload.len()))
                }
                (None, Head::Reply { id }) => Some(Message::UnwantedReply { id }),
                (None, Head::Call { .. }) => None,
            });
        }
        self.whole_in_another_layout(message).map(Some)
    }

    fn whole_in_another_layout(&self, message: &[u8]) -> Result<Message<P>, Error> {
        let name = self.direction.message();
        let (mut id, mut content) = (None, None);
        let mut fields = Fields::new(message);
        while let Some((number, value)) = fields.next() {
            if number == 1 {
                id = Some(value);
            } else if self.direction.is_content(number) {
                content = Some((number, value));
            }
        }
        if !fields.is_at_end() {
            return Err(Error::Malformed {
                message: name,
                reason: "its fields cannot be told apart".to_owned(),
            });
        }
        let id = id.ok_or(Error::MissingField {
            message: name,
            field: "callId",
        })?;
        let id: CallId = id
            .try_into()
            .map_err(|_| Error::Unexpected(format!("a call id of {} bytes", id.len())))?;
        Ok(match content {
            Some((field, call)) if field == u64::from(CALL) => read_call(id, Fields::new(call)),
            Some((field, reply)) if field == u64::from(self.direction.reply()) => {
                read_reply(id, Fields::new(reply))
            }
            content => Message::Other {
                id,
                field: content.map(|(field, _)| field),
                content: Bytes::copy_from_slice(content.map_or(&[], |(_, content)| content)),
            },
        })
    }
}

/// Reads a CallUnaryRequest.
fn read_call<P: Payload>(id: CallId, mut fields: Fields<'_>) -> Message<P> {
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
        return Message::InvalidCall { id };
    };
    Message::Call {
        id,
        peer: Bytes::copy_from_slice(peer),
        protocol: String::from_utf8_lossy(protocol).into_owned(),
        payload: P::copy_from(data),
        size: data.len(),
    }
}

/// Reads a CallUnaryResponse.
fn read_reply<P: Payload>(id: CallId, mut fields: Fields<'_>) -> Message<P> {
    let mut result = None;
    while let Some((number, value)) = fields.next() {
        if number == 1 || number == 2 {
            result = Some((number, value));
        }
    }
    match result {
        Some((1, data)) => Message::Reply {
            id,
            payload: P::copy_from(data),
        },
        Some((_, words)) => Message::HandlerError {
            id,
            error: String::from_utf8_lossy(words).into_owned(),
        },
        None => Message::EmptyReply { id },
    }
}

impl HeadRef<'_> {
    #[inline]
    fn to_owned(self) -> Head<Bytes, String> {
        match self {
            Self::Reply { id } => Head::Reply { id },
            Self::Call { id, peer, protocol } => Head::Call {
                id,
                peer: Bytes::copy_from_slice(peer),
                protocol: protocol.to_owned(),
            },
        }
    }
}

impl Head<Bytes, String> {
    /// The message that this is the head of.
    #[inline]
    fn with<P>(self, payload: P, size: usize) -> Message<P> {
        match self {
            Self::Reply { id } => Message::Reply { id, payload },
            Self::Call { id, peer, protocol } => Message::Call {
                id,
                peer,
                protocol,
                payload,
                size,
            },
        }
    }
}

enum Frame<P> {
    /// All of it is there: where the message begins and ends.
    Whole { prefix: usize, end: usize },
    /// Its payload is to be received on its own. It has all the bytes there were.
    Large(Receiving<P>),
    /// It is too large: all after its length prefix is skipped.
    Skip { prefix: usize, skip: Box<Skip> },
    /// So many bytes more.
    Needs(usize),
}

/// Looks for the payload in a message of `len` bytes of which `bytes` are there, if it is laid out
/// as Go and prost do it: fields in the order of their numbers, the payload last.
pub(super) fn scan(bytes: &[u8], len: usize, direction: Direction) -> Scan<'_> {
    let mut at = Cursor {
        bytes,
        offset: 0,
        end: len,
    };
    let scanned = (|| {
        let id: CallId = at.value(1)?.try_into().map_err(|_| Scan::Other)?;
        let head = match u32::from(at.key()?) {
            field if field == direction.reply() => {
                at.enter_last()?;
                Head::Reply { id }
            }
            CALL => {
                at.enter_last()?;
                let peer = at.value(1)?;
                let protocol = std::str::from_utf8(at.value(2)?).map_err(|_| Scan::Other)?;
                Head::Call { id, peer, protocol }
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
    fn byte(&mut self) -> Result<u8, Scan<'a>> {
        let byte = self.bytes.get(self.offset).ok_or(Scan::Incomplete)?;
        self.offset += 1;
        Ok(*byte)
    }

    /// The number of a length-delimited field, below 16.
    fn key(&mut self) -> Result<u8, Scan<'a>> {
        match self.byte()? {
            key if key & 0x87 == 2 => Ok(key >> 3),
            _ => Err(Scan::Other),
        }
    }

    fn length(&mut self) -> Result<usize, Scan<'a>> {
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

    fn value(&mut self, number: u8) -> Result<&'a [u8], Scan<'a>> {
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
    fn enter_last(&mut self) -> Result<(), Scan<'a>> {
        if self.length()? + self.offset == self.end {
            return Ok(());
        }
        Err(Scan::Other)
    }
}

fn field_len(number: u32, len: usize) -> usize {
    key_len(number) + encoded_len_varint(len as u64) + len
}

/// The bytes in front of a content or a payload, assembled on the stack and copied once, since every
/// call has them.
struct Prefix {
    bytes: [u8; 64],
    len: usize,
}

impl Default for Prefix {
    fn default() -> Self {
        Self {
            bytes: [0; 64],
            len: 0,
        }
    }
}

impl Prefix {
    /// The length of a message of `size` bytes, its call id, and the header of the field `number`,
    /// which is the rest of it.
    #[inline]
    fn new(size: usize, id: &CallId, number: u32, len: usize) -> Self {
        let mut prefix = Self::default();
        prefix.varint(size);
        prefix.header(1, id.len());
        prefix.bytes[prefix.len..prefix.len + id.len()].copy_from_slice(id);
        prefix.len += id.len();
        prefix.header(number, len);
        prefix
    }

    /// At most 10 bytes.
    #[inline]
    fn varint(&mut self, mut value: usize) {
        while value >= 0x80 {
            self.byte(value as u8 | 0x80);
            value >>= 7;
        }
        self.byte(value as u8);
    }

    #[inline]
    fn byte(&mut self, byte: u8) {
        self.bytes[self.len] = byte;
        self.len += 1;
    }

    /// The key and length of a field with a number under 16.
    #[inline]
    fn header(&mut self, number: u32, len: usize) {
        debug_assert!(number < 16);
        self.byte((number << 3) as u8 | WireType::LengthDelimited as u8);
        self.varint(len);
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

fn put_header(out: &mut BytesMut, number: u32, len: usize) {
    let mut header = Prefix::default();
    header.header(number, len);
    out.put_slice(header.as_slice());
}

pub(super) fn put_field(out: &mut BytesMut, number: u32, value: &[u8]) {
    put_header(out, number, value.len());
    out.put_slice(value);
}

/// A message whose content is small, and all of it here: `content` is that of the field `number`.
pub(super) fn put_message(out: &mut BytesMut, id: &CallId, number: u32, content: &[u8]) {
    let size = head_len(number, content.len());
    out.put_slice(Prefix::new(size, id, number, content.len()).as_slice());
    out.put_slice(content);
}

/// Length of a message whose field `number` has a content of `len` bytes.
pub(super) fn head_len(number: u32, len: usize) -> usize {
    18 + field_len(number, len)
}

/// A call up to its payload of `len` bytes; with the payload, it must not exceed `limit`.
pub(super) fn put_call(
    out: &mut BytesMut,
    id: &CallId,
    (peer, protocol): (&[u8], &str),
    len: usize,
) {
    let inner = call_len(peer, protocol, len);
    let mut prefix = Prefix::new(head_len(CALL, inner), id, CALL, inner);
    prefix.header(1, peer.len());
    out.put_slice(prefix.as_slice());
    out.put_slice(peer);
    put_field(out, 2, protocol.as_bytes());
    put_header(out, 3, len);
}

/// Length of a CallUnaryRequest.
pub(super) fn call_len(peer: &[u8], protocol: &str, len: usize) -> usize {
    field_len(1, peer.len()) + field_len(2, protocol.len()) + field_len(3, len)
}

/// A reply up to its payload of `len` bytes.
pub(super) fn put_reply(out: &mut BytesMut, direction: Direction, id: &CallId, len: usize) {
    let (number, inner) = (direction.reply(), field_len(1, len));
    let mut prefix = Prefix::new(head_len(number, inner), id, number, inner);
    prefix.header(1, len);
    out.put_slice(prefix.as_slice());
}

/// Length of the message with a reply of `len` bytes.
pub(super) fn reply_len(direction: Direction, len: usize) -> usize {
    head_len(direction.reply(), field_len(1, len))
}

/// A handler's error as a reply, cut to what a message of `limit` bytes can hold.
pub(super) fn put_handler_error(
    out: &mut BytesMut,
    direction: Direction,
    id: &CallId,
    error: &str,
    limit: usize,
) {
    let words = cut(error, limit).as_bytes();
    let (number, inner) = (direction.reply(), field_len(2, words.len()));
    out.put_slice(Prefix::new(head_len(number, inner), id, number, inner).as_slice());
    put_field(out, 2, words);
}

/// As much of an error's text as a message of `limit` bytes can hold.
pub(super) fn cut(words: &str, limit: usize) -> &str {
    let mut end = words.len().min(limit.saturating_sub(64).min(MAX_ERROR));
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    &words[..end]
}

/// Unpredictable call ids: the daemons match replies by the id alone, so a peer that could guess
/// the next ones could take replies that are not for it.
#[derive(Debug)]
pub(super) struct CallIds {
    seed: [u8; 32],
    counter: u64,
    spare: Option<CallId>,
}

impl CallIds {
    /// `seed` must be random, and used for no other connection.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            seed,
            counter: 0,
            spare: None,
        }
    }

    pub fn next(&mut self) -> CallId {
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

/// A hasher for keys that are random already.
#[derive(Debug, Default)]
pub(super) struct IdHasher(u64);

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
