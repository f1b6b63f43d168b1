//! Encodes the messages of a persistent connection, up to their payloads.

use super::call_id::CallId;
use super::message::{Direction, CALL, CANCEL};
use crate::Error;
use bytes::{BufMut, BytesMut};
use prost::encoding::{encoded_len_varint, key_len, WireType};

/// Largest error message that is sent, in bytes.
const MAX_ERROR: usize = 16 * 1024;

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

fn field_len(number: u32, len: usize) -> usize {
    key_len(number) + encoded_len_varint(len as u64) + len
}

/// The bytes before a content or a payload. Assembled on the stack and copied once, since every call
/// needs them.
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
    /// Starts a message of `size` bytes: its length, the call id, and the header of the field `number`,
    /// whose `len` bytes are the rest of the message.
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

    /// Appends a varint, of at most 10 bytes.
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

    /// Appends the key and length of a field with a number under 16.
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

/// Appends a whole message, whose field `number` has the given small `content`.
pub(super) fn put_message(out: &mut BytesMut, id: &CallId, number: u32, content: &[u8]) {
    let size = head_len(number, content.len());
    out.put_slice(Prefix::new(size, id, number, content.len()).as_slice());
    out.put_slice(content);
}

/// Length of a message whose field `number` has a content of `len` bytes.
pub(super) fn head_len(number: u32, len: usize) -> usize {
    18 + field_len(number, len)
}

/// Appends a call up to its payload of `len` bytes. The caller must have checked its size.
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

/// Appends a reply up to its payload of `len` bytes.
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

/// Appends a handler's error as a reply, truncated to fit a message of `limit` bytes.
pub(super) fn put_handler_error(
    out: &mut BytesMut,
    direction: Direction,
    id: &CallId,
    error: &str,
    limit: usize,
) {
    let error = cut(error, limit).as_bytes();
    let (number, inner) = (direction.reply(), field_len(2, error.len()));
    out.put_slice(Prefix::new(head_len(number, inner), id, number, inner).as_slice());
    put_field(out, 2, error);
}

/// Truncates an error message to fit a message of `limit` bytes.
pub(super) fn cut(error: &str, limit: usize) -> &str {
    let mut end = error.len().min(limit.saturating_sub(64).min(MAX_ERROR));
    while !error.is_char_boundary(end) {
        end -= 1;
    }
    &error[..end]
}
