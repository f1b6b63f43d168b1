//! A stream of the lines of a daemon's output.

use super::guard::POLL_INTERVAL;
use super::process::Process;
use futures_core::Stream;
use std::future::{poll_fn, Future as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use tokio::time::{sleep, Sleep};

/// The length in bytes at which a line is split.
const LINE_LIMIT: usize = 64 * 1024;
const READ_SIZE: usize = 16 * 1024;

/// Returns the last position up to `at` that does not split a UTF-8 character, if the text is
/// UTF-8.
fn character_end(text: &[u8], at: usize) -> usize {
    let continues = |place: &usize| text.get(*place).is_some_and(|byte| byte & 0xc0 == 0x80);
    let begins = (at.saturating_sub(3)..=at).rev().find(|at| !continues(at));
    begins.filter(|place| *place > 0).unwrap_or(at)
}

/// The lines of a daemon's output as a [`Stream`], which ends with the daemon.
///
/// Lines over 64 KiB come in pieces. While it is awaited, it polls the output every 50 ms.
///
/// # Panics
/// When polled outside of a tokio runtime.
#[derive(Debug)]
#[must_use = "a stream does nothing until it is awaited"]
pub struct Logs {
    process: Arc<Process>,
    /// The read position in the output, in bytes.
    position: u64,
    /// Whether the end of the output was reached.
    complete: bool,
    /// Output that was read but not returned yet; it begins at `start`.
    buffer: Vec<u8>,
    start: usize,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Logs {
    pub(super) fn new(process: Arc<Process>) -> Self {
        Logs {
            process,
            position: 0,
            complete: false,
            buffer: Vec::new(),
            start: 0,
            pause: None,
        }
    }

    /// Returns the next line, without its line ending; `None` once the daemon has ended.
    pub async fn next(&mut self) -> Option<String> {
        poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    fn take_line(&mut self) -> Option<String> {
        let rest = &self.buffer[self.start..];
        let end = memchr::memchr(b'\n', &rest[..rest.len().min(LINE_LIMIT + 1)]);
        let (line, taken) = match end {
            Some(end) => {
                let line = &rest[..end];
                (line.strip_suffix(b"\r").unwrap_or(line), end + 1)
            }
            None if rest.len() > LINE_LIMIT => {
                let piece = &rest[..character_end(rest, LINE_LIMIT)];
                (piece, piece.len())
            }
            None if self.complete && !rest.is_empty() => (rest, rest.len()),
            None => return None,
        };
        let line = String::from_utf8_lossy(line).into_owned();
        self.start += taken;
        Some(line)
    }

    /// Reads more output, and returns its length in bytes. This blocks: handing the read of a local
    /// file to a thread pool would take longer than the read itself.
    fn read(&mut self) -> usize {
        self.buffer.drain(..self.start);
        self.start = 0;
        let (begin, data) = self.process.read_output(self.position, READ_SIZE);
        self.position = begin + data.len() as u64;
        self.buffer.extend_from_slice(&data);
        data.len()
    }
}

impl Stream for Logs {
    type Item = String;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<String>> {
        let logs = self.get_mut();
        let coop = ready!(tokio::task::coop::poll_proceed(cx));
        loop {
            if let Some(line) = logs.take_line() {
                coop.made_progress();
                return Poll::Ready(Some(line));
            }
            if logs.complete {
                return Poll::Ready(None);
            }
            if let Some(pause) = &mut logs.pause {
                ready!(pause.as_mut().poll(cx));
                logs.pause = None;
            }
            // Checked before the read: output may arrive between a read and the daemon's end.
            let ended = logs.process.finished();
            if logs.read() == 0 {
                if ended {
                    logs.complete = true;
                } else {
                    logs.pause = Some(Box::pin(sleep(POLL_INTERVAL)));
                }
            }
        }
    }
}
