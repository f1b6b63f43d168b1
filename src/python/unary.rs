//! A persistent connection: the protocol's state machine over a non-blocking socket, on the event
//! loop's own thread. `unary.py` opens it, and gives it the loop and something to hand calls to.
//!
//! No Python is called while the state is locked: it could come back to this connection. Only bytes
//! objects are made there, whose making runs nothing.

use super::buffer::with_bytes;
use super::ending::inside;
use super::errors::{self, Loss, P2PHandlerError, ProtocolViolation};
use super::peer_id::extract_peer_id;
use super::pid::pid;
use super::socket::{with_scratch, Socket};
use super::waiter::{hand_over, tell, waiter, Turn, Work};
use bytes::BytesMut;
use p2pd_protocol::unary::{self, CallId, Payload};
use p2pd_protocol::{Error, Output, PersistentClient, UnaryEvent, UnaryLimits};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyList};
use pyo3::{intern, PyTraverseError, PyVisit};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Token = Py<PyAny>;
type Event = UnaryEvent<Token, PyPayload>;

/// A persistent connection to the daemon.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct PersistentConnection {
    fd: RawFd,
    pid: u32,
    /// `add_reader`, `add_writer`, `remove_reader`, `remove_writer`, `call_soon`, `call_later`,
    /// `closing`.
    reactor: Py<PyAny>,
    /// Asyncio's event loop, if it is one.
    event_loop: Option<Py<PyAny>>,
    /// What the loop is to call with this when it is readable: it does what `take` adds.
    pump: Py<PyAny>,
    /// A weak reference to what has `on_call`, `on_cancelled`, `on_lost`.
    owner: Py<PyAny>,
    turn: Turn,
    inner: Mutex<Inner>,
}

struct Inner {
    /// `None` once lost or closed.
    socket: Option<Socket>,
    core: PersistentClient<Token, PyPayload>,
    /// Holds bytes objects, not of subclasses: to drop one runs no Python.
    output: Output<PyBackedBytes>,
    /// Where the head of a frame is made.
    head: BytesMut,
    /// A flush is scheduled, before which nothing is sent: the answers to what one read brought
    /// go out together.
    corked: bool,
    /// What came last, and is to be seen to when what came before it has been.
    loss: Option<Loss>,
    reading: bool,
    writing: bool,
    /// Since when nothing is read, if so.
    paused: Option<Instant>,
    /// `_press_on` and `_remind` are to be called back.
    pressing: bool,
    reminding: bool,
    /// Futures of those who wait for room in the output.
    waiters: VecDeque<Token>,
}

/// What is to be done to the event loop once the state is unlocked.
#[derive(Default)]
struct Chores {
    add_reader: bool,
    remove_reader: bool,
    add_writer: bool,
    remove_writer: bool,
    press_on_later: Option<Duration>,
    remind_later: bool,
    /// Somebody who waited for room.
    wake: Option<Token>,
}

/// What came of something to be sent.
struct Submitted {
    /// `None` if there is no room.
    id: io::Result<Option<CallId>>,
    too_large: Option<Error>,
    chores: Chores,
    /// A token that is not to be dropped under the lock.
    _forgotten: Option<Token>,
}

/// The limits as `unary.py` gives them: the largest message to send and to receive, in bytes; the
/// number of calls in progress and the size of their payloads, in bytes; how long reading may pause
/// above these, in seconds.
#[derive(FromPyObject)]
pub struct Limits(
    usize,
    Option<usize>,
    Option<usize>,
    Option<usize>,
    Option<f64>,
);

impl From<Limits> for UnaryLimits {
    fn from(limits: Limits) -> Self {
        let Limits(max_message, max_incoming, max_unanswered, max_unanswered_bytes, hold) = limits;
        UnaryLimits::default()
            .with_max_message(max_message)
            .with_max_incoming(max_incoming)
            .with_max_unanswered(max_unanswered.unwrap_or(usize::MAX))
            .with_max_unanswered_bytes(max_unanswered_bytes.unwrap_or(usize::MAX))
            // A hold that a Duration cannot express never ends.
            .with_hold(hold.and_then(|hold| Duration::try_from_secs_f64(hold).ok()))
    }
}

/// A payload that is a Python bytes object from the start.
pub struct PyPayload(Py<PyBytes>);

#[allow(unsafe_code)]
impl Payload for PyPayload {
    fn with_len(len: usize) -> Option<Self> {
        Python::attach(|py| {
            let size = isize::try_from(len).ok()?;
            // SAFETY: a null pointer asks for an uninitialised object of that size; what comes
            // back is a new reference or null with an exception set. Zeroing it instead would cost
            // a pass over every large payload; the protocol emits it only when all is written.
            let bytes = unsafe {
                let new = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
                Bound::from_owned_ptr_or_err(py, new)
            };
            let bytes = bytes.ok()?.cast_into::<PyBytes>().ok()?;
            Some(Self(bytes.unbind()))
        })
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Python::attach(|py| Self(PyBytes::new(py, bytes).unbind()))
    }

    fn as_mut(&mut self) -> &mut [u8] {
        Python::attach(|py| {
            let len = self.0.bind(py).as_bytes().len();
            // SAFETY: the object is a bytes object of that length. It is changed only while it is
            // being received, when nothing but this `&mut self` refers to it, and it is only
            // written to before all of it is.
            unsafe {
                let data = pyo3::ffi::PyBytes_AsString(self.0.as_ptr());
                std::slice::from_raw_parts_mut(data.cast::<u8>(), len)
            }
        })
    }
}

impl PersistentConnection {
    /// A connection that was just upgraded, and what came right behind the answer.
    pub fn new(
        socket: Socket,
        seed: [u8; 32],
        limits: UnaryLimits,
        reactor: Py<PyAny>,
        event_loop: Option<Py<PyAny>>,
        pump: Py<PyAny>,
        owner: Py<PyAny>,
    ) -> Self {
        Self {
            fd: socket.as_raw_fd(),
            pid: pid(),
            reactor,
            event_loop,
            pump,
            owner,
            turn: Turn::default(),
            inner: Mutex::new(Inner {
                socket: Some(socket),
                core: PersistentClient::new(seed, limits),
                output: Output::keeping(unary::KEPT_OUTPUT),
                head: BytesMut::new(),
                corked: false,
                loss: None,
                reading: false,
                writing: false,
                paused: None,
                pressing: false,
                reminding: false,
                waiters: VecDeque::new(),
            }),
        }
    }
}

#[pymethods]
impl PersistentConnection {
    /// Begins to read, as `take` does. `input` came right behind the upgrade's answer.
    fn start(slf: &Bound<'_, Self>, input: &[u8], work: &Bound<'_, PyList>) {
        let mut events = Vec::new();
        {
            let mut inner = slf.get().lock();
            inner.loss = inner.poll(&mut &input[..], &mut events).err();
        }
        Self::hand_out(slf, events, false, work);
    }

    /// Reads, and adds to `work` what is to be called for what came. When that has been, all of it
    /// and whatever it raised, `settle` is to be called.
    fn take(slf: &Bound<'_, Self>, work: &Bound<'_, PyList>) -> PyResult<()> {
        let this = slf.get();
        if this.is_elsewhere() {
            return Ok(());
        }
        let _inside = inside(slf.py());
        let event_loop = this.event_loop.as_ref().map(|it| it.bind(slf.py()));
        let may_wake = this.turn.begin(event_loop)?;
        let mut events = Vec::new();
        let lost = {
            let mut inner = this.lock();
            inner.loss = inner.read(&mut events).err();
            // The answers to several are better sent at once, when all of those who were woken
            // have had their turn.
            inner.corked |= events.len() > 1;
            inner.loss.is_some()
        };
        // On what is lost nobody is to make another call: they go on when that is known.
        Self::hand_out(slf, events, may_wake && !lost, work);
        Ok(())
    }

    /// Loses the connection, if that is what came last, or has the answers sent: now, if `now`, or
    /// after those who were woken have had their turn.
    fn settle(slf: &Bound<'_, Self>, now: bool) -> PyResult<()> {
        slf.get().turn.end();
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let py = slf.py();
        let _inside = inside(py);
        let (mut loss, mut corked) = (None, false);
        let changed = slf.get().changed(|inner| {
            loss = inner.loss.take();
            inner.corked &= !now;
            corked = inner.corked;
            inner.flush()
        });
        if let Some(loss) = loss {
            return Self::lose(slf, loss);
        }
        if corked {
            let flush = slf.getattr(intern!(py, "_flush"))?;
            let reactor = slf.get().reactor.bind(py);
            reactor.call_method1(intern!(py, "call_soon"), (flush,))?;
        }
        Self::after(slf, changed)
    }

    /// Calls the handler of `protocol` at a peer. Returns what to await for the reply and the call's
    /// id, or `None` if too much waits to be sent: wait for `room`.
    fn call<'py>(
        slf: &Bound<'py, Self>,
        peer: &Bound<'py, PyAny>,
        protocol: &str,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<Option<(Bound<'py, PyAny>, Bound<'py, PyBytes>)>> {
        let (py, this) = (slf.py(), slf.get());
        let _inside = inside(py);
        let peer = extract_peer_id(peer)?;
        let waiter = match &this.event_loop {
            Some(event_loop) => waiter(event_loop.bind(py))?,
            None => this.reactor.bind(py).call_method0(intern!(py, "promise"))?,
        };
        // Nothing runs while the bytes are borrowed: they may be those of a bytearray.
        let submitted = with_bytes(data, |bytes| {
            this.submit(Tail::of(data, bytes), |inner| {
                if inner.output.len() > unary::HIGH_WATER {
                    return Ok(None);
                }
                let Inner { core, head, .. } = inner;
                let (token, now) = (waiter.clone().unbind(), Instant::now());
                core.call(peer.as_bytes(), protocol, bytes.len(), token, now, head)
                    .map(Some)
            })
        })?;
        let id = Self::finish(slf, submitted)?;
        Ok(id.map(|id| (waiter, PyBytes::new(py, &id))))
    }

    /// Asks for calls of `protocol`: `token.set_result` is called when they come, or
    /// `token.set_exception`.
    fn add_handler(
        slf: &Bound<'_, Self>,
        protocol: &str,
        balanced: bool,
        token: Token,
    ) -> PyResult<()> {
        let submitted = slf.get().submit(Tail::None, |inner| {
            let Inner { core, head, .. } = inner;
            core.add_handler(protocol, balanced, token, head).map(Some)
        })?;
        Self::finish(slf, submitted).map(drop)
    }

    /// Asks for no more calls of `protocol`, as `add_handler` does.
    fn remove_handler(slf: &Bound<'_, Self>, protocol: &str, token: Token) -> PyResult<()> {
        let submitted = slf.get().submit(Tail::None, |inner| {
            let Inner { core, head, .. } = inner;
            core.remove_handler(protocol, token, head).map(Some)
        })?;
        Self::finish(slf, submitted).map(drop)
    }

    /// Gives up on what was called, and tells the daemon. Does nothing if its answer came, or in a
    /// forked child, whose parent it is that called.
    fn cancel(slf: &Bound<'_, Self>, id: CallId) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let mut token = None;
        Self::change(slf, |inner| {
            inner.send_head(|core, head| token = core.cancel(&id, Instant::now(), head))
        })?;
        drop(token);
        Ok(())
    }

    /// Replies to a call, unless its caller is gone.
    fn reply(slf: &Bound<'_, Self>, id: CallId, data: &Bound<'_, PyAny>) -> PyResult<()> {
        errors::check_fork(slf.get().pid, "connection")?;
        let changed = with_bytes(data, |bytes| {
            Ok(slf.get().changed(|inner| {
                inner.head.clear();
                let Inner { core, head, .. } = inner;
                let follows = core.reply(&id, bytes.len(), head);
                inner.send(if follows {
                    Tail::of(data, bytes)
                } else {
                    Tail::None
                })
            }))
        })?;
        Self::after(slf, changed)
    }

    /// Replies to a call with an error, unless its caller is gone.
    fn reply_error(slf: &Bound<'_, Self>, id: CallId, error: &str) -> PyResult<()> {
        errors::check_fork(slf.get().pid, "connection")?;
        Self::change(slf, |inner| {
            inner.send_head(|core, head| core.reply_error(&id, error, head))
        })
    }

    /// Changes the limits from the next message on.
    fn set_limits(slf: &Bound<'_, Self>, limits: Limits) -> PyResult<()> {
        Self::change(slf, |inner| {
            let hold = inner.core.limits().hold;
            inner.core.set_limits(limits.into());
            // A timer for another time looks in vain.
            inner.pressing &= inner.core.limits().hold == hold;
            Ok(())
        })
    }

    /// Whether a call would find room now. If not, `token.set_result` is called when there may be;
    /// who then does not call must call `pass_on`.
    fn room(&self, token: Token) -> bool {
        let mut inner = self.lock();
        if inner.socket.is_none() || inner.output.len() <= unary::HIGH_WATER {
            return true;
        }
        inner.waiters.push_back(token);
        false
    }

    /// Takes back `room`: that token waits no more, or if its turn has come, it is the next one's.
    fn pass_on(slf: &Bound<'_, Self>, token: Token) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let (waited, chores) = {
            let mut inner = slf.get().lock();
            let place = inner.waiters.iter().position(|waiter| waiter.is(&token));
            match place.and_then(|place| inner.waiters.remove(place)) {
                None => (None, inner.chores()),
                waited => (waited, Chores::default()),
            }
        };
        drop(waited);
        Self::run(slf, chores)
    }

    /// Closes the connection. In a forked child only the descriptor is closed.
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            let socket = slf.get().lock().socket.take();
            drop(socket);
            return Ok(());
        }
        // Go's daemon does not tell the peers that a client left: callers would wait for ever, and
        // handlers be at work for nobody. What the socket does not take at once cannot be helped.
        let _ = Self::change(slf, |inner| {
            inner.corked = false;
            inner
                .send_head(|core, head| core.shut_down("the handler's client was closed", head))?;
            inner.flush()
        });
        Self::lose(slf, Loss::Closed)
    }

    /// Whether the connection was closed or lost.
    #[getter]
    fn closed(&self) -> bool {
        self.lock().socket.is_none()
    }

    /// Whether what runs is called by the loop for what came over this connection.
    #[getter]
    fn in_turn(&self) -> bool {
        self.turn.is_here()
    }

    /// How many answers are awaited.
    #[getter]
    fn pending(&self) -> usize {
        self.lock().core.pending()
    }

    /// How many incoming calls are at work.
    #[getter]
    fn unanswered(&self) -> usize {
        self.lock().core.unanswered()
    }

    fn _on_writable(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::change(slf, Inner::flush)
    }

    fn _flush(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::change(slf, |inner| {
            inner.corked = false;
            inner.flush()
        })
    }

    fn _press_on(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::change(slf, |inner| {
            inner.pressing = false;
            if inner.hold_left() == Some(Duration::ZERO) {
                inner.core.stop_back_pressure();
                // Output that cannot be sent may still keep it from reading.
                inner.paused = Some(Instant::now());
            }
            Ok(())
        })
    }

    fn _remind(slf: &Bound<'_, Self>) -> PyResult<()> {
        Self::change(slf, |inner| {
            inner.reminding = false;
            inner.send_head(|core, head| core.repeat_cancels(Instant::now(), head))
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.reactor)?;
        visit.call(&self.event_loop)?;
        visit.call(&self.pump)?;
        visit.call(&self.owner)?;
        if let Ok(inner) = self.inner.try_lock() {
            for token in inner.core.tokens().chain(&inner.waiters) {
                visit.call(token)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let tokens = match self.inner.try_lock() {
            Ok(mut inner) => (
                inner.core.take_pending(),
                std::mem::take(&mut inner.waiters),
            ),
            Err(_) => return,
        };
        drop(tokens);
    }
}

impl PersistentConnection {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is a forked child of the process that the connection belongs to.
    fn is_elsewhere(&self) -> bool {
        pid() != self.pid
    }

    /// Sends the head that `encode` makes and `tail`, for `finish` to go on with.
    fn submit(
        &self,
        tail: Tail<'_, '_>,
        encode: impl FnOnce(&mut Inner) -> Result<Option<CallId>, Error>,
    ) -> PyResult<Submitted> {
        errors::check_fork(self.pid, "connection")?;
        let mut inner = self.lock();
        if inner.socket.is_none() {
            drop(inner); // before the exception is made
            let words = "the persistent connection is closed";
            return Err(errors::connection_gone(words));
        }
        inner.head.clear();
        let (mut forgotten, mut sent) = (None, Ok(None));
        let encoded = encode(&mut inner);
        if let Ok(Some(id)) = encoded {
            sent = inner.send(tail).map(|()| Some(id));
            if sent.is_err() {
                forgotten = inner.core.forget(&id);
            }
        }
        Ok(Submitted {
            id: sent,
            too_large: encoded.err(),
            // Also if nothing was sent: somebody else may wait for the room.
            chores: inner.chores(),
            _forgotten: forgotten,
        })
    }

    /// Does what follows from `submit`. If this fails, nothing was carried out.
    fn finish(slf: &Bound<'_, Self>, submitted: Submitted) -> PyResult<Option<CallId>> {
        Self::run(slf, submitted.chores)?;
        if let Some(error) = submitted.too_large {
            return Err(errors::too_large(slf.py(), &error));
        }
        match submitted.id {
            Ok(id) => Ok(id),
            Err(error) => {
                let words = format!("the connection was lost: {error}");
                let number = error.raw_os_error();
                Self::break_off(slf, error.into())?;
                Err(errors::connection_gone_of(&words, number))
            }
        }
    }

    /// Does something that may send, on a connection that may be gone or a parent's.
    fn change(slf: &Bound<'_, Self>, f: impl FnOnce(&mut Inner) -> io::Result<()>) -> PyResult<()> {
        if slf.get().is_elsewhere() {
            return Ok(());
        }
        let changed = slf.get().changed(f);
        Self::after(slf, changed)
    }

    fn changed(&self, f: impl FnOnce(&mut Inner) -> io::Result<()>) -> Result<Chores, Loss> {
        let mut inner = self.lock();
        if inner.socket.is_some() {
            f(&mut inner)?;
        }
        Ok(inner.chores())
    }

    fn after(slf: &Bound<'_, Self>, changed: Result<Chores, Loss>) -> PyResult<()> {
        match changed {
            Ok(chores) => Self::run(slf, chores),
            Err(loss) => Self::break_off(slf, loss),
        }
    }

    /// Loses a connection that cannot be written to, once what had come is handed out.
    fn break_off(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        let mut events = Vec::new();
        let _ = slf.get().lock().read(&mut events);
        // Handlers would be at work for nobody.
        events.retain(|event| !matches!(event, Event::Call { .. } | Event::Cancelled { .. }));
        Self::hand_out(slf, events, false, &PyList::empty(slf.py()));
        Self::lose(slf, loss)
    }

    /// Sets what is awaited, and adds to `work` what is to be called then: the tasks that wait, if
    /// they may go on `here`, and what takes calls.
    fn hand_out(slf: &Bound<'_, Self>, events: Vec<Event>, here: bool, work: &Bound<'_, PyList>) {
        let _inside = inside(slf.py());
        for event in events {
            hand_over(work, Self::work_of(slf, event, here));
        }
    }

    fn work_of(slf: &Bound<'_, Self>, event: Event, here: bool) -> PyResult<Option<Work>> {
        let py = slf.py();
        let (function, arguments) = match event {
            Event::Reply { token, payload } => {
                return tell(token.bind(py), Ok(payload.0.into_any()), here);
            }
            Event::Acknowledged { token } => return tell(token.bind(py), Ok(py.None()), here),
            Event::HandlerFailed { token, error } => {
                let error = errors::made::<P2PHandlerError>(py, &error);
                return tell(token.bind(py), Err(error), here);
            }
            Event::Refused { token, error } => {
                return tell(token.bind(py), Err(errors::refused(py, &error)), here);
            }
            Event::InvalidReply { token, error } => {
                let words = format!("the peer's daemon sent no reply: {error}");
                let error = errors::made::<ProtocolViolation>(py, &words);
                return tell(token.bind(py), Err(error), here);
            }
            Event::Oversized { token, error } => {
                return tell(token.bind(py), Err(errors::too_large(py, &error)), here);
            }
            Event::Skipped { error } => {
                let arguments = (slf, error.to_string()).into_pyobject(py)?;
                (intern!(py, "on_skipped"), arguments)
            }
            Event::Rejected { id, reason } => {
                Self::change(slf, |inner| {
                    inner.send_head(|core, head| core.refuse(&id, &reason, head))
                })?;
                return Ok(None);
            }
            Event::Call {
                id,
                peer,
                protocol,
                payload,
            } => {
                let id = PyBytes::new(py, &id);
                let arguments = (slf, id, protocol, &peer[..], payload.0).into_pyobject(py)?;
                (intern!(py, "on_call"), arguments)
            }
            Event::Cancelled { id } => {
                let arguments = (slf, PyBytes::new(py, &id)).into_pyobject(py)?;
                (intern!(py, "on_cancelled"), arguments)
            }
        };
        let Some(owner) = Self::owner(slf)? else {
            return Ok(None);
        };
        let function = owner.getattr(function)?.unbind();
        Ok(Some((None, function, arguments.into_any().unbind())))
    }

    fn owner<'py>(slf: &Bound<'py, Self>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let owner = slf.get().owner.bind(slf.py()).call0()?;
        Ok((!owner.is_none()).then_some(owner))
    }

    /// Ends the connection: everything that is awaited fails now.
    fn lose(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        let py = slf.py();
        let _inside = inside(py);
        let this = slf.get();
        let (socket, pending, waiters, output) = {
            let mut inner = this.lock();
            let Some(socket) = inner.socket.take() else {
                return Ok(());
            };
            (
                socket,
                inner.core.take_pending(),
                std::mem::take(&mut inner.waiters),
                std::mem::take(&mut inner.output),
            )
        };
        drop(output);
        let reactor = this.reactor.bind(py);
        let mut outcome = reactor
            .call_method1(intern!(py, "closing"), (this.fd,))
            .map(drop);
        let ended = reactor.getattr(intern!(py, "ended"));
        match loss {
            // What was sent last must not be overtaken by a reset.
            Loss::Closed => socket.close(),
            _ => socket.end(),
        }
        if ended.and_then(|ended| ended.is_truthy()).unwrap_or(true) {
            // A loop that is no more can wake nobody.
            return outcome;
        }
        for token in pending {
            outcome = outcome.and(tell(token.bind(py), Err(loss.to_err(py)), false).map(drop));
        }
        for token in waiters {
            outcome = outcome.and(tell(token.bind(py), Ok(py.None()), false).map(drop));
        }
        if let Some(owner) = Self::owner(slf)? {
            let told = owner.call_method1(intern!(py, "on_lost"), (slf, loss.to_err(py)));
            outcome = outcome.and(told.map(drop));
        }
        outcome
    }

    fn run(slf: &Bound<'_, Self>, chores: Chores) -> PyResult<()> {
        let py = slf.py();
        let _inside = inside(py);
        let this = slf.get();
        let reactor = this.reactor.bind(py);
        let fd = this.fd;
        // As in `Pipeline::run`: its number may be another file's by now.
        let adds = chores.add_reader || chores.add_writer;
        let is_open = !adds || this.lock().socket.is_some();
        if chores.add_reader && is_open {
            reactor.call_method1(intern!(py, "add_reader"), (fd, &this.pump, slf))?;
        }
        if chores.remove_reader {
            reactor.call_method1(intern!(py, "remove_reader"), (fd,))?;
        }
        if chores.add_writer && is_open {
            let callback = slf.getattr(intern!(py, "_on_writable"))?;
            reactor.call_method1(intern!(py, "add_writer"), (fd, callback))?;
        }
        if chores.remove_writer {
            reactor.call_method1(intern!(py, "remove_writer"), (fd,))?;
        }
        let remind_later = chores.remind_later.then_some(unary::CANCEL_INTERVAL);
        for (after, callback) in [
            (chores.press_on_later, intern!(py, "_press_on")),
            (remind_later, intern!(py, "_remind")),
        ] {
            if let Some(after) = after {
                let callback = slf.getattr(callback)?;
                reactor.call_method1(intern!(py, "call_later"), (after.as_secs_f64(), callback))?;
            }
        }
        if let Some(token) = chores.wake {
            tell(token.bind(py), Ok(py.None()), false)?;
        }
        Ok(())
    }
}

impl Inner {
    /// Sends what `encode` makes, if anything, which has no payload.
    fn send_head(
        &mut self,
        encode: impl FnOnce(&mut PersistentClient<Token, PyPayload>, &mut BytesMut),
    ) -> io::Result<()> {
        self.head.clear();
        encode(&mut self.core, &mut self.head);
        self.send(Tail::None)
    }

    /// Sends the head that was encoded, if any, and its tail; later, what cannot be now.
    fn send(&mut self, tail: Tail<'_, '_>) -> io::Result<()> {
        let (head, payload) = (&self.head[..], tail.as_bytes());
        if head.is_empty() {
            return Ok(());
        }
        let mut sent = 0;
        if let (Some(socket), false, true) = (&self.socket, self.corked, self.output.is_empty()) {
            sent = socket.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)])?;
        }
        self.output.push_copied(&head[sent.min(head.len())..]);
        let sent = sent.saturating_sub(head.len());
        match tail {
            Tail::None => {}
            Tail::Shared(data) => self.output.push_shared(data.clone().into(), sent),
            Tail::Borrowed(bytes) => self.output.push_copied(&bytes[sent..]),
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some(socket) = self.socket.as_ref().filter(|_| !self.corked) else {
            return Ok(());
        };
        while !self.output.is_empty() {
            let sent = socket.write_vectored(&self.output.slices())?;
            if sent == 0 {
                break;
            }
            self.output.sent(sent);
        }
        Ok(())
    }

    /// Reads what is there, within the bounds of a turn.
    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), Loss> {
        let mut budget = unary::READ_BUDGET;
        with_scratch(|scratch| loop {
            let Some(socket) = &self.socket else {
                return Ok(());
            };
            let (room, wanted, read) = match self.core.payload_buffer() {
                Some(room) => {
                    let (len, behind) = (room.len(), &mut scratch[..unary::LOOK_AHEAD]);
                    (
                        len,
                        len + unary::LOOK_AHEAD,
                        socket.read_both(room, behind)?,
                    )
                }
                None => (
                    0,
                    unary::READ_SIZE,
                    socket.read(&mut scratch[..unary::READ_SIZE])?,
                ),
            };
            let Some(count) = read else {
                return Ok(());
            };
            if count == 0 {
                return Err(Loss::Protocol(self.core.end_of_file()));
            }
            self.core.payload_filled(count.min(room));
            self.poll(&mut &scratch[..count.saturating_sub(room)], events)?;
            budget = budget.saturating_sub(count);
            if count < wanted || budget == 0 || !self.wants_input() {
                return Ok(());
            }
        })
    }

    fn poll(&mut self, input: &mut &[u8], events: &mut Vec<Event>) -> Result<(), Loss> {
        while let Some(event) = self.core.poll(input).map_err(Loss::Protocol)? {
            events.push(event);
        }
        Ok(())
    }

    fn wants_input(&self) -> bool {
        self.core.wants_input() && self.output.len() <= unary::MAX_OUTPUT
    }

    /// How long peers are held back yet, if nothing is read and that is to end.
    fn hold_left(&self) -> Option<Duration> {
        let hold = self.core.limits().hold?;
        Some(hold.saturating_sub(self.paused?.elapsed()))
    }

    /// What the event loop has to be told after a change.
    fn chores(&mut self) -> Chores {
        let mut chores = Chores::default();
        if self.socket.is_none() {
            return chores;
        }
        let read = self.wants_input();
        if read != self.reading {
            self.reading = read;
            chores.add_reader = read;
            chores.remove_reader = !read;
            self.paused = (!read).then(Instant::now);
        }
        let write = !self.output.is_empty() && !self.corked;
        if write != self.writing {
            self.writing = write;
            chores.add_writer = write;
            chores.remove_writer = !write;
        }
        // Output that cannot be sent keeps it from reading, too, and no timer ends that.
        if !self.pressing && !self.core.wants_input() {
            chores.press_on_later = self.hold_left();
            self.pressing = chores.press_on_later.is_some();
        }
        if !self.reminding && self.core.has_unconfirmed_cancels() {
            self.reminding = true;
            chores.remind_later = true;
        }
        if self.output.len() <= unary::LOW_WATER {
            chores.wake = self.waiters.pop_front();
        }
        chores
    }
}

/// What follows the head of a frame.
enum Tail<'a, 'py> {
    None,
    /// A bytes object, which can be kept.
    Shared(&'a Bound<'py, PyBytes>),
    /// Something else, which may change.
    Borrowed(&'a [u8]),
}

impl<'a, 'py> Tail<'a, 'py> {
    fn of(data: &'a Bound<'py, PyAny>, bytes: &'a [u8]) -> Self {
        match data.cast_exact::<PyBytes>() {
            // Not of a subclass: dropping one could run Python.
            Ok(data) => Tail::Shared(data),
            Err(_) => Tail::Borrowed(bytes),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Tail::None => &[],
            Tail::Shared(data) => data.as_bytes(),
            Tail::Borrowed(bytes) => bytes,
        }
    }
}
