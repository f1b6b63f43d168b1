//! A daemon's process, its files, and the janitor that clears up after it. Knows no event loop:
//! nothing here waits, except [`Process::destroy`], for killed processes and up to a limit.
//!
//! The daemon's sockets and its output are in a private directory, and whatever becomes of this
//! process, neither the daemon nor that directory outlives it. That is so on unix; on Windows a
//! daemon outlives a process that is killed.

#[cfg(unix)]
mod janitor;
#[cfg(unix)]
mod launch;
mod log;

#[cfg(unix)]
#[doc(hidden)]
pub use self::janitor::Kind;
use self::log::Log;
#[cfg(unix)]
use self::{
    janitor::Janitor,
    launch::{Child, Launch},
};
use super::options::{Bootstrap, BootstrapPeer, DaemonOptions, Flavour};
use super::start::{self, DaemonError, StartError};
use p2pd_protocol::multiaddr::{Endpoint, Host};
use p2pd_protocol::policy::supervision::Supervision;
use p2pd_protocol::{Multiaddr, PeerId};
use p2pd_sockets::Failed;
use std::fs::File;
use std::io::{self, PipeWriter, Write as _};
use std::net::TcpListener;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
#[cfg(not(unix))]
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

/// How much of the end of the daemon's output is kept, in bytes.
#[cfg(test)]
const OUTPUT_LIMIT: u64 = log::LIMIT;
/// The name of a client's socket, at its longest.
const LONGEST_SOCKET: &str = "client-4194304-9999999.sock";
/// How long a process that was killed is waited for. It may be in the middle of something that
/// cannot be interrupted.
const LAST_WAIT: Duration = Duration::from_secs(5);
/// How long what was killed with a wrapper is waited for.
#[cfg(unix)]
const LEFT_BEHIND: Duration = Duration::from_millis(500);
/// None of these does a system give to whoever asks for any port, or connects.
const PORTS: Range<u16> = 20_000..32_000;

/// A daemon's process and its files.
///
/// It belongs to the process that made it: in a forked child nothing is signalled, reaped or
/// removed, and no lock is waited for, which another thread of the parent may have held.
///
/// ```no_run
/// use p2pd_manager::process::Process;
/// use p2pd_manager::DaemonOptions;
///
/// let process = Process::prepare("/usr/bin/p2pd".into(), &DaemonOptions::default(), None)?;
/// process.spawn()?;
/// println!("process {:?} will be at {}", process.pid(), process.control());
/// // … talk to it, and ask `poll` from time to time whether it is still there.
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
    log: PathBuf,
    output: Log,
    /// The control socket, if that is a file outside the directory that was not there before.
    socket: Option<PathBuf>,
    clients: AtomicU64,
    /// Of the last run; 0 before the first.
    pid: AtomicU32,
    /// Where the output of the last run begins in the log.
    begun: AtomicU64,
    /// Whether a supervisor starts it again when it ends.
    supervised: AtomicBool,
    /// The end of the output, and its position; there once the daemon was destroyed.
    last_output: OnceLock<(u64, Vec<u8>)>,
    /// Whether nothing is left of it.
    destroyed: AtomicBool,
    /// Held for no longer than it takes to look.
    run: Mutex<Run>,
    /// Held for one step of the end, and while the daemon is started.
    ending: Mutex<Ending>,
    #[cfg(unix)]
    janitor: Janitor,
}

/// The last run of the daemon.
#[derive(Debug, Default)]
struct Run {
    child: Option<Child>,
    status: Option<ExitStatus>,
}

/// How far the end of a daemon has come.
#[derive(Debug, Default)]
struct Ending {
    phase: Phase,
    /// When this phase began.
    begun: Option<Instant>,
}

/// What the end of a daemon waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    /// The daemon, which is killed.
    #[default]
    Daemon,
    /// What a wrapper has left, which may hold the control socket.
    #[cfg(unix)]
    Socket,
    /// The janitor, which is killed unless there is something left for it to remove.
    #[cfg(unix)]
    Janitor,
    Over,
}

impl Process {
    /// Makes everything a daemon with these options needs, and its command line. Its private
    /// directory is made in `parent`, or where temporary files go.
    ///
    /// `binary` is a path, for a name is not looked for in `PATH`: that is what
    /// [`find`](super::find) does.
    ///
    /// # Errors
    /// The options are wrong, or something could not be made: the [`StartError`] names it.
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

    /// As [`prepare`](Self::prepare), with this kind of janitor.
    #[doc(hidden)]
    pub fn prepare_with(
        binary: PathBuf,
        options: &DaemonOptions,
        parent: Option<&Path>,
        #[cfg(unix)] janitor: Option<Kind>,
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
            // If it cannot be removed, the daemon will say what is wrong with it.
            let _ = p2pd_sockets::remove_stale(path);
            path.symlink_metadata().is_err()
        });
        #[cfg(unix)]
        // Before the daemon, so that there is no time at which nobody would clear up.
        let janitor = Janitor::start([Some(directory.path()), socket.as_deref()], janitor)
            .map_err(StartError::not_prepared)?;
        let directory = directory.keep();
        let log = directory.join("log");
        Ok(Process {
            binary,
            arguments,
            control,
            options,
            owner: std::process::id(),
            output: Log::new(&log),
            log,
            directory,
            socket,
            clients: AtomicU64::new(0),
            pid: AtomicU32::new(0),
            begun: AtomicU64::new(0),
            supervised: AtomicBool::new(false),
            last_output: OnceLock::new(),
            destroyed: AtomicBool::new(false),
            run: Mutex::default(),
            ending: Mutex::default(),
            #[cfg(unix)]
            janitor,
        })
    }

    /// The same daemon, in a process and a directory of its own, but for the bootstrap peers, to
    /// which it does not connect: those can be asked what is wrong with them.
    #[doc(hidden)]
    pub fn without_bootstrap(&self) -> Result<Self, DaemonError> {
        let options = DaemonOptions {
            bootstrap: Bootstrap::Background,
            restart: 0,
            // Nobody but who asks is to talk to it.
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

    /// The decisions of a supervisor for this daemon; none if it needs no supervisor.
    pub fn supervision(&self) -> Option<Supervision> {
        let (limit, peers) = (self.options.restart, self.background_peers().len());
        (limit > 0 || peers > 0).then(|| Supervision::new(limit, peers))
    }

    /// Deaths in a row after which the daemon is given up; 0 if it is never started again.
    pub fn restart_limit(&self) -> u32 {
        self.options.restart
    }

    /// Sets whether a supervisor starts the daemon again when it ends.
    pub fn set_supervised(&self, supervised: bool) {
        self.supervised.store(supervised, Ordering::Release);
    }

    /// Whether the daemon has ended, and no supervisor starts it again.
    pub fn finished(&self) -> bool {
        // Loaded first: a supervisor stops supervising only after it has seen the last end.
        let supervised = self.supervised.load(Ordering::Acquire);
        self.ended() || !supervised && self.poll().is_some()
    }

    /// Runs the daemon; again, if it has ended.
    ///
    /// # Errors
    /// It cannot be executed, is running, or was destroyed.
    pub fn spawn(&self) -> Result<(), StartError> {
        let refused = |why: &str| StartError::not_run(self.command(), io::Error::other(why));
        if !self.owned() {
            return Err(refused(
                "it belongs to the process that made it, of which this is a forked child",
            ));
        }
        let ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        if ending.begun.is_some() {
            return Err(refused("it was stopped"));
        }
        let mut run = self.run();
        self.reap(&mut run);
        let ran = run.child.is_some();
        if ran && run.status.is_none() {
            return Err(refused("it is running"));
        }
        #[cfg(unix)]
        // It may have died without removing it.
        if let (true, Ok(Endpoint::Unix(path))) = (ran, self.control.endpoint()) {
            let _ = p2pd_sockets::remove_stale(Path::new(&path));
        }
        let launched = self.output.begin_run().and_then(|(output, begun)| {
            let child = self.launch(output)?;
            Ok((child, begun))
        });
        let (child, begun) =
            launched.map_err(|failed| StartError::failed(self.command(), failed))?;
        self.begun.store(begun, Ordering::Relaxed);
        self.pid.store(child.id(), Ordering::Relaxed);
        *run = Run {
            child: Some(child),
            status: None,
        };
        Ok(())
    }

    #[cfg(unix)]
    fn launch(&self, output: PipeWriter) -> Result<Child, Failed> {
        let null =
            File::open("/dev/null").map_err(Failed::at(|| "cannot open /dev/null for reading"))?;
        let arguments = self.arguments.iter().map(String::as_bytes);
        let launch = Launch::new(&self.binary, arguments, [&null, &output, &output])?;
        let launched = self.janitor.announced(launch)?.run();
        if launched.is_err() {
            self.janitor.tell(0);
        }
        launched
    }

    #[cfg(not(unix))]
    fn launch(&self, output: PipeWriter) -> Result<Child, Failed> {
        let run = || -> io::Result<Child> {
            Command::new(&self.binary)
                .args(&self.arguments)
                .stdin(Stdio::null())
                .stdout(output.try_clone()?)
                .stderr(output)
                .spawn()
        };
        run().map_err(Failed::at(|| {
            format!("cannot execute {}", self.binary.display())
        }))
    }

    /// The command line.
    pub fn command(&self) -> Vec<String> {
        let binary = self.binary.display().to_string();
        std::iter::once(binary)
            .chain(self.arguments.iter().cloned())
            .collect()
    }

    /// Where the daemon is to serve the control protocol.
    pub fn control(&self) -> &Multiaddr {
        &self.control
    }

    /// A new address for a client of the daemon to listen at, in the private directory.
    pub fn listen_maddr(&self) -> Multiaddr {
        if cfg!(not(unix)) {
            return loopback();
        }
        // The process id, for a forked child counts from the same number as its parent.
        let number = self.clients.fetch_add(1, Ordering::Relaxed);
        let name = format!("client-{}-{number}.sock", std::process::id());
        unix_maddr(&self.directory.join(name))
    }

    /// The file with the daemon's newest output, at most a MiB; the file with `.1` added to its
    /// name has up to a MiB more, from before. They go with [`destroy`](Self::destroy).
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The daemon's process id, which on unix is its process group's too; none before it ran.
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// Whether this is the process that started the daemon.
    #[doc(hidden)]
    pub fn owned(&self) -> bool {
        self.owner == std::process::id()
    }

    /// Whether it was destroyed, though some of its files or processes may be there still.
    #[doc(hidden)]
    pub fn ended(&self) -> bool {
        self.last_output.get().is_some()
    }

    /// Whether it was destroyed and nothing is left of it.
    #[doc(hidden)]
    pub fn destroyed(&self) -> bool {
        self.destroyed.load(Ordering::Acquire)
    }

    /// Whether the daemon is running; a forked child can tell too.
    pub fn alive(&self) -> bool {
        let Some(pid) = self.pid() else { return false };
        // Nobody forks on Windows.
        #[cfg(unix)]
        let seen = self.owned() || exists(pid);
        #[cfg(not(unix))]
        let seen = pid != 0;
        self.poll().is_none() && seen
    }

    /// The exit status; none if the daemon is running, or if only its parent can tell. Of a daemon
    /// that somebody else has reaped, nobody knows it, and it is 0.
    pub fn poll(&self) -> Option<ExitStatus> {
        if !self.owned() {
            // Another thread of the parent may have held it.
            return self.run.try_lock().ok()?.status;
        }
        self.output.retry();
        let mut run = self.run();
        self.reap(&mut run);
        run.status
    }

    /// Asks the daemon and its children to end, if it is running. (On Windows, where nothing can
    /// be asked, it ends it.)
    pub fn terminate(&self) {
        if self.owned() {
            self.signal(&mut self.run(), Signal::Terminate);
        }
    }

    /// Kills the daemon and its children, if it is running. Once it has ended, it can be run again.
    pub fn kill(&self) {
        if self.owned() {
            self.signal(&mut self.run(), Signal::Kill);
        }
    }

    /// The end of what the daemon has printed: the last MiB. Once the daemon has ended, it is
    /// complete.
    pub fn output(&self) -> String {
        self.output_from(0)
    }

    /// What the last run has printed.
    fn output_of_run(&self) -> String {
        self.output_from(self.begun.load(Ordering::Relaxed))
    }

    fn output_from(&self, begin: u64) -> String {
        let (first, output) = if !self.owned() && !self.ended() {
            (begin, log::tail_of_files(&self.log))
        } else {
            let tail = self.output.tail(begin);
            // It may have been destroyed meanwhile.
            self.last_output.get().cloned().unwrap_or(tail)
        };
        let before = usize::try_from(begin.saturating_sub(first)).unwrap_or(usize::MAX);
        let output = output.get(before..).unwrap_or_default();
        String::from_utf8_lossy(output).into_owned()
    }

    /// At most `limit` bytes of the output from a position on, and the position of the first one:
    /// a later one if the output there is no longer stored.
    #[doc(hidden)]
    pub fn read_output(&self, begin: u64, limit: usize) -> (u64, Vec<u8>) {
        let read = self.output.read(begin, limit as u64);
        let Some((first, output)) = self.last_output.get() else {
            return read;
        };
        let begin = begin.max(*first);
        let output = output.get((begin - first) as usize..).unwrap_or_default();
        (begin, output[..limit.min(output.len())].to_vec())
    }

    /// Ends the thread that stores the output, until [`resume`](Self::resume). Before a fork: a
    /// lock that the thread holds would never be released in the child.
    #[doc(hidden)]
    pub fn pause(&self) {
        if self.owned() {
            self.output.pause();
        }
    }

    /// Undoes [`pause`](Self::pause).
    #[doc(hidden)]
    pub fn resume(&self) {
        if self.owned() {
            self.output.resume();
        }
    }

    /// Ends all of it now; status and output can still be had. Waits for the daemon that was
    /// killed, which takes milliseconds; one that the kernel does not let go of is given up after
    /// five seconds. [`try_destroy`](Self::try_destroy) does not wait.
    pub fn destroy(&self) {
        self.destroy_within(Duration::MAX);
    }

    /// As [`destroy`](Self::destroy), but for no longer than `limit`. Returns whether it is done.
    #[doc(hidden)]
    pub fn destroy_within(&self, limit: Duration) -> bool {
        let begun = Instant::now();
        let mut pause = Duration::from_micros(200);
        while !self.try_destroy() {
            if begun.elapsed() >= limit {
                return false;
            }
            thread::sleep(pause);
            pause = (2 * pause).min(Duration::from_millis(10));
        }
        true
    }

    /// Does the next step of [`destroy`](Self::destroy) without waiting: kills the daemon, and
    /// removes its files once it has ended. Returns whether nothing is left. The caller repeats it
    /// every few milliseconds until then, for about ten seconds at most.
    pub fn try_destroy(&self) -> bool {
        if !self.owned() || self.destroyed() {
            return true;
        }
        let mut ending = match self.ending.try_lock() {
            Ok(ending) => ending,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        loop {
            let waited = ending.begun.get_or_insert_with(Instant::now).elapsed();
            let next = match ending.phase {
                Phase::Daemon if self.end_daemon() || waited >= LAST_WAIT => {
                    self.output.close();
                    // Before the files go: from now on it is had from here.
                    let _ = self.last_output.set(self.output.tail(0));
                    let _ = p2pd_sockets::remove_directory(&self.directory);
                    #[cfg(unix)]
                    let next = Phase::Socket;
                    #[cfg(not(unix))]
                    let next = Phase::Over;
                    #[cfg(not(unix))]
                    if let Some(socket) = &self.socket {
                        let _ = std::fs::remove_file(socket);
                    }
                    next
                }
                #[cfg(unix)]
                Phase::Socket if self.end_socket() || waited >= LEFT_BEHIND => Phase::Janitor,
                // After the files: should this process be killed meanwhile, it removes them.
                #[cfg(unix)]
                Phase::Janitor if self.end_janitor() || waited >= LAST_WAIT => {
                    self.janitor.cut_lifeline();
                    Phase::Over
                }
                Phase::Over => {
                    self.destroyed.store(true, Ordering::Release);
                    return true;
                }
                _ => return false,
            };
            *ending = Ending {
                phase: next,
                begun: Some(Instant::now()),
            };
        }
    }

    /// Kills the daemon; whether it has ended, or never ran.
    fn end_daemon(&self) -> bool {
        let mut run = self.run();
        self.signal(&mut run, Signal::Kill);
        self.reap(&mut run);
        run.child.is_none() || run.status.is_some()
    }

    /// Removes the control socket; whether it is gone, or not this daemon's.
    #[cfg(unix)]
    fn end_socket(&self) -> bool {
        // Another daemon may serve there by now, and so may one that a wrapper has left behind:
        // that was killed, but need not have ended.
        self.socket.as_ref().is_none_or(|socket| {
            let _ = p2pd_sockets::remove_stale(socket);
            socket.symlink_metadata().is_err() || !self.pid().is_some_and(group_exists)
        })
    }

    /// Ends the janitor; whether it has ended.
    #[cfg(unix)]
    fn end_janitor(&self) -> bool {
        // It could not be removed if no descriptor was left. The janitor has its own.
        let left = self.directory.symlink_metadata().is_ok();
        if left && p2pd_sockets::remove_directory(&self.directory).is_err() {
            self.janitor.finish()
        } else {
            self.janitor.dismiss()
        }
    }

    /// Lets go of what tells the janitor that this process lives. For a forked child, in which it
    /// would be taken for its parent.
    #[cfg(unix)]
    #[doc(hidden)]
    pub fn cut_lifeline(&self) {
        self.janitor.cut_lifeline();
    }

    /// The janitor's process id.
    #[cfg(unix)]
    #[doc(hidden)]
    pub fn janitor_pid(&self) -> u32 {
        self.janitor.id()
    }

    /// Why the daemon's answer to IDENTIFY is not to be believed yet; nothing if it is.
    pub fn doubt(&self, peer_id: &PeerId) -> Option<String> {
        let must_say_so = start::must_say_so(&self.options);
        start::doubt(&self.output_of_run(), peer_id, must_say_so)
    }

    /// The error of a daemon that ended, or was not ready in `timeout` seconds. `obstacle` is why
    /// its last answer was none.
    pub fn not_ready(&self, timeout: f64, obstacle: Option<String>) -> StartError {
        let status = self.poll().map(exit_code);
        let output = self.output_of_run();
        StartError::not_ready(self.command(), &output, status, timeout, obstacle)
    }

    /// The error of a daemon that was ready, and died.
    pub fn died(&self) -> StartError {
        let status = self.poll().map(exit_code);
        StartError::died(self.command(), &self.output_of_run(), status)
    }

    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the daemon's status if it has ended.
    fn reap(&self, run: &mut Run) {
        let Some(daemon) = run.child.as_mut().filter(|_| run.status.is_none()) else {
            return;
        };
        #[cfg(unix)]
        let status = match daemon.has_ended() {
            Ok(false) => return,
            Ok(true) => {
                // A wrapper script may have left the real daemon behind. Before it is reaped:
                // after that, its number may become another's.
                self.signal_group(Signal::Kill);
                self.janitor.tell(0);
                daemon.reap()
            }
            // Somebody else has reaped it, and its number may be another's already.
            Err(_) => {
                self.janitor.tell(0);
                None
            }
        };
        #[cfg(not(unix))]
        let status = match daemon.try_wait() {
            Ok(None) => return,
            status => status.ok().flatten(),
        };
        run.status = Some(status.unwrap_or_default());
    }

    fn signal(&self, run: &mut Run, signal: Signal) {
        self.reap(run);
        if run.status.is_some() {
            return;
        }
        #[cfg(unix)]
        self.signal_group(signal);
        #[cfg(not(unix))]
        if let (Some(daemon), Signal::Terminate | Signal::Kill) = (&mut run.child, signal) {
            let _ = daemon.kill();
        }
    }

    #[cfg(unix)]
    fn signal_group(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            signal_group(pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.destroy();
    }
}

#[derive(Debug, Clone, Copy)]
enum Signal {
    Terminate,
    Kill,
}

/// An exit status as one number, negative for a signal.
#[doc(hidden)]
pub fn exit_code(status: ExitStatus) -> i32 {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return -signal;
    }
    status.code().unwrap_or_default()
}

/// A TCP port that nobody listened on a moment ago, at an address or name of this machine.
///
/// It is none of those that the system gives to whoever asks for any, or connects: one of these
/// could be gone before it is used.
///
/// # Errors
/// There is no such address, or no port.
#[doc(hidden)]
pub fn unused_tcp_port(host: &str) -> io::Result<u16> {
    for attempt in 0..100 {
        let offset = p2pd_sockets::random(attempt) % PORTS.len() as u64;
        let port = PORTS.start + offset as u16;
        match TcpListener::bind((host, port)) {
            Ok(_) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    let message = format!("no port is free at {host}");
    Err(io::Error::new(io::ErrorKind::AddrInUse, message))
}

/// Gives the options an identity and ports that are the same at every start.
fn make_repeatable(options: &mut DaemonOptions, directory: &Path) -> Result<(), Failed> {
    for address in &mut options.host_addrs {
        // Of others than plain TCP the port is left to the daemon.
        if let Ok(maddr) = address.parse() {
            *address = with_free_port(maddr)?.to_string();
        }
    }
    if options.identity.is_none() {
        let path = directory.join("identity.key");
        new_identity(&path).map_err(Failed::at(|| {
            format!("cannot write the identity file {}", path.display())
        }))?;
        options.identity = Some(path);
    }
    Ok(())
}

/// Writes a private key as libp2p encodes it: one for secp256k1, which is any 32 bytes, but for
/// one set of them in 2^128.
fn new_identity(path: &Path) -> io::Result<()> {
    let mut key = *b"\x08\x02\x12\x20--------------------------------";
    getrandom::fill(&mut key[4..]).map_err(|error| match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number as _),
        None => io::Error::other(error.to_string()),
    })?;
    let mut options = File::options();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(&key)
}

/// Replaces TCP port 0: not every daemon says which port it was given.
fn with_free_port(control: Multiaddr) -> Result<Multiaddr, Failed> {
    let host = match control.endpoint() {
        Ok(Endpoint::Tcp { host, port: 0 }) => host,
        _ => return Ok(control),
    };
    let ip = match &host {
        Host::Ip4(ip) => ip.to_string(),
        Host::Ip6(ip) => ip.to_string(),
        Host::Dns(_) | Host::Dns4(_) | Host::Dns6(_) => return Ok(control),
    };
    let port = unused_tcp_port(&ip).map_err(Failed::at(|| {
        format!("cannot find a free TCP port of {ip}")
    }))?;
    Ok((&Endpoint::Tcp { host, port }).into())
}

fn default_control(directory: &Path) -> Multiaddr {
    if cfg!(unix) {
        unix_maddr(&directory.join("control.sock"))
    } else {
        loopback()
    }
}

fn loopback() -> Multiaddr {
    (&Endpoint::from(std::net::SocketAddr::from(([127, 0, 0, 1], 0)))).into()
}

fn unix_maddr(path: &Path) -> Multiaddr {
    (&Endpoint::Unix(path.display().to_string())).into()
}

#[cfg(unix)]
fn signal_group(group: u32, signal: Signal) {
    let signal = match signal {
        Signal::Terminate => rustix::process::Signal::TERM,
        Signal::Kill => rustix::process::Signal::KILL,
    };
    if let Some(group) = unix_pid(group) {
        // It may have ended; macOS says EPERM of a group of which only zombies are left.
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

#[cfg(unix)]
fn exists(process: u32) -> bool {
    let found = |pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH);
    unix_pid(process).is_some_and(found)
}

#[cfg(unix)]
fn group_exists(group: u32) -> bool {
    let found = |pid| rustix::process::test_kill_process_group(pid) != Err(rustix::io::Errno::SRCH);
    unix_pid(group).is_some_and(found)
}

#[cfg(unix)]
fn unix_pid(number: u32) -> Option<rustix::process::Pid> {
    i32::try_from(number)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use rustix::process::{kill_process, Pid, Signal};
    use socket2::{Domain, SockAddr, Socket, Type};
    use std::cell::RefCell;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::process::Command;
    use std::time::Instant;

    /// A process that runs a script, once it has said that its traps are set.
    fn running(body: &str) -> Process {
        let process = scripted(&format!("{body}\nwhile :; do sleep 0.02; done"));
        process.spawn().unwrap();
        until(|| process.output().contains("ready"));
        process
    }

    fn scripted(body: &str) -> Process {
        let options = DaemonOptions::default();
        let mut process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
        process.arguments = vec!["-c".into(), body.into()];
        process
    }

    fn ended(body: &str) -> Process {
        let process = scripted(body);
        process.spawn().unwrap();
        until(|| process.poll().is_some());
        process
    }

    fn until(condition: impl Fn() -> bool) {
        let begun = Instant::now();
        while !condition() {
            assert!(
                begun.elapsed() < Duration::from_secs(15),
                "it did not come true"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Whether it runs; a zombie, which is init's to reap or nobody's, does not.
    fn runs(pid: u32) -> bool {
        let state = Command::new("ps")
            .args(["-o", "stat=", "-p", &pid.to_string()])
            .output()
            .unwrap();
        let state = String::from_utf8(state.stdout).unwrap();
        !state.trim().is_empty() && !state.starts_with('Z')
    }

    #[cfg(target_os = "linux")]
    const KINDS: &[Option<Kind>] = &[None, Some(Kind::Shell), Some(Kind::Forked)];
    #[cfg(not(target_os = "linux"))]
    const KINDS: &[Option<Kind>] = &[None, Some(Kind::Shell)];

    /// The numbers that the script printed, one a line.
    fn printed(process: &Process) -> Vec<u32> {
        let output = process.output();
        output
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
    }

    #[test]
    fn status_and_output_can_be_had_when_everything_else_is_gone() {
        let process = ended("echo out; echo err >&2; exit 3");
        assert_eq!(process.poll().map(exit_code), Some(3));
        assert!(!process.alive() && !process.ended());
        process.destroy();
        process.destroy();
        assert!(process.ended() && !process.directory.exists());
        assert!(!runs(process.janitor_pid()));
        assert_eq!(process.output(), "out\nerr\n");
        assert_eq!(process.poll().map(exit_code), Some(3));
    }

    #[test]
    fn only_the_end_of_a_long_output_is_kept() {
        let process = ended("head -c 2000000 /dev/zero | tr '\\0' x; echo end");
        assert_eq!(process.output().len() as u64, OUTPUT_LIMIT);
        assert!(process.output().ends_with("xend\n"));
    }

    #[test]
    fn it_runs_in_a_session_of_its_own_and_what_it_makes_is_for_its_user() {
        let process = ended("umask; ps -o sid= -p $$; echo $$; cat");
        let pid = process.pid().unwrap();
        let mode = process.directory.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(process.output().lines().next(), Some("0077"));
        let words = process.output();
        let numbers: Vec<_> = words.split_whitespace().skip(1).collect();
        assert_eq!(numbers, [pid.to_string(), pid.to_string()]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn it_has_none_of_this_processs_files() {
        use std::os::fd::AsRawFd as _;
        let file = File::open("/dev/null").unwrap();
        let inheritable = rustix::io::dup(&file).unwrap();
        let process = running("echo ready");
        for pid in [process.pid().unwrap(), process.janitor_pid()] {
            let fd = format!("/proc/{pid}/fd/{}", inheritable.as_raw_fd());
            assert!(fs::read_link(&fd).is_err());
        }
    }

    #[test]
    fn asked_to_end_it_ends_with_its_children() {
        let process = running("trap 'exit 7' TERM; sleep 1000 & echo $!; echo ready");
        let child = printed(&process)[0];
        assert!(process.alive() && runs(child));
        process.terminate();
        until(|| process.poll().is_some());
        assert_eq!(process.poll().map(exit_code), Some(7));
        until(|| !runs(child));
    }

    #[test]
    fn what_ignores_being_asked_is_killed() {
        let process = running("trap '' TERM; echo ready");
        let pid = process.pid().unwrap();
        process.terminate();
        assert!(process.alive());
        process.destroy();
        assert_eq!(process.poll().map(exit_code), Some(-9));
        assert!(!runs(pid));
    }

    #[test]
    fn it_can_be_asked_while_another_thread_waits_for_its_end() {
        let process = running("trap '' TERM; echo ready");
        let ending = process.ending.lock().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| process.destroy());
            assert_eq!(process.poll(), None);
            process.terminate();
            assert!(process.alive() && !process.ended());
            drop(ending);
        });
        assert!(process.ended());
    }

    #[test]
    fn it_starts_though_somebody_killed_its_janitor() {
        let process = scripted("echo ready; sleep 1000");
        let janitor = Pid::from_raw(process.janitor_pid() as i32).unwrap();
        kill_process(janitor, Signal::KILL).unwrap();
        until(|| !runs(process.janitor_pid()));
        process.spawn().unwrap();
        until(|| process.output().contains("ready"));
    }

    #[test]
    fn what_a_wrapper_leaves_behind_ends_with_it() {
        let process = ended("sleep 1000 & echo $!");
        until(|| !runs(printed(&process)[0]));
    }

    #[test]
    fn dropping_it_ends_it_and_removes_its_files() {
        let process = running("echo ready");
        let (pid, janitor) = (process.pid().unwrap(), process.janitor_pid());
        let directory = process.directory.clone();
        drop(process);
        assert!(!runs(pid) && !runs(janitor) && !directory.exists());
    }

    #[test]
    fn a_daemon_that_somebody_else_reaped_has_ended() {
        let process = scripted("sleep 1000 & echo $!; exit 5");
        process.spawn().unwrap();
        let pid = Pid::from_raw(process.pid().unwrap() as i32);
        let options = rustix::process::WaitOptions::empty();
        rustix::process::waitpid(pid, options).unwrap().unwrap();
        assert_eq!(process.poll().map(exit_code), Some(0));
        assert!(!process.alive());
        // The number of its group may be another's by now.
        process.terminate();
        process.destroy();
        let left = Pid::from_raw(printed(&process)[0] as i32).unwrap();
        kill_process(left, Signal::KILL).unwrap();
    }

    #[test]
    fn what_cannot_be_executed_is_not_given_to_a_shell() {
        let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
        let binary = directory.path().join("p2pd");
        fs::write(&binary, "echo this is no binary").unwrap();
        fs::set_permissions(&binary, fs::Permissions::from_mode(0o700)).unwrap();
        let process = Process::prepare(binary, &DaemonOptions::default(), None).unwrap();
        // While another test is between fork and exec, the file is open for writing there.
        let busy = |error: &StartError| error.to_string().contains("Text file busy");
        let error = loop {
            match process.spawn().unwrap_err() {
                error if busy(&error) => fs::remove_file(&process.log).unwrap(),
                error => break error,
            }
        };
        let cause = error.cause.unwrap();
        assert!(
            cause.starts_with("the binary is not for this machine"),
            "{cause}"
        );
        assert_eq!((process.pid(), process.output()), (None, String::new()));
    }

    #[test]
    fn a_nul_in_an_argument_is_an_error() {
        let mut process = scripted("");
        process.arguments.push("a\0b".into());
        assert!(process
            .spawn()
            .unwrap_err()
            .to_string()
            .contains("nul byte"));
    }

    #[test]
    fn the_control_socket_is_private_or_where_it_was_wanted() {
        let process = scripted("");
        let directory = process.directory.display();
        assert_eq!(
            process.control().to_string(),
            format!("/unix{directory}/control.sock")
        );
        let names = [process.listen_maddr(), process.listen_maddr()].map(|addr| addr.to_string());
        assert!(names[0].starts_with(&format!("/unix{directory}/client-")));
        assert_ne!(names[0], names[1]);

        let options = DaemonOptions {
            control: Some("/ip4/127.0.0.1/tcp/0".parse().unwrap()),
            ..Default::default()
        };
        let process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
        let control = process.control().to_string();
        let port: u16 = control.rsplit('/').next().unwrap().parse().unwrap();
        assert!(PORTS.contains(&port));
        assert_eq!(process.arguments, [format!("-listen={control}")]);
    }

    #[test]
    fn a_socket_left_behind_is_removed_and_one_in_use_is_not() {
        let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
        let path = directory.path().join("c.sock");
        let options = DaemonOptions {
            control: Some(unix_maddr(&path)),
            ..Default::default()
        };
        let listener = UnixListener::bind(&path).unwrap();
        drop(Process::prepare("/bin/sh".into(), &options, None).unwrap());
        assert!(path.exists());
        drop(listener);
        // While another test is between fork and exec, it is still open there.
        let process = RefCell::new(None);
        until(|| {
            process.replace(Some(
                Process::prepare("/bin/sh".into(), &options, None).unwrap(),
            ));
            !path.exists()
        });
        // What the daemon leaves there goes with it, but not what another serves there by then.
        let listener = UnixListener::bind(&path).unwrap();
        drop(process.take());
        assert!(path.exists());
        drop(listener);
        fs::remove_file(&path).unwrap();
        let process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
        let left = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        left.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        drop(process);
        assert!(!path.exists());
    }

    #[test]
    fn a_long_temporary_directory_is_avoided() {
        let long = std::env::temp_dir().join("x".repeat(100));
        let options = DaemonOptions::default();
        let process = Process::prepare("/bin/sh".into(), &options, Some(&long)).unwrap();
        assert_eq!(process.directory.parent(), Some(Path::new("/tmp")));
    }

    #[test]
    fn an_unused_port_is_none_that_the_system_gives_away() {
        let ports: std::collections::HashSet<_> = (0..50)
            .map(|_| unused_tcp_port("127.0.0.1").unwrap())
            .collect();
        assert!(ports.len() > 45);
        assert!(ports.iter().all(|port| PORTS.contains(port)));
        assert!(unused_tcp_port("192.0.2.1").is_err()); // not of this machine
    }

    #[test]
    fn the_janitor_ends_the_group_it_was_told_unless_that_has_ended() {
        for (kind, has_ended) in KINDS
            .iter()
            .flat_map(|kind| [(*kind, false), (*kind, true)])
        {
            let mut other = Command::new("sleep");
            let mut other = std::os::unix::process::CommandExt::process_group(&mut other, 0)
                .arg("1000")
                .spawn()
                .unwrap();
            let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
            let files = directory.path().join("d i r");
            fs::create_dir_all(files.join("within")).unwrap();
            fs::write(files.join("within/file"), "").unwrap();
            std::os::unix::fs::symlink("/tmp", files.join("link")).unwrap();
            let janitor = Janitor::start([Some(files.as_path())], kind).unwrap();
            janitor.tell(other.id());
            if has_ended {
                janitor.tell(0);
            }
            janitor.cut_lifeline();
            if has_ended {
                until(|| !files.exists());
                assert_eq!(other.try_wait().unwrap(), None);
                other.kill().unwrap();
                other.wait().unwrap();
            } else {
                assert_eq!(exit_code(other.wait().unwrap()), -15);
                until(|| !files.exists());
            }
            until(|| janitor.dismiss());
        }
    }

    #[test]
    fn a_failed_preparation_is_a_start_error_that_names_the_file() {
        let prepare = |parent: &Path, options: &DaemonOptions| match Process::prepare(
            "/bin/sh".into(),
            options,
            Some(parent),
        ) {
            Err(DaemonError::Start(error)) => error,
            other => panic!("{other:?}"),
        };
        let options = DaemonOptions::default();
        for (parent, number) in [("/no/such", 2), ("/dev/null", 20)] {
            let error = prepare(Path::new(parent), &options);
            let cause = error.cause.clone().unwrap();
            let begin = format!("cannot create the directory {parent}/p2pd-");
            assert!(cause.starts_with(&begin), "{cause}");
            assert_eq!(error.source.as_ref().unwrap().raw_os_error(), Some(number));
            assert!(error.to_string().contains("hint: set TMPDIR"), "{error}");
        }
        let elsewhere = DaemonOptions {
            control: Some("/ip4/192.0.2.1/tcp/0".parse().unwrap()),
            ..options
        };
        let cause = prepare(&std::env::temp_dir(), &elsewhere).cause.unwrap();
        assert!(
            cause.starts_with("cannot find a free TCP port of 192.0.2.1: "),
            "{cause}"
        );
    }

    #[test]
    fn a_binary_that_vanished_is_named() {
        let binary = PathBuf::from("/no/such/p2pd");
        let process = Process::prepare(binary, &DaemonOptions::default(), None).unwrap();
        let error = process.spawn().unwrap_err();
        let cause = error.cause.unwrap();
        assert!(
            cause.starts_with("cannot execute /no/such/p2pd: "),
            "{cause}"
        );
        assert_eq!(error.source.unwrap().raw_os_error(), Some(2));
        // It can be tried again.
        assert!(process.spawn().is_err());
    }

    #[test]
    fn a_step_of_the_end_does_not_wait() {
        let process = running("trap '' TERM; echo ready");
        let pid = process.pid().unwrap();
        let begun = Instant::now();
        let mut longest = Duration::ZERO;
        loop {
            let before = Instant::now();
            let done = process.try_destroy();
            longest = longest.max(before.elapsed());
            if done {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(15));
            thread::sleep(Duration::from_millis(1));
        }
        assert!(longest < Duration::from_millis(250), "{longest:?}");
        assert!(process.destroyed() && process.try_destroy());
        assert!(!runs(pid) && !process.directory.exists());
        assert!(!runs(process.janitor_pid()));
        let error = process.spawn().unwrap_err();
        assert_eq!(error.cause.as_deref(), Some("it was stopped"));
    }

    #[test]
    fn it_is_not_started_again_once_its_end_has_begun() {
        let process = ended("exit 0");
        // As after the first of several steps.
        process.ending.lock().unwrap().begun = Some(Instant::now());
        let error = process.spawn().unwrap_err();
        assert_eq!(error.cause.as_deref(), Some("it was stopped"));
    }

    /// The test starts itself, as the process that has no descriptor left.
    #[test]
    #[cfg(target_os = "linux")]
    fn no_file_is_left_though_no_descriptor_is() {
        use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
        const IN_CHILD: &str = "P2PCLIENT_RS_TEST_DESCRIPTORS";
        if std::env::var_os(IN_CHILD).is_some() {
            let before = getrlimit(Resource::Nofile);
            let limit = |current| {
                let limit = Rlimit { current, ..before };
                setrlimit(Resource::Nofile, limit).unwrap();
            };
            for kind in KINDS.iter().copied() {
                limit(before.current);
                let options = DaemonOptions::default();
                let process =
                    Process::prepare_with("/bin/sh".into(), &options, None, kind).unwrap();
                fs::create_dir(process.directory.join("more")).unwrap();
                fs::write(process.directory.join("more/file"), "").unwrap();
                limit(Some(0));
                assert!(fs::remove_dir_all(&process.directory).is_err());
                process.destroy();
                assert!(!process.directory.exists());
                assert!(!exists(process.janitor_pid()));
            }
            let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
            let path = directory.path().to_owned();
            assert!(path.exists());
            drop(directory);
            assert!(!path.exists());
            limit(before.current);
            return;
        }
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "no_file_is_left_though_no_descriptor_is",
                "--test-threads=1",
            ])
            .env(IN_CHILD, "")
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    }

    /// The test starts itself, as the process that is to be killed.
    #[test]
    fn the_death_of_this_process_ends_the_daemon_and_removes_its_files() {
        const IN_CHILD: &str = "P2PCLIENT_RS_TEST_PARENT";
        if let Some(kind) = std::env::var_os(IN_CHILD) {
            let kind = KINDS[kind.to_str().unwrap().parse::<usize>().unwrap()];
            let mut process =
                Process::prepare_with("/bin/sh".into(), &DaemonOptions::default(), None, kind)
                    .unwrap();
            let body = "echo ready; while :; do sleep 0.02; done";
            process.arguments = vec!["-c".into(), body.into()];
            process.spawn().unwrap();
            until(|| process.output().contains("ready"));
            let (pid, janitor) = (process.pid().unwrap(), process.janitor_pid());
            println!("\n{pid} {janitor} {}", process.directory.display());
            kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
        }
        let name = "the_death_of_this_process_ends_the_daemon_and_removes_its_files";
        for kind in 0..KINDS.len() {
            let output = Command::new(std::env::current_exe().unwrap())
                .args([name, "--nocapture", "--test-threads=1"])
                .env(IN_CHILD, kind.to_string())
                .output()
                .unwrap();
            assert_eq!(exit_code(output.status), -9);
            let output = String::from_utf8(output.stdout).unwrap();
            let told = output.lines().find(|line| line.contains("/p2pd-")).unwrap();
            let told: Vec<_> = told.split(' ').collect();
            let [pid, janitor] = [told[0], told[1]].map(|number| number.parse::<u32>().unwrap());
            until(|| !runs(pid) && !runs(janitor) && !Path::new(told[2]).exists());
        }
    }
}
