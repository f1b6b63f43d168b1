//! Runs a program in a session of its own, with none of this process's files, and makes what it
//! makes reachable by this user only, at whatever path.
//!
//! Ctrl-C must reach this process alone, which then stops the daemon; and a wrapper script and what
//! it runs are signalled together.
//!
//! Not by `std::process::Command`: for this it needs a hook, with which it forks. That copies the
//! page tables, which in a process of some GiB takes a quarter of a second, in which Python's event
//! loop stands still; and it runs what others want done at a fork. On Linux the child shares this
//! process's memory until it executes the program. Elsewhere it is forked.
//!
//! Nor by `execvp`, which gives to a shell whatever the kernel refuses: of a binary for another
//! machine one would be told syntax errors.

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

/// How many descriptors are marked one by one, where they cannot be all at once.
const MARKED_ONE_BY_ONE: u64 = 1 << 16;
/// In bytes.
#[cfg(target_os = "linux")]
const STACK_SIZE: usize = 64 * 1024;

/// A program to run. Everything is made ready here: the child makes system calls only.
pub(super) struct Program {
    words: Vec<CString>,
    environment: Vec<CString>,
    stdio: [OwnedFd; 3],
    announce: Option<OwnedFd>,
    /// Whether the kernel can mark all descriptors at once. (Some tests say it cannot.)
    #[cfg(target_os = "linux")]
    by_range: bool,
}

impl Program {
    /// The program is a path. It gets this process's environment.
    ///
    /// # Errors
    /// There is a NUL in a word, or no descriptor left.
    pub(super) fn new<'a>(
        program: &'a Path,
        arguments: impl IntoIterator<Item = &'a [u8]>,
        [input, output, errors]: [&dyn AsFd; 3],
    ) -> Result<Self, Failed> {
        let words = std::iter::once(program.as_os_str().as_bytes())
            .chain(arguments)
            .map(CString::new);
        let words = words.collect::<Result<_, _>>().map_err(io::Error::from);
        let operation = || format!("cannot pass these arguments to {}", program.display());
        Ok(Program {
            words: words.map_err(Failed::at(operation))?,
            environment: environment(std::env::vars_os()),
            stdio: [above(input)?, above(output)?, above(errors)?],
            announce: None,
            #[cfg(target_os = "linux")]
            by_range: true,
        })
    }

    /// Gives the program this environment instead.
    pub(super) fn environment(self, variables: [(OsString, OsString); 1]) -> Self {
        let environment = environment(variables);
        Program {
            environment,
            ..self
        }
    }

    /// Has the child write its process id and a newline there, before it executes the program: so
    /// that whoever reads there knows of it even if this process is killed meanwhile.
    pub(super) fn announced_to(mut self, pipe: &dyn AsFd) -> Result<Self, Failed> {
        self.announce = Some(above(pipe)?);
        Ok(self)
    }

    /// # Errors
    /// It cannot be executed, or no process can be made.
    pub(super) fn spawn(&self) -> Result<Child, Failed> {
        let [argv, envp] = [&self.words, &self.environment].map(|words| -> Vec<*const c_char> {
            let words = words.iter().map(|word| word.as_ptr());
            words.chain([ptr::null()]).collect()
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
        Child::new(pid).map_err(Failed::at(|| MAKE_PROCESS))
    }

    /// The error with the program's name.
    fn explained(&self, failed: NotStarted) -> Failed {
        let error = match failed {
            NotStarted::Process(error) => return Failed::at(|| MAKE_PROCESS)(error),
            NotStarted::Program(error) => error,
        };
        let program = self.words.first().map(|word| word.to_bytes());
        let program = Path::new(OsStr::from_bytes(program.unwrap_or_default()));
        let mut operation = format!("cannot execute {}", program.display());
        // The kernel also says so of a program that is there, if what runs it is not.
        if error.kind() == io::ErrorKind::NotFound && program.exists() {
            operation += " as its interpreter or loader is missing";
        }
        Failed { operation, error }
    }
}

const MAKE_PROCESS: &str = "cannot start another process";

/// At what the start of a program failed.
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

/// The same file, at none of the numbers that the child replaces.
fn above(file: &dyn AsFd) -> Result<OwnedFd, Failed> {
    rustix::io::fcntl_dupfd_cloexec(file, 3)
        .map_err(io::Error::from)
        .map_err(Failed::at(|| {
            "cannot duplicate a descriptor for another process"
        }))
}

/// What the child needs to know.
struct Body {
    argv: *const *const c_char,
    envp: *const *const c_char,
    stdio: [c_int; 3],
    /// Or -1.
    announce: c_int,
    #[cfg(target_os = "linux")]
    by_range: bool,
    limit: c_int,
    /// What the child says, if it cannot execute the program.
    #[cfg(target_os = "linux")]
    error: c_int,
}

impl Body {
    /// Becomes the program; returns the error if it cannot.
    ///
    /// # Safety
    /// To be called in a child only, with what the pointers point to still there. That child may
    /// share its parent's memory, other threads of which run on: this neither allocates nor waits
    /// for a lock nor panics, and calls but what is safe in a signal handler.
    #[allow(unsafe_code)]
    unsafe fn execute(&self) -> c_int {
        // SAFETY: system calls on what is the child's own, but for the pointers, which the caller
        // vouches for. Zeroes are a valid `sigset_t`, which sigemptyset then fills.
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
                // After setsid(): it is the number of a group too.
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
        // Digits at the end, and blanks before, which a shell's `read` takes off.
        let mut line = *b"           \n";
        // SAFETY: system calls that look at nothing but the line.
        unsafe {
            let mut rest = libc::getpid().unsigned_abs();
            for place in line.iter_mut().rev().skip(1) {
                if rest > 0 {
                    *place = b'0' + (rest % 10) as u8;
                    rest /= 10;
                }
            }
            // It fails if somebody killed the reader, and SIGPIPE must not tell.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            libc::write(self.announce, line.as_ptr().cast(), line.len());
            // Takes it back if it is only blocked.
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        }
    }

    /// Takes back this process's signal handlers, which would run in its memory. What it ignores
    /// is ignored on (nohup), but for what runtimes ignore for themselves.
    #[allow(unsafe_code)]
    unsafe fn default_signals(&self) {
        // SAFETY: system calls that look at these two only; zeroes are valid for both, and mean
        // SIG_DFL.
        unsafe {
            let default: libc::sigaction = mem::zeroed();
            for signal in 1..=64 {
                let mut action: libc::sigaction = mem::zeroed();
                let known = libc::sigaction(signal, ptr::null(), &mut action) == 0;
                let meant = action.sa_sigaction == libc::SIG_IGN
                    && signal != libc::SIGPIPE
                    && signal != libc::SIGXFSZ;
                if known && !meant {
                    libc::sigaction(signal, &default, ptr::null_mut());
                }
            }
        }
    }

    /// Has every descriptor closed that others have left inheritable.
    #[allow(unsafe_code)]
    unsafe fn close_on_exec(&self) {
        // SAFETY: it changes but a flag, of the child's own descriptors.
        unsafe {
            #[cfg(target_os = "linux")]
            if self.by_range {
                let (first, last) = (3, libc::c_uint::MAX);
                let flag = libc::CLOSE_RANGE_CLOEXEC;
                if libc::syscall(libc::SYS_close_range, first, last, flag) == 0 {
                    return;
                }
            }
            // The kernel is too old for it, or something between does not know it.
            for file in 3..self.limit {
                libc::fcntl(file, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
    }
}

fn errno() -> c_int {
    io::Error::last_os_error().raw_os_error().unwrap_or(-1)
}

/// The child's process id, unless none was made.
#[cfg(target_os = "linux")]
pub(super) fn child_made(pid: c_int) -> io::Result<c_int> {
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pid)
}

/// Starts the child; returns once it has become the program, or has failed to.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn start(mut body: Body) -> Result<c_int, NotStarted> {
    use std::ffi::c_void;

    extern "C" fn child(body: *mut c_void) -> c_int {
        let body = body.cast::<Body>();
        // SAFETY: it is `start`'s, which waits for as long as this runs.
        unsafe {
            (&raw mut (*body).error).write_volatile((*body).execute());
            libc::_exit(127)
        }
    }

    let mut stack = vec![0u128; STACK_SIZE / mem::size_of::<u128>()];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let top = stack.as_mut_ptr_range().end;
    let body_of_child = (&raw mut body).cast();
    // SAFETY: with CLONE_VFORK this thread stands still until the child has executed the program
    // or ended, so that the stack and what `body` points to are the child's until then; the stack
    // is many times what it needs, and no signal handler runs on it, as all are blocked.
    let pid = with_signals_blocked(|| unsafe {
        child_made(libc::clone(child, top.cast(), flags, body_of_child))
    })
    .map_err(NotStarted::Process)?;
    // SAFETY: it is there. Volatile, as nothing else says that another has written it.
    match unsafe { (&raw const body.error).read_volatile() } {
        0 => Ok(pid),
        error => {
            // It has ended already.
            let _ = process::waitpid(Pid::from_raw(pid), WaitOptions::empty());
            Err(NotStarted::Program(io::Error::from_raw_os_error(error)))
        }
    }
}

/// Starts the child; returns once it has become the program, or has failed to.
#[cfg(not(target_os = "linux"))]
#[allow(unsafe_code)]
fn start(mut body: Body) -> Result<c_int, NotStarted> {
    use std::ffi::CStr;
    use std::os::unix::process::CommandExt as _;
    use std::sync::atomic::{AtomicPtr, Ordering};

    // SAFETY: `argv` begins with the program, a C string that is there.
    let program = unsafe { CStr::from_ptr(*body.argv) };
    let mut command = std::process::Command::new(OsStr::from_bytes(program.to_bytes()));
    // Atomic only for being `Send`.
    let body = AtomicPtr::new(&raw mut body);
    let run = move || -> io::Result<()> {
        // SAFETY: this is the child, a copy of a parent that is still in `start`.
        let error = unsafe { (*body.load(Ordering::Relaxed)).execute() };
        Err(io::Error::from_raw_os_error(error))
    };
    // SAFETY: it does only what can be done after a fork; see `execute`.
    let child = unsafe { command.pre_exec(run) }.spawn();
    let child = child.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => NotStarted::Process(error),
        _ => NotStarted::Program(error),
    })?;
    // Dropping the `Child` does nothing to the child.
    Ok(child.id() as c_int)
}

#[cfg(test)]
mod tests;
