//! The input buffer of a connection.

use crate::socket::Socket;
use std::io::{self, IoSliceMut, Read as _};

/// Size of one read, in bytes: small until a read has filled it.
const FIRST_READ: usize = 4 << 10;
const READ: usize = 256 << 10;
/// Alignment of the buffer: the kernel copies to unaligned addresses at as little as half the speed.
const ALIGN: usize = 4 << 10;

/// An input buffer: the bytes that were read and not yet consumed.
#[derive(Default)]
pub(super) struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Whether a read has filled the buffer.
    was_filled: bool,
}

impl Input {
    /// Starts with these bytes.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            buffer: bytes.to_vec(),
            end: bytes.len(),
            ..Self::default()
        }
    }

    /// Consumes all bytes.
    pub(super) fn take(&mut self) -> &[u8] {
        let start = std::mem::replace(&mut self.start, self.end);
        &self.buffer[start..self.end]
    }

    pub(super) fn peek(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Consumes all but the last `count` bytes.
    pub(super) fn keep(&mut self, count: usize) {
        self.start = self.end - count;
    }

    /// Reads once, into `front` first; returns the number of bytes, which is 0 at the end.
    pub(super) fn fill(&mut self, mut socket: &Socket, front: &mut [u8]) -> io::Result<usize> {
        let wanted = if self.was_filled { READ } else { FIRST_READ };
        let left = self.end - self.start;
        if self.buffer.len() < left + wanted + ALIGN {
            self.buffer.resize(left + wanted + ALIGN, 0);
        }
        let begin = self.buffer.as_ptr().align_offset(ALIGN) % ALIGN;
        self.buffer.copy_within(self.start..self.end, begin);
        (self.start, self.end) = (begin, begin + left);
        let (before, buffer) = (front.len(), &mut self.buffer[self.end..][..wanted]);
        let mut slices = [IoSliceMut::new(front), IoSliceMut::new(buffer)];
        let count = loop {
            let read = match before {
                0 => socket.read(&mut slices[1]),
                _ => socket.read_vectored(&mut slices),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        self.was_filled |= count == before + wanted;
        self.end += count.saturating_sub(before);
        Ok(count)
    }
}
