//! The bytes that were read from a connection.

use crate::socket::Socket;
use std::io::{self, IoSliceMut, Read as _};

/// Size of one read, in bytes: small until a read has filled it.
const FIRST_READ: usize = 4 << 10;
const READ: usize = 256 << 10;
/// Alignment of the place that is read into: the kernel copies to other places at up to half the speed.
const ALIGN: usize = 4 << 10;

/// Bytes that were read and not yet taken.
#[derive(Default)]
pub(super) struct Input {
    room: Vec<u8>,
    start: usize,
    end: usize,
    /// A read filled all the room there was.
    was_filled: bool,
}

impl Input {
    /// Begins with these bytes.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self {
            room: bytes.to_vec(),
            end: bytes.len(),
            ..Self::default()
        }
    }

    /// Takes all of it.
    pub(super) fn take(&mut self) -> &[u8] {
        let start = std::mem::replace(&mut self.start, self.end);
        &self.room[start..self.end]
    }

    pub(super) fn peek(&self) -> &[u8] {
        &self.room[self.start..self.end]
    }

    /// Takes all but the last `count` bytes.
    pub(super) fn keep(&mut self, count: usize) {
        self.start = self.end - count;
    }

    /// Reads once, first into `front`; returns how much, which is nothing at the end.
    pub(super) fn fill(&mut self, mut socket: &Socket, front: &mut [u8]) -> io::Result<usize> {
        let wanted = if self.was_filled { READ } else { FIRST_READ };
        let left = self.end - self.start;
        if self.room.len() < left + wanted + ALIGN {
            self.room.resize(left + wanted + ALIGN, 0);
        }
        let begin = self.room.as_ptr().align_offset(ALIGN) % ALIGN;
        self.room.copy_within(self.start..self.end, begin);
        (self.start, self.end) = (begin, begin + left);
        let (before, room) = (front.len(), &mut self.room[self.end..][..wanted]);
        let mut slices = [IoSliceMut::new(front), IoSliceMut::new(room)];
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
