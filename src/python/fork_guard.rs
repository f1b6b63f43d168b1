//! Which process this is, without asking the kernel each time: everything here that belongs to one
//! checks whether it is in a forked child.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// 0 where it is not known.
static PID: AtomicU32 = AtomicU32::new(0);
/// Whether a fork makes it unknown.
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

/// To be called once, when this is loaded.
#[allow(unsafe_code)]
pub fn watch() {
    // SAFETY: what runs in the child only stores to an atomic. Asking the kernel costs a system
    // call, and a unary call has but two others.
    if unsafe { libc::pthread_atfork(None, None, Some(forget)) } == 0 {
        WATCHED.store(true, Ordering::Relaxed);
    }
}
