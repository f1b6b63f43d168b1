//! Waiting for a socket on an asyncio or uvloop event loop, with its own readiness callbacks.

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

/// The watch of one event loop over one file descriptor.
///
/// A callback stays registered while it might be needed again, since every `add_reader` costs a
/// system call.
///
/// Whoever waits goes on within the loop's callback, not a turn of the loop later. What the loop
/// calls is `on_readable` and `on_writable`, which run what `take_…` gives them: Python's functions,
/// for what goes on there may be anything, and is not to be on its way through Rust then (see
/// `ending`).
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Readiness {
    driver: Driver,
    on_readable: Py<PyAny>,
    on_writable: Py<PyAny>,
    read: Mutex<Direction>,
    write: Mutex<Direction>,
}

/// One of the two things to wait for.
#[derive(Default)]
struct Direction {
    registered: bool,
    /// The last event found nobody who waits.
    idle: bool,
    closed: bool,
    /// Each with how many bytes may be left over once it is woken.
    futures: Vec<(Py<PyAny>, usize)>,
    /// What is to be written when that is possible.
    flushing: Option<Flushing>,
    /// Whose answer is to be read, and who waits for it.
    answering: Option<(Py<ControlConnection>, Py<PyAny>)>,
    attempts: Attempts,
}

/// A stream that has left something over, and what is to live until it is written.
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

    /// A wait until the socket may be readable, or the watch was closed.
    fn readable(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Read, usize::MAX)
    }

    /// A wait until the socket may be writable, or the watch was closed.
    fn writable(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Write, usize::MAX)
    }

    /// Has what a stream has left over be written when that is possible. Its `owner` lives until
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

    /// A wait until no more than `mark` bytes are left of what `flush_later` is to write, or that
    /// failed, or the watch was closed.
    fn drained(slf: &Bound<'_, Self>, mark: usize) -> PyResult<Py<PyAny>> {
        Self::wait(slf, Way::Write, mark)
    }

    /// A wait for the answer to the request that a connection has sent.
    fn answer(slf: &Bound<'_, Self>, connection: Py<ControlConnection>) -> PyResult<Py<PyAny>> {
        let py = slf.py();
        let _guard = enter(py);
        let this = slf.get();
        let future = this.driver.create_future(py)?;
        // A daemon that is quick has answered by now, unless it has to wait for this core.
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
                let answering = Some((connection, future.clone().unbind()));
                std::mem::replace(&mut direction.answering, answering)
            })
        };
        match before {
            Some(of_a_cancelled_wait) => drop(of_a_cancelled_wait),
            None => return Err(closed()),
        }
        Self::register(slf, Way::Read)?;
        Ok(future.unbind())
    }

    /// Adds to `ready` what is to be run when the socket is readable.
    fn read_ready(&self, ready: &Bound<'_, PyList>) -> PyResult<()> {
        self.collect(ready, Way::Read)
    }

    /// Adds to `ready` what is to be run when the socket is writable. Then `remove_idle_writer` is to be called.
    fn write_ready(&self, ready: &Bound<'_, PyList>) -> PyResult<()> {
        self.collect(ready, Way::Write)
    }

    /// Stops to watch for the socket to be writable, as it mostly is, if nobody waits for that.
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

    /// Ends the watch and wakes whoever waits. In a forked child nothing is touched: the loop's
    /// epoll is the parent's too.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if self.driver.is_forked() {
            for way in [Way::Read, Way::Write] {
                self.direction(way).closed = true;
            }
            return Ok(());
        }
        let _guard = enter(py);
        // A loop that is closed watches nothing, and can wake nobody.
        let loop_is_closed = self.driver.loop_is_closed(py)?;
        for way in [Way::Read, Way::Write] {
            let (registered, futures, answering, _flushing) = {
                let mut direction = self.direction(way);
                direction.closed = true;
                (
                    std::mem::take(&mut direction.registered),
                    std::mem::take(&mut direction.futures),
                    direction.answering.take(),
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
            if let Some((_, future)) = answering {
                future::complete(future.bind(py), Err(closed()), false)?;
                // The garbage collector may have closed the coroutine that awaited it.
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
                if let Some((_, future)) = &direction.answering {
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
                let answering = direction.answering.take();
                (futures, answering, direction.flushing.take())
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

    /// No Python is called while a direction is locked: it could come back to this watch.
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
        // Who was cancelled waits no more, and is dropped at the end: what runs then may close this.
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
            // By Python code above.
            for (future, _) in futures {
                future::complete(future.bind(py), Ok(py.None()), false)?;
            }
            return Ok(future.unbind());
        }
        Self::register(slf, way)?;
        Ok(future.unbind())
    }

    /// Has the event loop watch the descriptor, unless it does or the watch is closed: then the
    /// number may be another file's.
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

    /// Whoever is to be woken by an event, the first of them by who called, the others a turn of
    /// the loop later.
    fn collect(&self, ready: &Bound<'_, PyList>, way: Way) -> PyResult<()> {
        let py = ready.py();
        let _guard = enter(py);
        // First: a signal's handler can raise in it, and nobody who waits is to be lost then.
        let may_wake = self.driver.may_wake(py)?;
        let (futures, flushing, answering) = {
            let mut direction = self.direction(way);
            (
                std::mem::take(&mut direction.futures),
                direction.flushing.take(),
                direction.answering.take(),
            )
        };
        // What has failed will fail again for whoever goes on.
        let left = flushing
            .as_ref()
            .map_or(0, |flushing| flushing.stream.get().flush().unwrap_or(0));
        let (mut told, mut kept) = (Vec::new(), Vec::new());
        for (future, mark) in futures {
            if future::is_done(future.bind(py))? {
                continue; // it was cancelled
            }
            if left > mark {
                kept.push((future, mark));
            } else {
                told.push((future, Ok(py.None())));
            }
        }
        let mut unanswered = None;
        if let Some((connection, future)) = answering {
            if !future::is_done(future.bind(py))? {
                match connection.get().step(py).transpose() {
                    Some(outcome) => told.push((future, outcome)),
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
                // Python code above may have set these anew; the old ones are dropped after
                // unlocking.
                if direction.flushing.is_none() {
                    direction.flushing = unfinished.take();
                }
                if direction.answering.is_none() {
                    direction.answering = unanswered.take();
                }
                let idle = told.is_empty() && direction.futures.is_empty();
                let idle = idle && direction.flushing.is_none() && direction.answering.is_none();
                // A task may be about to wait again: the next event, if there is one, will tell.
                let again = std::mem::replace(&mut direction.idle, idle);
                let remove = idle && again && std::mem::take(&mut direction.registered);
                (remove, false)
            }
        };
        if closed_meanwhile {
            // By Python code above: no event will complete these.
            told.extend(kept.into_iter().map(|(future, _)| (future, Ok(py.None()))));
            told.extend(unanswered.map(|(_, future)| (future, Err(closed()))));
        }
        if remove {
            self.driver.remove(py, way)?;
        }
        drop(finished);
        for (future, outcome) in told {
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
