//! Prepares daemons for a fork of this process. The child must not inherit a lock that another thread
//! holds, nor the lifelines by which watchdogs recognise the parent.
//!
//! The hooks are native functions, so that no Python signal handler can raise between two of their steps.

use p2pd_manager::process::Process;
use pyo3::prelude::*;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// All daemons of this process.
static PROCESSES: Mutex<Vec<Weak<Process>>> = Mutex::new(Vec::new());

thread_local! {
    /// The daemons that this thread has paused; `None` unless it is forking.
    static PAUSED: RefCell<Option<Vec<Arc<Process>>>> = const { RefCell::new(None) };
}

/// Keeps other threads out of the methods of daemons while this process forks.
pub(super) struct Gate {
    within: AtomicUsize,
    /// The number of threads that are forking.
    closed: AtomicUsize,
}

pub(super) static GATE: Gate = Gate {
    within: AtomicUsize::new(0),
    closed: AtomicUsize::new(0),
};

impl Gate {
    /// Time that a fork waits for other threads. A method takes a few milliseconds.
    const PATIENCE: Duration = Duration::from_secs(5);
    const PAUSE: Duration = Duration::from_micros(100);

    pub(super) fn pass<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Within<'a>(&'a AtomicUsize);
        impl Drop for Within<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        // A finalizer that runs in the forking thread must not wait for that fork.
        if is_forking() {
            return work();
        }
        loop {
            self.within.fetch_add(1, Ordering::SeqCst);
            let within = Within(&self.within);
            if self.closed.load(Ordering::SeqCst) == 0 {
                let outcome = work();
                drop(within);
                return outcome;
            }
            drop(within);
            thread::sleep(Self::PAUSE);
        }
    }

    fn close(&self) {
        self.closed.fetch_add(1, Ordering::SeqCst);
        let begun = Instant::now();
        while self.within.load(Ordering::SeqCst) > 0 && begun.elapsed() < Self::PATIENCE {
            thread::sleep(Self::PAUSE);
        }
    }

    fn open(&self) {
        self.closed.fetch_sub(1, Ordering::SeqCst);
    }

    /// Opens the gate in a forked child, whose only thread is the one that forked.
    fn reset(&self) {
        self.closed.store(0, Ordering::SeqCst);
        self.within.store(0, Ordering::SeqCst);
    }
}

fn is_forking() -> bool {
    // Returns false while the thread exits.
    PAUSED
        .try_with(|paused| paused.try_borrow().is_ok_and(|paused| paused.is_some()))
        .unwrap_or(false)
}

/// Registers a new daemon with the hooks. Must be called within the gate.
pub(super) fn registered(process: Process) -> Arc<Process> {
    let process = Arc::new(process);
    let mut all = PROCESSES.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|other| other.strong_count() > 0);
    all.push(Arc::downgrade(&process));
    process
}

/// Runs before a fork: keeps other threads out of all daemons, and ends the threads that log their output.
#[pyfunction]
pub fn before_fork(py: Python<'_>) {
    if is_forking() {
        return;
    }
    py.detach(|| {
        GATE.close();
        let all = PROCESSES.lock().unwrap_or_else(PoisonError::into_inner);
        let processes: Vec<_> = all.iter().filter_map(Weak::upgrade).collect();
        drop(all);
        for process in &processes {
            process.pause();
        }
        PAUSED.set(Some(processes));
    });
}

/// Runs after a fork, in the parent: undoes `before_fork`. Does nothing if `before_fork` did not run.
#[pyfunction]
pub fn after_fork_in_parent(py: Python<'_>) {
    if let Some(processes) = PAUSED.take() {
        py.detach(|| {
            GATE.open();
            for process in &processes {
                process.resume();
            }
            drop(processes);
        });
    }
}

/// Runs after a fork, in the child: leaves the daemons to the parent.
#[pyfunction]
pub fn after_fork_in_child() {
    let processes = PAUSED.take();
    GATE.reset();
    for process in processes.iter().flatten() {
        process.cut_lifeline();
    }
}
