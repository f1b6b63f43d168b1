//! Resumes asyncio tasks inside the callback that completes their future, and decides where that is
//! safe.
//!
//! An asyncio future schedules its task for the next iteration of the loop. That iteration, with its
//! system call, is most of the cost of a small operation. So the task's wake-up callback is removed from
//! the future before the future is completed. The Python function that the loop has called then calls
//! the callback itself. `Future._callbacks` is private. Each type of loop is therefore tested first, and
//! a switch turns the mechanism off.

use super::shutdown_guard::enter;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyList, PyTuple, PyType};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// A call to make: a context, a function, and its argument. Without a context, the last item is a tuple
/// of arguments. Python code makes the call, since a resumed task must not have Rust on its stack (see
/// `shutdown_guard`).
pub type WakeUp = (Option<Py<PyAny>>, Py<PyAny>, Py<PyAny>);

/// Whether tasks may be resumed in place at all.
static ENABLED: AtomicBool = AtomicBool::new(true);

/// Reads `P2PCLIENT_RS_INPLACE_WAKE`, once, when the module is imported.
pub fn read_environment() {
    let off = std::env::var_os("P2PCLIENT_RS_INPLACE_WAKE").is_some_and(|value| value == "0");
    ENABLED.store(!off, Relaxed);
}

/// Turns in-place resumption of asyncio tasks on or off, for all event loops.
#[pyfunction]
pub fn set_inplace_wake(enabled: bool) {
    ENABLED.store(enabled, Relaxed);
}

/// Whether the tasks of a type of event loop can be resumed in place.
pub struct LoopKind(AtomicU8);

/// Its futures failed the test, or it is not an asyncio loop.
const UNUSABLE: u8 = 0;
/// Its futures passed the test; no task has been resumed yet.
const UNPROVEN: u8 = 1;
/// A task has been resumed.
const PROVEN: u8 = 2;

/// The types of event loop seen so far. Never freed.
static KINDS: Mutex<Vec<(Py<PyType>, &'static LoopKind)>> = Mutex::new(Vec::new());

impl LoopKind {
    /// Returns the kind of an event loop. Tests its futures when its type is seen for the first time.
    pub fn of(event_loop: &Bound<'_, PyAny>) -> &'static Self {
        let of_type = event_loop.get_type();
        let find = || {
            let kinds = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
            let known = kinds.iter().find(|(known, _)| known.is(&of_type));
            known.map(|(_, kind)| *kind)
        };
        if let Some(kind) = find() {
            return kind;
        }
        let _guard = enter(event_loop.py());
        let state = match test(event_loop) {
            Ok(true) => UNPROVEN,
            Ok(false) | Err(_) => UNUSABLE,
        };
        let kind: &'static Self = Box::leak(Box::new(Self(AtomicU8::new(state))));
        let mut kinds = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
        kinds.push((of_type.unbind(), kind));
        kind
    }

    /// Whether tasks of a loop of this kind may be resumed in place now. They may not while another task
    /// runs, as in a loop that runs inside a task. Under nest_asyncio they never may: a resumed task
    /// could run the loop again, and the loop cannot call a callback that is already on its stack.
    pub fn may_wake(&self, event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
        static CURRENT_TASK: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let py = event_loop.py();
        if self.0.load(Relaxed) == UNUSABLE || !ENABLED.load(Relaxed) || is_nested(event_loop)? {
            return Ok(false);
        }
        let current = CURRENT_TASK.import(py, "asyncio", "current_task")?;
        Ok(current.call1((event_loop,))?.is_none())
    }

    /// Wraps a wake-up, until the first one has resumed its task and `p2pclient_rs.wake` has called
    /// `report_first_wake`.
    pub fn until_proven(&self, event_loop: &Bound<'_, PyAny>, wake_up: WakeUp) -> PyResult<WakeUp> {
        static FIRST_WAKE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
        let (Some(context), callback, future) = wake_up else {
            return Ok(wake_up);
        };
        if self.0.load(Relaxed) == PROVEN {
            return Ok((Some(context), callback, future));
        }
        let py = event_loop.py();
        let first_wake = FIRST_WAKE.import(py, "p2pclient_rs.wake", "first_wake")?;
        let arguments = (event_loop, context, callback, future).into_pyobject(py)?;
        let first_wake = first_wake.clone().unbind();
        Ok((None, first_wake, arguments.into_any().unbind()))
    }
}

/// Records whether the first wake-up on this type of loop has resumed its task.
#[pyfunction]
pub fn report_first_wake(event_loop: &Bound<'_, PyAny>, resumed: bool) {
    let state = if resumed { PROVEN } else { UNUSABLE };
    LoopKind::of(event_loop).0.store(state, Relaxed);
}

/// Whether the futures of a loop show their callbacks and allow their removal.
fn test(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    let wake = event_loop.py().import("p2pclient_rs.wake")?;
    wake.call_method1("shows_callbacks", (event_loop,))?
        .extract()
}

/// Whether nest_asyncio or its successor was applied to a loop.
fn is_nested(event_loop: &Bound<'_, PyAny>) -> PyResult<bool> {
    static MODULES: PyOnceLock<Py<PyDict>> = PyOnceLock::new();
    let py = event_loop.py();
    let modules = MODULES.import(py, "sys", "modules")?;
    // The modules are checked first, since before Python 3.13 a missing attribute costs an exception.
    for name in [intern!(py, "nest_asyncio"), intern!(py, "nest_asyncio2")] {
        if modules.get_item(name)?.is_some() {
            let patched = event_loop.getattr_opt(intern!(py, "_nest_patched"))?;
            return patched.map_or(Ok(false), |patched| patched.is_truthy());
        }
    }
    Ok(false)
}

/// Takes the wake-up callback of the only task that awaits a future. `None` if there is no task, if
/// there are several callbacks, or if the future hides them. The future then resumes its task itself.
pub fn take_from(future: &Bound<'_, PyAny>) -> Option<WakeUp> {
    let py = future.py();
    let callbacks = future.getattr(intern!(py, "_callbacks")).ok()?;
    let callbacks = callbacks.cast::<PyList>().ok()?;
    let only = callbacks
        .get_item(0)
        .ok()
        .filter(|_| callbacks.len() == 1)?;
    let only = only.cast::<PyTuple>().ok()?;
    let (callback, context) = (only.get_item(0).ok()?, only.get_item(1).ok()?);
    let removed = future.call_method1(intern!(py, "remove_done_callback"), (&callback,));
    // If the callback was not removed, the future will call it.
    let removed: usize = removed.ok()?.extract().ok()?;
    let future = future.clone().unbind();
    (removed == 1).then(|| (Some(context.unbind()), callback.unbind(), future))
}

/// Marks the time during which a callback resumes tasks: holds the thread of their loop, or 0. The
/// running loop of such a task is known, which saves the system call that asyncio makes to find it up to
/// Python 3.11.
#[derive(Default)]
pub struct WakeBatch(AtomicUsize);

impl WakeBatch {
    pub fn begin(&self) {
        self.0.store(thread(), Relaxed);
    }

    pub fn end(&self) {
        self.0.store(0, Relaxed);
    }

    /// Whether the caller is a task that the callback has resumed.
    pub fn is_here(&self) -> bool {
        self.0.load(Relaxed) == thread()
    }
}

/// A number that no other running thread has.
fn thread() -> usize {
    thread_local!(static HERE: u8 = const { 0 });
    HERE.with(|here| std::ptr::from_ref(here) as usize)
}
