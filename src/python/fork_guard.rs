//! The process id, cached: sockets and loops belong to the process that made them, and each use checks for
//! a forked child.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// 0 if it is not known.
static PID: AtomicU32 = AtomicU32::new(0);
/// Whether the fork handler is registered.
static WATCHED: AtomicBool = AtomicBool::new(false);

/// The process's id.
pub fn pid() -> u32 {
    match PID.load(Ordering::Relaxed) {
        0 => {
            let pid = std::process::id();
            if WATCHED.load(Ordering::Relaxed) {
                PID.store(pid, Ordering::Relaxed);
            }
            pid
        }
        pid => pid,
    }
}

extern "C" fn forget() {
    PID.store(0, Ordering::Relaxed);
}

/// Registers the fork handler. Call it once, when the module is imported.
#[allow(unsafe_code)]
pub fn watch() {
    // SAFETY: the handler only stores to an atomic. `getpid` would be a third system call in a unary call.
    if unsafe { libc::pthread_atfork(None, None, Some(forget)) } == 0 {
        WATCHED.store(true, Ordering::Relaxed);
    }
}
