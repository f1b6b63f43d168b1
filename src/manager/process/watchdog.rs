//! The watchdog: a process that outlives this one, if necessary, to clean up after it.
//!
//! It reads lines from a pipe until the end of file, which comes when this process ends for any
//! reason. The last line is the daemon's process group, or 0 if the daemon has ended. The watchdog
//! then ends that group and removes the files.
//!
//! There are two kinds. A shell script (0.7 MB, 1 ms to start) is used where there is a shell with
//! `rm` and `sleep`. Elsewhere, as in a container image without a shell, the watchdog is a forked
//! child that executes no program; see [`forked`]. That kind copies this process's page tables,
//! some 10 ms for each GiB in use, which is why it is the second choice.

#[cfg(target_os = "linux")]
mod forked;

#[cfg(target_os = "linux")]
use super::super::discovery;
use super::super::locks::{lock, try_lock};
use super::child::Child;
use super::spawn::Program;
use p2pd_sockets::Failed;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeWriter, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Mutex;

const SHELL: &str = "/bin/sh";
/// The programs that the script needs.
#[cfg(target_os = "linux")]
const PROGRAMS: [&str; 2] = ["rm", "sleep"];
const SCRIPT: &str = r#"
cd /
group=0
while read -r line; do group=$line; done
if [ "$group" -gt 0 ]; then
    kill -s TERM -- "-$group"
    tries=0
    while [ "$tries" -lt 50 ] && kill -s 0 -- "-$group"; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill -s KILL -- "-$group"
fi
rm -rf -- "$@"
"#;

/// What kind of watchdog to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[doc(hidden)]
pub enum WatchdogKind {
    Shell,
    #[cfg(target_os = "linux")]
    Forked,
}

#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    /// The write end of its pipe; the kernel closes it when this process ends.
    lifeline: Mutex<Option<PipeWriter>>,
}

impl Watchdog {
    /// Starts a watchdog that will remove these files and directories. Without a `kind`, it is the
    /// shell script if that can run, else a forked child.
    pub(super) fn start<'a>(
        files: impl IntoIterator<Item = Option<&'a Path>>,
        kind: Option<WatchdogKind>,
    ) -> Result<Self, Failed> {
        let files: Vec<_> = files.into_iter().flatten().collect();
        match kind {
            Some(WatchdogKind::Shell) => Self::run_shell(&files),
            #[cfg(target_os = "linux")]
            Some(WatchdogKind::Forked) => Self::fork(&files),
            #[cfg(target_os = "linux")]
            None if !has_shell() => Self::fork(&files),
            #[cfg(target_os = "linux")]
            None => Self::run_shell(&files).or_else(|failed| {
                // The shell may exist and still not run: for another platform, or without its
                // loader.
                Self::fork(&files).map_err(|_| failed)
            }),
            #[cfg(not(target_os = "linux"))]
            None => Self::run_shell(&files),
        }
    }

    fn run_shell(files: &[&Path]) -> Result<Self, Failed> {
        let (reader, lifeline) = pipe()?;
        let arguments = ["-c", SCRIPT, "p2pd-watchdog"].map(str::as_bytes);
        let files = files.iter().map(|file| file.as_os_str().as_bytes());
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .map_err(Failed::at(|| "cannot open /dev/null"))?;
        let child = Program::new(
            Path::new(SHELL),
            arguments.into_iter().chain(files),
            [&reader, &null, &null],
        )?
        .environment([("PATH".into(), path())])
        .spawn()?;
        Ok(Watchdog {
            child,
            lifeline: Mutex::new(Some(lifeline)),
        })
    }

    #[cfg(target_os = "linux")]
    fn fork(files: &[&Path]) -> Result<Self, Failed> {
        let (reader, lifeline) = pipe()?;
        let child = forked::fork(&reader, &lifeline, files)
            .map_err(Failed::at(|| "cannot fork the watchdog"))?;
        Ok(Watchdog {
            child,
            lifeline: Mutex::new(Some(lifeline)),
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Makes the spawned process write its process id to the pipe.
    pub(super) fn announced(&self, program: Program) -> Result<Program, Failed> {
        let lifeline = lock(&self.lifeline);
        match lifeline.as_ref() {
            Some(lifeline) => program.announced_to(lifeline),
            None => Ok(program),
        }
    }

    /// Sends the process group that the watchdog must end, or 0 if there is none.
    pub(super) fn send(&self, group: u32) {
        let lifeline = lock(&self.lifeline);
        if let Some(mut lifeline) = lifeline.as_ref() {
            // One write, so that lines do not mix. Fails if the watchdog was killed.
            let _ = lifeline.write_all(format!("{group}\n").as_bytes());
        }
    }

    /// Kills the watchdog, so that it does not clean up. Returns whether it has ended; the caller
    /// calls again until then.
    pub(super) fn dismiss(&self) -> bool {
        let ended = self.child.kill();
        if ended {
            self.cut_lifeline();
        }
        ended
    }

    /// Lets the watchdog clean up. Returns whether it has ended; the caller calls again until then.
    pub(super) fn finish(&self) -> bool {
        self.cut_lifeline();
        let ended = !matches!(self.child.has_ended(), Ok(false));
        if ended {
            self.child.reap();
        }
        ended
    }

    /// Closes this process's end of the pipe.
    pub(super) fn cut_lifeline(&self) {
        // The lock is held forever in a forked child if another thread of the parent was writing.
        if let Some(mut lifeline) = try_lock(&self.lifeline) {
            *lifeline = None;
        }
    }
}

fn pipe() -> Result<(io::PipeReader, PipeWriter), Failed> {
    io::pipe().map_err(Failed::at(|| "cannot create a pipe"))
}

/// `PATH` for the script.
fn path() -> OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/bin:/usr/bin");
    path
}

/// Whether the script's programs exist.
#[cfg(target_os = "linux")]
fn has_shell() -> bool {
    let path = path();
    let in_path = |program: &&str| -> bool {
        let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(program));
        candidates.any(|candidate| discovery::check(&candidate).is_ok())
    };
    discovery::check(Path::new(SHELL)).is_ok() && PROGRAMS.iter().all(in_path)
}
