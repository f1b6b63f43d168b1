//! A control connection: the protocol's exchange over a non-blocking socket. Nothing here waits;
//! `connector.py` does. While the state is locked, errors are Rust values, for the reason given in
//! `stream`.

use super::channel::{is_unread, READ_BUDGET};
use super::errors::{self, ConnectionLost};
use super::persistent::{Limits as UnaryLimits, PersistentConnection};
use super::pipeline::Pipeline;
use super::request::{self, PyRequest};
use super::socket::{Address, Connecting, Socket, READ_SIZE};
use super::stream::RawStream;
use bytes::{Buf, Bytes};
use p2pd_protocol::command::Answered;
use p2pd_protocol::policy::retry::Progress;
use p2pd_protocol::{ClientExchange, Error, Event, Limits, Reply, State};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A connection to the daemon's control socket.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct ControlConnection {
    pid: u32,
    inner: Mutex<Option<Inner>>,
}

struct Inner {
    socket: Socket,
    connected: bool,
    exchange: ClientExchange,
    /// The unsent part of the request.
    output: Bytes,
    /// Whether the request is a query with one value.
    one_value: bool,
    /// The values received so far.
    values: Vec<Reply>,
}

/// Why an operation on the locked state failed. There is no `From` for `PyErr`, so that `?` cannot
/// create an exception under the lock.
enum ConnectionError {
    Closed,
    /// The operating system refused the connection.
    Refused(io::Error),
    /// `unexecuted`: the daemon cannot have read the whole request.
    Lost {
        error: io::Error,
        unexecuted: bool,
    },
    /// Boxed, so that results are small.
    Protocol(Box<Error>),
}

impl ConnectionError {
    fn protocol(error: Error) -> Self {
        Self::Protocol(Box::new(error))
    }

    /// Returns the exception. Caller must not hold the lock.
    #[cold]
    fn into_exception(self) -> PyErr {
        match self {
            Self::Closed => closed(),
            Self::Refused(error) => errors::os_error(error),
            Self::Lost { error, unexecuted } => errors::connection_lost(error, unexecuted),
            Self::Protocol(error) => errors::from_core(*error),
        }
    }
}

#[pymethods]
impl ControlConnection {
    /// Begins to connect to a path or to `(ip, port)`. Returns `None` if the listen queue of a unix
    /// socket is full; the caller must try again later.
    #[staticmethod]
    #[pyo3(signature = (address, max_frame = None))]
    fn connect(
        py: Python<'_>,
        address: Address,
        max_frame: Option<usize>,
    ) -> PyResult<Option<Self>> {
        errors::import(py);
        let (socket, connected) = match Socket::connect(&address)? {
            Connecting::Done(socket) => (socket, true),
            Connecting::Pending(socket) => (socket, false),
            Connecting::Full => return Ok(None),
        };
        let mut limits = Limits::default();
        if let Some(max_frame) = max_frame {
            limits.max_frame = max_frame;
        }
        Ok(Some(Self {
            pid: super::fork_guard::pid(),
            inner: Mutex::new(Some(Inner {
                socket,
                connected,
                exchange: ClientExchange::new(limits),
                output: Bytes::new(),
                one_value: false,
                values: Vec::new(),
            })),
        }))
    }

    /// Whether the connection is established. If not, wait until it is writable and call
    /// `finish_connect`.
    #[getter]
    fn connected(&self) -> PyResult<bool> {
        self.with(|inner| Ok(inner.connected))
    }

    /// Completes a connection attempt. Raises OSError if it failed.
    fn finish_connect(&self) -> PyResult<()> {
        self.with(|inner| match inner.socket.take_error() {
            Err(error) | Ok(Some(error)) => Err(ConnectionError::Refused(error)),
            Ok(None) => {
                inner.connected = true;
                Ok(())
            }
        })
    }

    /// Sends a request. Returns whether the socket accepted all of it. If not, wait until it is writable
    /// and call `flush`.
    fn start(&self, request: PyRef<'_, PyRequest>) -> PyResult<bool> {
        self.with(|inner| {
            inner.values.clear();
            inner.one_value = request.0.answered() == Answered::WithOneValue;
            let frame = inner.exchange.send(&request.0);
            inner.output = frame.map_err(ConnectionError::protocol)?;
            inner.flush()
        })
    }

    /// Sends the rest of the request. Returns whether the socket accepted all of it.
    fn flush(&self) -> PyResult<bool> {
        self.with(Inner::flush)
    }

    /// Reads the reply. Returns `(reply,)`, or `None` if it has not arrived.
    #[pyo3(name = "step")]
    fn py_step(&self, py: Python<'_>) -> PyResult<Option<(Py<PyAny>,)>> {
        Ok(self.step(py)?.map(|answer| (answer,)))
    }

    /// Reads the next value of a DHT query. Returns `(value,)`, `()` at the end, or `None` if it has not
    /// arrived.
    fn next_value<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        Ok(match self.with(Inner::next_value)? {
            None => None,
            Some(Outcome::Reply(value)) => {
                Some((request::reply_to_python(py, value)?,).into_pyobject(py)?)
            }
            Some(Outcome::Values(_)) => Some(PyTuple::empty(py)),
            Some(Outcome::Refused(message)) => return Err(errors::refused(py, &message)),
        })
    }

    /// Whether another request can be sent.
    #[getter]
    pub fn reusable(&self) -> bool {
        self.lock().as_ref().is_some_and(Inner::is_reusable)
    }

    /// Whether the connection has become a stream or a subscription.
    #[getter]
    fn consumed(&self) -> bool {
        self.lock()
            .as_ref()
            .is_some_and(|inner| inner.exchange.state() == State::Consumed)
    }

    /// Whether something has arrived without a request, most likely the end of the connection.
    #[getter]
    pub fn stale(&self) -> PyResult<bool> {
        self.with(|inner| Ok(inner.socket.is_readable()))
    }

    /// Takes the stream or subscription that this connection has become. While no request is in flight,
    /// takes the bare connection.
    fn take_stream(&self) -> PyResult<RawStream> {
        let taken = self.take(|inner| {
            inner.exchange.state() == State::Consumed || inner.exchange.is_reusable()
        })?;
        Ok(RawStream::new(
            taken.socket,
            taken.exchange.into_remainder(),
        ))
    }

    /// Takes the connection that was upgraded for unary calls.
    fn take_persistent(
        slf: &Bound<'_, Self>,
        seed: [u8; 32],
        limits: UnaryLimits,
        event_loop: &Bound<'_, PyAny>,
        on_readable: Py<PyAny>,
        owner: Py<PyAny>,
    ) -> PyResult<(PersistentConnection, Py<PyBytes>)> {
        let taken = slf
            .get()
            .take(|inner| inner.exchange.state() == State::Consumed)?;
        let rest = PyBytes::new(slf.py(), &taken.exchange.into_remainder());
        let connection = PersistentConnection::new(
            taken.socket,
            seed,
            limits.into(),
            event_loop,
            on_readable,
            owner,
        );
        Ok((connection, rest.unbind()))
    }

    /// Takes the connection as a pipeline, if no request is in flight on it.
    fn take_pipeline(
        &self,
        event_loop: &Bound<'_, PyAny>,
        on_readable: Py<PyAny>,
    ) -> PyResult<Pipeline> {
        let taken = self.take(Inner::is_reusable)?;
        Ok(Pipeline::new(
            taken.socket,
            taken.exchange,
            event_loop,
            on_readable,
        ))
    }

    /// The file descriptor, or -1 if the connection is closed or was taken.
    fn fileno(&self) -> RawFd {
        let inner = self.lock();
        inner.as_ref().map_or(-1, |inner| inner.socket.as_raw_fd())
    }

    /// Closes the socket, unless it was taken. In a forked child only the descriptor is closed, since
    /// the connection belongs to the parent.
    fn close(&self) {
        let inner = self.lock().take();
        if let Some(inner) = inner.filter(|_| super::fork_guard::pid() == self.pid) {
            inner.socket.end();
        }
    }
}

/// The result of an exchange.
enum Outcome {
    Reply(Reply),
    Values(Vec<Reply>),
    Refused(String),
}

impl ControlConnection {
    fn lock(&self) -> MutexGuard<'_, Option<Inner>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from the socket. Returns the reply if it is complete.
    pub fn step(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        Ok(match self.with(Inner::step)? {
            None => None,
            Some(Outcome::Reply(reply)) => Some(request::reply_to_python(py, reply)?.unbind()),
            Some(Outcome::Values(values)) => Some(request::replies_to_python(py, values)?.unbind()),
            Some(Outcome::Refused(message)) => return Err(errors::refused(py, &message)),
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut Inner) -> Result<T, ConnectionError>) -> PyResult<T> {
        errors::check_fork(self.pid, "connection")?;
        let outcome = match self.lock().as_mut() {
            Some(inner) => f(inner),
            None => Err(ConnectionError::Closed),
        };
        outcome.map_err(ConnectionError::into_exception)
    }

    /// Takes the connection for another use. Closes it if it is not `ready` for that.
    fn take(&self, ready: impl FnOnce(&Inner) -> bool) -> PyResult<Inner> {
        errors::check_fork(self.pid, "connection")?;
        let taken = self.lock().take();
        taken.filter(ready).ok_or_else(closed)
    }
}

impl Inner {
    fn is_reusable(&self) -> bool {
        self.exchange.is_reusable() && self.output.is_empty()
    }

    fn flush(&mut self) -> Result<bool, ConnectionError> {
        while !self.output.is_empty() {
            match self.socket.write(&self.output) {
                Ok(0) => break,
                Ok(count) => self.output.advance(count),
                Err(error) => {
                    let transport = self.socket.transport();
                    let unexecuted = Progress::Sending.is_unsent(transport, Some(error.kind()));
                    return Err(ConnectionError::Lost { error, unexecuted });
                }
            }
        }
        Ok(self.output.is_empty())
    }

    fn step(&mut self) -> Result<Option<Outcome>, ConnectionError> {
        self.flush()?;
        let mut budget = READ_BUDGET;
        loop {
            match self.exchange.poll().map_err(ConnectionError::protocol)? {
                Some(Event::Value(value)) => self.values.push(value),
                Some(Event::Refused(message)) => return Ok(Some(Outcome::Refused(message))),
                Some(Event::Reply(reply)) => return Ok(Some(Outcome::Reply(reply))),
                Some(Event::End) => {
                    let mut values = std::mem::take(&mut self.values);
                    return Ok(Some(match values.pop() {
                        Some(only) if self.one_value => Outcome::Reply(only),
                        last => {
                            values.extend(last);
                            Outcome::Values(values)
                        }
                    }));
                }
                Some(other) => return Err(ConnectionError::protocol(other.unexpected())),
                None if self.read(&mut budget)? => {}
                None => return Ok(None),
            }
        }
    }

    /// Returns the next value of a query's reply, or no values at its end.
    fn next_value(&mut self) -> Result<Option<Outcome>, ConnectionError> {
        let mut budget = READ_BUDGET;
        let event = loop {
            match self.exchange.poll().map_err(ConnectionError::protocol)? {
                Some(event) => break event,
                None if self.read(&mut budget)? => {}
                None => return Ok(None),
            }
        };
        Ok(Some(match event {
            Event::Value(value) => Outcome::Reply(value),
            Event::End => Outcome::Values(Vec::new()),
            Event::Refused(message) => Outcome::Refused(message),
            other => return Err(ConnectionError::protocol(other.unexpected())),
        }))
    }

    /// Reads once, unless the budget is used up. Returns whether bytes have arrived.
    fn read(&mut self, budget: &mut usize) -> Result<bool, ConnectionError> {
        if *budget == 0 {
            return Ok(false);
        }
        let Self {
            socket, exchange, ..
        } = self;
        let read = socket.read_with(READ_SIZE, |bytes| {
            exchange.receive(bytes);
            bytes.len()
        });
        match read {
            Ok(None) => Ok(false),
            Ok(Some(0)) => Err(ConnectionError::protocol(self.exchange.end_of_file())),
            Ok(Some(count)) => {
                *budget = budget.saturating_sub(count);
                Ok(true)
            }
            Err(error) => {
                let unexecuted = is_unread(&self.socket, &mut self.exchange, &error);
                Err(ConnectionError::Lost { error, unexecuted })
            }
        }
    }
}

/// The exception for the use of a closed connection.
pub fn closed() -> PyErr {
    ConnectionLost::new_err("the control connection is closed")
}
