//! The interpreter's end, with event loops that still run in other threads.
//!
//! Before Python 3.14 it ends a thread that wants to run Python after the end has begun, by
//! unwinding its stack; and what unwinds through Rust ends the process with SIGABRT. So no such
//! thread may be on its way through Rust into Python then: the end waits for those that are, and
//! holds up those that are about to.

use pyo3::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the end waits for threads on their way, which may themselves wait for something.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a thread about to go is held up. Usually the end has come by then; if not, somebody
/// who does things at the end may need that thread.
const HELD_UP: Duration = Duration::from_millis(100);

const PAUSE: Duration = Duration::from_millis(1);

/// How many threads are on their way.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
static NEAR: AtomicBool = AtomicBool::new(false);
/// The process that these count for: a forked child has none of its parent's threads.
static PROCESS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// This thread is the one that brings the end about.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

/// A way through Rust into Python, for as long as it lives.
pub struct ShutdownGuard(());

/// To be called on it by what event loops call, and what calls Python.
pub fn enter(py: Python<'_>) -> ShutdownGuard {
    let depth = DEPTH.get();
    if depth == 0 {
        if NEAR.load(Ordering::Relaxed) && !ENDING.get() && is_this_process() {
            py.detach(hold_up);
        }
        INSIDE.fetch_add(1, Ordering::Relaxed);
    }
    DEPTH.set(depth + 1);
    ShutdownGuard(())
}

impl Drop for ShutdownGuard {
    fn drop(&mut self) {
        let depth = DEPTH.get() - 1;
        DEPTH.set(depth);
        if depth == 0 {
            INSIDE.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Python calls it when the interpreter's end is near: nothing but daemon threads is left.
#[pyfunction]
pub fn _the_end_is_near(py: Python<'_>) {
    if !is_this_process() {
        return;
    }
    ENDING.set(true);
    NEAR.store(true, Ordering::Relaxed);
    py.detach(|| {
        let begun = Instant::now();
        while INSIDE.load(Ordering::Relaxed) > 0 && begun.elapsed() < PATIENCE {
            thread::sleep(PAUSE);
        }
    });
}

/// Has Python call that.
pub fn watch(module: &Bound<'_, PyModule>) -> PyResult<()> {
    PROCESS.store(super::fork_guard::pid(), Ordering::Relaxed);
    let callback = module.getattr("_the_end_is_near")?;
    module
        .py()
        .import("atexit")?
        .call_method1("register", (callback,))?;
    Ok(())
}

fn is_this_process() -> bool {
    PROCESS.load(Ordering::Relaxed) == super::fork_guard::pid()
}

/// Waits without the interpreter, for good if its end has come.
fn hold_up() {
    let begun = Instant::now();
    while begun.elapsed() < HELD_UP || !is_running() {
        thread::sleep(PAUSE);
    }
}

#[allow(unsafe_code)]
fn is_running() -> bool {
    // SAFETY: it reads a flag, as any thread may at any time.
    unsafe { pyo3::ffi::Py_IsInitialized() != 0 }
}
