//! Waiting for a socket on an asyncio or uvloop event loop, with its own readiness callbacks.

use super::connection::{closed, ControlConnection};
use super::ending::inside;
use super::pid::pid;
use super::stream::RawStream;
use super::waiter::{done, hand_over, may_wake, tell, waiter};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{intern, PyTraverseError, PyVisit};
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The watch of one event loop over one file descriptor.
///
/// A callback stays registered while it might be needed again, since every `add_reader` costs a
/// system call.
///
/// Whoever waits goes on within the loop's callback, not a turn of the loop later. What the loop
/// calls is `wake_reader` and `wake_writer`, which run what `take_…` gives them: Python's functions,
/// for what goes on there may be anything, and is not to be on its way through Rust then (see
/// `ending`).
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Readiness {
    event_loop: Py<PyAny>,
    fd: RawFd,
    pid: u32,
    wake_reader: Py<PyAny>,
    wake_writer: Py<PyAny>,
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
    waiters: Vec<(Py<PyAny>, usize)>,
    /// What is to be written when that is possible.
    flushing: Option<Flushing>,
    /// Whose answer is to be read, and who waits for it.
    answering: Option<(Py<ControlConnection>, Py<PyAny>)>,
    tries: Tries,
}

/// How many answers in a row were tried for without a turn of the loop: whoever asks again and again
/// is to give it one all the same.
#[derive(Default)]
pub struct Tries(u8);

impl Tries {
    const MAX: u8 = 16;

    /// Whether another answer may be tried for.
    pub fn another(&mut self) -> bool {
        let may = self.0 < Self::MAX;
        self.0 += u8::from(may);
        may
    }

    /// The loop has its turn.
    pub fn start_over(&mut self) {
        self.0 = 0;
    }
}

/// A stream that has left something over, and what is to live until it is written.
struct Flushing {
    stream: Py<RawStream>,
    owner: Py<PyAny>,
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

#[pymethods]
impl Readiness {
    #[new]
    fn new(
        event_loop: Py<PyAny>,
        fd: RawFd,
        wake_reader: Py<PyAny>,
        wake_writer: Py<PyAny>,
    ) -> Self {
        Self {
            event_loop,
            fd,
            pid: pid(),
            wake_reader,
            wake_writer,
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
        let _inside = inside(py);
        let this = slf.get();
        let waiter = waiter(this.event_loop.bind(py))?;
        // A daemon that is quick has answered by now, unless it has to wait for this core.
        if this.direction(Way::Read).tries.another() {
            if let Some(answer) = connection.get().step(py)? {
                tell(&waiter, Ok(answer), false)?;
                return Ok(waiter.unbind());
            }
        }
        let before = {
            let mut direction = this.direction(Way::Read);
            (!direction.closed).then(|| {
                direction.tries.start_over();
                direction.idle = false;
                let answering = Some((connection, waiter.clone().unbind()));
                std::mem::replace(&mut direction.answering, answering)
            })
        };
        match before {
            Some(of_a_cancelled_wait) => drop(of_a_cancelled_wait),
            None => return Err(closed()),
        }
        Self::register(slf, Way::Read)?;
        Ok(waiter.unbind())
    }

    /// Adds to `work` what is to be run when the socket is readable.
    fn take_readable(&self, work: &Bound<'_, PyList>) -> PyResult<()> {
        self.take(work, Way::Read)
    }

    /// Adds to `work` what is to be run when the socket is writable. Then `settle` is to be called.
    fn take_writable(&self, work: &Bound<'_, PyList>) -> PyResult<()> {
        self.take(work, Way::Write)
    }

    /// Stops to watch for the socket to be writable, as it mostly is, if nobody waits for that.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        {
            let mut direction = self.direction(Way::Write);
            let busy = direction.flushing.is_some() || !direction.waiters.is_empty();
            if busy || !std::mem::take(&mut direction.registered) {
                return Ok(());
            }
        }
        let _inside = inside(py);
        self.remove(py, Way::Write)
    }

    /// Ends the watch and wakes whoever waits. In a forked child nothing is touched: the loop's
    /// epoll is the parent's too.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if pid() != self.pid {
            for way in [Way::Read, Way::Write] {
                self.direction(way).closed = true;
            }
            return Ok(());
        }
        let _inside = inside(py);
        // A loop that is closed watches nothing, and can wake nobody.
        let loop_is_closed = self.loop_is_closed(py)?;
        for way in [Way::Read, Way::Write] {
            let (registered, waiters, answering, _flushing) = {
                let mut direction = self.direction(way);
                direction.closed = true;
                (
                    std::mem::take(&mut direction.registered),
                    std::mem::take(&mut direction.waiters),
                    direction.answering.take(),
                    direction.flushing.take(),
                )
            };
            if loop_is_closed {
                continue;
            }
            if registered {
                self.remove(py, way)?;
            }
            for (waiter, _) in waiters {
                tell(waiter.bind(py), Ok(py.None()), false)?;
            }
            if let Some((_, waiter)) = answering {
                tell(waiter.bind(py), Err(closed()), false)?;
            }
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        visit.call(&self.wake_reader)?;
        visit.call(&self.wake_writer)?;
        for direction in [&self.read, &self.write] {
            if let Ok(direction) = direction.try_lock() {
                for (waiter, _) in &direction.waiters {
                    visit.call(waiter)?;
                }
                if let Some(flushing) = &direction.flushing {
                    visit.call(&flushing.owner)?;
                }
                if let Some((_, waiter)) = &direction.answering {
                    visit.call(waiter)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        for direction in [&self.read, &self.write] {
            let held = direction.try_lock().map(|mut direction| {
                let waiters = std::mem::take(&mut direction.waiters);
                let answering = direction.answering.take();
                (waiters, answering, direction.flushing.take())
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
        let _inside = inside(py);
        let waiter = waiter(this.event_loop.bind(py))?;
        let before = {
            let mut direction = this.direction(way);
            (!direction.closed).then(|| std::mem::take(&mut direction.waiters))
        };
        let Some(before) = before else {
            tell(&waiter, Ok(py.None()), false)?;
            return Ok(waiter.unbind());
        };
        // Who was cancelled waits no more, and is dropped at the end: what runs then may close this.
        let (mut waiters, mut cancelled) = (Vec::with_capacity(before.len() + 1), Vec::new());
        for (waiter, mark) in before {
            match done(waiter.bind(py))? {
                true => cancelled.push(waiter),
                false => waiters.push((waiter, mark)),
            }
        }
        waiters.push((waiter.clone().unbind(), mark));
        let closed = {
            let mut direction = this.direction(way);
            if !direction.closed {
                waiters.append(&mut direction.waiters);
                std::mem::swap(&mut direction.waiters, &mut waiters);
                direction.idle = false;
            }
            direction.closed
        };
        if closed {
            // By Python code above.
            for (waiter, _) in waiters {
                tell(waiter.bind(py), Ok(py.None()), false)?;
            }
            return Ok(waiter.unbind());
        }
        Self::register(slf, way)?;
        Ok(waiter.unbind())
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
        let _inside = inside(slf.py());
        let added = this.add(slf, way);
        if added.is_err() {
            this.direction(way).registered = false;
        }
        added
    }

    /// Whoever is to be woken by an event, the first of them by who called, the others a turn of
    /// the loop later.
    fn take(&self, work: &Bound<'_, PyList>, way: Way) -> PyResult<()> {
        let py = work.py();
        let _inside = inside(py);
        // First: a signal's handler can raise in it, and nobody who waits is to be lost then.
        let may_wake = may_wake(self.event_loop.bind(py))?;
        let (waiters, flushing, answering) = {
            let mut direction = self.direction(way);
            (
                std::mem::take(&mut direction.waiters),
                direction.flushing.take(),
                direction.answering.take(),
            )
        };
        // What has failed will fail again for whoever goes on.
        let left = flushing
            .as_ref()
            .map_or(0, |flushing| flushing.stream.get().flush().unwrap_or(0));
        let (mut told, mut kept) = (Vec::new(), Vec::new());
        for (waiter, mark) in waiters {
            if done(waiter.bind(py))? {
                continue; // it was cancelled
            }
            if left > mark {
                kept.push((waiter, mark));
            } else {
                told.push((waiter, Ok(py.None())));
            }
        }
        let mut unanswered = None;
        if let Some((connection, waiter)) = answering {
            if !done(waiter.bind(py))? {
                match connection.get().step(py).transpose() {
                    Some(outcome) => told.push((waiter, outcome)),
                    None => unanswered = Some((connection, waiter)),
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
                kept.append(&mut direction.waiters);
                std::mem::swap(&mut direction.waiters, &mut kept);
                // Python code above may have set these anew; the old ones are dropped after
                // unlocking.
                if direction.flushing.is_none() {
                    direction.flushing = unfinished.take();
                }
                if direction.answering.is_none() {
                    direction.answering = unanswered.take();
                }
                let idle = told.is_empty() && direction.waiters.is_empty();
                let idle = idle && direction.flushing.is_none() && direction.answering.is_none();
                // A task may be about to wait again: the next event, if there is one, will tell.
                let again = std::mem::replace(&mut direction.idle, idle);
                let remove = idle && again && std::mem::take(&mut direction.registered);
                (remove, false)
            }
        };
        if closed_meanwhile {
            // By Python code above: no event will complete these.
            told.extend(kept.into_iter().map(|(waiter, _)| (waiter, Ok(py.None()))));
            told.extend(unanswered.map(|(_, waiter)| (waiter, Err(closed()))));
        }
        if remove {
            self.remove(py, way)?;
        }
        drop(finished);
        for (waiter, outcome) in told {
            let here = may_wake && work.is_empty();
            hand_over(work, tell(waiter.bind(py), outcome, here));
        }
        Ok(())
    }

    fn add(&self, slf: &Bound<'_, Self>, way: Way) -> PyResult<()> {
        let py = slf.py();
        let (add, callback) = match way {
            Way::Read => (intern!(py, "add_reader"), &self.wake_reader),
            Way::Write => (intern!(py, "add_writer"), &self.wake_writer),
        };
        let event_loop = self.event_loop.bind(py);
        event_loop.call_method1(add, (self.fd, callback, slf))?;
        Ok(())
    }

    fn remove(&self, py: Python<'_>, way: Way) -> PyResult<()> {
        let remove = match way {
            Way::Read => intern!(py, "remove_reader"),
            Way::Write => intern!(py, "remove_writer"),
        };
        self.event_loop.bind(py).call_method1(remove, (self.fd,))?;
        Ok(())
    }

    fn loop_is_closed(&self, py: Python<'_>) -> PyResult<bool> {
        self.event_loop
            .bind(py)
            .call_method0(intern!(py, "is_closed"))?
            .extract()
    }
}
