//! A control connection on which queries follow each other, without waiting for the answers before:
//! the protocol's exchange over a non-blocking socket, on the event loop's own thread. A read brings the
//! answers to many, and what those who are woken ask next goes out in one write.
//!
//! As in `unary`, no Python is called while the state is locked.

use super::answer;
use super::connection::{is_unread, TURN};
use super::ending::inside;
use super::errors::{self, Loss};
use super::pid::pid;
use super::readiness::Tries;
use super::request::PyRequest;
use super::socket::{Socket, READ_SIZE};
use super::waiter::{done, hand_over, tell, waiter, Turn};
use bytes::{Buf, BytesMut};
use p2pd_protocol::command::Answered;
use p2pd_protocol::{ClientExchange, EncodedRequest, Error, Event};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{intern, PyTraverseError, PyVisit};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many queries may be under way, and how many bytes of them may wait to be sent. A daemon that
/// does not answer or read is not to fill our memory.
const MAX_ASKED: usize = 1024;
const MAX_OUTPUT: usize = 1024 * 1024;

/// A control connection for queries of one event loop, asyncio's or alike.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Pipeline {
    fd: RawFd,
    pid: u32,
    event_loop: Py<PyAny>,
    /// What the loop is to call with this when it is readable: it does what `take` adds.
    pump: Py<PyAny>,
    turn: Turn,
    inner: Mutex<Inner>,
}

struct Inner {
    /// `None` once lost or closed.
    socket: Option<Socket>,
    exchange: ClientExchange,
    output: BytesMut,
    /// Who waits, in the order of the answers. One that was cancelled keeps its place.
    asked: VecDeque<Py<PyAny>>,
    /// It takes no more queries, and ends with the last answer.
    retired: bool,
    /// A flush is to come, before which nothing is sent.
    corked: bool,
    /// What came last, and is to be seen to when what came before it has been.
    loss: Option<Loss>,
    /// Whether anything was sent since nobody waited, and, of a connection that was lost, whether
    /// the daemon cannot have read the first query that was not answered.
    sent: bool,
    unread: bool,
    reading: bool,
    writing: bool,
    tries: Tries,
}

/// What came of a query.
enum Asked {
    Sent,
    /// It is to be asked elsewhere.
    Refused,
    Failed(Error),
    Lost(Loss),
}

/// What the event loop has to be told after a change.
#[derive(Default)]
struct Chores {
    add_reader: bool,
    add_writer: bool,
    remove_writer: bool,
    retired: bool,
}

impl Pipeline {
    /// On a connection that is connected, and on which nothing is under way.
    pub fn new(
        socket: Socket,
        exchange: ClientExchange,
        event_loop: Py<PyAny>,
        pump: Py<PyAny>,
    ) -> Self {
        Self {
            fd: socket.as_raw_fd(),
            pid: pid(),
            event_loop,
            pump,
            turn: Turn::default(),
            inner: Mutex::new(Inner {
                socket: Some(socket),
                exchange,
                output: BytesMut::new(),
                asked: VecDeque::new(),
                retired: false,
                corked: false,
                loss: None,
                sent: false,
                unread: false,
                reading: false,
                writing: false,
                tries: Tries::default(),
            }),
        }
    }
}

#[pymethods]
impl Pipeline {
    /// Sends a query. Returns what to await for the answer, or `None` if there are too many, or
    /// this takes no more.
    fn ask(slf: &Bound<'_, Self>, request: PyRef<'_, PyRequest>) -> PyResult<Option<Py<PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        let _inside = inside(py);
        errors::check_fork(this.pid, "client")?;
        let waiter = waiter(this.event_loop.bind(py))?;
        let mut events = Vec::new();
        let (asked, chores) = {
            let mut inner = this.lock();
            let asked = inner.ask(&request.0, &waiter, &mut events);
            (asked, inner.chores())
        };
        Self::hand_out(slf, events, false, &PyList::empty(py));
        Self::run(slf, chores)?;
        match asked {
            Asked::Refused => return Ok(None),
            Asked::Failed(error) => return Err(errors::from_core(error)),
            Asked::Lost(loss) => Self::lose(slf, &loss)?,
            Asked::Sent => {}
        }
        Ok(Some(waiter.unbind()))
    }

    /// Reads, and adds to `work` what is to be called for what came. When that has been, all of it
    /// and whatever it raised, `settle` is to be called.
    fn take(slf: &Bound<'_, Self>, work: &Bound<'_, PyList>) -> PyResult<()> {
        let this = slf.get();
        if this.is_elsewhere() {
            return Ok(());
        }
        let _inside = inside(slf.py());
        let may_wake = this.turn.begin(Some(this.event_loop.bind(slf.py())))?;
        let mut events = Vec::new();
        let lost = {
            let mut inner = this.lock();
            inner.loss = inner.read(&mut events).err();
            inner.tries.start_over();
            // What several ask next is better sent at once.
            inner.corked |= events.len() > 1;
            inner.loss.is_some()
        };
        Self::hand_out(slf, events, may_wake && !lost, work);
        Ok(())
    }

    /// Loses the connection, if that is what came last, or sends what was asked: now, if `now`, or
    /// after those who were woken have had their turn.
    fn settle(slf: &Bound<'_, Self>, now: bool) -> PyResult<()> {
        slf.get().turn.end();
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let py = slf.py();
        let _inside = inside(py);
        let (loss, corked) = {
            let mut inner = slf.get().lock();
            inner.corked &= !now;
            (inner.loss.take(), inner.corked)
        };
        if let Some(loss) = loss {
            return Self::lose(slf, &loss);
        }
        if corked {
            let flush = slf.getattr(intern!(py, "_flush"))?;
            let event_loop = slf.get().event_loop.bind(py);
            event_loop.call_method1(intern!(py, "call_soon"), (flush,))?;
            return Ok(());
        }
        Self::_flush(slf)
    }

    /// Takes no more queries, and closes when those under way are answered or given up.
    fn retire(slf: &Bound<'_, Self>) -> PyResult<()> {
        let _inside = inside(slf.py());
        slf.get().lock().retired = true;
        if Self::loop_is_closed(slf)? {
            return Self::close(slf); // nobody is left to be answered
        }
        Self::_flush(slf)
    }

    /// Closes the connection. In a forked child only the descriptor is closed.
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            let socket = slf.get().lock().socket.take();
            drop(socket);
            return Ok(());
        }
        Self::lose(slf, &Loss::Closed)
    }

    /// Whether what runs is called by the loop for what came over this connection.
    #[getter]
    fn in_turn(&self) -> bool {
        self.turn.is_here()
    }

    /// Whether the connection was closed or lost.
    #[getter]
    fn closed(&self) -> bool {
        self.lock().socket.is_none()
    }

    /// Whether it takes no more queries.
    #[getter]
    fn retired(&self) -> bool {
        let inner = self.lock();
        inner.retired || inner.socket.is_none()
    }

    fn _flush(slf: &Bound<'_, Self>) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let _inside = inside(slf.py());
        let flushed = {
            let mut inner = slf.get().lock();
            inner.corked = false;
            inner.flush().map(|()| inner.chores())
        };
        match flushed {
            Ok(chores) => Self::run(slf, chores),
            Err(loss) => Self::lose(slf, &loss),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        visit.call(&self.pump)?;
        if let Ok(inner) = self.inner.try_lock() {
            for waiter in &inner.asked {
                visit.call(waiter)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let asked = match self.inner.try_lock() {
            Ok(mut inner) => std::mem::take(&mut inner.asked),
            Err(_) => return,
        };
        drop(asked);
    }
}

impl Pipeline {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is a forked child of the process that the connection belongs to.
    fn is_elsewhere(&self) -> bool {
        pid() != self.pid
    }

    /// Tells those who asked, and adds to `work` what is to be called for that.
    fn hand_out(slf: &Bound<'_, Self>, events: Vec<Event>, here: bool, work: &Bound<'_, PyList>) {
        let py = slf.py();
        for event in events {
            let Some(waiter) = slf.get().lock().asked.pop_front() else {
                continue;
            };
            let answer = match event {
                Event::Reply(reply) | Event::Value(reply) => answer::to_python(py, reply),
                Event::Refused(words) => Err(errors::refused(py, &words)),
                Event::End => Ok(py.None().into_bound(py)),
                other => Err(errors::from_core(other.unexpected())),
            };
            hand_over(work, tell(waiter.bind(py), answer.map(Bound::unbind), here));
        }
    }

    /// Ends the connection: everything that is awaited fails now. Only the first in the row is told
    /// why: the daemon was not at the others yet, which can be asked again.
    fn lose(slf: &Bound<'_, Self>, loss: &Loss) -> PyResult<()> {
        let py = slf.py();
        let _inside = inside(py);
        let this = slf.get();
        let (socket, asked, unread, reading, writing) = {
            let mut inner = this.lock();
            (
                inner.socket.take(),
                std::mem::take(&mut inner.asked),
                inner.unread,
                std::mem::take(&mut inner.reading),
                std::mem::take(&mut inner.writing),
            )
        };
        let Some(socket) = socket else {
            return Ok(());
        };
        let event_loop = this.event_loop.bind(py);
        if Self::loop_is_closed(slf)? {
            // It can wake nobody.
            socket.end();
            return Ok(());
        }
        if reading {
            event_loop.call_method1(intern!(py, "remove_reader"), (this.fd,))?;
        }
        if writing {
            event_loop.call_method1(intern!(py, "remove_writer"), (this.fd,))?;
        }
        socket.end();
        drop(socket);
        for (place, waiter) in asked.iter().enumerate() {
            let error = match place {
                0 if !unread => loss.to_err(py),
                _ => errors::connection_gone("the connection was lost before the daemon read this"),
            };
            if let Err(error) = tell(waiter.bind(py), Err(error), false) {
                error.write_unraisable(py, Some(slf));
            }
        }
        Ok(())
    }

    fn loop_is_closed(slf: &Bound<'_, Self>) -> PyResult<bool> {
        let py = slf.py();
        let event_loop = slf.get().event_loop.bind(py);
        event_loop.call_method0(intern!(py, "is_closed"))?.extract()
    }

    fn run(slf: &Bound<'_, Self>, chores: Chores) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let event_loop = this.event_loop.bind(py);
        let mut watched = Ok(());
        // Python code that ran since the chores were listed may have closed the socket. Its number
        // may be another file's by now.
        let adds = chores.add_reader || chores.add_writer;
        if adds && this.lock().socket.is_none() {
            return Ok(());
        }
        if chores.add_reader {
            let arguments = (this.fd, &this.pump, slf);
            watched = event_loop
                .call_method1(intern!(py, "add_reader"), arguments)
                .map(drop);
        }
        if chores.add_writer {
            let arguments = (this.fd, slf.getattr(intern!(py, "_flush"))?);
            let added = event_loop.call_method1(intern!(py, "add_writer"), arguments);
            watched = watched.and(added.map(drop));
        }
        if watched.is_err() {
            // Nothing would ever come of what was asked.
            Self::lose(slf, &Loss::Closed)?;
            return watched;
        }
        if chores.remove_writer {
            event_loop.call_method1(intern!(py, "remove_writer"), (this.fd,))?;
        }
        if chores.retired && Self::nobody_waits(slf)? {
            Self::lose(slf, &Loss::Closed)?;
        }
        Ok(())
    }

    fn nobody_waits(slf: &Bound<'_, Self>) -> PyResult<bool> {
        let py = slf.py();
        let asked: Vec<_> = {
            let inner = slf.get().lock();
            inner
                .asked
                .iter()
                .map(|waiter| waiter.clone_ref(py))
                .collect()
        };
        for waiter in asked {
            if !done(waiter.bind(py))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Inner {
    fn ask(
        &mut self,
        request: &EncodedRequest,
        waiter: &Bound<'_, PyAny>,
        events: &mut Vec<Event>,
    ) -> Asked {
        let alone = self.asked.is_empty() && !self.corked;
        self.sent &= !self.asked.is_empty();
        let Some(socket) = self.socket.as_ref().filter(|_| !self.retired) else {
            return Asked::Refused;
        };
        let full = self.asked.len() >= MAX_ASKED || self.output.len() > MAX_OUTPUT;
        // Only what is answered in one message keeps the row in step.
        let pipelined = request.answered() == Answered::AtOnce;
        if full || self.loss.is_some() || !pipelined {
            return Asked::Refused;
        }
        if alone && socket.is_readable() {
            // Whatever that is, it answers nothing: the connection's end, most likely.
            self.retired = true;
            return Asked::Refused;
        }
        match self.exchange.send(request) {
            Ok(frame) => self.output.extend_from_slice(&frame),
            Err(error) => return Asked::Failed(error),
        }
        self.asked.push_back(waiter.clone().unbind());
        let mut sent = self.flush();
        // A daemon that is quick has answered by now, unless it has to wait for this core.
        if sent.is_ok() && alone && self.tries.another() {
            sent = self.read(events);
        }
        match sent {
            Ok(()) => Asked::Sent,
            Err(loss) => Asked::Lost(loss),
        }
    }

    fn flush(&mut self) -> Result<(), Loss> {
        let Some(socket) = self.socket.as_ref().filter(|_| !self.corked) else {
            return Ok(());
        };
        while !self.output.is_empty() {
            match socket.write(&self.output) {
                Ok(0) => break,
                Ok(count) => {
                    self.output.advance(count);
                    self.sent = true;
                }
                Err(error) => {
                    // A part of a query is none.
                    self.unread = !self.sent || self.asked.len() == 1;
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Reads what is there, within the bounds of a turn.
    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), Loss> {
        let mut budget = TURN;
        loop {
            let (Some(socket), exchange) = (&self.socket, &mut self.exchange) else {
                return Ok(());
            };
            let read = socket.read_with(READ_SIZE, |bytes| {
                exchange.receive(bytes);
                bytes.len()
            });
            let count = match read {
                Ok(None) => return Ok(()),
                Ok(Some(0)) => return Err(Loss::Protocol(self.exchange.end_of_file())),
                Ok(Some(count)) => count,
                Err(error) => {
                    let only = self.asked.len() == 1 && events.is_empty();
                    self.unread = only && is_unread(socket, &mut self.exchange, &error);
                    return Err(error.into());
                }
            };
            while let Some(event) = self.exchange.poll().map_err(Loss::Protocol)? {
                events.push(event);
            }
            budget = budget.saturating_sub(count);
            if count < READ_SIZE || budget == 0 {
                return Ok(());
            }
        }
    }

    fn chores(&mut self) -> Chores {
        let mut chores = Chores::default();
        if self.socket.is_none() {
            return chores;
        }
        chores.add_reader = !std::mem::replace(&mut self.reading, true);
        let write = !self.output.is_empty() && !self.corked;
        if write != self.writing {
            self.writing = write;
            chores.add_writer = write;
            chores.remove_writer = !write;
        }
        chores.retired = self.retired;
        chores
    }
}
