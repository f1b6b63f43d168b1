//! A byte stream over a non-blocking socket. Nothing here waits: an operation that would block returns
//! `None` (or a count of 0), and `stream.py` waits and tries again.
//!
//! No Python runs while the state is locked. `State` reports errors as `StreamError`, which
//! `RawStream::with` turns into an exception after it has released the lock: creating an exception can
//! run Python code (a finalizer, an `__init__`) that uses the same stream.

mod state;

use super::buffer::with_bytes;
use super::bytes_builder;
use super::errors;
use super::socket::{python_address, Socket, READ_SIZE};
use bytes::{Bytes, BytesMut};
use p2pd_protocol::output::Output;
use p2pd_protocol::{self as protocol, framing};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use state::{State, StreamError, StreamResult, KEPT, LARGE, READ_AHEAD};
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

/// A stream: its socket, its look-ahead data and its unsent output.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawStream {
    pid: u32,
    state: Mutex<State>,
}

impl RawStream {
    /// A new stream. `input` was received before its connection became a stream.
    pub fn new(socket: Socket, input: Bytes) -> Self {
        Self {
            pid: super::fork_guard::pid(),
            state: Mutex::new(State::new(socket, input)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a read or write on the locked state. Raises in a forked child.
    #[inline(always)]
    fn with<T>(&self, operation: impl FnOnce(&mut State) -> StreamResult<T>) -> PyResult<T> {
        errors::check_fork(self.pid, "stream")?;
        let outcome = {
            let mut state = self.lock();
            state.operations = state.operations.wrapping_add(1);
            operation(&mut state)
        };
        outcome.map_err(StreamError::into_exception)
    }

    /// Like `with`, for a read. A closed stream is an error, unless it was closed with `keep_input`.
    #[inline(always)]
    fn with_input<T>(&self, read: impl FnOnce(&mut State) -> StreamResult<T>) -> PyResult<T> {
        self.with(|state| {
            if !state.readable_to_end {
                state.socket()?;
            }
            read(state)
        })
    }

    /// Calls `look` on the socket of an open stream, and returns its result.
    fn look<T>(&self, look: impl FnOnce(&Socket) -> StreamResult<T>) -> PyResult<T> {
        let found = self.lock().socket().and_then(look);
        found.map_err(StreamError::into_exception)
    }

    /// Like `lock`, for callers that must not block, such as callbacks of the garbage collector.
    /// Returns `None` if another thread uses the stream.
    fn try_lock(&self) -> Option<MutexGuard<'_, State>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[pymethods]
impl RawStream {
    /// Returns up to `max_bytes` bytes; none at the end of the stream.
    fn try_receive<'py>(
        &self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|state| {
            state.release_large(py);
            if state.input.is_empty() && max_bytes >= READ_AHEAD {
                // There is no look-ahead data, so the data is received directly into the object that the
                // caller gets.
                if state.at_eof {
                    return Ok(Some(bytes_builder::bytes(py, b"")?));
                }
                return state.receive(py, max_bytes.min(READ_SIZE));
            }
            if state.input.is_empty() && max_bytes > 0 && !state.fill()? {
                return Ok(None);
            }
            let count = max_bytes.min(state.input.len());
            state.take(py, count).map(Some)
        })
    }

    /// Returns `count` bytes; fewer only at the end of the stream.
    fn try_read_exactly<'py>(
        &self,
        py: Python<'py>,
        count: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|state| {
            if !matches!(state.large, Some((_, wanted)) if wanted == count) {
                state.release_large(py);
                if count < state.input.len().saturating_add(LARGE) || !state.begin_large(py, count)
                {
                    return state.read_exactly(py, count);
                }
            }
            state.read_large(py)
        })
    }

    /// Returns everything up to and including `separator`, or up to the end of the stream. If more than
    /// `limit` bytes arrive without the separator, keeps the input and raises asyncio's
    /// LimitOverrunError; with `eager`, already at `limit` bytes.
    #[pyo3(signature = (separator, limit, eager = false))]
    fn try_read_until<'py>(
        &self,
        py: Python<'py>,
        separator: &[u8],
        limit: usize,
        eager: bool,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        self.with_input(|state| {
            state.release_large(py);
            let mut searched = 0;
            loop {
                let found = memchr::memmem::find(&state.input[searched..], separator);
                if let Some(end) = found.map(|at| searched + at + separator.len()) {
                    if end > limit {
                        return Err(StreamError::LimitOverrun {
                            found: true,
                            consumed: end - separator.len(),
                        });
                    }
                    return state.take(py, end).map(Some);
                }
                searched = (state.input.len() + 1).saturating_sub(separator.len());
                if state.input.len() >= limit.saturating_add(usize::from(!eager)) {
                    return Err(StreamError::LimitOverrun {
                        found: false,
                        consumed: searched,
                    });
                }
                if state.at_eof {
                    let count = state.input.len();
                    return state.take(py, count).map(Some);
                }
                if !state.fill()? {
                    return Ok(None);
                }
            }
        })
    }

    /// Puts `data` back in front of the unread input.
    fn put_back(&self, py: Python<'_>, data: &[u8]) -> PyResult<()> {
        self.with_input(|state| {
            state.release_large(py);
            let rest = std::mem::replace(&mut state.input, BytesMut::from(data));
            state.input.extend_from_slice(&rest);
            Ok(())
        })
    }

    /// The look-ahead data: received, not yet read.
    #[getter]
    fn read_ahead<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let read_ahead = {
            let mut state = self.lock();
            state.release_large(py);
            bytes_builder::bytes(py, &state.input)
        };
        Ok(read_ahead?)
    }

    /// Returns a list with the next length-prefixed message, of at most `max_bytes`; an empty list at
    /// the end of the stream. Raises ConnectionLost if the stream ends within a message.
    fn try_read_frame<'py>(
        &self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<Option<Vec<Bound<'py, PyBytes>>>> {
        self.with_input(|state| {
            state.release_large(py);
            loop {
                let frame = framing::split_frame(&mut state.input, max_bytes);
                if let Some(frame) = frame.map_err(StreamError::protocol)? {
                    return Ok(Some(vec![bytes_builder::bytes(py, &frame)?]));
                }
                if state.at_eof {
                    return if state.input.is_empty() {
                        Ok(Some(Vec::new()))
                    } else {
                        Err(StreamError::protocol(protocol::Error::Closed {
                            mid_message: true,
                        }))
                    };
                }
                if !state.fill()? {
                    return Ok(None);
                }
            }
        })
    }

    /// Writes the unsent output, then as much of `data` from `offset` on as the socket accepts. Returns
    /// how many bytes of `data` it accepted; 0 if it would block.
    fn try_send(&self, data: &Bound<'_, PyAny>, offset: usize) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|state| {
                state.writable()?;
                if !state.flush()? {
                    return Ok(0);
                }
                let rest = bytes.get(offset..).unwrap_or_default();
                state.socket()?.write(rest).map_err(StreamError::Broken)
            })
        })
    }

    /// Writes `data`, and keeps the part that the socket does not accept. Copies that part, unless
    /// `data` is a large bytes object. Returns how many bytes are unsent.
    fn write(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|state| {
                state.writable()?;
                let written = state.write(bytes)?;
                match data.cast_exact::<PyBytes>() {
                    Ok(object) => state.output.push_shared(object.clone().into(), written),
                    Err(_) => state.output.push_copied(&bytes[written..]),
                }
                Ok(state.output.len())
            })
        })
    }

    /// Keeps a copy of `data` for the next `flush`. Returns how many bytes are unsent.
    fn cork(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            self.with(|state| {
                state.writable()?;
                state.output.push_copied(bytes);
                Ok(state.output.len())
            })
        })
    }

    /// Writes the unsent output. Returns how many bytes of it are left.
    pub fn flush(&self) -> PyResult<usize> {
        self.with(|state| {
            state.flush()?;
            Ok(state.output.len())
        })
    }

    /// Number of unsent bytes.
    #[getter]
    fn buffered(&self) -> usize {
        self.lock().output.len()
    }

    /// Whether the last write was partial.
    #[getter]
    fn blocked(&self) -> bool {
        self.lock().blocked
    }

    /// Whether the end of the stream was reached, and everything before it was read.
    #[getter]
    fn at_eof(&self) -> bool {
        let state = self.lock();
        state.at_eof && state.input.is_empty()
    }

    #[getter]
    fn closed(&self) -> bool {
        self.lock().socket.is_none()
    }

    /// Whether the writing half was closed.
    #[getter]
    fn write_ended(&self) -> bool {
        self.lock().write_ended
    }

    /// Closes the writing half, so that the other side reads the end of the stream.
    fn shutdown_write(&self) -> PyResult<()> {
        self.with(|state| {
            if !state.write_ended {
                let socket = state.socket()?;
                socket.shutdown_write().map_err(StreamError::Broken)?;
                state.write_ended = true;
            }
            Ok(())
        })
    }

    /// Reads if there is no look-ahead data. If the end of the stream has arrived, `at_eof` is true
    /// afterwards.
    fn look_ahead(&self, py: Python<'_>) -> PyResult<()> {
        self.with_input(|state| {
            state.release_large(py);
            if state.input.is_empty() {
                state.fill()?;
            }
            Ok(())
        })
    }

    /// Closes the socket gracefully or, with `abort`, at once. In a forked child only the descriptor is
    /// closed, since the socket belongs to the parent.
    ///
    /// `keep_input` closes as asyncio does: unsent output is written if the socket accepts it, and input
    /// that has arrived, up to a limit, can still be read.
    #[pyo3(signature = (abort = false, keep_input = false))]
    fn close(&self, py: Python<'_>, abort: bool, keep_input: bool) {
        let mut state = self.lock();
        state.release_large(py);
        let forked = super::fork_guard::pid() != self.pid;
        if keep_input && !forked {
            // A close does not report errors.
            let _ = state.flush();
            state.prefetch(KEPT);
        }
        state.output = Output::default();
        let Some(socket) = state.socket.take() else {
            return;
        };
        if keep_input {
            state.at_eof = true;
            state.readable_to_end = true;
        } else {
            state.input.clear();
        }
        if forked {
            drop(socket);
        } else if abort && keep_input {
            // Not `abort`: a reset would discard the data sent last.
            socket.end();
        } else if abort {
            socket.abort();
        } else {
            socket.close();
        }
    }

    /// The file descriptor, or -1 if the stream is closed.
    fn fileno(&self) -> RawFd {
        let state = self.lock();
        state.socket.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Returns a duplicate of the descriptor. The caller must close it.
    fn duplicate(&self) -> PyResult<RawFd> {
        let copy = self.look(|socket| Ok(socket.duplicate()))?;
        Ok(copy.map_err(errors::os_error)?.into_raw_fd())
    }

    /// Number of reads and writes so far.
    #[getter]
    fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Whether the peer has closed both directions. TCP sends the same FIN for a half-close, which
    /// counts too. False if the stream is closed.
    #[getter]
    fn peer_closed(&self) -> bool {
        let state = self.try_lock();
        let socket = state.as_ref().and_then(|state| state.socket.as_ref());
        socket.is_some_and(Socket::peer_closed)
    }

    /// Whether asyncio would not watch this socket: it is closed, the peer has shut its writing half
    /// down, or the unread input has reached the size that asyncio buffers. False while another thread
    /// uses the stream.
    fn is_unwatched(&self, py: Python<'_>) -> bool {
        let Some(state) = self.try_lock() else {
            return false;
        };
        let Some(socket) = &state.socket else {
            return true;
        };
        socket.peer_ended() || state.received(py) + socket.unread() >= KEPT
    }

    /// Number of bytes received and not read yet.
    #[getter]
    fn read_ahead_size(&self, py: Python<'_>) -> usize {
        self.lock().received(py)
    }

    /// Reads until `limit` bytes are buffered, by default as many as asyncio buffers. Returns how many
    /// bytes it read. No task may be waiting to read.
    #[pyo3(signature = (limit = KEPT))]
    fn prefetch(&self, py: Python<'_>, limit: usize) -> usize {
        let mut state = self.lock();
        state.release_large(py);
        let before = state.input.len();
        // Not on a broken connection, where the handler's next read must report the reason.
        let open = |socket: &Socket| !socket.peer_closed();
        if !state.at_eof && state.socket.as_ref().is_some_and(open) {
            state.prefetch(limit);
        }
        state.input.len() - before
    }

    /// `"unix"` or `"tcp"`.
    #[getter]
    fn family(&self) -> PyResult<&'static str> {
        self.look(|socket| Ok(if socket.is_unix() { "unix" } else { "tcp" }))
    }

    /// The local address: a path, or `(host, port)`.
    #[getter]
    fn local_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let address = self.look(|socket| Ok(socket.local_address()))?;
        python_address(py, &address.map_err(errors::os_error)?)
    }

    /// The remote address: a path, or `(host, port)`.
    #[getter]
    fn remote_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let address = self.look(|socket| Ok(socket.remote_address()))?;
        python_address(py, &address.map_err(errors::os_error)?)
    }
}
