//! Destroys a daemon's process, and waits for its end, on tokio.

use super::process::Process;
use p2pd_protocol::policy::backoff::Backoff;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// The longest interval between two checks of a process or its output.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long dropping a guard blocks before a thread takes over.
const DROP_LIMIT: Duration = Duration::from_millis(100);

/// Destroys the process when it is dropped, even if others still hold it.
#[derive(Debug)]
pub(super) struct ProcessGuard(pub(super) Arc<Process>);

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        if self.0.destroy_within(DROP_LIMIT) {
            return;
        }
        // Goes on in a thread, because the caller may be an event loop.
        let process = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().spawn(move || process.destroy());
        if thread.is_err() {
            self.0.destroy();
        }
    }
}

/// Destroys the process, and waits until nothing is left of it.
pub(super) async fn destroyed(process: &Process) {
    let mut backoff = Backoff::new(Duration::from_millis(1), POLL_INTERVAL);
    while !process.try_destroy() {
        sleep(backoff.next(0)).await;
    }
}

/// Waits until the daemon has ended.
pub(super) async fn ended(process: &Process) -> ExitStatus {
    #[cfg(unix)]
    // Before the first poll, so that no SIGCHLD is missed in between.
    let mut children = {
        use tokio::signal::unix::{signal, SignalKind};
        signal(SignalKind::child()).ok()
    };
    loop {
        if let Some(status) = process.poll() {
            return status;
        }
        #[cfg(unix)]
        if let Some(children) = &mut children {
            // The timeout is for programs that have replaced tokio's signal handler.
            let _ = tokio::time::timeout(Duration::from_secs(1), children.recv()).await;
            continue;
        }
        sleep(POLL_INTERVAL).await;
    }
}
