//! What a task on asyncio awaits until something here has come: a future of its loop, but the task
//! can be woken by what the event loop calls, with no other turn of the loop in between. That turn,
//! with the system call that asks for events, is most of what a small operation costs there.
//!
//! So the task's wake-up is taken off the future before that is set, for whoever may run it.

use super::ending::inside;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyTuple};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// What is to be called, in a context with one argument, or without one with several. Python calls
/// it: it may be anything, and is not to be on its way through Rust then (see `ending`).
pub type Work = (Option<Py<PyAny>>, Py<PyAny>, Py<PyAny>);

/// Something for a task of this loop to wait for.
pub fn waiter<'py>(event_loop: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    event_loop.call_method0(intern!(event_loop.py(), "create_future"))
}

/// Whether a wait has ended: it may have been cancelled.
pub fn done(waiter: &Bound<'_, PyAny>) -> PyResult<bool> {
    waiter
        .call_method0(intern!(waiter.py(), "done"))?
        .is_truthy()
}

/// Whether tasks of a loop may be woken here and now: none is running. What an event loop calls
/// finds it so, unless something runs a loop inside a task. Where nest_asyncio makes that possible, a
/// task that was woken could do it, and the loop cannot call within itself what has called that task.
pub fn may_wake(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static CURRENT_TASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = event_loop.py();
    if is_nested(event_loop)? {
        return Ok(false);
    }
    let current = CURRENT_TASK.import(py, "asyncio", "current_task")?;
    Ok(current.call1((event_loop,))?.is_none())
}

/// Whether nest_asyncio, or what goes on with it, was applied to a loop.
fn is_nested(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static MODULES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let py = event_loop.py();
    let modules = MODULES.import(py, "sys", "modules")?;
    // Before Python 3.13 an attribute that is not there costs an exception.
    for name in [intern!(py, "nest_asyncio"), intern!(py, "nest_asyncio2")] {
        if modules.get_item(name)?.is_some() {
            let patched = event_loop.getattr_opt(intern!(py, "_nest_patched"))?;
            return patched.map_or(Ok(false), |patched| patched.is_truthy());
        }
    }
    Ok(false)
}

/// The time in which the tasks that an event loop's callback wakes have their turn: in which thread, if
/// it is on. They are that loop's, which nobody need ask asyncio then; up to Python 3.11 that costs a
/// system call.
#[derive(Default)]
pub struct Turn(AtomicUsize);

impl Turn {
    /// Begins it, if tasks of the loop may be woken; says whether they may. This is to be the first
    /// thing done: a signal's handler can raise in it, and what was read is not to be lost then.
    pub fn begin(&self, event_loop: Option<&Bound<'_, PyAny>>) -> PyResult<bool> {
        let may_wake = event_loop.map_or(Ok(false), may_wake)?;
        self.0.store(if may_wake { thread() } else { 0 }, Relaxed);
        Ok(may_wake)
    }

    pub fn end(&self) {
        self.0.store(0, Relaxed);
    }

    pub fn is_here(&self) -> bool {
        self.0.load(Relaxed) == thread()
    }
}

/// What tells a thread from the others that live.
fn thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here) as usize)
}

/// Ends a wait, unless it has ended. What is returned has the task go on `here`; without it, it
/// has another turn of the loop.
pub fn tell(
    waiter: &Bound<'_, PyAny>,
    outcome: PyResult<Py<PyAny>>,
    here: bool,
) -> PyResult<Option<Work>> {
    let py = waiter.py();
    let _inside = inside(py);
    if done(waiter)? {
        return Ok(None);
    }
    let wakeup = here.then(|| take_wakeup(waiter)).flatten();
    match outcome {
        Ok(value) => waiter.call_method1(intern!(py, "set_result"), (value,))?,
        Err(error) => waiter.call_method1(intern!(py, "set_exception"), (error.into_value(py),))?,
    };
    Ok(wakeup)
}

/// Adds what came of telling one who waits to what is to be done. One that fails does not keep the
/// rest from theirs.
pub fn hand_over(work: &Bound<'_, PyList>, told: PyResult<Option<Work>>) {
    let added = match told {
        Ok(Some(some)) => work.append(some),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = added {
        error.write_unraisable(work.py(), None);
    }
}

/// What the task that waits is to be run by, if there is one and nobody else waits. Of a future that
/// does not show its callbacks, as all of asyncio's do, there is none: it calls them itself.
fn take_wakeup(waiter: &Bound<'_, PyAny>) -> Option<Work> {
    let py = waiter.py();
    let callbacks = waiter.getattr(intern!(py, "_callbacks")).ok()?;
    let callbacks = callbacks.cast::<PyList>().ok()?;
    let only = callbacks
        .get_item(0)
        .ok()
        .filter(|_| callbacks.len() == 1)?;
    let only = only.cast::<PyTuple>().ok()?;
    let (callback, context) = (only.get_item(0).ok()?, only.get_item(1).ok()?);
    let removed = waiter.call_method1(intern!(py, "remove_done_callback"), (&callback,));
    // One that is not taken off will be called.
    let removed: usize = removed.ok()?.extract().ok()?;
    let waiter = waiter.clone().unbind();
    (removed == 1).then(|| (Some(context.unbind()), callback.unbind(), waiter))
}
