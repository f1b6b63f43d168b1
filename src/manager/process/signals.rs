//! Signals to processes and process groups.

#[cfg(unix)]
use std::mem;
#[cfg(unix)]
use std::ptr;

#[derive(Debug, Clone, Copy)]
pub(super) enum Signal {
    Terminate,
    Kill,
}

#[cfg(unix)]
pub(super) fn signal_group(group: u32, signal: Signal) {
    let signal = match signal {
        Signal::Terminate => rustix::process::Signal::TERM,
        Signal::Kill => rustix::process::Signal::KILL,
    };
    if let Some(group) = unix_pid(group) {
        // Fails if the group has ended; on macOS with EPERM if only zombies are left.
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

#[cfg(unix)]
pub(super) fn exists(process: u32) -> bool {
    let found = |pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH);
    unix_pid(process).is_some_and(found)
}

#[cfg(unix)]
pub(super) fn group_exists(group: u32) -> bool {
    let found = |pid| rustix::process::test_kill_process_group(pid) != Err(rustix::io::Errno::SRCH);
    unix_pid(group).is_some_and(found)
}

#[cfg(unix)]
fn unix_pid(number: u32) -> Option<rustix::process::Pid> {
    i32::try_from(number)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
}

/// Runs `make`, which creates a child or a thread, with all signals blocked. The new child or
/// thread inherits that.
#[cfg(unix)]
#[allow(unsafe_code)]
pub(super) fn with_signals_blocked<T>(make: impl FnOnce() -> T) -> T {
    // SAFETY: the mask belongs to this thread, and the sets are initialised before they are read.
    let before = unsafe {
        let [mut all, mut before]: [libc::sigset_t; 2] = mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    let made = make();
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut()) };
    made
}
