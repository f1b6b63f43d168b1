//! A byte stream over a non-blocking socket. Nothing here waits: what cannot be done at once
//! answers `None` (or a count of 0), and `streams.py` waits and tries again.

use super::convert::with_bytes;
use super::errors::{self, BrokenResourceError, ClosedResourceError, LimitOverrunError};
use super::socket::{Socket, READ_SIZE};
use crate::core::framing;
use bytes::{Bytes, BytesMut};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Reads of less than this fetch more at once and keep the rest, in bytes.
const READ_AHEAD: usize = 16 * 1024;

/// How much of what has come a close keeps to be read, in bytes: as much as asyncio reads ahead.
const KEPT: usize = 2 * 64 * 1024;

/// How much is read before the event loop gets a turn, in bytes.
const TURN: usize = 2 * 1024 * 1024;

/// The socket of a stream, with what was read ahead and what is still to be written.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct RawStream {
    fd: RawFd,
    pid: u32,
    state: Mutex<Half>,
}

struct Half {
    /// `None` once closed.
    socket: Option<Socket>,
    /// Read, not yet asked for.
    input: BytesMut,
    /// Written by `write`, not yet taken by the socket.
    output: BytesMut,
    at_eof: bool,
    /// Closed so that what was read ahead can still be read, and then the end.
    readable_to_end: bool,
    write_ended: bool,
}

impl RawStream {
    /// A stream whose first bytes, `input`, came with what was read before it was one.
    pub fn new(socket: Socket, input: Bytes) -> Self {
        Self {
            fd: socket.as_raw_fd(),
            pid: std::process::id(),
            state: Mutex::new(Half {
                socket: Some(socket),
                input: BytesMut::from(input),
                output: BytesMut::new(),
                at_eof: false,
                readable_to_end: false,
                write_ended: false,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Half> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, for use in the process that the stream belongs to.
    fn open(&self) -> PyResult<MutexGuard<'_, Half>> {
        errors::check_fork(self.pid, "stream")?;
        Ok(self.lock())
    }

    /// As `open`; a closed stream is an error even if its end had been reached, unless it was
    /// closed with `keep_input`.
    fn open_to_read(&self) -> PyResult<MutexGuard<'_, Half>> {
        let half = self.open()?;
        if !half.readable_to_end {
            half.socket()?;
        }
        Ok(half)
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
        let mut half = self.open_to_read()?;
        if half.input.is_empty() && max_bytes >= READ_AHEAD {
            // Nothing was read ahead: what comes goes to the caller without another copy.
            if half.at_eof {
                return Ok(Some(PyBytes::new(py, b"")));
            }
            let read = half
                .socket()?
                .read_with(max_bytes, |bytes| {
                    (bytes.is_empty(), PyBytes::new(py, bytes))
                })
                .map_err(broken)?;
            return Ok(read.map(|(end, bytes)| {
                half.at_eof = end;
                bytes
            }));
        }
        if half.input.is_empty() && max_bytes > 0 && !half.fill()? {
            return Ok(None);
        }
        let count = max_bytes.min(half.input.len());
        Ok(Some(half.take(py, count)))
    }

    /// `count` bytes; fewer only at the end of the stream.
    fn try_read_exactly<'py>(
        &self,
        py: Python<'py>,
        count: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut half = self.open_to_read()?;
        let begin = half.input.len();
        while half.input.len() < count && !half.at_eof {
            // A sender that keeps up must not keep the loop from everything else.
            if half.input.len() - begin >= TURN || !half.fill()? {
                return Ok(None);
            }
        }
        let count = count.min(half.input.len());
        Ok(Some(half.take(py, count)))
    }

    /// Everything up to and including `separator`; what is left at the end of the stream. More
    /// than `limit` bytes without it are asyncio's LimitOverrunError, and stay.
    fn try_read_until<'py>(
        &self,
        py: Python<'py>,
        separator: &[u8],
        limit: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut half = self.open_to_read()?;
        let mut searched = 0;
        loop {
            let found = memchr::memmem::find(&half.input[searched..], separator);
            if let Some(end) = found.map(|at| searched + at + separator.len()) {
                if end > limit {
                    return Err(LimitOverrunError::new_err((
                        "the separator was found, but beyond the limit",
                        end - separator.len(),
                    )));
                }
                return Ok(Some(half.take(py, end)));
            }
            searched = (half.input.len() + 1).saturating_sub(separator.len());
            if half.input.len() > limit {
                return Err(LimitOverrunError::new_err((
                    "the separator was not found within the limit",
                    searched,
                )));
            }
            if half.at_eof {
                let count = half.input.len();
                return Ok(Some(half.take(py, count)));
            }
            if !half.fill()? {
                return Ok(None);
            }
        }
    }

    /// A message of at most `max_bytes` with its length in front. At the end of the stream an
    /// empty tuple; in the middle of a message that is a ConnectionLost.
    fn try_read_frame<'py>(
        &self,
        py: Python<'py>,
        max_bytes: usize,
    ) -> PyResult<Option<Vec<Bound<'py, PyBytes>>>> {
        let mut half = self.open_to_read()?;
        loop {
            let frame = framing::split_frame(&mut half.input, max_bytes);
            if let Some(frame) = frame.map_err(errors::from_core)? {
                return Ok(Some(vec![PyBytes::new(py, &frame)]));
            }
            if half.at_eof {
                return if half.input.is_empty() {
                    Ok(Some(Vec::new()))
                } else {
                    Err(errors::from_core(crate::core::Error::Closed {
                        mid_message: true,
                    }))
                };
            }
            if !half.fill()? {
                return Ok(None);
            }
        }
    }

    /// Writes what the socket takes of `data` from `offset` on, after what `write` left over.
    /// Returns how many bytes it took; 0 means that it would block.
    fn try_send(&self, data: &Bound<'_, PyAny>, offset: usize) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            let mut half = self.open()?;
            half.writable()?;
            if !half.flush()? {
                return Ok(0);
            }
            let rest = bytes.get(offset..).unwrap_or_default();
            half.socket()?.write(rest).map_err(broken)
        })
    }

    /// Writes `data`; what the socket does not take now is copied and written later. Returns how
    /// many bytes wait.
    fn write(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            let mut half = self.open()?;
            half.writable()?;
            let mut written = 0;
            if half.flush()? {
                while written < bytes.len() {
                    match half.socket()?.write(&bytes[written..]).map_err(broken)? {
                        0 => break,
                        count => written += count,
                    }
                }
            }
            half.output.extend_from_slice(&bytes[written..]);
            Ok(half.output.len())
        })
    }

    /// Keeps a copy of `data` to be written by `flush`. Returns how many bytes wait.
    fn cork(&self, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            let mut half = self.open()?;
            half.writable()?;
            half.output.extend_from_slice(bytes);
            Ok(half.output.len())
        })
    }

    /// Writes what waits; says how many bytes still do.
    fn flush(&self) -> PyResult<usize> {
        let mut half = self.open()?;
        half.flush()?;
        Ok(half.output.len())
    }

    /// How many bytes wait to be written.
    #[getter]
    fn buffered(&self) -> usize {
        self.lock().output.len()
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
        let mut half = self.open()?;
        if !half.write_ended {
            half.socket()?.shutdown_write().map_err(broken)?;
            half.write_ended = true;
        }
        Ok(())
    }

    /// Reads ahead if nothing was, so that `at_eof` knows of an end that has come.
    fn look_ahead(&self) -> PyResult<()> {
        let mut half = self.open_to_read()?;
        if half.input.is_empty() {
            half.fill()?;
        }
        Ok(())
    }

    /// Closes the socket, in good order or, with `abort`, at once. In a forked child only the
    /// descriptor is closed: the socket is the parent's.
    ///
    /// With `keep_input` it is asyncio's way: what has come, up to a bound, can still be read, and
    /// then the end; and what waits to be written is lost only if the socket does not take it.
    #[pyo3(signature = (*, abort = false, keep_input = false))]
    fn close(&self, abort: bool, keep_input: bool) {
        let mut half = self.lock();
        let forked = std::process::id() != self.pid;
        if keep_input && !forked {
            // Whatever this fails at, a close has nobody to tell.
            let _ = half.flush();
            half.keep();
        }
        half.output.clear();
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

    /// The file descriptor. It is not to be used once the stream is closed.
    fn fileno(&self) -> RawFd {
        self.fd
    }

    /// `"unix"` or `"tcp"`.
    #[getter]
    fn family(&self) -> PyResult<&'static str> {
        Ok(if self.lock().socket()?.is_unix() {
            "unix"
        } else {
            "tcp"
        })
    }

    /// The local end: a path, or `(host, port)`.
    #[getter]
    fn local_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.lock().socket()?.local_address(py)
    }

    /// The remote end: a path, or `(host, port)`.
    #[getter]
    fn remote_address(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.lock().socket()?.remote_address(py)
    }
}

impl Half {
    fn socket(&self) -> PyResult<&Socket> {
        self.socket
            .as_ref()
            .ok_or_else(|| ClosedResourceError::new_err("the stream is closed"))
    }

    fn writable(&self) -> PyResult<()> {
        self.socket()?;
        if self.write_ended {
            return Err(ClosedResourceError::new_err(
                "the writing half of the stream is closed",
            ));
        }
        Ok(())
    }

    /// Reads once into `input`; false if it would block.
    fn fill(&mut self) -> PyResult<bool> {
        if self.at_eof {
            return Ok(true);
        }
        self.socket()?;
        let Self { socket, input, .. } = self;
        let socket = socket.as_ref().expect("checked above");
        let read = socket.read_with(READ_SIZE, |bytes| {
            input.extend_from_slice(bytes);
            bytes.is_empty()
        });
        let end = read.map_err(broken)?;
        self.at_eof |= end == Some(true);
        Ok(end.is_some())
    }

    /// Reads what has come into `input`, up to a bound.
    fn keep(&mut self) {
        let Self { socket, input, .. } = self;
        while let (Some(socket), true) = (socket.as_ref(), input.len() < KEPT) {
            let read = socket.read_with(KEPT - input.len(), |bytes| {
                input.extend_from_slice(bytes);
                bytes.len()
            });
            if !matches!(read, Ok(Some(1..))) {
                break;
            }
        }
    }

    /// Writes what `write` left over; false if some is left still.
    fn flush(&mut self) -> PyResult<bool> {
        while !self.output.is_empty() {
            match self.socket()?.write(&self.output).map_err(broken)? {
                0 => return Ok(false),
                count => {
                    let _ = self.output.split_to(count);
                }
            }
        }
        Ok(true)
    }

    fn take<'py>(&mut self, py: Python<'py>, count: usize) -> Bound<'py, PyBytes> {
        let bytes = PyBytes::new(py, &self.input[..count]);
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
        bytes
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
