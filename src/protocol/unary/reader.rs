//! [`Reader`]: splits the input of a persistent connection into messages.

use super::call_id::CallId;
use super::message::{Direction, Head, HeadRef, Message, CALL};
use super::payload::Payload;
use super::scan::{scan, Scan};
use super::skip::Skip;
use crate::command::required;
use crate::fields::Fields;
use crate::{framing, Error};
use bytes::{Bytes, BytesMut};

/// Payloads of at least this many bytes are received directly into their buffer.
pub(super) const DIRECT: usize = 16 * 1024;

/// The buffer for a payload is allocated only after 1/16 of it has arrived, so that a declared
/// length alone costs no memory.
const EARNED: usize = 16;

/// Largest head of a frame, in bytes. With a longer head, the payload is copied.
const MAX_HEAD: usize = 1024;

/// Largest frame buffer that is kept for the next frame, in bytes: the head, and the part of a payload of
/// 4 MiB that arrives before its buffer is allocated.
pub(super) const KEPT_BUFFER: usize = (4 << 20) / EARNED + MAX_HEAD;

/// Largest possible protobuf message, in bytes. A longer message that also exceeds the limit on incoming
/// messages ends the connection.
pub const MAX_PROTOBUF: usize = i32::MAX as usize;

/// Reads messages out of bytes that arrive in pieces of any size.
#[derive(Debug)]
pub(super) struct Reader<P> {
    direction: Direction,
    /// Largest message to receive, in bytes. Larger ones are skipped.
    pub(super) max_incoming: usize,
    /// The beginning of a frame.
    pub(super) buffer: BytesMut,
    body: Body<P>,
}

/// A frame whose head was read and whose rest has not arrived yet.
#[derive(Debug)]
enum Body<P> {
    None,
    Payload(Receiving<P>),
    /// Its bytes are dropped as they arrive.
    Skipped(Box<Skip>),
}

/// A payload that is being received, and the head of its frame.
#[derive(Debug)]
pub struct Receiving<P> {
    head: Head<Bytes, String>,
    payload: P,
    filled: usize,
    len: usize,
}

impl<P: Payload> Receiving<P> {
    /// The part that has not arrived. The driver reads into its beginning.
    pub fn unfilled(&mut self) -> &mut [u8] {
        &mut self.payload.as_mut()[self.filled..self.len]
    }

    /// Notes that `count` bytes were read into [`unfilled`](Self::unfilled).
    pub fn filled(&mut self, count: usize) {
        self.filled = self.len.min(self.filled + count);
    }
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

    /// Returns the next message, and removes its bytes from the front of `input`. `None` if all of `input`
    /// was read and more is needed.
    ///
    /// `wanted` gets the head and the payload of each call and reply that arrives whole and in the usual
    /// layout, and returns the part of the payload to copy. With `None`, a call is dropped, and nothing
    /// of a reply is copied.
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
                    let unfilled = receiving.unfilled();
                    let count = input.len().min(unfilled.len());
                    unfilled[..count].copy_from_slice(&input[..count]);
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
                // Most frames arrive whole, and are not copied.
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
            // Copies only what the frame, or its head, still needs.
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

    /// The unfilled part of the payload that is being received. [`payload_filled`](Self::payload_filled)
    /// must follow.
    pub fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        match &mut self.body {
            Body::Payload(receiving) => Some(receiving.unfilled()),
            _ => None,
        }
    }

    /// Notes that `count` bytes were read into [`payload_buffer`](Self::payload_buffer).
    pub fn payload_filled(&mut self, count: usize) {
        if let Body::Payload(receiving) = &mut self.body {
            receiving.filled(count);
        }
    }

    /// Takes out the payload that is being received. [`resume`](Self::resume) must follow.
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

    /// Inspects the frame at the front of `bytes`.
    fn frame(&self, bytes: &[u8]) -> Result<Frame<P>, Error> {
        let (prefix, len) = match framing::split_length(bytes, self.max_incoming) {
            Ok(Some(split)) => split,
            Ok(None) => return Ok(Frame::Needs(1)),
            Err(error) => return self.oversized(bytes, error),
        };
        // Without a limit on messages, the length can be up to `usize::MAX`.
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

    /// Skips a frame whose length exceeds the limit, or fails if no protobuf message is that large.
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

    /// Reads a whole message; `None` if it is a call that `wanted` dropped.
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
        let id = required(id, name, "callId")?;
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
        Some((_, error)) => Message::HandlerError {
            id,
            error: String::from_utf8_lossy(error).into_owned(),
        },
        None => Message::EmptyReply { id },
    }
}

/// What to do with the frame at the front of the input.
enum Frame<P> {
    /// It is complete: where the message begins and ends.
    Whole { prefix: usize, end: usize },
    /// Its payload has a buffer of its own, which already holds the bytes that have arrived.
    Large(Receiving<P>),
    /// It is too large: all bytes after its length prefix are skipped.
    Skip { prefix: usize, skip: Box<Skip> },
    /// This many more bytes are needed.
    Needs(usize),
}
