//! Guards calls from Rust to Python against the interpreter's finalization, while event loops run in
//! other threads.
//!
//! Once finalization has begun, Python before 3.14 stops each thread that wants the GIL by unwinding its
//! stack. Unwinding through Rust aborts the process. So an exit handler delays finalization until no
//! thread calls Python from Rust. It also delays threads that are about to.
//!
//! A guard is taken where such a call begins, and nowhere below:
//! - in the functions of `driver` that methods of `Pipeline` and `PersistentConnection` call;
//! - in each method of these two classes that calls Python in another way, as its first statement;
//! - in the methods of `Readiness`, once it is clear that they will call Python, as most of their calls only
//!   change its state;
//! - where a new type of event loop is tested (`LoopKind::of`);
//! - in `errors`, around the constructors of exceptions, since any method may fail.

use pyo3::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Time limit of that wait.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a thread is delayed. Usually the process ends before that; if it does not, an exit handler
/// may be waiting for the thread.
const DELAY: Duration = Duration::from_millis(100);

const PAUSE: Duration = Duration::from_millis(1);

/// Number of threads that call Python from Rust.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Whether finalization is about to begin.
static NEAR: AtomicBool = AtomicBool::new(false);
/// The process to which the counters belong: a forked child has none of its parent's threads.
static PROCESS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Whether this thread finalizes the interpreter.
    static ENDING: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, finalization waits for this thread.
pub struct ShutdownGuard(());

/// Begins a call of Python; see the rule above. The caller must hold no lock.
pub fn enter(py: Python<'_>) -> ShutdownGuard {
    let depth = DEPTH.get();
    if depth == 0 {
        if NEAR.load(Ordering::Relaxed) && !ENDING.get() && is_this_process() {
            py.detach(delay);
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

/// Called at exit, when only daemon threads are left. Waits for the threads that call Python from Rust.
#[pyfunction]
pub fn _wait_before_finalization(py: Python<'_>) {
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

/// Registers the exit handler.
pub fn watch(module: &Bound<'_, PyModule>) -> PyResult<()> {
    PROCESS.store(super::fork_guard::pid(), Ordering::Relaxed);
    let callback = module.getattr("_wait_before_finalization")?;
    module
        .py()
        .import("atexit")?
        .call_method1("register", (callback,))?;
    Ok(())
}

fn is_this_process() -> bool {
    PROCESS.load(Ordering::Relaxed) == super::fork_guard::pid()
}

/// Waits without the GIL; forever if the interpreter is finalized.
fn delay() {
    let begun = Instant::now();
    while begun.elapsed() < DELAY || !is_running() {
        thread::sleep(PAUSE);
    }
}

#[allow(unsafe_code)]
fn is_running() -> bool {
    // SAFETY: reads a flag, which any thread may do at any time.
    unsafe { pyo3::ffi::Py_IsInitialized() != 0 }
}
