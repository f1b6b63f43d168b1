//! Waiting for a socket on an asyncio or uvloop event loop, with its own readiness callbacks.

use super::ending::inside;
use pyo3::prelude::*;
use pyo3::{intern, PyTraverseError, PyVisit};
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The watch of one event loop over one file descriptor.
///
/// A callback stays registered while it might be needed again, since every `add_reader` costs a
/// system call; it is removed when the socket is readable and nobody waits for it.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Readiness {
    event_loop: Py<PyAny>,
    fd: RawFd,
    pid: u32,
    read: Mutex<Direction>,
    write: Mutex<Direction>,
}

/// One of the two things to wait for.
#[derive(Default)]
struct Direction {
    registered: bool,
    /// The last event woke somebody, whose reading the next event may have overtaken: a loop asks
    /// for events before it runs the tasks that the last ones woke.
    stale: bool,
    closed: bool,
    waiters: Vec<Py<PyAny>>,
}

#[derive(Clone, Copy)]
enum Way {
    Read,
    Write,
}

#[pymethods]
impl Readiness {
    #[new]
    fn new(event_loop: Py<PyAny>, fd: RawFd) -> Self {
        Self {
            event_loop,
            fd,
            pid: std::process::id(),
            read: Mutex::default(),
            write: Mutex::default(),
        }
    }

    /// A future that is done when the socket may be readable, or the watch was closed.
    fn readable<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::wait(slf, Way::Read)
    }

    /// A future that is done when the socket may be writable, or the watch was closed.
    fn writable<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::wait(slf, Way::Write)
    }

    fn _on_readable(&self, py: Python<'_>) -> PyResult<()> {
        self.on_event(py, Way::Read)
    }

    fn _on_writable(&self, py: Python<'_>) -> PyResult<()> {
        self.on_event(py, Way::Write)
    }

    /// Ends the watch and wakes whoever waits. In a forked child nothing is touched: the loop's
    /// epoll is the parent's too.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        if std::process::id() != self.pid {
            return Ok(());
        }
        let _inside = inside(py);
        // A loop that is closed watches nothing, and can wake nobody.
        let loop_is_closed = self.loop_is_closed(py)?;
        for way in [Way::Read, Way::Write] {
            let (registered, waiters) = {
                let mut direction = self.direction(way);
                direction.closed = true;
                (
                    std::mem::take(&mut direction.registered),
                    std::mem::take(&mut direction.waiters),
                )
            };
            if loop_is_closed {
                continue;
            }
            if registered {
                self.remove(py, way)?;
            }
            wake(py, waiters)?;
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        for direction in [&self.read, &self.write] {
            if let Ok(direction) = direction.try_lock() {
                for waiter in &direction.waiters {
                    visit.call(waiter)?;
                }
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        for direction in [&self.read, &self.write] {
            let waiters = match direction.try_lock() {
                Ok(mut direction) => std::mem::take(&mut direction.waiters),
                Err(_) => Vec::new(),
            };
            drop(waiters);
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
    fn wait<'py>(slf: &Bound<'py, Self>, way: Way) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let _inside = inside(py);
        let this = slf.get();
        let future = this
            .event_loop
            .bind(py)
            .call_method0(intern!(py, "create_future"))?;
        let old = std::mem::take(&mut this.direction(way).waiters);
        let mut kept = Vec::with_capacity(old.len() + 1);
        for waiter in old {
            if !is_done(waiter.bind(py))? {
                kept.push(waiter);
            }
        }
        kept.push(future.clone().unbind());
        let register = {
            let mut direction = this.direction(way);
            if direction.closed {
                None
            } else {
                direction.waiters.append(&mut kept);
                Some(!std::mem::replace(&mut direction.registered, true))
            }
        };
        match register {
            None => wake(py, kept)?,
            Some(true) => {
                if let Err(error) = this.add(slf, way) {
                    this.direction(way).registered = false;
                    return Err(error);
                }
            }
            Some(false) => {}
        }
        Ok(future)
    }

    fn on_event(&self, py: Python<'_>, way: Way) -> PyResult<()> {
        let _inside = inside(py);
        let waiters = {
            let mut direction = self.direction(way);
            let suspect = std::mem::replace(&mut direction.stale, false);
            if (suspect || direction.waiters.is_empty()) && !is_ready(self.fd, way) {
                return Ok(());
            }
            if direction.waiters.is_empty() {
                if std::mem::replace(&mut direction.registered, false) {
                    drop(direction);
                    self.remove(py, way)?;
                }
                return Ok(());
            }
            direction.stale = true;
            std::mem::take(&mut direction.waiters)
        };
        wake(py, waiters)
    }

    fn add(&self, slf: &Bound<'_, Self>, way: Way) -> PyResult<()> {
        let py = slf.py();
        let (add, callback) = match way {
            Way::Read => (intern!(py, "add_reader"), intern!(py, "_on_readable")),
            Way::Write => (intern!(py, "add_writer"), intern!(py, "_on_writable")),
        };
        let callback = slf.getattr(callback)?;
        self.event_loop
            .bind(py)
            .call_method1(add, (self.fd, callback))?;
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

fn wake(py: Python<'_>, waiters: Vec<Py<PyAny>>) -> PyResult<()> {
    for waiter in waiters {
        let waiter = waiter.bind(py);
        if !is_done(waiter)? {
            waiter.call_method1(intern!(py, "set_result"), (py.None(),))?;
        }
    }
    Ok(())
}

fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future.call_method0(intern!(future.py(), "done"))?.extract()
}

/// Whether the socket is ready now.
#[allow(unsafe_code)]
fn is_ready(fd: RawFd, way: Way) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: match way {
            Way::Read => libc::POLLIN,
            Way::Write => libc::POLLOUT,
        },
        revents: 0,
    };
    // SAFETY: one pollfd is passed, and it outlives the call. A descriptor that is not open is
    // reported in `revents`.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}
