//! Caches the process id. Sockets and event loops belong to the process that created them, so each use
//! checks for a forked child. The cache saves a `getpid`, which would be the third system call of a
//! unary call.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// 0 if it is not cached.
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
    // SAFETY: the handler only stores to an atomic.
    if unsafe { libc::pthread_atfork(None, None, Some(forget)) } == 0 {
        WATCHED.store(true, Ordering::Relaxed);
    }
}
