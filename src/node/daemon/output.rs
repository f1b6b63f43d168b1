//! Lines on stdout and stderr, through a bounded queue. A reader that stops reading, or goes away, neither
//! stops nor ends the daemon: lines are dropped and counted.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Largest size of the queue of lines, in bytes.
const MAX_QUEUED: usize = 256 << 10;

/// A queue of lines, which a thread writes.
#[derive(Debug, Default)]
pub(super) struct Lines {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    queued: String,
    /// Number of lines that were dropped since the last write.
    dropped: usize,
    is_writing: bool,
    /// Whether a write has failed; all further lines are dropped.
    is_broken: bool,
}

/// The lines of stdout.
pub(super) fn stdout() -> &'static Lines {
    static STDOUT: OnceLock<&Lines> = OnceLock::new();
    STDOUT.get_or_init(|| Lines::start("stdout", io::stdout()))
}

/// The lines of stderr.
pub(super) fn stderr() -> &'static Lines {
    static STDERR: OnceLock<&Lines> = OnceLock::new();
    STDERR.get_or_init(|| Lines::start("stderr", io::stderr()))
}

impl Lines {
    /// Starts a thread that writes lines. Both live as long as the process.
    fn start(name: &str, target: impl Write + Send + 'static) -> &'static Self {
        let lines: &'static Self = Box::leak(Box::default());
        let thread = thread::Builder::new().name(name.to_owned());
        if thread.spawn(|| lines.write_to(target)).is_err() {
            lines.lock().is_broken = true;
        }
        lines
    }

    /// Queues a line, unless the queue is full.
    pub(super) fn push(&self, line: &str) {
        let mut state = self.lock();
        if state.is_broken {
            return;
        }
        if state.queued.len() + line.len() >= MAX_QUEUED {
            state.dropped += 1;
            return;
        }
        state.queued.push_str(line);
        state.queued.push('\n');
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until all lines are written, at most for `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        while !state.queued.is_empty() || state.is_writing {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || state.is_broken {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn write_to(&self, mut target: impl Write) {
        let mut state = self.lock();
        loop {
            if state.queued.is_empty() {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let mut lines = std::mem::take(&mut state.queued);
            match std::mem::take(&mut state.dropped) {
                0 => {}
                count => lines += &format!("p2pd-rs: {count} lines were dropped here\n"),
            }
            state.is_writing = true;
            drop(state);
            let written = target
                .write_all(lines.as_bytes())
                .and_then(|()| target.flush());
            state = self.lock();
            state.is_writing = false;
            state.is_broken |= written.is_err();
            self.changed.notify_all();
            if state.is_broken {
                state.queued = String::new();
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// A target that writes only when the test allows it.
    struct Blocked {
        permits: mpsc::Receiver<()>,
        written: mpsc::Sender<String>,
    }

    impl Write for Blocked {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
            self.permits.recv().map_err(gone)?;
            let _ = self
                .written
                .send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn blocked() -> (&'static Lines, mpsc::Sender<()>, mpsc::Receiver<String>) {
        let (permit, permits) = mpsc::channel();
        let (written, output) = mpsc::channel();
        (
            Lines::start("test", Blocked { permits, written }),
            permit,
            output,
        )
    }

    #[test]
    fn drops_and_counts_lines_that_are_not_read() {
        let (lines, permit, output) = blocked();
        let line = "x".repeat(1023);
        for _ in 0..1000 {
            lines.push(&line);
        }
        lines.flush(Duration::from_millis(10));
        for _ in 0..3 {
            let _ = permit.send(());
        }
        lines.flush(Duration::from_secs(10));
        lines.push("last");
        let _ = permit.send(());
        lines.flush(Duration::from_secs(10));
        let written: String = output.try_iter().collect();
        assert!(written.len() < 3 * MAX_QUEUED);
        let dropped = written.lines().find(|line| line.starts_with("p2pd-rs: "));
        let count = written.lines().filter(|found| **found == line).count();
        assert_eq!(
            dropped,
            Some(format!("p2pd-rs: {} lines were dropped here", 1000 - count).as_str())
        );
        assert!(written.ends_with("last\n"));
    }

    #[test]
    fn goes_on_without_a_reader() {
        let (lines, permit, _output) = blocked();
        drop(permit);
        for _ in 0..3 {
            lines.push("nobody reads this");
            lines.flush(Duration::from_secs(10));
        }
    }
}
