//! A daemon's output: a pipe, drained by a thread into two files of bounded size.
//!
//! The daemon writes to a pipe rather than to a file, since only the reader of a pipe can limit the
//! size of the log. The thread runs from the start of a daemon until its output ends. It never takes
//! Python's global interpreter lock, so a program that computes does not hold up its daemon.
//!
//! `log` holds the newest output. Once it is full, it is renamed to `log.1`, replacing the previous
//! one.

#[cfg(unix)]
use super::launch::with_signals_blocked;
use p2pd_sockets::{words_of, Failed};
use std::fs::{self, File};
use std::io::{
    self, ErrorKind, PipeReader, PipeWriter, Read as _, Seek as _, SeekFrom, Write as _,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The size of each of the two files, and of what [`Log::tail`] returns, in bytes.
pub(super) const LIMIT: u64 = 1 << 20;
/// The size of one read, in bytes.
const READ_SIZE: usize = 16 * 1024;
/// The most that is read at once, in bytes: the pipe may be refilled as fast as it is drained.
#[cfg(unix)]
const BUDGET: usize = 2 << 20;
/// The wanted capacity of the pipe, in bytes. The daemon blocks when the pipe is full.
#[cfg(target_os = "linux")]
const PIPE_SIZE: usize = 1 << 20;
/// In bytes.
const STACK_SIZE: usize = 64 * 1024;
/// How long [`Log::retry`] keeps to a pause. A hook after a fork may have failed, and nobody would
/// end the pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Log {
    store: Arc<Mutex<Store>>,
    /// Locked before the store.
    draining: Mutex<Draining>,
}

#[derive(Debug, Default)]
struct Draining {
    drainer: Option<Drainer>,
    /// How many forks are in progress.
    pauses: u32,
    /// When the last pause began.
    paused: Option<Instant>,
}

impl Log {
    /// Nothing is created before the first run.
    pub(super) fn new(path: &Path) -> Self {
        Log {
            store: Arc::new(Mutex::new(Store {
                path: path.into(),
                source: None,
                file: None,
                begin: 0,
                oldest: 0,
                end: 0,
                lost: None,
            })),
            draining: Mutex::default(),
        }
    }

    /// Prepares another run. Returns the pipe for the daemon's output, and the position at which
    /// that output begins.
    pub(super) fn begin_run(&self) -> Result<(PipeWriter, u64), Failed> {
        // Held throughout: a thread that was started meanwhile would wait for the last run's pipe.
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
        // Optional: a user's pipes have a limit on their total size.
        let _ = rustix::pipe::fcntl_setpipe_size(&source, PIPE_SIZE);
        let begin = self.store().begin_run(source)?;
        draining.start(&self.store).map_err(Failed::at(|| {
            "cannot start a thread for the daemon's output"
        }))?;
        Ok((writer, begin))
    }

    /// Ends the thread until [`resume`](Self::resume). What the daemon prints meanwhile stays in
    /// the pipe. Pauses add up, for several threads may fork at once.
    pub(super) fn pause(&self) {
        let mut draining = self.draining();
        draining.pauses += 1;
        draining.paused = Some(Instant::now());
        draining.stop();
    }

    /// Undoes a [`pause`](Self::pause). If the thread cannot be started, [`retry`](Self::retry)
    /// tries again.
    pub(super) fn resume(&self) {
        let mut draining = self.draining();
        draining.pauses = draining.pauses.saturating_sub(1);
        if draining.pauses == 0 {
            let _ = draining.start(&self.store);
        }
    }

    /// Starts the thread if it is missing, whatever became of it: without it, the daemon blocks
    /// when the pipe is full.
    pub(super) fn retry(&self) {
        let mut draining = match self.draining.try_lock() {
            Ok(draining) => draining,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            // Another thread is at it.
            Err(TryLockError::WouldBlock) => return,
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

    /// Ends the thread, stores the rest of the pipe, and closes all files.
    pub(super) fn close(&self) {
        let mut draining = self.draining();
        draining.stop();
        let mut store = self.store();
        store.drain();
        store.source = None;
        store.file = None;
    }

    /// The end of the output from a position on, and the position of its first byte. Complete once
    /// the daemon has ended.
    pub(super) fn tail(&self, begin: u64) -> (u64, Vec<u8>) {
        let mut store = self.store();
        store.drain();
        let begin = begin.max(store.end.saturating_sub(LIMIT));
        let (begin, mut data) = store.read(begin, LIMIT);
        store.note_what_is_lost(&mut data);
        (begin, data)
    }

    /// At most `limit` bytes from a position on, or from the oldest stored if that is newer; and
    /// the position of the first one.
    pub(super) fn read(&self, begin: u64, limit: u64) -> (u64, Vec<u8>) {
        let mut store = self.store();
        store.drain();
        store.read(begin, limit)
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    fn draining(&self) -> MutexGuard<'_, Draining> {
        lock(&self.draining)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Draining {
    /// Starts the thread, if there is output to come and none runs.
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

/// The thread that drains the pipe.
#[derive(Debug)]
struct Drainer {
    thread: JoinHandle<()>,
    owner: u32,
    /// The thread ends when this is closed.
    #[cfg(unix)]
    stop: PipeWriter,
    #[cfg(target_os = "linux")]
    task: PathBuf,
}

impl Drainer {
    #[cfg(unix)]
    fn start(store: &Arc<Mutex<Store>>, source: Arc<PipeReader>) -> io::Result<Self> {
        let (stopped, stop) = io::pipe()?;
        let store = Arc::clone(store);
        #[cfg(target_os = "linux")]
        let (name, named) = std::sync::mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name("p2pd-log".into())
            .stack_size(STACK_SIZE);
        // The program's signals are not for this thread: a program may block one to wait for it.
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
    fn start(store: &Arc<Mutex<Store>>, source: Arc<PipeReader>) -> io::Result<Self> {
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

    /// Whether it runs, or has nothing left to do.
    fn runs(&self) -> bool {
        // Elsewhere than on unix, it ends with the output only.
        cfg!(not(unix)) || !self.thread.is_finished()
    }

    fn stop(self) {
        if self.owner != std::process::id() {
            // A forked child does not have the thread.
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
            // The kernel counts a thread for a moment longer, and so would CPython, which warns of
            // a fork with threads.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_millis(20) && self.task.exists() {
                thread::yield_now();
            }
        }
    }
}

/// Stores the output until it ends, or `stopped` does.
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

/// Stores the output until it ends.
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

/// Where the older half of a log is.
fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

/// The files. Positions count the bytes of all runs.
#[derive(Debug)]
struct Store {
    path: PathBuf,
    /// None if there is nothing more to come.
    source: Option<Arc<PipeReader>>,
    file: Option<File>,
    /// Position of the first byte of `log`.
    begin: u64,
    /// Position of the first byte of `log.1`.
    oldest: u64,
    end: u64,
    /// The bytes that could not be stored.
    lost: Option<Lost>,
}

#[derive(Debug)]
struct Lost {
    bytes: u64,
    error: io::Error,
}

impl Store {
    fn begin_run(&mut self, source: PipeReader) -> Result<u64, Failed> {
        self.drain();
        let create = || -> io::Result<(File, u64)> {
            let file = File::options().create(true).append(true).open(&self.path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        let (file, length) = create().map_err(Failed::at(|| {
            format!("cannot create {}", self.path.display())
        }))?;
        self.begin = self.end.saturating_sub(length);
        self.oldest = self.oldest.min(self.begin);
        self.file = Some(file);
        self.source = Some(Arc::new(source));
        Ok(self.end)
    }

    /// Stores the content of the pipe, without waiting. Returns whether the output has ended.
    fn drain(&mut self) -> bool {
        #[cfg(unix)]
        if let Some(source) = self.source.clone() {
            let mut buffer = [0; READ_SIZE];
            let mut budget = BUDGET;
            while budget > 0 {
                match (&*source).read(&mut buffer) {
                    Ok(0) => {
                        self.source = None;
                        break;
                    }
                    Ok(length) => {
                        self.append(&buffer[..length]);
                        budget = budget.saturating_sub(length);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.source = None;
                        break;
                    }
                }
            }
        }
        self.source.is_none()
    }

    /// Never fails, since nothing may hold up the daemon: counts the bytes that cannot be stored.
    fn append(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let room = match self.room() {
                Ok(room) => room.min(data.len() as u64) as usize,
                Err(error) => return self.lose(data.len(), error),
            };
            let (now, rest) = data.split_at(room);
            let written = self.file.as_ref().map(|mut file| file.write_all(now));
            match written {
                Some(Ok(())) => self.end += room as u64,
                Some(Err(error)) => {
                    // Part of it may be there.
                    let length = self.file.as_ref().and_then(|file| file.metadata().ok());
                    self.end = self.begin + length.map_or(0, |file| file.len());
                    return self.lose(data.len(), error);
                }
                None => return self.lose(data.len(), ErrorKind::NotFound.into()),
            }
            data = rest;
        }
    }

    fn lose(&mut self, bytes: usize, error: io::Error) {
        let before = self.lost.as_ref().map_or(0, |lost| lost.bytes);
        let bytes = before + bytes as u64;
        self.lost = Some(Lost { bytes, error });
    }

    /// How much fits into `log`; begins another one if nothing does.
    fn room(&mut self) -> io::Result<u64> {
        let room = LIMIT.saturating_sub(self.end - self.begin);
        if room > 0 && self.file.is_some() {
            return Ok(room);
        }
        // Closed first: elsewhere than on unix, an open file cannot be renamed.
        self.file = None;
        match fs::rename(&self.path, older(&self.path)) {
            Ok(()) => (self.oldest, self.begin) = (self.begin, self.end),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            // It was renamed before, and then another one could not be created.
            Err(_) if self.begin == self.end => {}
            // The file was removed: the output from here on does not continue `log.1`.
            Err(_) => (self.oldest, self.begin) = (self.end, self.end),
        }
        let created = File::options()
            .create(true)
            .append(true)
            .truncate(false)
            .open(&self.path);
        self.file = Some(created?);
        Ok(LIMIT)
    }

    fn read(&self, begin: u64, limit: u64) -> (u64, Vec<u8>) {
        let begin = begin.clamp(self.oldest, self.end);
        let mut data = Vec::new();
        let mut position = begin;
        let files = [
            (older(&self.path), self.oldest, self.begin),
            (self.path.clone(), self.begin, self.end),
        ];
        for (path, first, last) in files {
            let length = last
                .saturating_sub(position)
                .min(limit - (position - begin));
            if position >= first && length > 0 {
                // No error is expected from a file of our own; an unreadable part is left out.
                let _ = read_at(&path, position - first, length, &mut data);
                position += length;
            }
        }
        (begin, data)
    }

    fn note_what_is_lost(&self, data: &mut Vec<u8>) {
        if let Some(Lost { bytes, error }) = &self.lost {
            let error = words_of(error);
            let note = format!("[{bytes} bytes of output could not be stored: {error}]\n");
            if data.last().is_some_and(|last| *last != b'\n') {
                data.push(b'\n');
            }
            data.extend(note.bytes());
        }
    }
}

fn read_at(path: &Path, offset: u64, length: u64, data: &mut Vec<u8>) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    file.take(length).read_to_end(data)?;
    Ok(())
}

/// The end of the output, read from the files alone: for a forked child, in which the lock may be
/// held by a thread that it does not have.
pub(super) fn tail_of_files(path: &Path) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..10 {
        data.clear();
        let older_path = older(path);
        let older = File::open(&older_path).ok();
        let Ok(mut newer) = File::open(path) else {
            continue;
        };
        if let Some(mut older) = older.as_ref() {
            let _ = older.read_to_end(&mut data);
        }
        let _ = newer.read_to_end(&mut data);
        // Otherwise they were renamed meanwhile.
        let same = older.is_none_or(|older| is_still(&older, &older_path));
        if same && is_still(&newer, path) {
            break;
        }
    }
    data.drain(..data.len().saturating_sub(LIMIT as usize));
    data
}

#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let number = |file: io::Result<fs::Metadata>| file.map(|file| file.ino()).ok();
    number(file.metadata()) == number(fs::metadata(path))
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use p2pd_sockets::{private_directory, PrivateDirectory};

    fn log() -> (PrivateDirectory, Log) {
        let directory = private_directory(None, "log-", "").unwrap();
        let log = Log::new(&directory.path().join("log"));
        (directory, log)
    }

    fn size(directory: &PrivateDirectory) -> u64 {
        let files = fs::read_dir(directory.path()).unwrap();
        files
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum()
    }

    fn until(condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            assert!(begun.elapsed() < Duration::from_secs(15));
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn task(log: &Log) -> Option<PathBuf> {
        let draining = log.draining();
        draining.drainer.as_ref().map(|one| one.task.clone())
    }

    #[test]
    fn files_stay_within_the_bound_and_keep_the_newest_output() {
        let (directory, log) = log();
        let (mut pipe, begin) = log.begin_run().unwrap();
        assert_eq!(begin, 0);
        let line: Vec<u8> = (0..=255).cycle().take(100_003).collect();
        for _ in 0..50 {
            pipe.write_all(&line).unwrap();
            assert!(size(&directory) <= 2 * LIMIT);
        }
        drop(pipe);
        let (begin, tail) = log.tail(0);
        let end = 50 * line.len() as u64;
        assert_eq!((begin, tail.len() as u64), (end - LIMIT, LIMIT));
        let expected = line.iter().cycle().skip(begin as usize % line.len());
        assert!(tail.iter().eq(expected.take(tail.len())));
        assert!(tail_of_files(&directory.path().join("log")) == tail);
        assert!(size(&directory) <= 2 * LIMIT);
    }

    #[test]
    fn output_is_there_when_the_writer_has_closed_though_the_thread_is_late() {
        let (_directory, log) = log();
        let (mut pipe, _) = log.begin_run().unwrap();
        log.pause();
        pipe.write_all(b"last words").unwrap();
        assert_eq!(log.tail(0), (0, b"last words".to_vec()));
        pipe.write_all(b" indeed").unwrap();
        log.resume();
        drop(pipe);
        until(|| log.store().source.is_none());
        assert_eq!(log.tail(5), (5, b"words indeed".to_vec()));
    }

    #[test]
    fn a_position_that_is_no_longer_stored_gives_the_oldest() {
        let (_directory, log) = log();
        let (mut pipe, _) = log.begin_run().unwrap();
        for number in 0..60_000u64 {
            pipe.write_all(format!("{number:63}\n").as_bytes()).unwrap();
        }
        let (mut position, mut lines) = (0, Vec::new());
        loop {
            let (begin, data) = log.read(position, 10_000);
            if data.is_empty() {
                break;
            }
            assert!(begin == position || lines.is_empty());
            position = begin + data.len() as u64;
            lines.extend(data);
        }
        assert!(lines.len() as u64 > LIMIT && lines.len() as u64 <= 2 * LIMIT);
        let lines = String::from_utf8(lines).unwrap();
        let numbers: Vec<u64> = lines
            .lines()
            .map(|line| line.trim().parse().unwrap())
            .collect();
        assert_eq!(numbers.last(), Some(&59_999));
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
    }

    #[test]
    fn runs_follow_each_other() {
        let (directory, log) = log();
        for run in 0..5u64 {
            let (mut pipe, begin) = log.begin_run().unwrap();
            assert_eq!(begin, run * 700_000);
            pipe.write_all(&vec![b'0' + run as u8; 700_000]).unwrap();
            // A process that was left behind still has it.
            let left = pipe.try_clone().unwrap();
            drop(pipe);
            let (first, tail) = log.tail(begin);
            assert_eq!((first, tail.len()), (begin, 700_000));
            assert!(tail.iter().all(|byte| *byte == b'0' + run as u8));
            assert!(size(&directory) <= 2 * LIMIT);
            std::mem::forget(left);
        }
    }

    #[test]
    fn output_that_cannot_be_stored_is_counted_and_does_not_block() {
        let (directory, log) = log();
        let (mut pipe, _) = log.begin_run().unwrap();
        // The second file cannot be made, nor the first be moved away.
        fs::create_dir_all(directory.path().join("log.1/full")).unwrap();
        for _ in 0..3 * LIMIT / 1000 {
            pipe.write_all(&[b'x'; 1000]).unwrap();
        }
        drop(pipe);
        let (_, tail) = log.tail(0);
        let text = String::from_utf8(tail).unwrap();
        let note = text.lines().last().unwrap();
        assert!(
            note.contains("bytes of output could not be stored: "),
            "{note}"
        );
        assert!(!note.contains("os error"), "{note}");
        assert!(size(&directory) <= 2 * LIMIT);
    }

    #[test]
    fn the_thread_ends_with_the_output_and_when_stopped() {
        let (_directory, log) = log();
        let (pipe, _) = log.begin_run().unwrap();
        let first = task(&log).unwrap();
        assert!(first.exists());
        log.pause();
        assert!(!first.exists() && task(&log).is_none());
        log.resume();
        let second = task(&log).unwrap();
        assert!(second.exists());
        drop(pipe);
        until(|| !second.exists());
        log.close();
        assert!(task(&log).is_none());
    }

    #[test]
    fn a_thread_that_is_missing_is_started_again_but_not_during_a_fork() {
        let (_directory, log) = log();
        let (mut pipe, _) = log.begin_run().unwrap();
        // As two threads fork.
        log.pause();
        log.pause();
        log.retry();
        log.resume();
        log.retry();
        assert!(task(&log).is_none());
        log.resume();
        assert!(task(&log).unwrap().exists());
        // Not resumed.
        log.pause();
        log.draining().paused = Instant::now().checked_sub(LONGEST_PAUSE);
        log.retry();
        let first = task(&log).unwrap();
        assert!(first.exists());
        log.retry();
        assert_eq!(task(&log), Some(first.clone()));
        // It ends by itself, though there is output to come.
        let source = log.store().source.take();
        pipe.write_all(b"x").unwrap();
        until(|| !first.exists());
        log.store().source = source;
        log.retry();
        let second = task(&log).unwrap();
        assert!(second.exists());
        pipe.write_all(b"y").unwrap();
        drop(pipe);
        until(|| !second.exists());
        assert_eq!(log.tail(0), (0, b"xy".to_vec()));
        // There is no more to come.
        log.retry();
        assert_eq!(task(&log), Some(second));
    }

    #[test]
    fn the_thread_takes_no_signal() {
        let (_directory, log) = log();
        let blocked = |task: &Path| {
            let status = fs::read_to_string(task.join("status")).unwrap();
            let mut lines = status.lines();
            let mask = lines.find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
            u64::from_str_radix(mask.trim(), 16).unwrap()
        };
        let before = blocked(Path::new("/proc/thread-self"));
        let _pipe = log.begin_run().unwrap();
        assert_eq!(blocked(Path::new("/proc/thread-self")), before);
        // No thread can block SIGKILL and SIGSTOP. The real-time signals are glibc's to keep.
        let standard = (1 << 31) - 1;
        let unblockable = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
        let mask = blocked(&task(&log).unwrap()) & standard;
        assert_eq!(mask, standard & !unblockable);
    }

    #[test]
    fn a_file_that_could_not_be_created_leaves_the_older_one() {
        let (directory, log) = log();
        let _pipe = log.begin_run().unwrap();
        let path = directory.path().join("log");
        let mut store = log.store();
        store.append(&vec![b'a'; LIMIT as usize]);
        // As if `log` had been renamed, and another one not been created.
        store.file = None;
        fs::rename(&path, older(&path)).unwrap();
        (store.oldest, store.begin) = (store.begin, store.end);
        store.append(b"bc");
        let (begin, data) = store.read(LIMIT - 1, 10);
        assert_eq!((begin, &*data), (LIMIT - 1, &b"abc"[..]));
        assert_eq!(store.read(0, 10), (0, vec![b'a'; 10]));
        // One that somebody removed is missing, and nothing else is taken for it.
        store.append(&vec![b'd'; LIMIT as usize - 2]);
        fs::remove_file(&path).unwrap();
        store.append(b"ef");
        assert_eq!(store.read(0, 10), (2 * LIMIT, b"ef".to_vec()));
        assert_eq!(fs::read(&path).unwrap(), b"ef");
    }
}
