//! Skips frames that are too large: drops their bytes as they arrive, but keeps the call id.

use super::call_id::CallId;
use super::message::Direction;
use crate::Error;

/// A frame that is being skipped.
///
/// Reads the fields of the message in pieces of any size, but stores only the call id. It therefore finds
/// the id anywhere in the message, in bounded memory.
#[derive(Debug)]
pub(super) struct Skip {
    /// Reason why it is skipped.
    pub error: Error,
    direction: Direction,
    /// Number of bytes of the frame that have not arrived yet.
    left: usize,
    reading: Reading,
    /// The varint that is being read: its value so far, and the number of bits read.
    varint: u64,
    bits: u32,
    /// Number of the field whose length is being read.
    field: u64,
    /// Number of groups that enclose the current field.
    depth: usize,
    id: [u8; 16],
    has_id: bool,
    content: Option<u64>,
}

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    Key,
    Varint,
    Length,
    /// A value of which this many bytes are left.
    Value(u64),
    /// The call id, of which this many bytes were read.
    Id(usize),
    /// The rest of the message is malformed.
    Malformed,
}

impl Skip {
    /// Skips a message of `size` bytes.
    pub fn new(size: usize, direction: Direction, error: Error) -> Self {
        Self {
            error,
            direction,
            left: size,
            reading: Reading::Key,
            varint: 0,
            bits: 0,
            field: 0,
            depth: 0,
            id: [0; 16],
            has_id: false,
            content: None,
        }
    }

    /// Removes the bytes of the frame from the front of `input`.
    pub fn take(&mut self, input: &mut &[u8]) {
        let (mut bytes, rest) = input.split_at(self.left.min(input.len()));
        *input = rest;
        self.left -= bytes.len();
        while let Some(&first) = bytes.first() {
            let taken = match self.reading {
                Reading::Malformed => return,
                Reading::Value(left) => {
                    let count = usize::try_from(left).map_or(bytes.len(), |n| n.min(bytes.len()));
                    self.value(left - count as u64);
                    count
                }
                Reading::Id(filled) => {
                    let count = bytes.len().min(self.id.len() - filled);
                    self.id[filled..filled + count].copy_from_slice(&bytes[..count]);
                    self.has_id = filled + count == self.id.len();
                    self.reading = if self.has_id {
                        Reading::Key
                    } else {
                        Reading::Id(filled + count)
                    };
                    count
                }
                Reading::Key | Reading::Varint | Reading::Length => {
                    self.varint_byte(first);
                    1
                }
            };
            bytes = &bytes[taken..];
        }
    }

    /// Whether the whole frame was read.
    pub fn is_over(&self) -> bool {
        self.left == 0
    }

    /// The call id, if one was found.
    pub fn call_id(&self) -> Option<CallId> {
        self.has_id.then_some(self.id)
    }

    /// Number of the last field that determines the kind of message.
    pub fn content(&self) -> Option<u64> {
        self.content
    }

    /// Whether all fields were well-formed.
    pub fn is_sound(&self) -> bool {
        self.reading == Reading::Key && self.bits == 0 && self.depth == 0
    }

    fn varint_byte(&mut self, byte: u8) {
        let part = u64::from(byte & 0x7f);
        // The tenth byte may hold only one more bit.
        if self.bits > 63 || (self.bits == 63 && part > 1) {
            self.reading = Reading::Malformed;
            return;
        }
        self.varint |= part << self.bits;
        self.bits += 7;
        if byte < 0x80 {
            let number = std::mem::take(&mut self.varint);
            self.bits = 0;
            self.on_varint(number);
        }
    }

    fn on_varint(&mut self, number: u64) {
        match self.reading {
            Reading::Key => {
                self.field = number >> 3;
                self.reading = match number & 7 {
                    0 => Reading::Varint,
                    1 => Reading::Value(8),
                    2 => Reading::Length,
                    3 => {
                        self.depth += 1;
                        Reading::Key
                    }
                    4 if self.depth > 0 => {
                        self.depth -= 1;
                        Reading::Key
                    }
                    5 => Reading::Value(4),
                    _ => Reading::Malformed,
                };
            }
            Reading::Length => match self.field {
                1 if self.depth == 0 => {
                    self.has_id = false;
                    if number == 16 {
                        self.reading = Reading::Id(0);
                    } else {
                        self.value(number);
                    }
                }
                field => {
                    if self.depth == 0 && self.direction.is_content(field) {
                        self.content = Some(field);
                    }
                    self.value(number);
                }
            },
            _ => self.reading = Reading::Key,
        }
    }

    /// Continues with a value of which this many bytes are left.
    fn value(&mut self, left: u64) {
        self.reading = if left == 0 {
            Reading::Key
        } else {
            Reading::Value(left)
        };
    }
}
