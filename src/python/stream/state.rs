//! The locked state of a stream: its socket, its look-ahead data and its unsent output.

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

/// A read of fewer bytes than this fills the look-ahead buffer, and is served from it.
pub const READ_AHEAD: usize = 16 * 1024;

/// A `try_read_exactly` of at least this many bytes receives directly into the object that the caller
/// gets.
pub const LARGE: usize = 64 * 1024;

/// The largest such object that is allocated before its bytes arrive. A peer may have declared the size,
/// and a declared size alone must cost no memory.
const MAX_UNRECEIVED: usize = 128 * 1024 * 1024;

/// How many bytes are read past the end of a large object in the same system call, mostly the header of
/// the next one.
const LOOK_AHEAD: usize = 4 * 1024;

/// How many bytes the first read after a large object takes, so that little of the next large object
/// must be copied.
const AFTER_LARGE: usize = 16 * 1024;

/// How many unread bytes a close keeps, if it keeps them: as many as asyncio buffers.
pub const KEPT: usize = 2 * 64 * 1024;

pub struct State {
    /// `None` once closed.
    pub socket: Option<Socket>,
    /// The look-ahead buffer: received, not yet returned to a caller.
    pub input: BytesMut,
    /// The object of an unfinished or cancelled `try_read_exactly`, and its length. Its bytes precede
    /// `input`, which is empty in the meantime.
    pub large: Option<(BytesBuilder, usize)>,
    /// The most that one read adds to `input`, in bytes.
    pub ahead: usize,
    /// Whether the last `try_receive` filled at least half of its buffer.
    pub bulk: bool,
    /// Accepted by `write`, not yet by the socket. Holds bytes objects, but none of a subclass: dropping
    /// one of those could run Python.
    pub output: Output<PyBackedBytes>,
    /// Whether the last write was partial. The loop then reports when the socket is writable.
    pub blocked: bool,
    pub at_eof: bool,
    /// Closed with `keep_input`: reads return the look-ahead data, then the end of the stream.
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
    /// The separator is beyond the limit, or not found within it. `consumed` is as in asyncio.
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

    /// Returns the exception. Caller must not hold the lock.
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
    /// The state of a new stream. `input` was received before its connection became a stream.
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

    /// Reads once into `input`. Returns false if that would block.
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

    /// Reads once, up to `size` bytes, into a new object.
    pub fn receive<'py>(
        &mut self,
        py: Python<'py>,
        size: usize,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let socket = self.socket()?;
        let received = if self.bulk {
            let mut builder = BytesBuilder::new(py, size)?;
            match socket.read(builder.rest(py)).map_err(StreamError::Broken)? {
                Some(count) => {
                    builder.advance(py, count);
                    Some(builder.finish(py)?)
                }
                None => None,
            }
        } else {
            // Far fewer bytes are likely to arrive, so they are copied into an object of their size.
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

    /// Reads exactly `count` bytes through `input`.
    pub fn read_exactly<'py>(
        &mut self,
        py: Python<'py>,
        count: usize,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let begin = self.input.len();
        while self.input.len() < count && !self.at_eof {
            // A fast sender must not starve the other tasks of the loop.
            if self.input.len() - begin >= READ_BUDGET || !self.fill()? {
                return Ok(None);
            }
        }
        let count = count.min(self.input.len());
        self.take(py, count).map(Some)
    }

    /// Allocates the object of a large read. Returns false if there is no memory for it, or if too few
    /// bytes have arrived to justify it.
    pub fn begin_large(&mut self, py: Python<'_>, count: usize) -> bool {
        if self.at_eof || count > MAX_UNRECEIVED && self.input.len() < MAX_UNRECEIVED {
            return false;
        }
        let Ok(mut builder) = BytesBuilder::new(py, count) else {
            return false;
        };
        builder.push(py, &self.input);
        self.input = BytesMut::new();
        self.large = Some((builder, count));
        true
    }

    /// Reads into the large object. Returns `None` if that would block before it is full.
    pub fn read_large<'py>(
        &mut self,
        py: Python<'py>,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let mut budget = READ_BUDGET;
        while budget > 0 {
            self.socket()?;
            let (Some(socket), Some((builder, _))) = (&self.socket, &mut self.large) else {
                break;
            };
            let input = &mut self.input;
            let wanted = builder.rest(py).len();
            let read = with_scratch(|scratch| {
                let behind = &mut scratch[..LOOK_AHEAD];
                let read = socket.read_both(builder.rest(py), behind)?;
                if let Some(count) = read.filter(|count| *count > wanted) {
                    input.extend_from_slice(&behind[..count - wanted]);
                }
                Ok(read)
            });
            let Some(count) = read.map_err(StreamError::Broken)? else {
                return Ok(None);
            };
            builder.advance(py, count.min(wanted));
            if count >= wanted {
                self.ahead = AFTER_LARGE;
                return match self.large.take() {
                    Some((builder, _)) => Ok(Some(builder.finish(py)?)),
                    None => Ok(None),
                };
            }
            if count == 0 {
                self.at_eof = true;
                self.release_large(py);
                let count = self.input.len();
                return self.take(py, count).map(Some);
            }
            budget = budget.saturating_sub(count);
        }
        Ok(None)
    }

    /// Moves the bytes of an unfinished large object to `input`, for the next read of any kind.
    pub fn release_large(&mut self, py: Python<'_>) {
        if let Some((builder, _)) = self.large.take() {
            self.input.extend_from_slice(builder.filled(py));
        }
    }

    /// Number of bytes received and not yet returned to a caller.
    pub fn received(&self, py: Python<'_>) -> usize {
        let large = self.large.as_ref();
        self.input.len() + large.map_or(0, |(builder, _)| builder.filled(py).len())
    }

    /// Reads until `input` has `limit` bytes, or the socket has no more.
    pub fn prefetch(&mut self, limit: usize) {
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

    /// Writes the unsent output. Returns whether the socket accepted all of it.
    pub fn flush(&mut self) -> StreamResult<bool> {
        self.blocked = false;
        while !self.output.is_empty() && !self.blocked {
            self.write_out(&[])?;
        }
        Ok(self.output.is_empty())
    }

    /// Writes the unsent output, then as much of `bytes` as the socket accepts. Returns how many of
    /// `bytes` were written. Does nothing if the last write was partial.
    pub fn write(&mut self, bytes: &[u8]) -> StreamResult<usize> {
        if self.blocked {
            return Ok(0);
        }
        self.write_out(bytes)
    }

    /// Writes the unsent output and `bytes` in one system call. Returns how many of `bytes` were written.
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
            // Only a small buffer is kept for reuse.
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
        let message = format!("the stream is broken: {error}");
        let broken = errors::made::<BrokenResourceError>(py, &message);
        broken.set_cause(py, Some(errors::os_error(error)));
        broken
    })
}
