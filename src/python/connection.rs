//! A control connection: the protocol's exchange over a non-blocking socket. As in `stream`, nothing
//! waits here; `connector.py` does. As there, errors stay Rust values while the state is locked.

use super::channel::{is_unread, READ_BUDGET};
use super::errors::{self, ConnectionLost};
use super::pipeline::Pipeline;
use super::request::{self, PyRequest};
use super::socket::{Address, Connecting, Socket, READ_SIZE};
use super::stream::RawStream;
use super::unary::{Limits as UnaryLimits, PersistentConnection};
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
    /// What the socket has not taken yet of the request.
    output: Bytes,
    /// Whether the request is a query with one value.
    one_value: bool,
    /// The values that came so far.
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

    /// The exception. Caller must not hold the lock.
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
    /// Begins to connect to a path or to `(ip, port)`. `None` if the daemon's queue of
    /// connections is full, which a unix socket says at once: try again a little later.
    #[staticmethod]
    #[pyo3(signature = (address, *, max_frame = None))]
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

    /// Whether the connection is made. While it is not, wait for it to be writable and call
    /// `finish_connect`.
    #[getter]
    fn connected(&self) -> PyResult<bool> {
        self.with(|inner| Ok(inner.connected))
    }

    /// Learns how a connection attempt ended.
    fn finish_connect(&self) -> PyResult<()> {
        self.with(|inner| match inner.socket.take_error() {
            Err(error) | Ok(Some(error)) => Err(ConnectionError::Refused(error)),
            Ok(None) => {
                inner.connected = true;
                Ok(())
            }
        })
    }

    /// Sends a request, as far as the socket takes it; says whether that was all of it. If not,
    /// wait for it to be writable and call `flush`.
    fn start(&self, request: PyRef<'_, PyRequest>) -> PyResult<bool> {
        self.with(|inner| {
            inner.values.clear();
            inner.one_value = request.0.answered() == Answered::WithOneValue;
            let frame = inner.exchange.send(&request.0);
            inner.output = frame.map_err(ConnectionError::protocol)?;
            inner.flush()
        })
    }

    /// Goes on sending; says whether the request is sent.
    fn flush(&self) -> PyResult<bool> {
        self.with(Inner::flush)
    }

    /// Goes on with the exchange as far as the socket allows. `None` while the answer is not
    /// there; then `(answer,)`.
    #[pyo3(name = "step")]
    fn py_step(&self, py: Python<'_>) -> PyResult<Option<(Py<PyAny>,)>> {
        Ok(self.step(py)?.map(|answer| (answer,)))
    }

    /// Goes on with a DHT query as far as the socket allows, one value at a time. `None` while the
    /// next value is not there, then `(value,)`; `()` at the end.
    fn next_value<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyTuple>>> {
        Ok(match self.with(Inner::next_value)? {
            None => None,
            Some(Outcome::Reply(value)) => {
                Some((request::reply_to_python(py, value)?,).into_pyobject(py)?)
            }
            Some(Outcome::Values(_)) => Some(PyTuple::empty(py)),
            Some(Outcome::Refused(words)) => return Err(errors::refused(py, &words)),
        })
    }

    /// Whether another request can be sent.
    #[getter]
    pub fn reusable(&self) -> bool {
        self.lock()
            .as_ref()
            .is_some_and(|inner| inner.exchange.is_reusable() && inner.output.is_empty())
    }

    /// Whether the connection has become a stream or a subscription.
    #[getter]
    fn consumed(&self) -> bool {
        self.lock()
            .as_ref()
            .is_some_and(|inner| inner.exchange.state() == State::Consumed)
    }

    /// Whether something came while nothing was asked: the end, most likely.
    #[getter]
    pub fn stale(&self) -> PyResult<bool> {
        self.with(|inner| Ok(inner.socket.is_readable()))
    }

    /// Takes the stream or subscription that this connection has become, or, before any request,
    /// the connection as it is.
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

    /// Takes the connection for queries that follow each other, if nothing is under way on it.
    fn take_pipeline(
        &self,
        event_loop: &Bound<'_, PyAny>,
        on_readable: Py<PyAny>,
    ) -> PyResult<Pipeline> {
        let taken = self.take(|inner| inner.exchange.is_reusable() && inner.output.is_empty())?;
        Ok(Pipeline::new(
            taken.socket,
            taken.exchange,
            event_loop,
            on_readable,
        ))
    }

    /// The file descriptor; -1 once the connection is closed or was taken.
    fn fileno(&self) -> RawFd {
        let inner = self.lock();
        inner.as_ref().map_or(-1, |inner| inner.socket.as_raw_fd())
    }

    /// Closes the socket, unless it became a stream. In a forked child only the descriptor is
    /// closed: the connection is the parent's.
    fn close(&self) {
        let inner = self.lock().take();
        if let Some(inner) = inner.filter(|_| super::fork_guard::pid() == self.pid) {
            inner.socket.end();
        }
    }
}

/// How an exchange ended.
enum Outcome {
    Reply(Reply),
    Values(Vec<Reply>),
    Refused(String),
}

impl ControlConnection {
    fn lock(&self) -> MutexGuard<'_, Option<Inner>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what there is; the answer, if that completes it.
    pub fn step(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        Ok(match self.with(Inner::step)? {
            None => None,
            Some(Outcome::Reply(reply)) => Some(request::reply_to_python(py, reply)?.unbind()),
            Some(Outcome::Values(values)) => Some(request::replies_to_python(py, values)?.unbind()),
            Some(Outcome::Refused(words)) => return Err(errors::refused(py, &words)),
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

    /// Takes the connection for another use. One that is not `ready` for it is closed.
    fn take(&self, ready: impl FnOnce(&Inner) -> bool) -> PyResult<Inner> {
        errors::check_fork(self.pid, "connection")?;
        let taken = self.lock().take();
        taken.filter(ready).ok_or_else(closed)
    }
}

impl Inner {
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
            match self.next_event(&mut budget)? {
                Some(Event::Value(value)) => self.values.push(value),
                Some(Event::Refused(words)) => return Ok(Some(Outcome::Refused(words))),
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
                None => return Ok(None),
            }
        }
    }

    /// The next value of a query's answer; no values at its end.
    fn next_value(&mut self) -> Result<Option<Outcome>, ConnectionError> {
        let mut budget = READ_BUDGET;
        Ok(Some(match self.next_event(&mut budget)? {
            None => return Ok(None),
            Some(Event::Value(value)) => Outcome::Reply(value),
            Some(Event::End) => Outcome::Values(Vec::new()),
            Some(Event::Refused(words)) => Outcome::Refused(words),
            Some(other) => return Err(ConnectionError::protocol(other.unexpected())),
        }))
    }

    /// The next event, for which up to `budget` bytes are read. `None` if more are needed than the
    /// socket or the budget has.
    fn next_event(&mut self, budget: &mut usize) -> Result<Option<Event>, ConnectionError> {
        loop {
            if let Some(event) = self.exchange.poll().map_err(ConnectionError::protocol)? {
                return Ok(Some(event));
            }
            if *budget == 0 {
                return Ok(None);
            }
            match self.read()? {
                Some(count) => *budget = budget.saturating_sub(count),
                None => return Ok(None),
            }
        }
    }

    /// Reads once; `None` if it would block.
    fn read(&mut self) -> Result<Option<usize>, ConnectionError> {
        let Self {
            socket, exchange, ..
        } = self;
        let read = socket.read_with(READ_SIZE, |bytes| {
            exchange.receive(bytes);
            bytes.len()
        });
        match read {
            Ok(Some(0)) => Err(ConnectionError::protocol(self.exchange.end_of_file())),
            Ok(read) => Ok(read),
            Err(error) => {
                let unexecuted = is_unread(&self.socket, &mut self.exchange, &error);
                Err(ConnectionError::Lost { error, unexecuted })
            }
        }
    }
}

/// The error of whoever uses a closed one.
pub fn closed() -> PyErr {
    ConnectionLost::new_err("the control connection is closed")
}
