//! A child process that other parts of the program may reap, too.

use rustix::process::{self, Pid, WaitId, WaitIdOptions, WaitOptions};
use std::ffi::c_int;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

/// A child process.
///
/// Other parts of the program may reap it (by waiting for any child), and the kernel may then reuse
/// its process id. So methods check that it is still there before they signal or reap it.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
}

impl Child {
    pub(super) fn new(pid: c_int) -> io::Result<Self> {
        let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::Other)?;
        Ok(Child { pid })
    }

    pub(super) fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether it has ended and can be reaped.
    ///
    /// # Errors
    /// It has been reaped elsewhere.
    pub(super) fn has_ended(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        Ok(process::waitid(WaitId::Pid(self.pid), options)?.is_some())
    }

    /// Returns the exit status; `None` if it is running, or has been reaped elsewhere.
    pub(super) fn reap(&self) -> Option<ExitStatus> {
        let (_, status) = process::waitpid(Some(self.pid), WaitOptions::NOHANG).ok()??;
        Some(ExitStatus::from_raw(status.as_raw()))
    }

    /// Kills it if it is running. Does not wait; returns whether it has been reaped.
    pub(super) fn kill(&self) -> bool {
        if let Ok(false) = self.has_ended() {
            let _ = process::kill_process(self.pid, process::Signal::KILL);
        }
        if let Ok(false) = self.has_ended() {
            return false;
        }
        self.reap();
        true
    }
}
