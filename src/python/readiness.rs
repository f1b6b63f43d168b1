//! Waits until a descriptor is ready, with the callbacks of an asyncio or uvloop event loop.

use super::connection::{closed, ControlConnection};
use super::driver::{Attempts, Driver, Way};
use super::future;
use super::shutdown_guard::enter;
use super::stream::RawStream;
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// One descriptor on one event loop.
///
/// A callback stays registered while it may be needed again, since each `add_reader` costs a system
/// call. The loop calls the Python functions `on_readable` and `on_writable`, which make the calls that
/// `read_ready` and `write_ready` return. These resume the first waiting task in place (see `wake`).
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Readiness {
    driver: Driver,
    on_readable: Py<PyAny>,
    on_writable: Py<PyAny>,
    read: Mutex<Direction>,
    write: Mutex<Direction>,
}

/// The state of one direction, reading or writing.
#[derive(Default)]
struct Direction {
    registered: bool,
    /// Whether no task was waiting at the last event.
    idle: bool,
    closed: bool,
    /// The futures of waiting tasks, each with the number of unsent bytes at which it is completed.
    futures: Vec<(Py<PyAny>, usize)>,
    /// The stream whose unsent output is written when the descriptor is writable.
    flushing: Option<Flushing>,
    /// The connection whose reply is read when the descriptor is readable, and the future of the reply.
    reply: Option<(Py<ControlConnection>, Py<PyAny>)>,
    attempts: Attempts,
}

/// A stream with unsent output, and the object that must live until it is written.
struct Flushing {
    stream: Py<RawStream>,
    owner: Py<PyAny>,
}

#[pymethods]
impl Readiness {
    #[new]
    fn new(
        event_loop: &Bound<'_, PyAny>,
        fd: RawFd,
        on_readable: Py<PyAny>,
        on_writable: Py<PyAny>,
    ) -> Self {
        Self {
            driver: Driver::new(event_loop, fd),
            on_readable,
            on_writable,
            read: Mutex::default(),
            write: Mutex::default(),
        }
    }

    /// Returns a future, completed when the descriptor may be readable or `close` was called.
    fn readable(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Read, usize::MAX)
    }

    /// Returns a future, completed when the descriptor may be writable or `close` was called.
    fn writable(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Write, usize::MAX)
    }

    /// Writes the unsent output of a stream when the descriptor is writable. Keeps `owner` alive until
    /// that is done or has failed.
    fn flush_later(slf: &Bound<'_, Self>, stream: Py<RawStream>, owner: Py<PyAny>) -> PyResult<()> {
        {
            let mut direction = slf.get().direction(Way::Write);
            if direction.closed || direction.flushing.is_some() {
                return Ok(());
            }
            direction.flushing = Some(Flushing { stream, owner });
        }
        Self::register(slf, Way::Write)
    }

    /// Returns a future, completed when at most `mark` bytes of the stream given to `flush_later` are
    /// unsent, or writing failed, or `close` was called.
    fn drained(slf: &Bound<'_, Self>, mark: usize) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Write, mark)
    }

    /// Returns the future of the reply to the request that a connection has sent.
    fn answer(slf: &Bound<'_, Self>, connection: Py<ControlConnection>) -> PyResult<Py<PyAny>> {
        let py = slf.py();
        let _guard = enter(py);
        let this = slf.get();
        let future = this.driver.create_future(py)?;
        // A fast daemon has already replied, unless it is waiting for this CPU core.
        if this.direction(Way::Read).attempts.another() {
            if let Some(answer) = connection.get().step(py)? {
                future::complete(&future, Ok(answer), false)?;
                return Ok(future.unbind());
            }
        }
        let before = {
            let mut direction = this.direction(Way::Read);
            (!direction.closed).then(|| {
                direction.attempts.start_over();
                direction.idle = false;
                let reply = Some((connection, future.clone().unbind()));
                std::mem::replace(&mut direction.reply, reply)
            })
        };
        match before {
            Some(cancelled) => drop(cancelled),
            None => return Err(closed()),
        }
        Self::register(slf, Way::Read)?;
        Ok(future.unbind())
    }

    /// Appends the calls to make to `ready`, when the descriptor is readable.
    fn read_ready(&self, ready: &Bound<'_, PyList>) -> PyResult<()> {
        self.collect(ready, Way::Read)
    }

    /// Appends the calls to make to `ready`, when the descriptor is writable. `remove_idle_writer` must
    /// follow.
    fn write_ready(&self, ready: &Bound<'_, PyList>) -> PyResult<()> {
        self.collect(ready, Way::Write)
    }

    /// Removes the writer if no task waits for it: most sockets are writable all the time.
    fn remove_idle_writer(&self, py: Python<'_>) -> PyResult<()> {
        {
            let mut direction = self.direction(Way::Write);
            let busy = direction.flushing.is_some() || !direction.futures.is_empty();
            if busy || !std::mem::take(&mut direction.registered) {
                return Ok(());
            }
        }
        let _guard = enter(py);
        self.driver.remove(py, Way::Write)
    }

    /// Removes the callbacks and completes all futures. In a forked child it does neither, since the
    /// loop's epoll instance belongs to the parent.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let _guard = enter(py);
        if self.driver.is_forked() {
            for way in [Way::Read, Way::Write] {
                self.direction(way).closed = true;
            }
            return Ok(());
        }
        // A closed loop has no callbacks and resumes no tasks.
        let loop_is_closed = self.driver.loop_is_closed(py)?;
        for way in [Way::Read, Way::Write] {
            let (registered, futures, reply, _flushing) = {
                let mut direction = self.direction(way);
                direction.closed = true;
                (
                    std::mem::take(&mut direction.registered),
                    std::mem::take(&mut direction.futures),
                    direction.reply.take(),
                    direction.flushing.take(),
                )
            };
            if loop_is_closed {
                continue;
            }
            if registered {
                self.driver.remove(py, way)?;
            }
            for (future, _) in futures {
                future::complete(future.bind(py), Ok(py.None()), false)?;
            }
            if let Some((_, future)) = reply {
                future::complete(future.bind(py), Err(closed()), false)?;
                // The garbage collector may have closed the coroutine that awaited the reply.
                future::mark_retrieved(future.bind(py));
            }
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.driver.traverse(&visit)?;
        visit.call(&self.on_readable)?;
        visit.call(&self.on_writable)?;
        for direction in [&self.read, &self.write] {
            if let Ok(direction) = direction.try_lock() {
                for (future, _) in &direction.futures {
                    visit.call(future)?;
                }
                if let Some(flushing) = &direction.flushing {
                    visit.call(&flushing.owner)?;
                }
                if let Some((_, future)) = &direction.reply {
                    visit.call(future)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        for direction in [&self.read, &self.write] {
            let held = direction.try_lock().map(|mut direction| {
                let futures = std::mem::take(&mut direction.futures);
                let reply = direction.reply.take();
                (futures, reply, direction.flushing.take())
            });
            drop(held);
        }
    }
}

impl Readiness {
    fn direction(&self, way: Way) -> MutexGuard<'_, Direction> {
        let direction = match way {
            Way::Read => &self.read,
            Way::Write => &self.write,
        };
        direction.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a future, completed when the descriptor may be ready and at most `mark` bytes are unsent,
    /// or on `close`.
    ///
    /// No Python code runs while a direction is locked, since it could use this object.
    fn wait(slf: &Bound<'_, Self>, way: Way, mark: usize) -> PyResult<Py<PyAny>> {
        let (py, this) = (slf.py(), slf.get());
        let _guard = enter(py);
        let future = this.driver.create_future(py)?;
        let before = {
            let mut direction = this.direction(way);
            (!direction.closed).then(|| std::mem::take(&mut direction.futures))
        };
        let Some(before) = before else {
            future::complete(&future, Ok(py.None()), false)?;
            return Ok(future.unbind());
        };
        // Cancelled futures are dropped last, since a finalizer may close this object.
        let (mut futures, mut cancelled) = (Vec::with_capacity(before.len() + 1), Vec::new());
        for (future, mark) in before {
            match future::is_done(future.bind(py))? {
                true => cancelled.push(future),
                false => futures.push((future, mark)),
            }
        }
        futures.push((future.clone().unbind(), mark));
        let closed = {
            let mut direction = this.direction(way);
            if !direction.closed {
                futures.append(&mut direction.futures);
                std::mem::swap(&mut direction.futures, &mut futures);
                direction.idle = false;
            }
            direction.closed
        };
        if closed {
            // Python code above has closed this object.
            for (future, _) in futures {
                future::complete(future.bind(py), Ok(py.None()), false)?;
            }
            return Ok(future.unbind());
        }
        Self::register(slf, way)?;
        Ok(future.unbind())
    }

    /// Registers the callback, unless it is registered or this object is closed. After a close, another
    /// file may have the descriptor's number.
    fn register(slf: &Bound<'_, Self>, way: Way) -> PyResult<()> {
        let this = slf.get();
        {
            let mut direction = this.direction(way);
            if direction.closed || std::mem::replace(&mut direction.registered, true) {
                return Ok(());
            }
        }
        let _guard = enter(slf.py());
        let added = this.add(slf, way);
        if added.is_err() {
            this.direction(way).registered = false;
        }
        added
    }

    /// Completes the futures of an event. The first task is resumed in place, by the caller; the others in
    /// the loop's next iteration.
    fn collect(&self, ready: &Bound<'_, PyList>, way: Way) -> PyResult<()> {
        let py = ready.py();
        let _guard = enter(py);
        // Called first: a signal handler can raise in `may_wake`, and futures taken before would be
        // lost.
        let may_wake = self.driver.may_wake(py)?;
        let (futures, flushing, reply) = {
            let mut direction = self.direction(way);
            (
                std::mem::take(&mut direction.futures),
                direction.flushing.take(),
                direction.reply.take(),
            )
        };
        // Errors are ignored here, since the resumed task will run into them itself.
        let left = flushing
            .as_ref()
            .map_or(0, |flushing| flushing.stream.get().flush().unwrap_or(0));
        let (mut completed, mut kept) = (Vec::new(), Vec::new());
        for (future, mark) in futures {
            if future::is_done(future.bind(py))? {
                continue; // cancelled
            }
            if left > mark {
                kept.push((future, mark));
            } else {
                completed.push((future, Ok(py.None())));
            }
        }
        let mut unanswered = None;
        if let Some((connection, future)) = reply {
            if !future::is_done(future.bind(py))? {
                match connection.get().step(py).transpose() {
                    Some(outcome) => completed.push((future, outcome)),
                    None => unanswered = Some((connection, future)),
                }
            }
        }
        let (finished, mut unfinished) = match left {
            0 => (flushing, None),
            _ => (None, flushing),
        };
        let (remove, closed_meanwhile) = {
            let mut direction = self.direction(way);
            if direction.closed {
                (false, true)
            } else {
                kept.append(&mut direction.futures);
                std::mem::swap(&mut direction.futures, &mut kept);
                // Python code above may have set new ones. The old ones are then dropped after the lock
                // is released.
                if direction.flushing.is_none() {
                    direction.flushing = unfinished.take();
                }
                if direction.reply.is_none() {
                    direction.reply = unanswered.take();
                }
                let idle = completed.is_empty() && direction.futures.is_empty();
                let idle = idle && direction.flushing.is_none() && direction.reply.is_none();
                // The task may wait again at once, so the callback is removed only at the next event.
                let again = std::mem::replace(&mut direction.idle, idle);
                let remove = idle && again && std::mem::take(&mut direction.registered);
                (remove, false)
            }
        };
        if closed_meanwhile {
            // Python code above has closed this object, so no event will complete these.
            completed.extend(kept.into_iter().map(|(future, _)| (future, Ok(py.None()))));
            completed.extend(unanswered.map(|(_, future)| (future, Err(closed()))));
        }
        if remove {
            self.driver.remove(py, way)?;
        }
        drop(finished);
        for (future, outcome) in completed {
            let here = may_wake && ready.is_empty();
            self.driver.complete(future.bind(py), outcome, here, ready);
        }
        Ok(())
    }

    fn add(&self, slf: &Bound<'_, Self>, way: Way) -> PyResult<()> {
        let callback = match way {
            Way::Read => &self.on_readable,
            Way::Write => &self.on_writable,
        };
        self.driver.add(way, callback.bind(slf.py()), slf)
    }
}
