//! A control connection on which queries are pipelined: each is sent without waiting for earlier replies.
//! One read brings many replies, and one write sends the next queries of all tasks that were resumed.

use super::channel::{is_unread, Channel, Decoder, ReadError, Tail, READ_BUDGET};
use super::driver::{self, lock, Attempts, Driven, DrivenState, Driver, Registered, Registrations};
use super::errors::{self, Loss};
use super::future;
use super::request::{self, PyRequest};
use super::shutdown_guard::enter;
use super::socket::{Socket, READ_SIZE};
use super::wake::WakeUp;
use p2pd_protocol::command::Answered;
use p2pd_protocol::{ClientExchange, EncodedRequest, Error, Event};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};
use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

/// Limits on queries in flight and on their unsent bytes, so that a daemon that does not reply or read
/// cannot exhaust memory.
const MAX_QUERIES: usize = 1024;
const MAX_OUTPUT: usize = 1024 * 1024;

/// How many bytes of the output buffer are kept for reuse.
const KEPT_OUTPUT: usize = 16 * 1024;

/// A control connection for the queries of one event loop.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Pipeline {
    driver: Driver,
    on_readable: Py<PyAny>,
    state: Mutex<State>,
}

pub struct State {
    channel: Channel,
    exchange: ClientExchange,
    /// The futures of the queries in flight, in the order of their replies. A query that was cancelled
    /// keeps its place.
    queries: VecDeque<Py<PyAny>>,
    /// Whether the pipeline takes no more queries, and closes after the last reply.
    retired: bool,
    loss: Option<Loss>,
    /// Whether any bytes were sent since the last time that no query was in flight.
    sent: bool,
    /// Whether the connection was lost before the daemon could read the first query in flight.
    unread: bool,
    registered: Registered,
    attempts: Attempts,
}

/// The result of sending a query.
enum Sent {
    Yes,
    /// It must be sent over another connection.
    Refused,
    Failed(Error),
    Lost(Loss),
}

/// Loop operations to carry out after a change of the state.
pub struct FollowUp {
    registrations: Registrations,
    retired: bool,
}

impl Pipeline {
    /// A pipeline on an open connection without a request in flight.
    pub fn new(
        socket: Socket,
        exchange: ClientExchange,
        event_loop: &Bound<'_, PyAny>,
        on_readable: Py<PyAny>,
    ) -> Self {
        Self {
            driver: Driver::new(event_loop, socket.as_raw_fd()),
            on_readable,
            state: Mutex::new(State {
                channel: Channel::new(socket, KEPT_OUTPUT),
                exchange,
                queries: VecDeque::new(),
                retired: false,
                loss: None,
                sent: false,
                unread: false,
                registered: Registered::default(),
                attempts: Attempts::default(),
            }),
        }
    }

    fn has_waiting_query(&self, py: Python<'_>) -> PyResult<bool> {
        let queries: Vec<_> = {
            let state = lock(self);
            let queries = state.queries.iter();
            queries.map(|future| future.clone_ref(py)).collect()
        };
        for future in queries {
            if !future::is_done(future.bind(py))? {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[pymethods]
impl Pipeline {
    /// Sends a query. Returns the future of its reply, or `None` if too many are in flight or the
    /// pipeline is retired.
    fn request(
        slf: &Bound<'_, Self>,
        request: PyRef<'_, PyRequest>,
    ) -> PyResult<Option<Py<PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        let _guard = enter(py);
        this.driver.check_fork("client")?;
        let future = this.driver.create_future(py)?;
        let mut events = Vec::new();
        let (sent, follow_up) = {
            let mut state = lock(this);
            let sent = state.request(&request.0, &future, &mut events);
            (sent, state.follow_up())
        };
        if !events.is_empty() {
            driver::handle_all(slf, events, false, &PyList::empty(py));
        }
        Self::run(slf, follow_up)?;
        match sent {
            Sent::Refused => return Ok(None),
            Sent::Failed(error) => return Err(errors::from_core(error)),
            Sent::Lost(loss) => Self::lose(slf, loss)?,
            Sent::Yes => {}
        }
        Ok(Some(future.unbind()))
    }

    /// Reads replies. Appends the calls to make to `ready`; `flush` must follow.
    fn read(slf: &Bound<'_, Self>, ready: &Bound<'_, PyList>) -> PyResult<()> {
        driver::read(slf, ready)
    }

    /// Sends unsent queries: at once if `now`, else after the woken tasks have run.
    fn flush(slf: &Bound<'_, Self>, now: bool) -> PyResult<()> {
        driver::flush(slf, now)
    }

    /// Takes no more queries, and closes the connection when those in flight are answered or cancelled.
    fn retire(slf: &Bound<'_, Self>) -> PyResult<()> {
        let _guard = enter(slf.py());
        lock(slf.get()).retired = true;
        if slf.get().driver.loop_is_closed(slf.py())? {
            return Self::close(slf); // no task is left to resume
        }
        driver::uncork(slf)
    }

    /// Closes the connection. In a forked child only the descriptor is closed.
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::close(slf)
    }

    /// Whether the caller is a task that a reply over this connection has resumed.
    #[getter]
    fn in_wake_batch(&self) -> bool {
        self.driver.in_wake_batch()
    }

    /// Whether the connection was closed or lost.
    #[getter]
    fn closed(&self) -> bool {
        !lock(self).channel.is_open()
    }

    /// Whether it takes no more queries.
    #[getter]
    fn retired(&self) -> bool {
        let state = lock(self);
        state.retired || !state.channel.is_open()
    }

    fn _on_writable(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::change(slf, State::flush)
    }

    fn _uncork(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::uncork(slf)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.driver.traverse(&visit)?;
        visit.call(&self.on_readable)?;
        if let Ok(state) = self.state.try_lock() {
            for future in &state.queries {
                visit.call(future)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let queries = match self.state.try_lock() {
            Ok(mut state) => std::mem::take(&mut state.queries),
            Err(_) => return,
        };
        drop(queries);
    }
}

impl Driven for Pipeline {
    type State = State;

    fn driver(&self) -> &Driver {
        &self.driver
    }

    fn state(&self) -> &Mutex<State> {
        &self.state
    }

    fn on_readable(&self) -> &Py<PyAny> {
        &self.on_readable
    }

    fn handle(slf: &Bound<'_, Self>, event: Event, in_place: bool) -> PyResult<Option<WakeUp>> {
        let py = slf.py();
        let Some(future) = lock(slf.get()).queries.pop_front() else {
            return Ok(None);
        };
        let reply = match event {
            Event::Reply(reply) | Event::Value(reply) => request::reply_to_python(py, reply),
            Event::Refused(message) => Err(errors::refused(py, &message)),
            Event::End => Ok(py.None().into_bound(py)),
            other => Err(errors::from_core(other.unexpected())),
        };
        future::complete(future.bind(py), reply.map(Bound::unbind), in_place)
    }

    fn run(slf: &Bound<'_, Self>, follow_up: FollowUp) -> PyResult<()> {
        if follow_up.registrations.is_empty() && !follow_up.retired {
            return Ok(());
        }
        let registered = driver::register(slf, follow_up.registrations);
        if registered.is_err() {
            // Without the callback, the replies would never be read.
            Self::lose(slf, Loss::Closed)?;
            return registered;
        }
        if follow_up.retired && !slf.get().has_waiting_query(slf.py())? {
            Self::lose(slf, Loss::Closed)?;
        }
        Ok(())
    }

    /// Only the first query in flight fails with the reason: the daemon had not begun the others,
    /// which can be sent again.
    fn lose(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let (socket, queries, unread, registered) = {
            let mut state = lock(this);
            (
                state.channel.close(),
                std::mem::take(&mut state.queries),
                state.unread,
                std::mem::take(&mut state.registered),
            )
        };
        let Some(socket) = socket else {
            return Ok(());
        };
        let (can_wake, outcome) = this.driver.close(py, socket, registered, false);
        if !can_wake {
            return outcome;
        }
        for (place, future) in queries.iter().enumerate() {
            let error = match place {
                0 if !unread => loss.to_err(py),
                _ => errors::connection_gone("the connection was lost before the daemon read this"),
            };
            if let Err(error) = future::complete(future.bind(py), Err(error), false) {
                error.write_unraisable(py, Some(slf));
            }
        }
        outcome
    }
}

impl State {
    fn request(
        &mut self,
        request: &EncodedRequest,
        future: &Bound<'_, PyAny>,
        events: &mut Vec<Event>,
    ) -> Sent {
        let is_first = self.queries.is_empty() && !self.channel.is_corked();
        self.sent &= !self.queries.is_empty();
        let Some(socket) = self.channel.socket().filter(|_| !self.retired) else {
            return Sent::Refused;
        };
        let is_full = self.queries.len() >= MAX_QUERIES || self.channel.unsent() > MAX_OUTPUT;
        // Replies are matched to queries by their order, so each query must have a single message as its
        // reply.
        let is_query = request.answered() == Answered::AtOnce;
        if is_full || self.loss.is_some() || !is_query {
            return Sent::Refused;
        }
        if is_first && socket.is_readable() {
            // This is not a reply; most likely the connection has ended.
            self.retired = true;
            return Sent::Refused;
        }
        let frame = match self.exchange.send(request) {
            Ok(frame) => frame,
            Err(error) => return Sent::Failed(error),
        };
        self.queries.push_back(future.clone().unbind());
        let sent = self.channel.send(&frame, Tail::None);
        let mut outcome = self.written(sent);
        // A fast daemon has already replied, unless it is waiting for this CPU core.
        if outcome.is_ok() && is_first && self.attempts.another() {
            outcome = self.read_replies(events);
        }
        match outcome {
            Ok(()) => Sent::Yes,
            Err(loss) => Sent::Lost(loss),
        }
    }

    fn written(&mut self, written: std::io::Result<usize>) -> Result<(), Loss> {
        match written {
            Ok(count) => {
                self.sent |= count > 0;
                Ok(())
            }
            Err(error) => {
                // The daemon cannot have acted on a part of a query.
                self.unread = !self.sent || self.queries.len() == 1;
                Err(error.into())
            }
        }
    }

    fn read_replies(&mut self, events: &mut Vec<Event>) -> Result<(), Loss> {
        let read = self.channel.read(&mut self.exchange, events);
        if let (Err(ReadError::Socket(error)), Some(socket)) = (&read, self.channel.socket()) {
            let is_only_query = self.queries.len() == 1 && events.is_empty();
            self.unread = is_only_query && is_unread(socket, &mut self.exchange, error);
        }
        Ok(read?)
    }
}

impl DrivenState for State {
    type Event = Event;
    type FollowUp = FollowUp;

    fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), Loss> {
        self.attempts.start_over();
        self.read_replies(events)
    }

    fn flush(&mut self) -> Result<(), Loss> {
        let written = self.channel.flush();
        self.written(written)
    }

    fn loss(&mut self) -> &mut Option<Loss> {
        &mut self.loss
    }

    fn follow_up(&mut self) -> FollowUp {
        let mut registrations = Registrations::default();
        if self.channel.is_open() {
            let is_blocked = self.channel.is_blocked();
            registrations = self.registered.update(true, is_blocked);
        }
        FollowUp {
            registrations,
            retired: self.retired && self.channel.is_open(),
        }
    }
}

impl Decoder for ClientExchange {
    type Event = Event;

    const READ: usize = READ_SIZE;
    const READ_BEHIND: usize = 0;
    const BUDGET: usize = READ_BUDGET;

    fn receive(&mut self, bytes: &[u8], events: &mut Vec<Event>) -> Result<(), Error> {
        ClientExchange::receive(self, bytes);
        while let Some(event) = self.poll()? {
            events.push(event);
        }
        Ok(())
    }

    fn end_of_file(&mut self) -> Error {
        ClientExchange::end_of_file(self)
    }
}
