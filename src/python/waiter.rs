//! What a task on asyncio awaits until something here has come: as `asyncio.Future`, but the task can
//! be woken by what the event loop calls, with no other turn of the loop in between. That turn, with
//! the system call that asks for events, is most of what a small operation costs there.
//!
//! It has as much of a future as `Task` asks for, and is awaited once, by one task.

use super::ending::inside;
use pyo3::exceptions::asyncio::{CancelledError, InvalidStateError};
use pyo3::exceptions::{PyBaseException, PyRuntimeError, PyStopIteration};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyBytes, PyTuple};
use pyo3::{intern, PyTraverseError, PyVisit};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See above.
#[pyclass(frozen, module = "p2pclient_rs._native")]
pub struct Waiter {
    event_loop: Py<PyAny>,
    state: Mutex<State>,
}

struct State {
    outcome: Outcome,
    /// Asyncio's mark that it was yielded by an `await`.
    blocking: bool,
    yielded: bool,
    /// The task's wake-up; others, if somebody adds them.
    callbacks: Vec<Wakeup>,
    call_id: [u8; 16],
}

enum Outcome {
    Pending,
    Value(Py<PyAny>),
    Error(Py<PyBaseException>),
    Cancelled(Option<Py<PyAny>>),
}

/// What is called at the end with the waiter, and the context to run it in.
pub struct Wakeup {
    pub function: Py<PyAny>,
    pub context: Option<Py<PyAny>>,
}

/// What is to be called, in a context with one argument, or without one with several.
pub type Work = (Option<Py<PyAny>>, Py<PyAny>, Py<PyAny>);

impl Waiter {
    /// One for a task of this loop.
    pub fn new(event_loop: Py<PyAny>) -> Self {
        Self {
            event_loop,
            state: Mutex::new(State {
                outcome: Outcome::Pending,
                blocking: false,
                yielded: false,
                callbacks: Vec::new(),
                call_id: [0; 16],
            }),
        }
    }

    /// No Python is called, and no Python object dropped, while it is locked.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the call whose reply is awaited.
    pub fn set_call_id(&self, id: [u8; 16]) {
        self.lock().call_id = id;
    }

    /// Ends the wait with a result, unless it has ended. What is returned is to be run, if
    /// [`may_wake`], by Python: it may be anything, and is not to be on its way through Rust then
    /// (see `ending`).
    pub fn succeed(slf: &Bound<'_, Self>, value: Py<PyAny>) -> PyResult<Option<Wakeup>> {
        Self::end(slf, Outcome::Value(value)).map(|(wakeup, _)| wakeup)
    }

    /// As [`succeed`](Self::succeed), with an exception.
    pub fn fail(slf: &Bound<'_, Self>, error: PyErr) -> PyResult<Option<Wakeup>> {
        Self::end(slf, Outcome::Error(error.into_value(slf.py()))).map(|(wakeup, _)| wakeup)
    }

    /// Has what was returned run in another turn of the loop.
    pub fn later(slf: &Bound<'_, Self>, wakeup: Option<Wakeup>) -> PyResult<()> {
        let Some(Wakeup { function, context }) = wakeup else {
            return Ok(());
        };
        let py = slf.py();
        let _inside = inside(py);
        let event_loop = slf.get().event_loop.bind(py);
        let keywords = match context {
            Some(context) => Some([(intern!(py, "context"), context)].into_py_dict(py)?),
            None => None,
        };
        let arguments = (function, slf);
        event_loop.call_method(intern!(py, "call_soon"), arguments, keywords.as_ref())?;
        Ok(())
    }

    /// Ends the wait, unless it has ended. What is returned has the task go on `here`; without it,
    /// it has another turn of the loop.
    pub fn tell(
        slf: &Bound<'_, Self>,
        outcome: PyResult<Py<PyAny>>,
        here: bool,
    ) -> PyResult<Option<Work>> {
        let wakeup = match outcome {
            Ok(value) => Self::succeed(slf, value)?,
            Err(error) => Self::fail(slf, error)?,
        };
        match wakeup {
            Some(Wakeup {
                function,
                context: Some(context),
            }) if here => {
                let waiter = slf.clone().into_any().unbind();
                Ok(Some((Some(context), function, waiter)))
            }
            wakeup => Self::later(slf, wakeup).map(|()| None),
        }
    }

    /// What is to be run, and whether the wait had not ended before.
    fn end(slf: &Bound<'_, Self>, outcome: Outcome) -> PyResult<(Option<Wakeup>, bool)> {
        let callbacks = {
            let mut state = slf.get().lock();
            if !matches!(state.outcome, Outcome::Pending) {
                drop(state);
                drop(outcome);
                return Ok((None, false));
            }
            state.outcome = outcome;
            std::mem::take(&mut state.callbacks)
        };
        if callbacks.len() > 1 {
            for callback in callbacks {
                Self::later(slf, Some(callback))?;
            }
            return Ok((None, true));
        }
        let first = callbacks.into_iter().next();
        Ok((first, true))
    }

    fn error(slf: &Bound<'_, Self>) -> Option<PyErr> {
        let py = slf.py();
        match &slf.get().lock().outcome {
            Outcome::Error(error) => Some(raised(py, error)),
            Outcome::Cancelled(Some(message)) => {
                Some(CancelledError::new_err((message.clone_ref(py),)))
            }
            Outcome::Cancelled(None) => Some(CancelledError::new_err(())),
            Outcome::Pending => Some(InvalidStateError::new_err("Result is not set.")),
            Outcome::Value(_) => None,
        }
    }
}

/// Whether tasks of a loop may be woken here and now: none is running. What an event loop calls
/// finds it so, unless something runs a loop inside a task.
pub fn may_wake(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static CURRENT_TASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let py = event_loop.py();
    let current = CURRENT_TASK.import(py, "asyncio", "current_task")?;
    Ok(current.call1((event_loop,))?.is_none())
}

fn raised(py: Python<'_>, error: &Py<PyBaseException>) -> PyErr {
    PyErr::from_value(error.bind(py).clone().into_any())
}

/// What an iterator raises to return a value.
fn returned(py: Python<'_>, value: Py<PyAny>) -> PyErr {
    let stop = py.get_type::<PyStopIteration>();
    let bound = value.bind(py);
    if bound.is_instance_of::<PyTuple>() || bound.is_instance_of::<PyBaseException>() {
        return PyErr::from_type(stop, (value,));
    }
    // Anything else can be the exception's value as it is, and no exception is made.
    PyErr::from_type(stop, value)
}

#[pymethods]
impl Waiter {
    #[new]
    fn py_new(event_loop: Py<PyAny>) -> Self {
        Self::new(event_loop)
    }

    /// The id of the call whose reply is awaited.
    #[getter]
    fn call_id<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let id = self.lock().call_id;
        PyBytes::new(py, &id)
    }

    /// Ends the wait; the task runs in another turn of the loop.
    #[pyo3(signature = (result, /))]
    fn set_result(slf: &Bound<'_, Self>, result: Py<PyAny>) -> PyResult<()> {
        let wakeup = Self::succeed(slf, result)?;
        Self::later(slf, wakeup)
    }

    /// Ends the wait with an exception; the task runs in another turn of the loop.
    #[pyo3(signature = (exception, /))]
    fn set_exception(slf: &Bound<'_, Self>, exception: &Bound<'_, PyAny>) -> PyResult<()> {
        let wakeup = Self::fail(slf, PyErr::from_value(exception.clone()))?;
        Self::later(slf, wakeup)
    }

    pub fn done(&self) -> bool {
        !matches!(self.lock().outcome, Outcome::Pending)
    }

    fn cancelled(&self) -> bool {
        matches!(self.lock().outcome, Outcome::Cancelled(_))
    }

    /// Ends the wait with a CancelledError; says whether it had not ended before.
    #[pyo3(signature = (msg = None))]
    fn cancel(slf: &Bound<'_, Self>, msg: Option<Py<PyAny>>) -> PyResult<bool> {
        let (wakeup, ended) = Self::end(slf, Outcome::Cancelled(msg))?;
        Self::later(slf, wakeup)?;
        Ok(ended)
    }

    fn result(slf: &Bound<'_, Self>) -> PyResult<Py<PyAny>> {
        if let Outcome::Value(value) = &slf.get().lock().outcome {
            return Ok(value.clone_ref(slf.py()));
        }
        match Self::error(slf) {
            Some(error) => Err(error),
            None => Ok(slf.py().None()),
        }
    }

    fn exception(slf: &Bound<'_, Self>) -> PyResult<Option<Py<PyBaseException>>> {
        match &slf.get().lock().outcome {
            Outcome::Value(_) => return Ok(None),
            Outcome::Error(error) => return Ok(Some(error.clone_ref(slf.py()))),
            _ => {}
        }
        Self::error(slf).map_or(Ok(None), Err)
    }

    fn get_loop(&self, py: Python<'_>) -> Py<PyAny> {
        self.event_loop.clone_ref(py)
    }

    #[getter(_asyncio_future_blocking)]
    fn blocking(&self) -> bool {
        self.lock().blocking
    }

    #[setter(_asyncio_future_blocking)]
    fn set_blocking(&self, blocking: bool) {
        self.lock().blocking = blocking;
    }

    #[pyo3(signature = (function, /, *, context = None))]
    fn add_done_callback(
        slf: &Bound<'_, Self>,
        function: Py<PyAny>,
        context: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let wakeup = Wakeup { function, context };
        {
            let mut state = slf.get().lock();
            if matches!(state.outcome, Outcome::Pending) {
                state.callbacks.push(wakeup);
                return Ok(());
            }
        }
        Self::later(slf, Some(wakeup))
    }

    /// Takes back `add_done_callback`; says how often it was called with that.
    fn remove_done_callback(slf: &Bound<'_, Self>, function: &Bound<'_, PyAny>) -> PyResult<usize> {
        let callbacks = std::mem::take(&mut slf.get().lock().callbacks);
        let (mut removed, mut kept) = (Vec::new(), Vec::new());
        for callback in callbacks {
            if callback.function.bind(slf.py()).eq(function)? {
                removed.push(callback);
            } else {
                kept.push(callback);
            }
        }
        slf.get().lock().callbacks.splice(0..0, kept);
        Ok(removed.len())
    }

    fn __await__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Itself while the wait is on; then the result, as generators return it.
    fn __next__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        let ended = {
            let mut state = slf.get().lock();
            match &state.outcome {
                Outcome::Pending if !state.yielded => {
                    state.yielded = true;
                    state.blocking = true;
                    return Ok(slf.clone());
                }
                Outcome::Pending => {
                    let words = "await wasn't used with future";
                    return Err(PyRuntimeError::new_err(words));
                }
                Outcome::Value(value) => Some(value.clone_ref(slf.py())),
                _ => None,
            }
        };
        Err(match ended {
            Some(value) => returned(slf.py(), value),
            None => Self::error(slf).expect("it has ended otherwise"),
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.event_loop)?;
        let Ok(state) = self.state.try_lock() else {
            return Ok(());
        };
        match &state.outcome {
            Outcome::Value(value) => visit.call(value)?,
            Outcome::Error(error) => visit.call(error)?,
            Outcome::Cancelled(message) => visit.call(message)?,
            Outcome::Pending => {}
        }
        for Wakeup { function, context } in &state.callbacks {
            visit.call(function)?;
            visit.call(context)?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let callbacks = match self.state.try_lock() {
            Ok(mut state) => std::mem::take(&mut state.callbacks),
            Err(_) => return,
        };
        drop(callbacks);
    }
}
