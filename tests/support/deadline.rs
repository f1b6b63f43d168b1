//! Deadlines: an end to every test, and waiting for what has no event.

use std::error::Error;
use std::future::{poll_fn, Future};
use std::io::Write as _;
use std::pin::pin;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(90);

/// How long what must happen is waited for.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Ends the test program if a test takes too long: none hangs for ever.
pub struct Limit(#[allow(unused)] Sender<()>);

impl Limit {
    /// Starts the clock of a test.
    #[allow(clippy::new_without_default)] // it starts a thread
    pub fn new() -> Self {
        let (sender, receiver) = mpsc::channel();
        let name = thread::current().name().unwrap_or("a test").to_owned();
        thread::spawn(move || {
            if receiver.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                // Not by `eprintln!`, whose output is the test's, to be seen when it has ended.
                let _ = writeln!(std::io::stderr(), "{name} took over {LIMIT:?}");
                std::process::exit(101);
            }
        });
        Self(sender)
    }
}

/// The result of `attempt`, once it has one.
pub async fn eventually<T>(mut attempt: impl AsyncFnMut() -> Result<T, Box<dyn Error>>) -> T {
    let begun = Instant::now();
    loop {
        match attempt().await {
            Ok(result) => return result,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "at last: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// An error for [`eventually`] if that is not so.
pub fn must(condition: bool, otherwise: &str) -> Result<(), Box<dyn Error>> {
    condition.then_some(()).ok_or_else(|| otherwise.into())
}

/// The result of `future`, or a panic that names `what` did not come in time.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let outcome = tokio::time::timeout(PATIENCE, future).await;
    outcome.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Lets a future go as far as it can for now.
pub async fn begin<T>(future: impl Future<Output = T>) {
    let mut future = pin!(future);
    let begun = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await;
    assert!(begun, "it has ended already");
}
