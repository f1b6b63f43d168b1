//! Deadlines of tests, and polling for conditions without an event.

use std::error::Error;
use std::future::{poll_fn, Future};
use std::io::Write as _;
use std::pin::pin;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

/// Time after which a test fails, by default.
const LIMIT: Duration = Duration::from_secs(90);

/// Time to wait for a daemon process to do something.
const DAEMON_PATIENCE: Duration = Duration::from_secs(60);

/// Time to wait for anything that must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Exits the test program if a test takes too long, so that none hangs.
pub struct Limit(#[allow(unused)] Sender<()>);

impl Limit {
    /// Starts the clock of a test.
    #[allow(clippy::new_without_default)] // it starts a thread
    pub fn new() -> Self {
        Self::of(LIMIT)
    }

    /// Starts the clock of a test that must end within `limit`.
    pub fn of(limit: Duration) -> Self {
        let (sender, receiver) = mpsc::channel();
        let name = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            if receiver.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                // `eprintln!` would be captured, and shown only when the test ends.
                let _ = writeln!(std::io::stderr(), "{name} took over {limit:?}");
                std::process::exit(101);
            }
        });
        Self(sender)
    }
}

/// Repeats `attempt` until it succeeds; returns its result.
pub async fn eventually<T>(mut attempt: impl AsyncFnMut() -> Result<T, Box<dyn Error>>) -> T {
    let begun = Instant::now();
    loop {
        match attempt().await {
            Ok(result) => return result,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "timed out: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Returns an error for [`eventually`] unless `condition` is true.
pub fn must(condition: bool, otherwise: &str) -> Result<(), Box<dyn Error>> {
    condition.then_some(()).ok_or_else(|| otherwise.into())
}

/// Waits for `future`; panics with the name `what` if that takes too long.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    within_time(PATIENCE, what, future).await
}

/// Waits for something that a daemon process does; panics if that takes too long.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    within_time(DAEMON_PATIENCE, "a daemon process", future).await
}

async fn within_time<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(limit, future).await;
    outcome.unwrap_or_else(|_| panic!("timed out waiting for {what}"))
}

/// Polls a future once. Panics if that completes it.
pub async fn begin<T>(future: impl Future<Output = T>) {
    let mut future = pin!(future);
    let begun = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await;
    assert!(begun, "it has ended already");
}
