//! The thread that drains the pipe of a daemon's output.

#[cfg(unix)]
use super::super::signals::with_signals_blocked;
use super::store::Store;
#[cfg(not(unix))]
use super::store::READ_SIZE;
use crate::locks::lock;
#[cfg(unix)]
use std::io::PipeWriter;
use std::io::{self, PipeReader};
#[cfg(not(unix))]
use std::io::{ErrorKind, Read as _};
#[cfg(target_os = "linux")]
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
#[cfg(target_os = "linux")]
use std::time::{Duration, Instant};

/// The size of the thread's stack, in bytes.
const STACK_SIZE: usize = 64 * 1024;

/// The thread that drains the pipe.
#[derive(Debug)]
pub(super) struct Drainer {
    thread: JoinHandle<()>,
    owner: u32,
    /// Closing it ends the thread.
    #[cfg(unix)]
    stop: PipeWriter,
    /// The thread's directory in `/proc`.
    #[cfg(target_os = "linux")]
    pub(super) task: PathBuf,
}

impl Drainer {
    #[cfg(unix)]
    pub(super) fn start(store: &Arc<Mutex<Store>>, source: Arc<PipeReader>) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let store = Arc::clone(store);
        #[cfg(target_os = "linux")]
        let (name, named) = std::sync::mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("p2pd-log".into())
            .stack_size(STACK_SIZE);
        // The program's signals must not be delivered to this thread: the program may have blocked
        // one in its own threads, to wait for it.
        let thread = with_signals_blocked(|| {
            thread.spawn(move || {
                #[cfg(target_os = "linux")]
                let _ = name.send(rustix::thread::gettid());
                drain(&store, &source, &stopped);
            })
        })?;
        #[cfg(target_os = "linux")]
        let task = named.recv().map_or_else(
            |_| PathBuf::new(),
            |id| format!("/proc/self/task/{}", id.as_raw_nonzero()).into(),
        );
        Ok(Drainer {
            thread,
            owner: std::process::id(),
            stop,
            #[cfg(target_os = "linux")]
            task,
        })
    }

    #[cfg(not(unix))]
    pub(super) fn start(store: &Arc<Mutex<Store>>, source: Arc<PipeReader>) -> io::Result<Self> {
        let store = Arc::clone(store);
        let thread = thread::Builder::new()
            .name("p2pd-log".into())
            .stack_size(STACK_SIZE)
            .spawn(move || drain(&store, &source))?;
        Ok(Drainer {
            thread,
            owner: std::process::id(),
        })
    }

    /// Whether the thread runs, or has nothing left to do.
    pub(super) fn runs(&self) -> bool {
        // On other systems, the thread ends only with the output.
        cfg!(not(unix)) || !self.thread.is_finished()
    }

    pub(super) fn stop(self) {
        if self.owner != std::process::id() {
            // The thread does not exist in a forked child.
            std::mem::forget(self.thread);
        } else {
            #[cfg(unix)]
            self.join();
        }
    }

    #[cfg(unix)]
    fn join(self) {
        drop(self.stop);
        let _ = self.thread.join();
        #[cfg(target_os = "linux")]
        {
            // The kernel lists the thread for a moment longer. CPython would count it, and warn
            // that a process with several threads forks.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(20) && self.task.exists() {
                thread::yield_now();
            }
        }
    }
}

/// Stores the output until its end, or the end of `stopped`.
#[cfg(unix)]
fn drain(store: &Mutex<Store>, source: &PipeReader, stopped: &PipeReader) {
    use rustix::event::{poll, PollFd, PollFlags};
    loop {
        let mut files = [source, stopped].map(|file| PollFd::new(file, PollFlags::IN));
        match poll(&mut files, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        if !files[1].revents().is_empty() {
            return;
        }
        let mut store = lock(store);
        if !files[0].revents().is_empty() && store.drain() {
            return;
        }
    }
}

/// Stores the output until its end.
#[cfg(not(unix))]
fn drain(store: &Mutex<Store>, mut source: &PipeReader) {
    let mut buffer = vec![0; READ_SIZE];
    loop {
        match source.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                let mut store = lock(store);
                store.append(&buffer[..length]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
