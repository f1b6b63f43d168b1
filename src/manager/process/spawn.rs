//! Spawns a program: in its own session, with umask 077 and without inherited descriptors, and
//! with its process id in the watchdog's pipe.
//!
//! In its own session, the program does not get Ctrl-C from the terminal: the caller stops the
//! daemon instead. And a wrapper script and its children form one process group.
//!
//! Why not `std::process::Command`: the session, the umask, the closed descriptors and the process
//! id, which must be written before the program runs, need `pre_exec`. With `pre_exec`, `Command`
//! forks. A fork runs `pthread_atfork` handlers and copies the page tables: measured on two busy
//! cores, in a process of 2 GiB, `spawn` then blocks the event loop for over 300 ms, instead of
//! 0.1 ms. So on Linux the child shares this process's memory until it executes the program.
//! Elsewhere it is forked.
//!
//! Why not `execvp`: it passes a file that the kernel rejects, such as a binary for another
//! machine, to a shell, whose syntax errors would hide the reason.

use super::child::Child;
#[cfg(target_os = "linux")]
use super::signals::with_signals_blocked;
use p2pd_sockets::Failed;
use rustix::process::{self, Resource};
#[cfg(target_os = "linux")]
use rustix::process::{Pid, WaitOptions};
use std::ffi::{c_char, c_int, CString, OsStr, OsString};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr;

/// Where `close_range` is missing, only descriptors below this number are marked close-on-exec.
const MARKED_ONE_BY_ONE: u64 = 1 << 16;
/// The size of the child's stack, in bytes.
#[cfg(target_os = "linux")]
const STACK_SIZE: usize = 64 * 1024;

/// A program to spawn. Everything is prepared here, so that the child only makes system calls.
pub(super) struct Program {
    /// The program and its arguments.
    arguments: Vec<CString>,
    environment: Vec<CString>,
    stdio: [OwnedFd; 3],
    announce: Option<OwnedFd>,
    /// Whether to try `close_range` first; false in tests of the fallback.
    #[cfg(target_os = "linux")]
    by_range: bool,
}

impl Program {
    /// `program` is a path. The child inherits this process's environment.
    ///
    /// # Errors
    /// An argument contains a NUL, or no descriptor is left.
    pub(super) fn new<'a>(
        program: &'a Path,
        arguments: impl IntoIterator<Item = &'a [u8]>,
        [input, output, errors]: [&dyn AsFd; 3],
    ) -> Result<Self, Failed> {
        let arguments = std::iter::once(program.as_os_str().as_bytes())
            .chain(arguments)
            .map(CString::new);
        let arguments = arguments.collect::<Result<_, _>>().map_err(io::Error::from);
        let operation = || format!("cannot pass these arguments to {}", program.display());
        Ok(Program {
            arguments: arguments.map_err(Failed::at(operation))?,
            environment: environment(std::env::vars_os()),
            stdio: [above(input)?, above(output)?, above(errors)?],
            announce: None,
            #[cfg(target_os = "linux")]
            by_range: true,
        })
    }

    /// Replaces the environment.
    pub(super) fn environment(self, variables: [(OsString, OsString); 1]) -> Self {
        let environment = environment(variables);
        Program {
            environment,
            ..self
        }
    }

    /// Makes the child write its process id and a newline to the pipe before it executes the
    /// program. The reader then knows the id even if this process is killed right after spawning.
    pub(super) fn announced_to(mut self, pipe: &dyn AsFd) -> Result<Self, Failed> {
        self.announce = Some(above(pipe)?);
        Ok(self)
    }

    /// Spawns the program.
    ///
    /// # Errors
    /// The program cannot be executed, or no process can be created.
    pub(super) fn spawn(&self) -> Result<Child, Failed> {
        let [argv, envp] =
            [&self.arguments, &self.environment].map(|strings| -> Vec<*const c_char> {
                let pointers = strings.iter().map(|string| string.as_ptr());
                pointers.chain([ptr::null()]).collect()
            });
        let limit = process::getrlimit(Resource::Nofile).current;
        let limit = limit.unwrap_or(u64::MAX).min(MARKED_ONE_BY_ONE);
        let pid = start(Body {
            argv: argv.as_ptr(),
            envp: envp.as_ptr(),
            stdio: self.stdio.each_ref().map(|fd| fd.as_raw_fd()),
            announce: self.announce.as_ref().map_or(-1, |fd| fd.as_raw_fd()),
            #[cfg(target_os = "linux")]
            by_range: self.by_range,
            limit: limit as c_int,
            #[cfg(target_os = "linux")]
            error: 0,
        })
        .map_err(|failed| self.explained(failed))?;
        Child::new(pid).map_err(Failed::at(|| START_PROCESS))
    }

    /// Adds the program's name to the error.
    fn explained(&self, failed: NotStarted) -> Failed {
        let error = match failed {
            NotStarted::Process(error) => return Failed::at(|| START_PROCESS)(error),
            NotStarted::Program(error) => error,
        };
        let program = self.arguments.first().map(|path| path.to_bytes());
        let program = Path::new(OsStr::from_bytes(program.unwrap_or_default()));
        let mut operation = format!("cannot execute {}", program.display());
        // The kernel reports ENOENT also if the program's interpreter or loader is missing.
        if error.kind() == io::ErrorKind::NotFound && program.exists() {
            operation += " as its interpreter or loader is missing";
        }
        Failed { operation, error }
    }
}

const START_PROCESS: &str = "cannot start another process";

/// Which step failed.
enum NotStarted {
    Process(io::Error),
    Program(io::Error),
}

fn environment(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Vec<CString> {
    let line = |(name, value): (OsString, OsString)| {
        let line = [name.as_bytes(), b"=", value.as_bytes()].concat();
        CString::new(line).ok()
    };
    variables.into_iter().filter_map(line).collect()
}

/// Duplicates the descriptor above 2: the child replaces 0 to 2.
fn above(file: &dyn AsFd) -> Result<OwnedFd, Failed> {
    rustix::io::fcntl_dupfd_cloexec(file, 3)
        .map_err(io::Error::from)
        .map_err(Failed::at(|| {
            "cannot duplicate a descriptor for another process"
        }))
}

/// The child's data.
struct Body {
    argv: *const *const c_char,
    envp: *const *const c_char,
    stdio: [c_int; 3],
    /// The watchdog's pipe, or -1.
    announce: c_int,
    #[cfg(target_os = "linux")]
    by_range: bool,
    limit: c_int,
    /// Set by the child if it cannot execute the program.
    #[cfg(target_os = "linux")]
    error: c_int,
}

impl Body {
    /// Executes the program; returns the error number if that fails.
    ///
    /// # Safety
    /// The caller is a child process, and the pointers are valid. The child may share the memory of
    /// its parent, whose other threads still run: this function does not allocate, lock or panic,
    /// and only calls functions that are async-signal-safe.
    #[allow(unsafe_code)]
    unsafe fn execute(&self) -> c_int {
        // SAFETY: these system calls only affect the child, and the caller guarantees that the
        // pointers are valid. A zeroed `sigset_t` is valid, and sigemptyset initialises it.
        unsafe {
            if libc::setsid() < 0 {
                return errno();
            }
            libc::umask(0o077);
            for (number, file) in (0..).zip(self.stdio) {
                if libc::dup2(file, number) < 0 {
                    return errno();
                }
            }
            if self.announce >= 0 {
                // After setsid(), so that it is the id of a process group too.
                self.announce();
            }
            self.default_signals();
            self.close_on_exec();
            let mut none = mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
            libc::execve(*self.argv, self.argv, self.envp);
        }
        errno()
    }

    #[allow(unsafe_code)]
    unsafe fn announce(&self) {
        // Right-aligned: the shell's `read` strips leading blanks.
        let mut line = *b"           \n";
        // SAFETY: these system calls read only the line.
        unsafe {
            let mut rest = libc::getpid().unsigned_abs();
            for place in line.iter_mut().rev().skip(1) {
                if rest > 0 {
                    *place = b'0' + (rest % 10) as u8;
                    rest /= 10;
                }
            }
            // The write raises SIGPIPE if the watchdog was killed.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::write(self.announce, line.as_ptr().cast(), line.len());
            // Discards a SIGPIPE that is pending because it is blocked.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        }
    }

    /// Resets signals that have a handler, which could run in the memory that the child shares with
    /// its parent. Ignored signals stay ignored, as nohup needs, except the two that language
    /// runtimes ignore.
    #[allow(unsafe_code)]
    unsafe fn default_signals(&self) {
        // SAFETY: these system calls access only the two structs. A zeroed `sigaction` is valid,
        // and means SIG_DFL.
        unsafe {
            let default: libc::sigaction = mem::zeroed();
            for signal in 1..=64 {
                let mut action: libc::sigaction = mem::zeroed();
                let known = libc::sigaction(signal, ptr::null(), &mut action) == 0;
                let is_ignored = action.sa_sigaction == libc::SIG_IGN
                    && signal != libc::SIGPIPE
                    && signal != libc::SIGXFSZ;
                if known && !is_ignored {
                    libc::sigaction(signal, &default, ptr::null_mut());
                }
            }
        }
    }

    /// Marks every inherited descriptor close-on-exec.
    #[allow(unsafe_code)]
    unsafe fn close_on_exec(&self) {
        // SAFETY: this changes a flag of the child's own descriptors.
        unsafe {
            #[cfg(target_os = "linux")]
            if self.by_range {
                let (first, last) = (3, libc::c_uint::MAX);
                let flag = libc::CLOSE_RANGE_CLOEXEC;
                if libc::syscall(libc::SYS_close_range, first, last, flag) == 0 {
                    return;
                }
            }
            // The kernel or a sandbox does not know the call.
            for file in 3..self.limit {
                libc::fcntl(file, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
    }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(-1)
}

/// The process id that `clone` returned, or the error.
#[cfg(target_os = "linux")]
pub(super) fn child_made(pid: c_int) -> io::Result<c_int> {
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pid)
}

/// Starts the child; returns once it has executed the program, or failed to.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn start(mut body: Body) -> Result<c_int, NotStarted> {
    use std::ffi::c_void;

    extern "C" fn child(body: *mut c_void) -> c_int {
        let body = body.cast::<Body>();
        // SAFETY: `body` belongs to `start`, which waits while this function runs.
        unsafe {
            (&raw mut (*body).error).write_volatile((*body).execute());
            libc::_exit(127)
        }
    }

    let mut stack = vec![0u128; STACK_SIZE / mem::size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let top = stack.as_mut_ptr_range().end;
    let body_of_child = (&raw mut body).cast();
    // SAFETY: CLONE_VFORK suspends this thread until the child has executed the program or ended,
    // so the stack and `body` are the child's until then. The stack is large enough, and no signal
    // handler runs on it, since all signals are blocked.
    let pid = with_signals_blocked(|| unsafe {
        child_made(libc::clone(child, top.cast(), flags, body_of_child))
    })
    .map_err(NotStarted::Process)?;
    // SAFETY: the pointer is valid. Volatile, since the compiler does not see the child's write.
    match unsafe { (&raw const body.error).read_volatile() } {
        0 => Ok(pid),
        error => {
            // The child has ended.
            let _ = process::waitpid(Pid::from_raw(pid), WaitOptions::empty());
            Err(NotStarted::Program(io::Error::from_raw_os_error(error)))
        }
    }
}

/// Starts the child; returns once it has executed the program, or failed to.
#[cfg(not(target_os = "linux"))]
#[allow(unsafe_code)]
fn start(mut body: Body) -> Result<c_int, NotStarted> {
    use std::ffi::CStr;
    use std::os::unix::process::CommandExt as _;
    use std::sync::atomic::{AtomicPtr, Ordering};

    // SAFETY: the first element of `argv` is the program, a valid C string.
    let program = unsafe { CStr::from_ptr(*body.argv) };
    let mut command = std::process::Command::new(OsStr::from_bytes(program.to_bytes()));
    // Atomic because the closure must be `Send`.
    let body = AtomicPtr::new(&raw mut body);
    let run = move || -> io::Result<()> {
        // SAFETY: this is the child; its parent is still in `start`, so the body is valid.
        let error = unsafe { (*body.load(Ordering::Relaxed)).execute() };
        Err(io::Error::from_raw_os_error(error))
    };
    // SAFETY: `execute` is async-signal-safe.
    let child = unsafe { command.pre_exec(run) }.spawn();
    let child = child.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => NotStarted::Process(error),
        _ => NotStarted::Program(error),
    })?;
    // Dropping std's `Child` does not affect the process.
    Ok(child.id() as c_int)
}

#[cfg(test)]
mod tests;
