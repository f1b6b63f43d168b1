//! The futures that tasks await. An event loop creates them, and a driver completes them. Callers hold a
//! `ShutdownGuard`.

use super::wake::{self, WakeUp};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyList;

/// A new future of an event loop.
pub fn create<'py>(event_loop: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    event_loop.call_method0(intern!(event_loop.py(), "create_future"))
}

/// Whether a future was completed or cancelled.
pub fn is_done(future: &Bound<'_, PyAny>) -> PyResult<bool> {
    future
        .call_method0(intern!(future.py(), "done"))?
        .is_truthy()
}

/// Completes a future, unless it is done. With `in_place`, returns the call that resumes its task, if
/// possible. Otherwise the event loop resumes the task in its next iteration.
pub fn complete(
    future: &Bound<'_, PyAny>,
    outcome: PyResult<Py<PyAny>>,
    in_place: bool,
) -> PyResult<Option<WakeUp>> {
    let py = future.py();
    if is_done(future)? {
        return Ok(None);
    }
    let wake_up = in_place.then(|| wake::take_from(future)).flatten();
    match outcome {
        Ok(value) => future.call_method1(intern!(py, "set_result"), (value,))?,
        Err(error) => future.call_method1(intern!(py, "set_exception"), (error.into_value(py),))?,
    };
    Ok(wake_up)
}

/// Keeps asyncio from reporting the exception of a future that no task awaits any more.
pub fn mark_retrieved(future: &Bound<'_, PyAny>) {
    // Fails only if the future was cancelled.
    let _ = future.call_method0(intern!(future.py(), "exception"));
}

/// Appends the result of `complete` to `ready`. Reports an error instead of returning it, so that the
/// batch continues.
pub fn push(ready: &Bound<'_, PyList>, completed: PyResult<Option<WakeUp>>) {
    let pushed = match completed {
        Ok(Some(wake_up)) => ready.append(wake_up),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = pushed {
        error.write_unraisable(ready.py(), None);
    }
}
