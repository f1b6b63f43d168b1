//! Drives a file descriptor with callbacks of an event loop. A `Driver` registers the callbacks, creates
//! and completes futures, and detects a fork or a closed loop. Each connection type implements `Driven`,
//! which adds how input is decoded and which futures the events complete.
//!
//! No Python code runs while a connection's state is locked, since it could use the same connection.
//! Under the lock, events and errors are Rust values.

use super::channel::Channel;
use super::errors::{self, Loss};
use super::fork_guard::pid;
use super::future;
use super::shutdown_guard::enter;
use super::socket::Socket;
use super::wake::{LoopKind, WakeBatch, WakeUp};
use pyo3::prelude::*;
use pyo3::pyclass::boolean_struct::True;
use pyo3::types::PyList;
use pyo3::{intern, PyClass, PyTraverseError, PyVisit};
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A file descriptor on its event loop.
pub struct Driver {
    /// asyncio's or uvloop's loop, or p2pclient_rs.reactor.TrioReactor, which has the same methods.
    event_loop: Py<PyAny>,
    kind: &'static LoopKind,
    fd: RawFd,
    pid: u32,
    batch: WakeBatch,
}

/// What a loop watches a descriptor for.
#[derive(Clone, Copy)]
pub enum Way {
    Read,
    Write,
}

/// Which callbacks are registered with the loop. Part of a locked state.
#[derive(Default, Clone, Copy)]
pub struct Registered {
    pub reader: bool,
    pub writer: bool,
}

/// Callbacks to register or to remove.
#[derive(Default, Clone, Copy)]
pub struct Registrations {
    /// Whether to add the callback or remove it.
    reader: Option<bool>,
    writer: Option<bool>,
}

impl Registered {
    /// Records which callbacks are wanted. Returns the changes, which the caller makes after it has
    /// released the lock.
    pub fn update(&mut self, reader: bool, writer: bool) -> Registrations {
        let change = |registered: &mut bool, wanted| {
            let before = std::mem::replace(registered, wanted);
            (before != wanted).then_some(wanted)
        };
        Registrations {
            reader: change(&mut self.reader, reader),
            writer: change(&mut self.writer, writer),
        }
    }
}

impl Registrations {
    /// Whether there is nothing to change.
    pub fn is_empty(self) -> bool {
        self.reader.is_none() && self.writer.is_none()
    }

    fn adds(self) -> bool {
        self.reader == Some(true) || self.writer == Some(true)
    }
}

/// Counts operations that found their result ready. After 16 in a row, the next one must wait for the
/// event loop.
#[derive(Default)]
pub struct Attempts(u8);

impl Attempts {
    const MAX: u8 = 16;

    /// Whether to try another operation at once.
    pub fn another(&mut self) -> bool {
        let may = self.0 < Self::MAX;
        self.0 += u8::from(may);
        may
    }

    /// Resets the count, since the event loop has run other callbacks.
    pub fn start_over(&mut self) {
        self.0 = 0;
    }
}

impl Driver {
    pub fn new(event_loop: &Bound<'_, PyAny>, fd: RawFd) -> Self {
        Self {
            event_loop: event_loop.clone().unbind(),
            kind: LoopKind::of(event_loop),
            fd,
            pid: pid(),
            batch: WakeBatch::default(),
        }
    }

    /// Whether this process is a forked child. The descriptor and the loop belong to its parent.
    pub fn is_forked(&self) -> bool {
        pid() != self.pid
    }

    /// Raises `ForkedClientError` in a forked child.
    pub fn check_fork(&self, what: &str) -> PyResult<()> {
        errors::check_fork(self.pid, what)
    }

    pub fn create_future<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        future::create(self.event_loop.bind(py))
    }

    pub fn may_wake(&self, py: Python<'_>) -> PyResult<bool> {
        self.kind.may_wake(self.event_loop.bind(py))
    }

    /// Completes a future. With `in_place`, appends the call that resumes its task to `ready`.
    pub fn complete(
        &self,
        future: &Bound<'_, PyAny>,
        outcome: PyResult<Py<PyAny>>,
        in_place: bool,
        ready: &Bound<'_, PyList>,
    ) {
        self.push(ready, future::complete(future, outcome, in_place));
    }

    /// Like `future::push`, but checks the first wake-up on this type of loop.
    pub fn push(&self, ready: &Bound<'_, PyList>, completed: PyResult<Option<WakeUp>>) {
        let event_loop = self.event_loop.bind(ready.py());
        let completed = completed.and_then(|wake_up| {
            let wake_up = wake_up.map(|wake_up| self.kind.until_proven(event_loop, wake_up));
            wake_up.transpose()
        });
        future::push(ready, completed);
    }

    /// Whether the caller is a task that this descriptor's callback has resumed.
    pub fn in_wake_batch(&self) -> bool {
        self.batch.is_here()
    }

    /// Registers `callback(argument)`, which the loop calls when the descriptor is ready.
    pub fn add(
        &self,
        way: Way,
        callback: &Bound<'_, PyAny>,
        argument: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = callback.py();
        let add = match way {
            Way::Read => intern!(py, "add_reader"),
            Way::Write => intern!(py, "add_writer"),
        };
        let event_loop = self.event_loop.bind(py);
        event_loop.call_method1(add, (self.fd, callback, argument))?;
        Ok(())
    }

    /// Removes a callback. Does nothing in a forked child that runs the loop on, since the loop's epoll
    /// instance is also the parent's.
    pub fn remove(&self, py: Python<'_>, way: Way) -> PyResult<()> {
        if self.is_forked() {
            return Ok(());
        }
        let remove = match way {
            Way::Read => intern!(py, "remove_reader"),
            Way::Write => intern!(py, "remove_writer"),
        };
        self.event_loop.bind(py).call_method1(remove, (self.fd,))?;
        Ok(())
    }

    /// Whether the loop was closed. A closed loop can neither watch descriptors nor resume tasks.
    pub fn loop_is_closed(&self, py: Python<'_>) -> PyResult<bool> {
        let event_loop = self.event_loop.bind(py);
        event_loop
            .call_method0(intern!(py, "is_closed"))?
            .is_truthy()
    }

    pub fn call_soon(&self, callback: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = callback.py();
        let event_loop = self.event_loop.bind(py);
        event_loop.call_method1(intern!(py, "call_soon"), (callback,))?;
        Ok(())
    }

    /// Does nothing if the loop is closed, as it may be when a finalizer runs.
    pub fn call_later(&self, delay: Duration, callback: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = callback.py();
        if !self.loop_is_closed(py)? {
            let arguments = (delay.as_secs_f64(), callback);
            let event_loop = self.event_loop.bind(py);
            event_loop.call_method1(intern!(py, "call_later"), arguments)?;
        }
        Ok(())
    }

    /// Removes a connection's callbacks and closes its socket. With `gracefully`, no reset overtakes the
    /// last bytes sent. Returns whether the loop can still resume tasks, and the first error.
    pub fn close(
        &self,
        py: Python<'_>,
        socket: Socket,
        registered: Registered,
        gracefully: bool,
    ) -> (bool, PyResult<()>) {
        let mut outcome = Ok(());
        let is_closed = self.loop_is_closed(py).unwrap_or_else(|error| {
            outcome = Err(error);
            true
        });
        if !is_closed {
            for (way, is_registered) in [
                (Way::Read, registered.reader),
                (Way::Write, registered.writer),
            ] {
                if is_registered {
                    outcome = outcome.and(self.remove(py, way));
                }
            }
        }
        if gracefully {
            socket.close();
        } else {
            socket.end();
        }
        (!is_closed, outcome)
    }

    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)
    }
}

/// A connection that is served by callbacks of an event loop. Callers of `handle`, `run` and `lose` hold a
/// `ShutdownGuard`.
pub trait Driven: PyClass<Frozen = True> + Sync {
    type State: DrivenState;

    fn driver(&self) -> &Driver;

    fn state(&self) -> &Mutex<Self::State>;

    /// `p2pclient_rs.driver.on_readable`, which the loop calls with this connection. That function calls
    /// `read`, makes the calls that are ready, and calls `flush`.
    fn on_readable(&self) -> &Py<PyAny>;

    /// Completes the future of an event, or returns a call that the caller must make for it.
    fn handle(
        slf: &Bound<'_, Self>,
        event: <Self::State as DrivenState>::Event,
        in_place: bool,
    ) -> PyResult<Option<WakeUp>>;

    /// Carries out the loop operations that follow from a change of the state.
    fn run(
        slf: &Bound<'_, Self>,
        follow_up: <Self::State as DrivenState>::FollowUp,
    ) -> PyResult<()>;

    /// Ends the connection: closes the socket and fails all futures.
    fn lose(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()>;

    /// Like `lose`, after a write has failed.
    fn lose_writing(slf: &Bound<'_, Self>, loss: Loss) -> PyResult<()> {
        Self::lose(slf, loss)
    }
}

/// The locked state of a connection.
pub trait DrivenState {
    /// A decoded message.
    type Event;
    /// Loop operations, carried out after the lock is released.
    type FollowUp;

    fn channel(&mut self) -> &mut Channel;

    /// Reads and decodes input, within the budget. Called by the loop.
    fn read(&mut self, events: &mut Vec<Self::Event>) -> Result<(), Loss>;

    /// Sends the unsent output, unless it is corked.
    fn flush(&mut self) -> Result<(), Loss>;

    /// Why reading has ended. Kept until all earlier events are handled.
    fn loss(&mut self) -> &mut Option<Loss>;

    fn follow_up(&mut self) -> Self::FollowUp;
}

/// Locks the state of a connection.
pub fn lock<C: Driven>(this: &C) -> MutexGuard<'_, C::State> {
    this.state().lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads input and handles its events. Appends the calls to make to `ready`. The caller makes them, then
/// calls `flush`, even if one has raised.
pub fn read<C: Driven>(slf: &Bound<'_, C>, ready: &Bound<'_, PyList>) -> PyResult<()> {
    let driver = slf.get().driver();
    if driver.is_forked() {
        return Ok(());
    }
    let _guard = enter(slf.py());
    // Called before reading: a signal handler can raise in `may_wake`, and input that was read would be
    // lost.
    let may_wake = driver.may_wake(slf.py())?;
    if may_wake {
        driver.batch.begin();
    } else {
        driver.batch.end();
    }
    let mut events = Vec::new();
    let lost = {
        let mut state = lock(slf.get());
        let loss = state.read(&mut events).err();
        if events.len() > 1 {
            // The resumed tasks are likely to send messages. Corking sends all of them in one write.
            state.channel().cork();
        }
        let lost = loss.is_some();
        *state.loss() = loss;
        lost
    };
    // If the connection is lost, tasks are resumed only after `flush` has closed it.
    handle_all(slf, events, may_wake && !lost, ready);
    Ok(())
}

/// Handles events. Appends the calls to make to `ready`. The caller holds a `ShutdownGuard`.
pub fn handle_all<C: Driven>(
    slf: &Bound<'_, C>,
    events: Vec<<C::State as DrivenState>::Event>,
    in_place: bool,
    ready: &Bound<'_, PyList>,
) {
    let driver = slf.get().driver();
    for event in events {
        driver.push(ready, C::handle(slf, event, in_place));
    }
}

/// Closes the connection if reading has failed. Otherwise sends the unsent output: at once if `now`,
/// else in the next iteration of the loop, after the woken tasks have run.
pub fn flush<C: Driven>(slf: &Bound<'_, C>, now: bool) -> PyResult<()> {
    let driver = slf.get().driver();
    driver.batch.end();
    if driver.is_forked() {
        return Ok(());
    }
    let _guard = enter(slf.py());
    let (mut read_failed, mut corked) = (false, false);
    let changed = change_state(slf.get(), |state| {
        if let Some(loss) = state.loss().take() {
            // Checked before anything changes: `lose` removes the callbacks that are registered now.
            read_failed = true;
            return Err(loss);
        }
        if now {
            state.channel().uncork();
        }
        corked = state.channel().is_corked();
        state.flush()
    });
    let outcome = match changed {
        Err(loss) if read_failed => C::lose(slf, loss),
        changed => after(slf, changed),
    };
    if corked {
        // Even if that raised: nothing else would send the corked output.
        let uncork = slf.as_any().getattr(intern!(slf.py(), "_uncork"));
        return outcome.and(uncork.and_then(|uncork| driver.call_soon(&uncork)));
    }
    outcome
}

/// Sends the corked output.
pub fn uncork<C: Driven>(slf: &Bound<'_, C>) -> PyResult<()> {
    change(slf, |state| {
        state.channel().uncork();
        state.flush()
    })
}

/// Changes the state of a connection. Does nothing if it is closed, or in a forked child.
pub fn change<C: Driven>(
    slf: &Bound<'_, C>,
    f: impl FnOnce(&mut C::State) -> Result<(), Loss>,
) -> PyResult<()> {
    if slf.get().driver().is_forked() {
        return Ok(());
    }
    let changed = change_state(slf.get(), f);
    after(slf, changed)
}

/// Closes a connection. In a forked child only the descriptor is closed.
pub fn close<C: Driven>(slf: &Bound<'_, C>) -> PyResult<()> {
    if slf.get().driver().is_forked() {
        let socket = lock(slf.get()).channel().close();
        drop(socket);
        return Ok(());
    }
    let _guard = enter(slf.py());
    C::lose(slf, Loss::Closed)
}

/// The result of `change_state`.
pub type Changed<C> = Result<<<C as Driven>::State as DrivenState>::FollowUp, Loss>;

/// Like `change`, but runs no Python code. The caller must then call `after`.
pub fn change_state<C: Driven>(
    this: &C,
    f: impl FnOnce(&mut C::State) -> Result<(), Loss>,
) -> Changed<C> {
    let mut state = lock(this);
    if state.channel().is_open() {
        f(&mut state)?;
    }
    Ok(state.follow_up())
}

/// Carries out the loop operations that follow from `change_state`.
pub fn after<C: Driven>(slf: &Bound<'_, C>, changed: Changed<C>) -> PyResult<()> {
    let _guard = enter(slf.py());
    match changed {
        Ok(follow_up) => C::run(slf, follow_up),
        Err(loss) => C::lose_writing(slf, loss),
    }
}

/// Registers and removes callbacks.
pub fn register<C: Driven>(slf: &Bound<'_, C>, registrations: Registrations) -> PyResult<()> {
    let (py, this) = (slf.py(), slf.get());
    let driver = this.driver();
    // Python code that ran since the state was unlocked may have closed the socket. Another file may
    // have its descriptor number by now.
    let may_add = !registrations.adds() || lock(this).channel().is_open();
    match registrations.reader {
        Some(true) if may_add => {
            driver.add(Way::Read, this.on_readable().bind(py), slf.as_any())?
        }
        Some(false) => driver.remove(py, Way::Read)?,
        _ => {}
    }
    match registrations.writer {
        Some(true) if may_add => {
            let callback = slf
                .as_any()
                .get_type()
                .getattr(intern!(py, "_on_writable"))?;
            driver.add(Way::Write, &callback, slf.as_any())?;
        }
        Some(false) => driver.remove(py, Way::Write)?,
        _ => {}
    }
    Ok(())
}
