//! A daemon's process, its files, and the watchdog that cleans up after it. It needs no event loop:
//! nothing here waits, except [`Process::destroy`], which waits for killed processes up to a limit.
//!
//! The daemon's sockets and log are in a private directory. On unix, neither the daemon nor that
//! directory outlives this process, however it ends. On Windows, the daemon outlives a process that
//! is killed.

#[cfg(unix)]
mod child;
mod log;
mod preparation;
mod run;
mod shutdown;
mod signals;
#[cfg(unix)]
mod spawn;
#[cfg(unix)]
mod watchdog;

use self::log::Log;
#[doc(hidden)]
pub use self::preparation::unused_tcp_port;
use self::preparation::{default_control, loopback, make_repeatable, unix_maddr, with_free_port};
use self::run::Run;
#[cfg(unix)]
use self::shutdown::LEFT_BEHIND;
use self::shutdown::{Phase, Shutdown, LAST_WAIT};
use self::signals::Signal;
#[cfg(unix)]
use self::signals::{exists, group_exists};
#[cfg(unix)]
use self::watchdog::Watchdog;
#[cfg(unix)]
#[doc(hidden)]
pub use self::watchdog::WatchdogKind;
use super::locks::{lock, try_lock};
use super::options::{Bootstrap, BootstrapPeer, DaemonOptions, Flavour};
use super::start::{self, DaemonError, StartError};
use p2pd_protocol::endpoint::Endpoint;
use p2pd_protocol::policy::backoff::Backoff;
use p2pd_protocol::policy::supervision::Supervision;
use p2pd_protocol::{Multiaddr, PeerId};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// The longest name of a client's socket.
const LONGEST_SOCKET: &str = "client-4194304-9999999.sock";

/// A daemon's process and its files.
///
/// It belongs to the process that created it. In a forked child, methods do not signal, reap or
/// remove anything. They also do not wait for locks, which another thread of the parent may have
/// held during the fork.
///
/// ```no_run
/// use p2pd_manager::process::Process;
/// use p2pd_manager::DaemonOptions;
///
/// let process = Process::prepare("/usr/bin/p2pd".into(), &DaemonOptions::default(), None)?;
/// process.spawn()?;
/// println!("process {:?} will be at {}", process.pid(), process.control());
/// // … talk to it, and call `poll` from time to time to see whether it still runs.
/// process.destroy();
/// # Ok::<(), p2pd_manager::DaemonError>(())
/// ```
#[derive(Debug)]
pub struct Process {
    binary: PathBuf,
    options: DaemonOptions,
    arguments: Vec<String>,
    control: Multiaddr,
    owner: u32,
    directory: PathBuf,
    log: Log,
    /// The control socket, if it is a file outside the directory and did not exist before.
    socket: Option<PathBuf>,
    clients: AtomicU64,
    /// The process id of the last run; 0 before the first.
    pid: AtomicU32,
    /// Position in the log at which the output of the last run begins.
    begun: AtomicU64,
    /// Whether a supervisor restarts it when it ends.
    supervised: AtomicBool,
    /// Whether the shutdown is complete.
    destroyed: AtomicBool,
    /// Never held while waiting.
    run: Mutex<Run>,
    /// Held for one step of the shutdown, and while the daemon is spawned.
    shutdown: Mutex<Shutdown>,
    #[cfg(unix)]
    watchdog: Watchdog,
}

impl Process {
    /// Creates the private directory, starts the watchdog, and chooses addresses and ports.
    ///
    /// `binary` is a path; [`find`](super::find) searches `PATH`. The directory is created in
    /// `parent`, by default in the system's directory for temporary files.
    ///
    /// # Errors
    /// The options are invalid, or the operating system refused something; the [`StartError`] says
    /// what.
    pub fn prepare(
        binary: PathBuf,
        options: &DaemonOptions,
        parent: Option<&Path>,
    ) -> Result<Self, DaemonError> {
        #[cfg(unix)]
        return Self::prepare_with(binary, options, parent, None);
        #[cfg(not(unix))]
        Self::prepare_with(binary, options, parent)
    }

    /// Like [`prepare`](Self::prepare), with this kind of watchdog.
    #[doc(hidden)]
    pub fn prepare_with(
        binary: PathBuf,
        options: &DaemonOptions,
        parent: Option<&Path>,
        #[cfg(unix)] watchdog: Option<WatchdogKind>,
    ) -> Result<Self, DaemonError> {
        options.validate()?;
        let directory = p2pd_sockets::make_private_directory(parent, "p2pd-", LONGEST_SOCKET)
            .map_err(StartError::not_prepared)?;
        let mut options = options.clone();
        if options.restart > 0 {
            make_repeatable(&mut options, directory.path()).map_err(StartError::not_prepared)?;
        }
        let control = match &options.control {
            Some(control) => control.clone(),
            None => default_control(directory.path()),
        };
        let control = with_free_port(control).map_err(StartError::not_prepared)?;
        let arguments = DaemonOptions {
            flavour: Flavour::of(&binary),
            control: Some(control.clone()),
            ..options.clone()
        }
        .arguments()?;
        let socket = match (&options.control, control.endpoint()) {
            (Some(_), Ok(Endpoint::Unix(path))) => Some(PathBuf::from(path)),
            _ => None,
        };
        let socket = socket.filter(|path| {
            #[cfg(unix)]
            // If this fails, the daemon reports what is wrong with the file.
            let _ = p2pd_sockets::remove_stale(path);
            path.symlink_metadata().is_err()
        });
        #[cfg(unix)]
        // Started before the daemon, so that the daemon never runs without it.
        let watchdog = Watchdog::start([Some(directory.path()), socket.as_deref()], watchdog)
            .map_err(StartError::not_prepared)?;
        let directory = directory.keep();
        Ok(Process {
            binary,
            arguments,
            control,
            options,
            owner: std::process::id(),
            log: Log::new(&directory.join("log")),
            directory,
            socket,
            clients: AtomicU64::new(0),
            pid: AtomicU32::new(0),
            begun: AtomicU64::new(0),
            supervised: AtomicBool::new(false),
            destroyed: AtomicBool::new(false),
            run: Mutex::default(),
            shutdown: Mutex::default(),
            #[cfg(unix)]
            watchdog,
        })
    }

    /// Prepares a second daemon with the same options that does not connect to the bootstrap peers.
    /// The caller connects it to each of them, to find out why they are unreachable.
    #[doc(hidden)]
    pub fn without_bootstrap(&self) -> Result<Self, DaemonError> {
        let options = DaemonOptions {
            bootstrap: Bootstrap::Background,
            restart: 0,
            // A private socket, as only the caller connects to this daemon.
            control: None,
            ..self.options.clone()
        };
        Process::prepare(self.binary.clone(), &options, self.directory.parent())
    }

    /// The bootstrap peers, each with its address as the caller gave it.
    pub fn bootstrap_peers(&self) -> Vec<(String, BootstrapPeer)> {
        let addresses = self.options.bootstrap_peers.iter();
        addresses
            .filter_map(|address| Some((address.clone(), BootstrapPeer::parse(address).ok()?)))
            .collect()
    }

    /// The bootstrap peers that a supervisor connects the daemon to, instead of the daemon itself.
    pub fn background_peers(&self) -> Vec<(String, BootstrapPeer)> {
        match self.options.bootstrap {
            Bootstrap::Background => self.bootstrap_peers(),
            Bootstrap::Required => Vec::new(),
        }
    }

    /// Returns the policy that the daemon's supervisor follows; `None` if it needs no supervisor.
    pub fn supervision(&self) -> Option<Supervision> {
        let (limit, peers) = (self.options.restart, self.background_peers().len());
        (limit > 0 || peers > 0).then(|| Supervision::new(limit, peers))
    }

    /// The number of deaths in a row after which the supervisor gives up; 0 if it never restarts
    /// the daemon.
    pub fn restart_limit(&self) -> u32 {
        self.options.restart
    }

    /// Sets whether a supervisor restarts the daemon when it ends.
    pub fn set_supervised(&self, supervised: bool) {
        self.supervised.store(supervised, Ordering::Release);
    }

    /// Whether the daemon has ended, and no supervisor will restart it.
    pub fn finished(&self) -> bool {
        // Loaded first: the supervisor clears it only after it has seen the daemon's last end.
        let supervised = self.supervised.load(Ordering::Acquire);
        self.ended() || !supervised && self.poll().is_some()
    }

    /// Spawns the daemon, for the first time or after it has ended.
    ///
    /// # Errors
    /// The binary cannot be executed, or the daemon is running or was destroyed.
    pub fn spawn(&self) -> Result<(), StartError> {
        let refused = |why: &str| StartError::not_run(self.command(), io::Error::other(why));
        if !self.owned() {
            return Err(refused(
                "this is a forked child, and only the process that created it can spawn it",
            ));
        }
        let shutdown = lock(&self.shutdown);
        if shutdown.has_begun() {
            return Err(refused("it was stopped"));
        }
        let mut run = self.run();
        self.reap(&mut run);
        if run.is_running() {
            return Err(refused("it is running"));
        }
        #[cfg(unix)]
        // The last run may have died without removing its socket.
        if let (false, Ok(Endpoint::Unix(path))) = (run.is_new(), self.control.endpoint()) {
            let _ = p2pd_sockets::remove_stale(Path::new(&path));
        }
        let spawned = self.log.begin_run().and_then(|(output, begun)| {
            #[cfg(unix)]
            let new = Run::spawn(&self.binary, &self.arguments, output, &self.watchdog)?;
            #[cfg(not(unix))]
            let new = Run::spawn(&self.binary, &self.arguments, output)?;
            Ok((new, begun))
        });
        let (new, begun) = spawned.map_err(|failed| StartError::failed(self.command(), failed))?;
        self.begun.store(begun, Ordering::Relaxed);
        self.pid.store(new.pid(), Ordering::Relaxed);
        *run = new;
        Ok(())
    }

    /// The binary and its arguments.
    pub fn command(&self) -> Vec<String> {
        let binary = self.binary.display().to_string();
        std::iter::once(binary)
            .chain(self.arguments.iter().cloned())
            .collect()
    }

    /// The address at which the daemon serves the control protocol.
    pub fn control(&self) -> &Multiaddr {
        &self.control
    }

    /// A new address at which a client can listen for inbound streams, in the private directory.
    pub fn listen_maddr(&self) -> Multiaddr {
        if cfg!(not(unix)) {
            return loopback();
        }
        // With the process id, since a forked child continues its parent's count.
        let number = self.clients.fetch_add(1, Ordering::Relaxed);
        let name = format!("client-{}-{number}.sock", std::process::id());
        unix_maddr(&self.directory.join(name))
    }

    /// The file with the daemon's newest output, at most 1 MiB. A second file, with `.1` added to
    /// the name, has up to 1 MiB of older output. [`destroy`](Self::destroy) removes both.
    pub fn log(&self) -> &Path {
        self.log.path()
    }

    /// The daemon's process id, on unix also the id of its process group; `None` before it ran.
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// Whether this process created it; false in a forked child.
    #[doc(hidden)]
    pub fn owned(&self) -> bool {
        self.owner == std::process::id()
    }

    /// Whether [`destroy`](Self::destroy) has ended the daemon. Some of its files and the watchdog
    /// may be left: see [`destroyed`](Self::destroyed).
    #[doc(hidden)]
    pub fn ended(&self) -> bool {
        self.log.is_closed()
    }

    /// Whether it was destroyed, and no file and no process is left.
    #[doc(hidden)]
    pub fn destroyed(&self) -> bool {
        self.destroyed.load(Ordering::Acquire)
    }

    /// Whether the daemon is running. Works in a forked child, too.
    pub fn alive(&self) -> bool {
        let Some(pid) = self.pid() else { return false };
        // Windows has no fork.
        #[cfg(unix)]
        let seen = self.owned() || exists(pid);
        #[cfg(not(unix))]
        let seen = pid != 0;
        self.poll().is_none() && seen
    }

    /// The exit status; `None` while the daemon is running. It is 0 if another part of the program
    /// has reaped the daemon, because the true status is then lost.
    ///
    /// A forked child only knows a status that its parent knew at the fork.
    pub fn poll(&self) -> Option<ExitStatus> {
        if !self.owned() {
            // In a forked child the lock may never be released.
            return try_lock(&self.run)?.status();
        }
        self.log.retry();
        let mut run = self.run();
        self.reap(&mut run);
        run.status()
    }

    /// Sends SIGTERM to the daemon and its children, if it is running. On Windows, kills it.
    pub fn terminate(&self) {
        if self.owned() {
            self.signal(&mut self.run(), Signal::Terminate);
        }
    }

    /// Kills the daemon and its children, if it is running. It can be spawned again.
    pub fn kill(&self) {
        if self.owned() {
            self.signal(&mut self.run(), Signal::Kill);
        }
    }

    /// The last MiB of the daemon's output. Complete once the daemon has ended.
    pub fn output(&self) -> String {
        self.output_from(0)
    }

    /// The output of the last run.
    fn output_of_run(&self) -> String {
        self.output_from(self.begun.load(Ordering::Relaxed))
    }

    fn output_from(&self, begin: u64) -> String {
        self.log.text(begin, self.owned())
    }

    /// Reads at most `limit` bytes of the output, from the byte at `begin` on. Returns the data and
    /// the position of its first byte, which is later than `begin` if that output is no longer
    /// stored.
    #[doc(hidden)]
    pub fn read_output(&self, begin: u64, limit: usize) -> (u64, Vec<u8>) {
        self.log.read(begin, limit)
    }

    /// Ends the thread that stores the output, until [`resume`](Self::resume). Called before a
    /// fork: a lock that the thread holds would never be released in the child.
    #[doc(hidden)]
    pub fn pause(&self) {
        if self.owned() {
            self.log.pause();
        }
    }

    /// Starts the thread again after [`pause`](Self::pause).
    #[doc(hidden)]
    pub fn resume(&self) {
        if self.owned() {
            self.log.resume();
        }
    }

    /// Kills the daemon and removes its files. Its status and output stay available.
    ///
    /// Blocks until the killed processes have ended, which takes milliseconds; gives up on one that
    /// is in an uninterruptible system call after 5 seconds. [`try_destroy`](Self::try_destroy)
    /// does not block.
    pub fn destroy(&self) {
        self.destroy_within(Duration::MAX);
    }

    /// Like [`destroy`](Self::destroy), for at most `limit`. Returns whether the shutdown is
    /// complete.
    #[doc(hidden)]
    pub fn destroy_within(&self, limit: Duration) -> bool {
        let begun = Instant::now();
        let mut backoff = Backoff::new(Duration::from_micros(200), Duration::from_millis(10));
        while !self.try_destroy() {
            if begun.elapsed() >= limit {
                return false;
            }
            thread::sleep(backoff.next(0));
        }
        true
    }

    /// Takes the next step of [`destroy`](Self::destroy) without blocking. Returns whether the
    /// shutdown is complete: the caller calls it every few milliseconds until then, for about 10
    /// seconds at most.
    pub fn try_destroy(&self) -> bool {
        if !self.owned() || self.destroyed() {
            return true;
        }
        let Some(mut shutdown) = try_lock(&self.shutdown) else {
            return false;
        };
        loop {
            let (phase, waited) = shutdown.waiting_for();
            let next = match phase {
                Phase::Daemon if self.end_daemon() || waited >= LAST_WAIT => {
                    // Keeps the end of the output before the files are removed.
                    self.log.close();
                    let _ = p2pd_sockets::remove_directory(&self.directory);
                    #[cfg(unix)]
                    let next = Phase::Socket;
                    #[cfg(not(unix))]
                    let next = Phase::Done;
                    #[cfg(not(unix))]
                    if let Some(socket) = &self.socket {
                        let _ = std::fs::remove_file(socket);
                    }
                    next
                }
                #[cfg(unix)]
                Phase::Socket if self.end_socket() || waited >= LEFT_BEHIND => Phase::Watchdog,
                // Ended after the files are removed: if this process is killed before, the watchdog
                // removes them.
                #[cfg(unix)]
                Phase::Watchdog if self.end_watchdog() || waited >= LAST_WAIT => {
                    self.watchdog.cut_lifeline();
                    Phase::Done
                }
                Phase::Done => {
                    self.destroyed.store(true, Ordering::Release);
                    return true;
                }
                _ => return false,
            };
            shutdown.enter(next);
        }
    }

    /// Kills the daemon. Returns whether it has ended, or never ran.
    fn end_daemon(&self) -> bool {
        let mut run = self.run();
        self.signal(&mut run, Signal::Kill);
        self.reap(&mut run);
        !run.is_running()
    }

    /// Removes the control socket. Returns whether it is gone, or belongs to another daemon.
    #[cfg(unix)]
    fn end_socket(&self) -> bool {
        // A process that a wrapper script left behind may still serve the socket: it was killed,
        // but may not have ended yet. If the process group is gone, the socket is another daemon's.
        self.socket.as_ref().is_none_or(|socket| {
            let _ = p2pd_sockets::remove_stale(socket);
            socket.symlink_metadata().is_err() || !self.pid().is_some_and(group_exists)
        })
    }

    /// Ends the watchdog. Returns whether it has ended.
    #[cfg(unix)]
    fn end_watchdog(&self) -> bool {
        // Removing fails if this process has no free descriptor. The watchdog can still do it.
        let left = self.directory.symlink_metadata().is_ok();
        if left && p2pd_sockets::remove_directory(&self.directory).is_err() {
            self.watchdog.finish()
        } else {
            self.watchdog.dismiss()
        }
    }

    /// Closes this process's end of the watchdog's pipe. Called in a forked child, which would
    /// otherwise keep the watchdog waiting after its parent has ended.
    #[cfg(unix)]
    #[doc(hidden)]
    pub fn cut_lifeline(&self) {
        self.watchdog.cut_lifeline();
    }

    /// The watchdog's process id.
    #[cfg(unix)]
    #[doc(hidden)]
    pub fn watchdog_pid(&self) -> u32 {
        self.watchdog.id()
    }

    /// Returns why a reply to IDENTIFY with this peer id does not prove that the daemon is ready;
    /// `None` if it does.
    pub fn why_not_ready(&self, peer_id: &PeerId) -> Option<String> {
        let must_report_start = start::must_report_start(&self.options);
        start::why_not_ready(&self.output_of_run(), peer_id, must_report_start)
    }

    /// The error for a daemon that ended, or was not ready in `timeout` seconds. `reason` says
    /// why the last probe failed.
    pub fn not_ready(&self, timeout: f64, reason: Option<String>) -> StartError {
        let status = self.poll().map(exit_code);
        let output = self.output_of_run();
        StartError::not_ready(self.command(), &output, status, timeout, reason)
    }

    /// The error for a daemon that was ready and died.
    pub fn died(&self) -> StartError {
        let status = self.poll().map(exit_code);
        StartError::died(self.command(), &self.output_of_run(), status)
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        lock(&self.run)
    }

    /// Reaps the daemon if it has ended.
    fn reap(&self, run: &mut Run) {
        #[cfg(unix)]
        run.reap(&self.watchdog);
        #[cfg(not(unix))]
        run.reap();
    }

    fn signal(&self, run: &mut Run, signal: Signal) {
        self.reap(run);
        run.signal(signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.destroy();
    }
}

/// Converts an exit status to a number, negative for a signal.
#[doc(hidden)]
pub fn exit_code(status: ExitStatus) -> i32 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return -signal;
    }
    status.code().unwrap_or_default()
}

#[cfg(all(test, unix))]
mod tests;
