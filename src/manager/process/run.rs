//! One run of the daemon: its child process and exit status.

#[cfg(unix)]
use super::child::Child;
#[cfg(unix)]
use super::signals::signal_group;
use super::signals::Signal;
#[cfg(unix)]
use super::spawn::Program;
#[cfg(unix)]
use super::watchdog::Watchdog;
use p2pd_sockets::Failed;
#[cfg(unix)]
use std::fs::File;
#[cfg(not(unix))]
use std::io;
use std::io::PipeWriter;
use std::path::Path;
use std::process::ExitStatus;
#[cfg(not(unix))]
use std::process::{Child, Command, Stdio};

/// The last run of a daemon. The default is for a daemon that never ran.
#[derive(Debug, Default)]
pub(super) struct Run {
    child: Option<Child>,
    status: Option<ExitStatus>,
}

impl Run {
    /// Spawns the daemon in its own session, and sends its process group to the watchdog.
    #[cfg(unix)]
    pub(super) fn spawn(
        binary: &Path,
        arguments: &[String],
        output: PipeWriter,
        watchdog: &Watchdog,
    ) -> Result<Self, Failed> {
        let null =
            File::open("/dev/null").map_err(Failed::at(|| "cannot open /dev/null for reading"))?;
        let arguments = arguments.iter().map(String::as_bytes);
        let program = Program::new(binary, arguments, [&null, &output, &output])?;
        let spawned = watchdog.announced(program)?.spawn();
        if spawned.is_err() {
            watchdog.send(0);
        }
        spawned.map(Self::of)
    }

    #[cfg(not(unix))]
    pub(super) fn spawn(
        binary: &Path,
        arguments: &[String],
        output: PipeWriter,
    ) -> Result<Self, Failed> {
        let spawn = || -> io::Result<Child> {
            Command::new(binary)
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(output.try_clone()?)
                .stderr(output)
                .spawn()
        };
        let spawned = spawn().map_err(Failed::at(|| {
            format!("cannot execute {}", binary.display())
        }));
        spawned.map(Self::of)
    }

    fn of(child: Child) -> Self {
        Run {
            child: Some(child),
            status: None,
        }
    }

    /// Whether the daemon never ran.
    #[cfg(unix)]
    pub(super) fn is_new(&self) -> bool {
        self.child.is_none()
    }

    /// Whether the daemon was spawned and not yet reaped.
    pub(super) fn is_running(&self) -> bool {
        self.child.is_some() && self.status.is_none()
    }

    /// The process id; 0 if the daemon never ran.
    pub(super) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// The exit status, once the daemon was reaped.
    pub(super) fn status(&self) -> Option<ExitStatus> {
        self.status
    }

    /// Reaps the daemon if it has ended.
    #[cfg(unix)]
    pub(super) fn reap(&mut self, watchdog: &Watchdog) {
        let Some(child) = self.child.as_ref().filter(|_| self.status.is_none()) else {
            return;
        };
        let status = match child.has_ended() {
            Ok(false) => return,
            Ok(true) => {
                // A wrapper script may have left the real daemon behind. Kill it before reaping the
                // script: afterwards the kernel may reuse the process group's id.
                signal_group(child.id(), Signal::Kill);
                watchdog.send(0);
                child.reap()
            }
            // Reaped elsewhere: the kernel may have reused the id.
            Err(_) => {
                watchdog.send(0);
                None
            }
        };
        self.status = Some(status.unwrap_or_default());
    }

    /// Reaps the daemon if it has ended.
    #[cfg(not(unix))]
    pub(super) fn reap(&mut self) {
        let Some(child) = self.child.as_mut().filter(|_| self.status.is_none()) else {
            return;
        };
        if let status @ (Ok(Some(_)) | Err(_)) = child.try_wait() {
            self.status = Some(status.ok().flatten().unwrap_or_default());
        }
    }

    /// Signals the daemon and its children, if it runs. (On Windows it kills the daemon alone.)
    pub(super) fn signal(&mut self, signal: Signal) {
        if !self.is_running() {
            return;
        }
        #[cfg(unix)]
        signal_group(self.pid(), signal);
        #[cfg(not(unix))]
        if let (Some(child), Signal::Terminate | Signal::Kill) = (&mut self.child, signal) {
            let _ = child.kill();
        }
    }
}
