//! A persistent connection for unary calls: the protocol's state machine, driven by callbacks of the
//! event loop. `persistent.py` opens the connection, and receives the incoming calls.

mod payload;
mod state;

use super::buffer::with_bytes;
use super::channel::Tail;
use super::driver::{self, lock, Driven, DrivenState, Driver};
use super::errors::{self, Loss, P2PHandlerError, ProtocolViolation};
use super::future;
use super::peer_id::extract_peer_id;
use super::shutdown_guard::enter;
use super::socket::Socket;
use super::wake::WakeUp;
use p2pd_protocol::unary::{self, CallId};
use p2pd_protocol::{Error, UnaryLimits};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use pyo3::{intern, PyTraverseError, PyVisit};
use state::{Event, FollowUp, State, Token};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A persistent connection to the daemon.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct PersistentConnection {
    driver: Driver,
    on_readable: Py<PyAny>,
    /// A weak reference to the object with `on_call`, `on_cancelled`, `on_skipped` and `on_lost`.
    owner: Py<PyAny>,
    state: Mutex<State>,
}

/// The result of sending a message.
struct Submitted {
    /// `None` if the output has no room.
    id: io::Result<Option<CallId>>,
    too_large: Option<Error>,
    follow_up: FollowUp,
    /// Must not be dropped under the lock.
    _forgotten: Option<Token>,
}

/// The limits, in the order in which `unary.py` passes them:
/// - the largest message to send, in bytes
/// - the largest message to receive, in bytes
/// - the number of incoming calls in progress
/// - the total size of their payloads, in bytes
/// - how long reading may pause because of the last two, in seconds
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

impl PersistentConnection {
    /// A connection that was just upgraded.
    pub fn new(
        socket: Socket,
        seed: [u8; 32],
        limits: UnaryLimits,
        event_loop: &Bound<'_, PyAny>,
        on_readable: Py<PyAny>,
        owner: Py<PyAny>,
    ) -> Self {
        Self {
            driver: Driver::new(event_loop, socket.as_raw_fd()),
            on_readable,
            owner,
            state: Mutex::new(State::new(socket, seed, limits)),
        }
    }
}

#[pymethods]
impl PersistentConnection {
    /// Acts as the first `read`, of `input` that arrived together with the reply to the upgrade.
    fn start(slf: &Bound<'_, Self>, input: &[u8], ready: &Bound<'_, PyList>) {
        let _guard = enter(slf.py());
        let mut events = Vec::new();
        lock(slf.get()).start(input, &mut events);
        driver::handle_all(slf, events, false, ready);
    }

    /// Reads messages. Appends the calls to make to `ready`; `flush` must follow.
    fn read(slf: &Bound<'_, Self>, ready: &Bound<'_, PyList>) -> PyResult<()> {
        driver::read(slf, ready)
    }

    /// Sends unsent messages: at once if `now`, else after the woken tasks have run.
    fn flush(slf: &Bound<'_, Self>, now: bool) -> PyResult<()> {
        driver::flush(slf, now)
    }

    /// Calls the handler of `protocol` at a peer. Returns the future of the reply and the call's id, or
    /// `None` if the output is full: the caller must wait for room.
    fn call<'py>(
        slf: &Bound<'py, Self>,
        peer: &Bound<'py, PyAny>,
        protocol: &str,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<Option<(Bound<'py, PyAny>, Bound<'py, PyBytes>)>> {
        let (py, this) = (slf.py(), slf.get());
        let _guard = enter(py);
        let peer = extract_peer_id(peer)?;
        let future = this.driver.create_future(py)?;
        // No Python runs while the bytes are borrowed: they may be those of a bytearray.
        let submitted = with_bytes(data, |bytes| {
            this.submit(Tail::of(data, bytes), |state| {
                if state.channel.unsent() > unary::HIGH_WATER {
                    return Ok(None);
                }
                let State { core, head, .. } = state;
                let (token, now) = (future.clone().unbind(), Instant::now());
                core.call(peer.as_bytes(), protocol, bytes.len(), token, now, head)
                    .map(Some)
            })
        })?;
        let id = Self::finish(slf, submitted)?;
        Ok(id.map(|id| (future, PyBytes::new(py, &id))))
    }

    /// Registers a handler of `protocol` with the daemon. Calls `token.set_result` or
    /// `token.set_exception` when the daemon answers.
    fn add_handler(
        slf: &Bound<'_, Self>,
        protocol: &str,
        balanced: bool,
        token: Token,
    ) -> PyResult<()> {
        let _guard = enter(slf.py());
        let submitted = slf.get().submit(Tail::None, |state| {
            let State { core, head, .. } = state;
            core.add_handler(protocol, balanced, token, head).map(Some)
        })?;
        Self::finish(slf, submitted).map(drop)
    }

    /// Unregisters the handler of `protocol`. Uses `token` as `add_handler` does.
    fn remove_handler(slf: &Bound<'_, Self>, protocol: &str, token: Token) -> PyResult<()> {
        let _guard = enter(slf.py());
        let submitted = slf.get().submit(Tail::None, |state| {
            let State { core, head, .. } = state;
            core.remove_handler(protocol, token, head).map(Some)
        })?;
        Self::finish(slf, submitted).map(drop)
    }

    /// Cancels a call, unless its reply has arrived. Does nothing in a forked child, since the call
    /// belongs to the parent.
    fn cancel(slf: &Bound<'_, Self>, id: CallId) -> PyResult<()> {
        let mut token = None;
        driver::change(slf, |state| {
            state.send_head(|core, head| token = core.cancel(&id, Instant::now(), head))?;
            Ok(())
        })?;
        drop(token);
        Ok(())
    }

    /// Replies to a call, unless it was cancelled.
    fn reply(slf: &Bound<'_, Self>, id: CallId, data: &Bound<'_, PyAny>) -> PyResult<()> {
        slf.get().driver.check_fork("connection")?;
        let changed = with_bytes(data, |bytes| {
            Ok(driver::change_state(slf.get(), |state| {
                state.head.clear();
                let State { core, head, .. } = state;
                let follows = core.reply(&id, bytes.len(), head);
                state.send(if follows {
                    Tail::of(data, bytes)
                } else {
                    Tail::None
                })?;
                Ok(())
            }))
        })?;
        driver::after(slf, changed)
    }

    /// Replies to a call with an error, unless it was cancelled.
    fn reply_error(slf: &Bound<'_, Self>, id: CallId, error: &str) -> PyResult<()> {
        slf.get().driver.check_fork("connection")?;
        driver::change(slf, |state| {
            state.send_head(|core, head| core.reply_error(&id, error, head))?;
            Ok(())
        })
    }

    /// Changes the limits, from the next message on.
    fn set_limits(slf: &Bound<'_, Self>, limits: Limits) -> PyResult<()> {
        driver::change(slf, |state| {
            let hold = state.core.limits().hold;
            state.core.set_limits(limits.into());
            // If the hold has changed, another timer is needed. The old one does nothing before the new
            // hold is over.
            state.hold_timer &= state.core.limits().hold == hold;
            Ok(())
        })
    }

    /// Whether the output has room for a call. If not, calls `token.set_result` as soon as it has. A
    /// caller that then makes no call must call `pass_on`.
    fn has_room(&self, token: Token) -> bool {
        let mut state = lock(self);
        if !state.channel.is_open() || state.channel.unsent() <= unary::HIGH_WATER {
            return true;
        }
        state.callers.push_back(token);
        false
    }

    /// Withdraws the token of `has_room`: the caller no longer waits, or leaves the room to the next caller.
    fn pass_on(slf: &Bound<'_, Self>, token: Token) -> PyResult<()> {
        let _guard = enter(slf.py());
        if slf.get().driver.is_forked() {
            return Ok(());
        }
        let (waited, follow_up) = {
            let mut state = lock(slf.get());
            let place = state.callers.iter().position(|caller| caller.is(&token));
            match place.and_then(|place| state.callers.remove(place)) {
                None => (None, DrivenState::follow_up(&mut *state)),
                waited => (waited, FollowUp::default()),
            }
        };
        drop(waited);
        Self::run(slf, follow_up)
    }

    /// Closes the connection. In a forked child only the descriptor is closed.
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        // The Go daemon does not notify peers that a client has left: their calls, and our handlers,
        // would never end. Bytes that the socket does not accept at once are lost.
        let _ = driver::change(slf, |state| {
            state.channel.uncork();
            state
                .send_head(|core, head| core.shut_down("the handler's client was closed", head))?;
            state.channel.flush()?;
            Ok(())
        });
        driver::close(slf)
    }

    /// Whether the connection was closed or lost.
    #[getter]
    fn closed(&self) -> bool {
        !lock(self).channel.is_open()
    }

    /// Whether the caller is a task that a message over this connection has resumed.
    #[getter]
    fn in_wake_batch(&self) -> bool {
        self.driver.in_wake_batch()
    }

    /// Number of calls and requests that are not answered yet.
    #[getter]
    fn pending(&self) -> usize {
        lock(self).core.pending()
    }

    /// Number of incoming calls that are being handled.
    #[getter]
    fn unanswered(&self) -> usize {
        lock(self).core.unanswered()
    }

    fn _on_writable(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::change(slf, DrivenState::flush)
    }

    fn _uncork(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::uncork(slf)
    }

    fn _end_hold(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::change(slf, |state| {
            state.hold_timer = false;
            if state.hold_left() == Some(Duration::ZERO) {
                state.core.stop_back_pressure();
                // Unsent output may still stop reading.
                state.paused = Some(Instant::now());
            }
            Ok(())
        })
    }

    fn _repeat_cancels(slf: &Bound<'_, Self>) -> PyResult<()> {
        driver::change(slf, |state| {
            state.cancel_timer = false;
            state.send_head(|core, head| core.repeat_cancels(Instant::now(), head))?;
            Ok(())
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.driver.traverse(&visit)?;
        visit.call(&self.on_readable)?;
        visit.call(&self.owner)?;
        if let Ok(state) = self.state.try_lock() {
            for token in state.core.tokens().chain(&state.callers) {
                visit.call(token)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let tokens = match self.state.try_lock() {
            Ok(mut state) => (
                state.core.take_pending(),
                std::mem::take(&mut state.callers),
            ),
            Err(_) => return,
        };
        drop(tokens);
    }
}

impl Driven for PersistentConnection {
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
        let (function, arguments) = match event {
            Event::Reply { token, payload } => {
                let payload = payload.into_bytes().into_any();
                return future::complete(token.bind(py), Ok(payload), in_place);
            }
            Event::Acknowledged { token } => {
                return future::complete(token.bind(py), Ok(py.None()), in_place);
            }
            Event::HandlerFailed { token, error } => {
                let error = errors::made::<P2PHandlerError>(py, &error);
                return future::complete(token.bind(py), Err(error), in_place);
            }
            Event::Refused { token, error } => {
                let error = errors::refused(py, &error);
                return future::complete(token.bind(py), Err(error), in_place);
            }
            Event::InvalidReply { token, error } => {
                let message = format!("the peer's daemon sent no reply: {error}");
                let error = errors::made::<ProtocolViolation>(py, &message);
                return future::complete(token.bind(py), Err(error), in_place);
            }
            Event::Oversized { token, error } => {
                let error = errors::too_large(py, &error);
                return future::complete(token.bind(py), Err(error), in_place);
            }
            Event::Skipped { error } => {
                let arguments = (slf, error.to_string()).into_pyobject(py)?;
                (intern!(py, "on_skipped"), arguments)
            }
            Event::Rejected { id, reason } => {
                driver::change(slf, |state| {
                    state.send_head(|core, head| core.refuse(&id, &reason, head))?;
                    Ok(())
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
                let payload = payload.into_bytes();
                let arguments = (slf, id, protocol, &peer[..], payload).into_pyobject(py)?;
                (intern!(py, "on_call"), arguments)
            }
            Event::Cancelled { id } => {
                let arguments = (slf, PyBytes::new(py, &id)).into_pyobject(py)?;
                (intern!(py, "on_cancelled"), arguments)
            }
        };
        let Some(owner) = slf.get().owner(py)? else {
            return Ok(None);
        };
        let function = owner.getattr(function)?.unbind();
        Ok(Some((None, function, arguments.into_any().unbind())))
    }

    fn run(slf: &Bound<'_, Self>, follow_up: FollowUp) -> PyResult<()> {
        let py = slf.py();
        driver::register(slf, follow_up.registrations)?;
        let cancel_later = follow_up.cancel_later.then_some(unary::CANCEL_INTERVAL);
        for (delay, callback) in [
            (follow_up.hold_later, intern!(py, "_end_hold")),
            (cancel_later, intern!(py, "_repeat_cancels")),
        ] {
            if let Some(delay) = delay {
                slf.get()
                    .driver
                    .call_later(delay, &slf.getattr(callback)?)?;
            }
        }
        if let Some(caller) = follow_up.caller {
            future::complete(caller.bind(py), Ok(py.None()), false)?;
        }
        Ok(())
    }

    fn lose(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        let (py, this) = (slf.py(), slf.get());
        let (socket, registered, pending, callers) = {
            let mut state = lock(this);
            let Some(socket) = state.channel.close() else {
                return Ok(());
            };
            (
                socket,
                std::mem::take(&mut state.registered),
                state.core.take_pending(),
                std::mem::take(&mut state.callers),
            )
        };
        // A reset must not overtake the last message sent.
        let gracefully = matches!(loss, Loss::Closed);
        let (can_wake, mut outcome) = this.driver.close(py, socket, registered, gracefully);
        if !can_wake {
            return outcome;
        }
        for token in pending {
            let error = Err(loss.to_err(py));
            outcome = outcome.and(future::complete(token.bind(py), error, false).map(drop));
        }
        for caller in callers {
            let done = future::complete(caller.bind(py), Ok(py.None()), false);
            outcome = outcome.and(done.map(drop));
        }
        if let Some(owner) = this.owner(py)? {
            let told = owner.call_method1(intern!(py, "on_lost"), (slf, loss.to_err(py)));
            outcome = outcome.and(told.map(drop));
        }
        outcome
    }

    /// Handles the messages that have arrived, then loses the connection.
    fn lose_writing(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        let mut events = Vec::new();
        let _ = DrivenState::read(&mut *lock(slf.get()), &mut events);
        // Incoming calls are dropped, since a handler's reply could not be sent.
        events.retain(|event| !matches!(event, Event::Call { .. } | Event::Cancelled { .. }));
        driver::handle_all(slf, events, false, &PyList::empty(slf.py()));
        Self::lose(slf, loss)
    }
}

impl PersistentConnection {
    fn owner<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let owner = self.owner.bind(py).call0()?;
        Ok((!owner.is_none()).then_some(owner))
    }

    /// Sends the head that `encode` writes, and `tail`. The caller must then call `finish`.
    fn submit(
        &self,
        tail: Tail<'_, '_>,
        encode: impl FnOnce(&mut State) -> Result<Option<CallId>, Error>,
    ) -> PyResult<Submitted> {
        self.driver.check_fork("connection")?;
        let mut state = lock(self);
        if !state.channel.is_open() {
            drop(state); // before the exception is made
            let message = "the persistent connection is closed";
            return Err(errors::connection_gone(message));
        }
        state.head.clear();
        let (mut forgotten, mut sent) = (None, Ok(None));
        let encoded = encode(&mut state);
        if let Ok(Some(id)) = encoded {
            sent = state.send(tail).map(|()| Some(id));
            if sent.is_err() {
                forgotten = state.core.forget(&id);
            }
        }
        Ok(Submitted {
            id: sent,
            too_large: encoded.err(),
            // Even if nothing was sent: another caller may wait for the room.
            follow_up: DrivenState::follow_up(&mut *state),
            _forgotten: forgotten,
        })
    }

    /// Carries out the loop operations after `submit`. If this raises, the message was not sent.
    fn finish(slf: &Bound<'_, Self>, submitted: Submitted) -> PyResult<Option<CallId>> {
        Self::run(slf, submitted.follow_up)?;
        if let Some(error) = submitted.too_large {
            return Err(errors::too_large(slf.py(), &error));
        }
        match submitted.id {
            Ok(id) => Ok(id),
            Err(error) => {
                let message = format!("the connection was lost: {error}");
                let number = error.raw_os_error();
                Self::lose_writing(slf, error.into())?;
                Err(errors::connection_gone_of(&message, number))
            }
        }
    }
}
