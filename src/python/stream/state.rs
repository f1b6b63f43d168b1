//! The locked state of a stream: its socket, what was read ahead, and what waits to be written.

use crate::bytes_builder::{self, BytesBuilder, NoMemory};
use crate::channel::READ_BUDGET;
use crate::errors::{self, BrokenResourceError, ClosedResourceError, LimitOverrunError};
use crate::socket::{with_scratch, Socket, READ_SIZE};
use bytes::{Bytes, BytesMut};
use p2pd_protocol as protocol;
use p2pd_protocol::output::Output;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::io::{self, IoSlice};

/// Reads of less than this fetch more at once and keep the rest, in bytes.
pub const READ_AHEAD: usize = 16 * 1024;

/// At least as many bytes are received into the object that they are asked for in.
pub const LARGE: usize = 64 * 1024;

/// For how many bytes such an object has room at first: whoever asks may have been told the number
/// by another peer.
const FIRST_ROOM: usize = 128 * 1024 * 1024;

/// How much is read at the end of a large object of what may follow, in bytes: the head of the
/// next, mostly.
const BEHIND: usize = 4 * 1024;

/// How much is read ahead after a large object, in bytes, lest much of the next takes a detour.
const SHY: usize = 16 * 1024;

/// How much of what has come a close keeps to be read, in bytes: as much as asyncio reads ahead.
pub const KEPT: usize = 2 * 64 * 1024;

pub struct State {
    /// `None` once closed.
    pub socket: Option<Socket>,
    /// Read, not yet asked for.
    pub input: BytesMut,
    /// What is read for a `try_read_exactly` of that many bytes, which has not come to its end or
    /// was given up. Before `input`, which is empty meanwhile.
    pub large: Option<(BytesBuilder, usize)>,
    /// How much is read ahead at the most, in bytes.
    pub ahead: usize,
    /// The last `try_receive` got much of what it had room for.
    pub bulk: bool,
    /// Written by `write`, not yet taken by the socket. Holds bytes objects, not of subclasses: to
    /// drop one runs no Python.
    pub output: Output<PyBackedBytes>,
    /// The socket did not take all of it: it will be ready when it takes more.
    pub blocked: bool,
    pub at_eof: bool,
    /// Closed so that what was read ahead can still be read, and then the end.
    pub readable_to_end: bool,
    pub write_ended: bool,
    /// Number of reads and writes so far, wrapping.
    pub operations: u64,
}

/// Why an operation on the locked state failed.
///
/// There is no `From` for `PyErr`, so that `?` cannot create an exception under the lock.
pub enum StreamError {
    Closed,
    WriteEnded,
    Broken(io::Error),
    /// Boxed, so that results are small.
    Protocol(Box<protocol::Error>),
    /// No separator within the limit, or only beyond it; `consumed` is as in asyncio.
    LimitOverrun {
        found: bool,
        consumed: usize,
    },
    NoMemory(NoMemory),
}

pub type StreamResult<T> = Result<T, StreamError>;

impl StreamError {
    pub fn protocol(error: protocol::Error) -> Self {
        Self::Protocol(Box::new(error))
    }

    /// The exception. Caller must not hold the lock.
    #[cold]
    pub fn into_exception(self) -> PyErr {
        match self {
            Self::Closed => ClosedResourceError::new_err("the stream is closed"),
            Self::WriteEnded => {
                ClosedResourceError::new_err("the writing half of the stream is closed")
            }
            Self::Broken(error) => broken(error),
            Self::Protocol(error) => errors::from_core(*error),
            Self::LimitOverrun { found, consumed } => LimitOverrunError::new_err((
                if found {
                    "the separator was found, but beyond the limit"
                } else {
                    "the separator was not found within the limit"
                },
                consumed,
            )),
            Self::NoMemory(error) => error.into(),
        }
    }
}

impl From<NoMemory> for StreamError {
    fn from(error: NoMemory) -> Self {
        Self::NoMemory(error)
    }
}

impl State {
    /// The state of a stream whose first bytes, `input`, came with what was read before it was one.
    pub fn new(socket: Socket, input: Bytes) -> Self {
        Self {
            socket: Some(socket),
            input: BytesMut::from(input),
            large: None,
            ahead: READ_SIZE,
            bulk: false,
            output: Output::default(),
            blocked: false,
            at_eof: false,
            readable_to_end: false,
            write_ended: false,
            operations: 0,
        }
    }

    pub fn socket(&self) -> StreamResult<&Socket> {
        self.socket.as_ref().ok_or(StreamError::Closed)
    }

    pub fn writable(&self) -> StreamResult<()> {
        self.socket()?;
        if self.write_ended {
            return Err(StreamError::WriteEnded);
        }
        Ok(())
    }

    /// Reads once into `input`; false if it would block.
    pub fn fill(&mut self) -> StreamResult<bool> {
        if self.at_eof {
            return Ok(true);
        }
        self.socket()?;
        let Self { socket, input, .. } = self;
        let socket = socket.as_ref().expect("checked above");
        let read = socket.read_with(self.ahead, |bytes| {
            input.extend_from_slice(bytes);
            bytes.len()
        });
        let read = read.map_err(StreamError::Broken)?;
        self.at_eof |= read == Some(0);
        if read == Some(self.ahead) {
            self.ahead = READ_SIZE.min(2 * self.ahead);
        }
        Ok(read.is_some())
    }

    /// Reads once, up to `size` bytes, for a caller.
    pub fn receive<'py>(
        &mut self,
        py: Python<'py>,
        size: usize,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let socket = self.socket()?;
        let received = if self.bulk {
            let mut room = BytesBuilder::new(py, size)?;
            match socket.read(room.rest(py)).map_err(StreamError::Broken)? {
                Some(count) => {
                    room.advance(py, count);
                    Some(room.finish(py)?)
                }
                None => None,
            }
        } else {
            // What comes is likely to be much less, and is copied to an object of its size.
            let read = socket.read_with(size, |bytes| bytes_builder::bytes(py, bytes));
            read.map_err(StreamError::Broken)?.transpose()?
        };
        if let Some(bytes) = &received {
            let count = bytes.as_bytes().len();
            self.at_eof = count == 0;
            self.bulk = count >= size / 2;
        }
        Ok(received)
    }

    /// As `try_read_exactly`, by way of `input`.
    pub fn read_exactly<'py>(
        &mut self,
        py: Python<'py>,
        count: usize,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let begin = self.input.len();
        while self.input.len() < count && !self.at_eof {
            // A sender that keeps up must not keep the loop from everything else.
            if self.input.len() - begin >= READ_BUDGET || !self.fill()? {
                return Ok(None);
            }
        }
        let count = count.min(self.input.len());
        self.take(py, count).map(Some)
    }

    /// Makes room for an object of `count` bytes; false if it is not to be, since there is no
    /// memory or not so much will come.
    pub fn begin_large(&mut self, py: Python<'_>, count: usize) -> bool {
        if self.at_eof || count > FIRST_ROOM && self.input.len() < FIRST_ROOM {
            // Of what was announced, so much must have come before there is room for all of it.
            return false;
        }
        let Ok(mut room) = BytesBuilder::new(py, count) else {
            return false;
        };
        room.push(py, &self.input);
        self.input = BytesMut::new();
        self.large = Some((room, count));
        true
    }

    /// Reads into the large object; `None` if that would block before it is whole.
    pub fn read_large<'py>(
        &mut self,
        py: Python<'py>,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let mut budget = READ_BUDGET;
        while budget > 0 {
            self.socket()?;
            let (Some(socket), Some((room, _))) = (&self.socket, &mut self.large) else {
                break;
            };
            let input = &mut self.input;
            let wanted = room.rest(py).len();
            let read = with_scratch(|scratch| {
                let behind = &mut scratch[..BEHIND];
                let read = socket.read_both(room.rest(py), behind)?;
                if let Some(count) = read.filter(|count| *count > wanted) {
                    input.extend_from_slice(&behind[..count - wanted]);
                }
                Ok(read)
            });
            let Some(count) = read.map_err(StreamError::Broken)? else {
                return Ok(None);
            };
            room.advance(py, count.min(wanted));
            if count >= wanted {
                self.ahead = SHY;
                return match self.large.take() {
                    Some((room, _)) => Ok(Some(room.finish(py)?)),
                    None => Ok(None),
                };
            }
            if count == 0 {
                self.at_eof = true;
                self.give_up_large(py);
                let count = self.input.len();
                return self.take(py, count).map(Some);
            }
            budget = budget.saturating_sub(count);
        }
        Ok(None)
    }

    /// Has what was read for a large object be read by whatever comes next.
    pub fn give_up_large(&mut self, py: Python<'_>) {
        if let Some((room, _)) = self.large.take() {
            self.input.extend_from_slice(room.filled(py));
        }
    }

    /// Number of bytes that were received and not read yet.
    pub fn received(&self, py: Python<'_>) -> usize {
        let large = self.large.as_ref();
        self.input.len() + large.map_or(0, |(room, _)| room.filled(py).len())
    }

    /// Reads what has come into `input`, up to a bound.
    pub fn keep(&mut self, limit: usize) {
        let Self { socket, input, .. } = self;
        while let (Some(socket), true) = (socket.as_ref(), input.len() < limit) {
            let read = socket.read_with(limit - input.len(), |bytes| {
                input.extend_from_slice(bytes);
                bytes.len()
            });
            if !matches!(read, Ok(Some(1..))) {
                break;
            }
        }
    }

    /// Writes what `write` left over; false if some is left still.
    pub fn flush(&mut self) -> StreamResult<bool> {
        self.blocked = false;
        while !self.output.is_empty() && !self.blocked {
            self.write_out(&[])?;
        }
        Ok(self.output.is_empty())
    }

    /// Writes what is taken of `bytes` behind what waits. Tries nothing if the socket took less
    /// than all the last time: it says when it takes more.
    pub fn write(&mut self, bytes: &[u8]) -> StreamResult<usize> {
        if self.blocked {
            return Ok(0);
        }
        self.write_out(bytes)
    }

    /// Writes once: what waits, and `bytes`. Returns how many of `bytes` were written.
    pub fn write_out(&mut self, bytes: &[u8]) -> StreamResult<usize> {
        let socket = self.socket()?;
        let (offered, sent) = if self.output.is_empty() {
            (bytes.len(), socket.write(bytes))
        } else {
            let mut slices = self.output.slices();
            let mut offered = slices.iter().map(|slice| slice.len()).sum();
            if offered == self.output.len() && !bytes.is_empty() {
                offered += bytes.len();
                slices.push(IoSlice::new(bytes));
            }
            (offered, socket.write_vectored(&slices))
        };
        let sent = sent.map_err(StreamError::Broken)?;
        self.blocked = sent < offered;
        let waiting = self.output.len();
        self.output.sent(sent);
        Ok(sent.saturating_sub(waiting))
    }

    pub fn take<'py>(
        &mut self,
        py: Python<'py>,
        count: usize,
    ) -> StreamResult<Bound<'py, PyBytes>> {
        let bytes = bytes_builder::bytes(py, &self.input[..count])?;
        if count == self.input.len() {
            // A large buffer is given back; a small one is used again.
            if self.input.capacity() > READ_SIZE {
                self.input = BytesMut::new();
            } else {
                self.input.clear();
            }
        } else {
            let _ = self.input.split_to(count);
        }
        Ok(bytes)
    }
}

fn broken(error: io::Error) -> PyErr {
    Python::attach(|py| {
        let words = format!("the stream is broken: {error}");
        let broken = errors::made::<BrokenResourceError>(py, &words);
        broken.set_cause(py, Some(errors::os_error(error)));
        broken
    })
}
