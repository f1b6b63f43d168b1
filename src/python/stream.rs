//! A byte stream over a non-blocking socket. Nothing here waits: what cannot be done at once
//! answers `None` (or a count of 0), and `stream.py` waits and tries again.
//!
//! No Python runs while the state is locked. Methods of `Half` report errors as `StreamError`,
//! which `RawStream::with` turns into an exception after it has released the lock: creating one
//! can run Python code (a collection's finalizers, an `__init__`) that uses the same stream.

use super::buffer::with_bytes;
use super::bytes_builder::{self, BytesBuilder, NoMemory};
use super::errors::{self, BrokenResourceError, ClosedResourceError, LimitOverrunError};
use super::socket::{python_address, with_scratch, Socket, READ_SIZE};
use bytes::{Bytes, BytesMut};
use p2pd_protocol::output::Output;
use p2pd_protocol::{self as protocol, framing};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// Reads of less than this fetch more at once and keep the rest, in bytes.
const READ_AHEAD: usize = 16 * 1024;

/// At least as many bytes are received into the object that they are asked for in.
const LARGE: usize = 64 * 1024;

/// For how many bytes such an object has room at first: whoever asks may have been told the number
/// by another peer.
const FIRST_ROOM: usize = 128 * 1024 * 1024;

/// How much is read at the end of a large object of what may follow, in bytes: the head of the
/// next, mostly.
const BEHIND: usize = 4 * 1024;

/// How much is read ahead after a large object, in bytes, lest much of the next takes a detour.
const SHY: usize = 16 * 1024;

/// How much of what has come a close keeps to be read, in bytes: as much as asyncio reads ahead.
const KEPT: usize = 2 * 64 * 1024;

/// How much is read before the event loop gets a turn, in bytes.
const TURN: usize = 2 * 1024 * 1024;

/// The socket of a stream, with what was read ahead and what is still to be written.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawStream {
    pid: u32,
    state: Mutex<Half>,
}

struct Half {
    /// `None` once closed.
    socket: Option<Socket>,
    /// Read, not yet asked for.
    input: BytesMut,
    /// What is read for a `try_read_exactly` of that many bytes, which has not come to its end or
    /// was given up. Before `input`, which is empty meanwhile.
    large: Option<(BytesBuilder, usize)>,
    /// How much is read ahead at the most, in bytes.
    ahead: usize,
    /// The last `try_receive` got much of what it had room for.
    bulk: bool,
    /// Written by `write`, not yet taken by the socket. Holds bytes objects, not of subclasses: to
    /// drop one runs no Python.
    output: Output<PyBackedBytes>,
    /// The socket did not take all of it: it will be ready when it takes more.
    blocked: bool,
    at_eof: bool,
    /// Closed so that what was read ahead can still be read, and then the end.
    readable_to_end: bool,
    write_ended: bool,
    /// Number of reads and writes so far, wrapping.
    operations: u64,
}

/// Why an operation on the locked state failed.
///
/// There is no `From` for `PyErr`, so that `?` cannot create an exception under the lock.
enum StreamError {
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

type StreamResult<T> = Result<T, StreamError>;

impl StreamError {
    fn protocol(error: protocol::Error) -> Self {
        Self::Protocol(Box::new(error))
    }

    /// The exception. Caller must not hold the lock.
    #[cold]
    fn into_exception(self) -> PyErr {
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

impl RawStream {
    /// A stream whose first bytes, `input`, came with what was read before it was one.
    pub fn new(socket: Socket, input: Bytes) -> Self {
        Self {
            pid: super::fork_guard::pid(),
            state: Mutex::new(Half {
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
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Half> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a read or write on the locked state, in the process that the stream belongs to.
    #[inline(always)]
    fn with<T>(&self, operation: impl FnOnce(&mut Half) -> StreamResult<T>) -> PyResult<T> {
        errors::check_fork(self.pid, "stream")?;
        let outcome = {
            let mut half = self.lock();
            half.operations = half.operations.wrapping_add(1);
            operation(&mut half)
        };
        outcome.map_err(StreamError::into_exception)
    }

    /// As `with`; a closed stream is an error even if its end had been reached, unless it was
    /// closed with `keep_input`.
    #[inline(always)]
    fn with_input<T>(&self, read: impl FnOnce(&mut Half) -> StreamResult<T>) -> PyResult<T> {
        self.with(|half| {
            if !half.readable_to_end {
                half.socket()?;
            }
            read(half)
        })
    }

    /// What `look` finds about the socket of an open stream.
    fn look<T>(&self, look: impl FnOnce(&Socket) -> StreamResult<T>) -> PyResult<T> {
        let found = self.lock().socket().and_then(look);
        found.map_err(StreamError::into_exception)
    }

    /// As `look`, for a caller that must not block or fail, such as a callback of the garbage
    /// collector. `None` if the stream is closed or in use.
    fn try_look<T>(&self, look: impl FnOnce(&Socket) -> T) -> Option<T> {
        let half = match self.state.try_lock() {
            Ok(half) => half,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        half.socket.as_ref().map(look)
    }
}

#[pymethods]
impl RawStream {
    /// Up to `max_bytes` bytes; empty at the end of the stream.
    fn try_receive<'py>(
        &self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|half| {
            half.give_up_large(py);
            if half.input.is_empty() && max_bytes >= READ_AHEAD {
                // Nothing was read ahead: what comes goes to the caller without another copy.
                if half.at_eof {
                    return Ok(Some(bytes_builder::bytes(py, b"")?));
                }
                return half.receive(py, max_bytes.min(READ_SIZE));
            }
            if half.input.is_empty() && max_bytes > 0 && !half.fill()? {
                return Ok(None);
            }
            let count = max_bytes.min(half.input.len());
            half.take(py, count).map(Some)
        })
    }

    /// `count` bytes; fewer only at the end of the stream.
    fn try_read_exactly<'py>(
        &self,
        py: Python<'py>,
        count: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|half| {
            if !matches!(half.large, Some((_, wanted)) if wanted == count) {
                half.give_up_large(py);
                if count < half.input.len().saturating_add(LARGE) || !half.begin_large(py, count) {
                    return half.read_exactly(py, count);
                }
            }
            half.read_large(py)
        })
    }

    /// Everything up to and including `separator`; what is left at the end of the stream. More
    /// than `limit` bytes without it are asyncio's LimitOverrunError, and stay; with `eager`, so
    /// are `limit` bytes.
    #[pyo3(signature = (separator, limit, eager = false))]
    fn try_read_until<'py>(
        &self,
        py: Python<'py>,
        separator: &[u8],
        limit: usize,
        eager: bool,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|half| {
            half.give_up_large(py);
            let mut searched = 0;
            loop {
                let found = memchr::memmem::find(&half.input[searched..], separator);
                if let Some(end) = found.map(|at| searched + at + separator.len()) {
                    if end > limit {
                        return Err(StreamError::LimitOverrun {
                            found: true,
                            consumed: end - separator.len(),
                        });
                    }
                    return half.take(py, end).map(Some);
                }
                searched = (half.input.len() + 1).saturating_sub(separator.len());
                if half.input.len() >= limit.saturating_add(usize::from(!eager)) {
                    return Err(StreamError::LimitOverrun {
                        found: false,
                        consumed: searched,
                    });
                }
                if half.at_eof {
                    let count = half.input.len();
                    return half.take(py, count).map(Some);
                }
                if !half.fill()? {
                    return Ok(None);
                }
            }
        })
    }

    /// Puts `data` back, in front of the unread input.
    fn put_back(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        self.with_input(|half| {
            half.give_up_large(py);
            let rest = std::mem::replace(&mut half.input, BytesMut::from(data));
            half.input.extend_from_slice(&rest);
            Ok(())
        })
    }

    /// Bytes received and not read yet.
    #[getter]
    fn read_ahead<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let read_ahead = {
            let mut half = self.lock();
            half.give_up_large(py);
            bytes_builder::bytes(py, &half.input)
        };
        Ok(read_ahead?)
    }

    /// A message of at most `max_bytes` with its length in front. At the end of the stream an
    /// empty tuple; in the middle of a message that is a ConnectionLost.
    fn try_read_frame<'py>(
        &self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<Option<Vec<Bound<'py, PyBytes>>>> {
        self.with_input(|half| {
            half.give_up_large(py);
            loop {
                let frame = framing::split_frame(&mut half.input, max_bytes);
                if let Some(frame) = frame.map_err(StreamError::protocol)? {
                    return Ok(Some(vec![bytes_builder::bytes(py, &frame)?]));
                }
                if half.at_eof {
                    return if half.input.is_empty() {
                        Ok(Some(Vec::new()))
                    } else {
                        Err(StreamError::protocol(protocol::Error::Closed {
                            mid_message: true,
                        }))
                    };
                }
                if !half.fill()? {
                    return Ok(None);
                }
            }
        })
    }

    /// Writes what the socket takes of `data` from `offset` on, after what `write` left over.
    /// Returns how many bytes it took; 0 means that it would block.
    fn try_send(&self, data: &Bound<'_, PyAny>, offset: usize) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|half| {
                half.writable()?;
                if !half.flush()? {
                    return Ok(0);
                }
                let rest = bytes.get(offset..).unwrap_or_default();
                half.socket()?.write(rest).map_err(StreamError::Broken)
            })
        })
    }

    /// Writes `data`; what the socket does not take now is kept and written later, a large bytes
    /// object as it is and anything else as a copy. Returns how many bytes wait.
    fn write(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|half| {
                half.writable()?;
                let written = half.write(bytes)?;
                match data.cast_exact::<PyBytes>() {
                    Ok(object) => half.output.push_shared(object.clone().into(), written),
                    Err(_) => half.output.push_copied(&bytes[written..]),
                }
                Ok(half.output.len())
            })
        })
    }

    /// Keeps a copy of `data` to be written by `flush`. Returns how many bytes wait.
    fn cork(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|half| {
                half.writable()?;
                half.output.push_copied(bytes);
                Ok(half.output.len())
            })
        })
    }

    /// Writes what waits; says how many bytes still do.
    pub fn flush(&self) -> PyResult<usize> {
        self.with(|half| {
            half.flush()?;
            Ok(half.output.len())
        })
    }

    /// How many bytes wait to be written.
    #[getter]
    fn buffered(&self) -> usize {
        self.lock().output.len()
    }

    /// Whether something waits for the socket to take more.
    #[getter]
    fn blocked(&self) -> bool {
        self.lock().blocked
    }

    /// Whether the end was reached and everything before it was read.
    #[getter]
    fn at_eof(&self) -> bool {
        let half = self.lock();
        half.at_eof && half.input.is_empty()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.lock().socket.is_none()
    }

    /// Whether the writing half was ended.
    #[getter]
    fn write_ended(&self) -> bool {
        self.lock().write_ended
    }

    /// Ends the writing half: the other side reads the end of the stream.
    fn shutdown_write(&self) -> PyResult<()> {
        self.with(|half| {
            if !half.write_ended {
                let socket = half.socket()?;
                socket.shutdown_write().map_err(StreamError::Broken)?;
                half.write_ended = true;
            }
            Ok(())
        })
    }

    /// Reads ahead if nothing was, so that `at_eof` knows of an end that has come.
    fn look_ahead(&self, py: Python<'_>) -> PyResult<()> {
        self.with_input(|half| {
            half.give_up_large(py);
            if half.input.is_empty() {
                half.fill()?;
            }
            Ok(())
        })
    }

    /// Closes the socket, in good order or, with `abort`, at once. In a forked child only the
    /// descriptor is closed: the socket is the parent's.
    ///
    /// With `keep_input` it is asyncio's way: what has come, up to a bound, can still be read, and
    /// then the end; and what waits to be written is lost only if the socket does not take it.
    #[pyo3(signature = (*, abort = false, keep_input = false))]
    fn close(&self, py: Python<'_>, abort: bool, keep_input: bool) {
        let mut half = self.lock();
        half.give_up_large(py);
        let forked = super::fork_guard::pid() != self.pid;
        if keep_input && !forked {
            // Whatever this fails at, a close has nobody to tell.
            let _ = half.flush();
            half.keep(KEPT);
        }
        half.output = Output::default();
        let Some(socket) = half.socket.take() else {
            return;
        };
        if keep_input {
            half.at_eof = true;
            half.readable_to_end = true;
        } else {
            half.input.clear();
        }
        if forked {
            drop(socket);
        } else if abort && keep_input {
            // Without the reset, which would take back what was written before.
            socket.end();
        } else if abort {
            socket.abort();
        } else {
            socket.close();
        }
    }

    /// The file descriptor; -1 once the stream is closed.
    fn fileno(&self) -> RawFd {
        let half = self.lock();
        half.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// A new descriptor of the same socket, which the caller has to close.
    fn duplicate(&self) -> PyResult<RawFd> {
        let copy = self.look(|socket| Ok(socket.duplicate()))?;
        Ok(copy.map_err(errors::os_error)?.into_raw_fd())
    }

    /// Number of reads and writes so far.
    #[getter]
    fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Whether the peer has closed both directions, as far as the socket tells; of TCP, which
    /// sends the same FIN for either, whether it has ended its own. False on a closed stream.
    #[getter]
    fn peer_closed(&self) -> bool {
        self.try_look(Socket::peer_closed).unwrap_or(false)
    }

    /// Whether asyncio would no longer watch this socket: it is closed, the peer has ended its
    /// direction, or as much input is unread as asyncio buffers. False while another thread uses
    /// the stream.
    fn is_unwatched(&self, py: Python<'_>) -> bool {
        // The garbage collector calls this: it must not block.
        let half = match self.state.try_lock() {
            Ok(half) => half,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let Some(socket) = &half.socket else {
            return true;
        };
        socket.peer_ended() || half.received(py) + socket.unread() >= KEPT
    }

    /// Number of bytes that were received and not read yet.
    #[getter]
    fn read_ahead_size(&self, py: Python<'_>) -> usize {
        self.lock().received(py)
    }

    /// Reads ahead until `limit` bytes are buffered, by default as many as asyncio buffers.
    /// Returns how many bytes it read. No task may be waiting to read.
    #[pyo3(signature = (limit = KEPT))]
    fn prefetch(&self, py: Python<'_>, limit: usize) -> usize {
        let mut half = self.lock();
        half.give_up_large(py);
        let before = half.input.len();
        // If the connection is gone, the next read by the handler has to report the reason.
        let open = |socket: &Socket| !socket.peer_closed();
        if !half.at_eof && half.socket.as_ref().is_some_and(open) {
            half.keep(limit);
        }
        half.input.len() - before
    }

    /// `"unix"` or `"tcp"`.
    #[getter]
    fn family(&self) -> PyResult<&'static str> {
        self.look(|socket| Ok(if socket.is_unix() { "unix" } else { "tcp" }))
    }

    /// The local end: a path, or `(host, port)`.
    #[getter]
    fn local_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let address = self.look(|socket| Ok(socket.local_address()))?;
        python_address(py, &address.map_err(errors::os_error)?)
    }

    /// The remote end: a path, or `(host, port)`.
    #[getter]
    fn remote_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let address = self.look(|socket| Ok(socket.remote_address()))?;
        python_address(py, &address.map_err(errors::os_error)?)
    }
}

impl Half {
    fn socket(&self) -> StreamResult<&Socket> {
        self.socket.as_ref().ok_or(StreamError::Closed)
    }

    fn writable(&self) -> StreamResult<()> {
        self.socket()?;
        if self.write_ended {
            return Err(StreamError::WriteEnded);
        }
        Ok(())
    }

    /// Reads once into `input`; false if it would block.
    fn fill(&mut self) -> StreamResult<bool> {
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
    fn receive<'py>(
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
    fn read_exactly<'py>(
        &mut self,
        py: Python<'py>,
        count: usize,
    ) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let begin = self.input.len();
        while self.input.len() < count && !self.at_eof {
            // A sender that keeps up must not keep the loop from everything else.
            if self.input.len() - begin >= TURN || !self.fill()? {
                return Ok(None);
            }
        }
        let count = count.min(self.input.len());
        self.take(py, count).map(Some)
    }

    /// Makes room for an object of `count` bytes; false if it is not to be, since there is no
    /// memory or not so much will come.
    fn begin_large(&mut self, py: Python<'_>, count: usize) -> bool {
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
    fn read_large<'py>(&mut self, py: Python<'py>) -> StreamResult<Option<Bound<'py, PyBytes>>> {
        let mut budget = TURN;
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
    fn give_up_large(&mut self, py: Python<'_>) {
        if let Some((room, _)) = self.large.take() {
            self.input.extend_from_slice(room.filled(py));
        }
    }

    /// Number of bytes that were received and not read yet.
    fn received(&self, py: Python<'_>) -> usize {
        let large = self.large.as_ref();
        self.input.len() + large.map_or(0, |(room, _)| room.filled(py).len())
    }

    /// Reads what has come into `input`, up to a bound.
    fn keep(&mut self, limit: usize) {
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
    fn flush(&mut self) -> StreamResult<bool> {
        self.blocked = false;
        while !self.output.is_empty() && !self.blocked {
            self.write_out(&[])?;
        }
        Ok(self.output.is_empty())
    }

    /// Writes what is taken of `bytes` behind what waits. Tries nothing if the socket took less
    /// than all the last time: it says when it takes more.
    fn write(&mut self, bytes: &[u8]) -> StreamResult<usize> {
        if self.blocked {
            return Ok(0);
        }
        self.write_out(bytes)
    }

    /// Writes once: what waits, and `bytes`. Returns how many of `bytes` were written.
    fn write_out(&mut self, bytes: &[u8]) -> StreamResult<usize> {
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

    fn take<'py>(&mut self, py: Python<'py>, count: usize) -> StreamResult<Bound<'py, PyBytes>> {
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
