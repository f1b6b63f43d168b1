//! A daemon's output: a pipe, drained by a thread into two files of bounded size.
//!
//! The daemon writes to a pipe rather than to a file, since only the reader of a pipe can limit the
//! size of the log. The thread runs from the start of a daemon until its output ends. It never
//! takes Python's global interpreter lock, so a program that computes does not hold up its daemon.
//!
//! `log` holds the newest output. Once it is full, it is renamed to `log.1`, replacing the previous
//! one.

mod drainer;
mod store;

use self::drainer::Drainer;
pub(super) use self::store::LIMIT;
use self::store::{tail_of_files, Store};
use crate::locks::{lock, try_lock};
use p2pd_sockets::Failed;
use std::io::{self, PipeWriter};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// The wanted capacity of the pipe, in bytes. The daemon blocks when the pipe is full.
#[cfg(target_os = "linux")]
const PIPE_SIZE: usize = 1 << 20;
/// How long [`Log::retry`] respects a pause: the hook that ends it after a fork may have failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Log {
    path: PathBuf,
    /// The end of the output and its position, once the log is closed.
    last: OnceLock<(u64, Vec<u8>)>,
    store: Arc<Mutex<Store>>,
    /// Locked before the store.
    draining: Mutex<Draining>,
}

#[derive(Debug, Default)]
struct Draining {
    drainer: Option<Drainer>,
    /// The number of forks in progress.
    pauses: u32,
    /// When the last pause began.
    paused: Option<Instant>,
}

impl Log {
    /// Creates no file before the first run.
    pub(super) fn new(path: &Path) -> Self {
        Log {
            path: path.into(),
            last: OnceLock::new(),
            store: Arc::new(Mutex::new(Store::new(path))),
            draining: Mutex::default(),
        }
    }

    /// Prepares another run. Returns the pipe for the daemon's output, and the position in the log
    /// at which that output begins.
    pub(super) fn begin_run(&self) -> Result<(PipeWriter, u64), Failed> {
        // Locked throughout: a thread started in between would wait for the last run's pipe.
        let mut draining = self.draining();
        draining.stop();
        let (source, writer) = io::pipe().map_err(Failed::at(|| {
            "cannot create a pipe for the daemon's output"
        }))?;
        #[cfg(unix)]
        rustix::io::ioctl_fionbio(&source, true)
            .map_err(io::Error::from)
            .map_err(Failed::at(|| {
                "cannot set up the pipe of the daemon's output"
            }))?;
        #[cfg(target_os = "linux")]
        // May fail, because the total size of a user's pipes is limited.
        let _ = rustix::pipe::fcntl_setpipe_size(&source, PIPE_SIZE);
        let begin = self.store().begin_run(source)?;
        draining.start(&self.store).map_err(Failed::at(|| {
            "cannot start a thread for the daemon's output"
        }))?;
        Ok((writer, begin))
    }

    /// Ends the thread until [`resume`](Self::resume); output stays in the pipe until then. Pauses
    /// are counted, since several threads may fork at once.
    pub(super) fn pause(&self) {
        let mut draining = self.draining();
        draining.pauses += 1;
        draining.paused = Some(Instant::now());
        draining.stop();
    }

    /// Ends a [`pause`](Self::pause). If the thread cannot be started, [`retry`](Self::retry) tries
    /// again.
    pub(super) fn resume(&self) {
        let mut draining = self.draining();
        draining.pauses = draining.pauses.saturating_sub(1);
        if draining.pauses == 0 {
            let _ = draining.start(&self.store);
        }
    }

    /// Starts the thread if it is missing for any reason: without it, the daemon blocks once the
    /// pipe is full.
    pub(super) fn retry(&self) {
        let Some(mut draining) = try_lock(&self.draining) else {
            return; // another thread is here
        };
        if draining.pauses > 0 {
            let recent = |begun: Instant| begun.elapsed() < LONGEST_PAUSE;
            if draining.paused.is_some_and(recent) {
                return;
            }
            draining.pauses = 0;
        }
        let _ = draining.start(&self.store);
    }

    /// The file with the newest output.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Ends the thread, stores the rest of the pipe, and closes the files. The end of the output
    /// stays in memory, so that the files can be removed.
    pub(super) fn close(&self) {
        let mut draining = self.draining();
        draining.stop();
        let mut store = self.store();
        store.drain();
        store.close();
        drop(store);
        let _ = self.last.set(self.tail(0));
    }

    /// Whether [`close`](Self::close) was called.
    pub(super) fn is_closed(&self) -> bool {
        self.last.get().is_some()
    }

    /// Returns the output from a position on, at most the last [`LIMIT`] bytes. It is complete once
    /// the daemon has ended.
    ///
    /// `may_lock` is false in a forked child, in which the lock may never be released.
    pub(super) fn text(&self, begin: u64, may_lock: bool) -> String {
        let (first, output) = if may_lock || self.is_closed() {
            let tail = self.tail(begin);
            // The log may have been closed in between.
            self.last.get().cloned().unwrap_or(tail)
        } else {
            (begin, tail_of_files(&self.path))
        };
        let before = usize::try_from(begin.saturating_sub(first)).unwrap_or(usize::MAX);
        let output = output.get(before..).unwrap_or_default();
        String::from_utf8_lossy(output).into_owned()
    }

    /// Returns the position of the first byte, and the data.
    fn tail(&self, begin: u64) -> (u64, Vec<u8>) {
        let mut store = self.store();
        store.drain();
        let begin = begin.max(store.end.saturating_sub(LIMIT));
        let (begin, mut data) = store.read(begin, LIMIT);
        store.note_what_is_lost(&mut data);
        (begin, data)
    }

    /// Reads at most `limit` bytes at a position, or at the oldest stored byte if that is later.
    /// Returns the position of the first byte, and the data.
    pub(super) fn read(&self, begin: u64, limit: usize) -> (u64, Vec<u8>) {
        let mut store = self.store();
        store.drain();
        let read = store.read(begin, limit as u64);
        drop(store);
        let Some((first, output)) = self.last.get() else {
            return read;
        };
        let begin = begin.max(*first);
        let output = output.get((begin - first) as usize..).unwrap_or_default();
        (begin, output[..limit.min(output.len())].to_vec())
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    fn draining(&self) -> MutexGuard<'_, Draining> {
        lock(&self.draining)
    }
}

impl Draining {
    /// Starts the thread, unless it runs or the output has ended.
    fn start(&mut self, store: &Arc<Mutex<Store>>) -> io::Result<()> {
        if self.drainer.as_ref().is_some_and(Drainer::runs) {
            return Ok(());
        }
        let source = lock(store).source.clone();
        if let Some(source) = source {
            self.drainer = None;
            self.drainer = Some(Drainer::start(store, source)?);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(drainer) = self.drainer.take() {
            drainer.stop();
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
