//! What a task on asyncio awaits until something here has come: a future of its loop, but the task
//! can be woken by what the event loop calls, with no other turn of the loop in between. That turn,
//! with the system call that asks for events, is most of what a small operation costs there.
//!
//! So the task's wake-up is taken off the future before that is set, for whoever may run it.

use super::ending::inside;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyList, PyTuple};

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
/// finds it so, unless something runs a loop inside a task.
pub fn may_wake(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static CURRENT_TASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = event_loop.py();
    let current = CURRENT_TASK.import(py, "asyncio", "current_task")?;
    Ok(current.call1((event_loop,))?.is_none())
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
    let wakeup = if here { take_wakeup(waiter)? } else { None };
    match outcome {
        Ok(value) => waiter.call_method1(intern!(py, "set_result"), (value,))?,
        Err(error) => waiter.call_method1(intern!(py, "set_exception"), (error.into_value(py),))?,
    };
    Ok(wakeup)
}

/// What the task that waits is to be run by, if there is one and nobody else waits. Of a future that
/// does not show its callbacks, as all of asyncio's do, there is none: it calls them itself.
fn take_wakeup(waiter: &Bound<'_, PyAny>) -> PyResult<Option<Work>> {
    let py = waiter.py();
    let callbacks = waiter.getattr_opt(intern!(py, "_callbacks"))?;
    let Some(Ok(callbacks)) = callbacks.as_ref().map(|it| it.cast::<PyList>()) else {
        return Ok(None);
    };
    if callbacks.len() != 1 {
        return Ok(None);
    }
    let only = callbacks.get_item(0)?;
    let Some((callback, context)) = only.cast::<PyTuple>().ok().and_then(|only| {
        let (callback, context) = (only.get_item(0).ok()?, only.get_item(1).ok()?);
        (!context.is_none()).then_some((callback, context))
    }) else {
        return Ok(None);
    };
    waiter.call_method1(intern!(py, "remove_done_callback"), (&callback,))?;
    let waiter = waiter.clone().unbind();
    Ok(Some((Some(context.unbind()), callback.unbind(), waiter)))
}
