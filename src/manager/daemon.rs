//! The daemon manager for tokio: waits for what [`process`](super::process) does.

use super::discovery::{find, Search, VARIABLE};
use super::guard::{destroyed, ended, ProcessGuard, POLL_INTERVAL};
use super::options::{Bootstrap, ConnectionManager, DaemonOptions, Dht, Pubsub};
use super::process::Process;
use super::start::{DaemonError, StartError};
use super::startup;
use super::supervisor::Supervisor;
use futures_core::Stream;
use p2pd_client::{Client, Error, Identity};
use p2pd_protocol::{Multiaddr, PeerId};
use std::future::{poll_fn, Future as _};
use std::path::PathBuf;
use std::pin::Pin;
use std::process::ExitStatus;
use std::sync::Arc;
use std::task::{ready, Context, Poll};
use std::time::Duration;
use tokio::time::{sleep, timeout, Sleep};

/// The longest line of output given in one piece, in bytes.
const LINE_LIMIT: usize = 64 * 1024;
const READ_SIZE: usize = 16 * 1024;

/// A libp2p daemon in a process of its own, which is killed when this is dropped.
///
/// Its sockets and its output are in a private directory. On unix, whatever becomes of this
/// process, neither the daemon nor that directory outlives it.
///
/// ```no_run
/// use p2pd_manager::{Dht, P2PDaemon};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let daemon = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
/// println!("{} listens on {:?}", daemon.peer_id(), daemon.addrs());
/// let client = daemon.client().await?;
/// println!("{:?}", client.list_peers().await?);
/// daemon.shutdown().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the daemon is killed when this is dropped"]
pub struct P2PDaemon {
    // Dropped before the process, whose end it would take for a death.
    supervisor: Option<Supervisor>,
    guard: ProcessGuard,
    identity: Identity,
    stop_timeout: Duration,
}

/// What a [`P2PDaemon`] is started with.
///
/// ```no_run
/// use p2pd_manager::{P2PDaemon, Pubsub};
/// use std::time::Duration;
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let daemon = P2PDaemon::builder()
///     .dht(true)
///     .relay(false)
///     .pubsub(Pubsub::Gossipsub)
///     .host_addrs(["/ip4/127.0.0.1/tcp/4001".parse()?])
///     .identity("identity.key")
///     .start_timeout(Duration::from_secs(10))
///     .spawn()
///     .await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[must_use = "it does nothing until spawn() is called"]
pub struct P2PDaemonBuilder {
    binary: Option<PathBuf>,
    options: DaemonOptions,
    start_timeout: Duration,
    stop_timeout: Duration,
}

impl Default for P2PDaemonBuilder {
    fn default() -> Self {
        P2PDaemonBuilder {
            binary: None,
            options: DaemonOptions {
                host_addrs: vec!["/ip4/127.0.0.1/tcp/0".into()],
                ..DaemonOptions::default()
            },
            start_timeout: Duration::from_secs(30),
            stop_timeout: Duration::from_secs(5),
        }
    }
}

impl P2PDaemonBuilder {
    /// The daemon's binary: a path, or a name in `PATH`. By default the path in the environment
    /// variable `P2PD_PATH`, else `p2pd` in `PATH`. (The one that comes with hivemind is found by
    /// Python only, which knows where that is installed.) One named `jsp2pd` is given the
    /// arguments of the JavaScript daemon.
    pub fn binary(mut self, binary: impl Into<PathBuf>) -> Self {
        self.binary = Some(binary.into());
        self
    }

    /// The DHT; off by default. With true, the daemon becomes a server once it finds itself
    /// publicly reachable, so that daemons on one machine need [`Dht::Server`].
    pub fn dht(mut self, dht: impl Into<Dht>) -> Self {
        self.options.dht = dht.into();
        self
    }

    /// Circuit relay. Not set, it is left to the daemon, which switches it on.
    pub fn relay(mut self, relay: bool) -> Self {
        self.options.relay = Some(relay);
        self
    }

    /// Pubsub; off by default. True leaves the router to the daemon.
    pub fn pubsub(mut self, pubsub: impl Into<Pubsub>) -> Self {
        self.options.pubsub = pubsub.into();
        self
    }

    /// The connection manager; off by default. True leaves its limits to the daemon.
    pub fn connection_manager(mut self, manager: impl Into<ConnectionManager>) -> Self {
        self.options.connection_manager = manager.into();
        self
    }

    /// Where to listen for peers; by default at a free port of 127.0.0.1. With none, the daemon
    /// chooses, which means every interface.
    pub fn host_addrs(mut self, addrs: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.host_addrs = texts(addrs);
        self
    }

    /// What to tell peers instead of the addresses listened on.
    pub fn announce_addrs(mut self, addrs: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.announce_addrs = texts(addrs);
        self
    }

    /// Peers to join others through, each an address that ends in `/p2p/<peer id>`; see
    /// [`P2PDaemon::peer_addrs`]. The daemon connects to them before it counts as started, and one
    /// of them must be reachable, unless [`bootstrap`](Self::bootstrap) says otherwise.
    pub fn bootstrap_peers(mut self, peers: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.bootstrap_peers = texts(peers);
        self
    }

    /// When the bootstrap peers are connected to. With [`Bootstrap::Background`] none need be
    /// reachable: they are connected to once the daemon has started, again and again, with pauses
    /// that grow from a second to a minute, and are looked after every 15 seconds from then on.
    /// Failures, with the peer and the reason, go to the [`log`] crate.
    pub fn bootstrap(mut self, when: Bootstrap) -> Self {
        self.options.bootstrap = when;
        self
    }

    /// Has a daemon that dies by itself started again, in a task on the runtime on which it was
    /// started: with the same options and control address, the same identity (without a file, a
    /// temporary one) and, of TCP, the same ports. The pauses before that grow from 0.1 to 30
    /// seconds. After `limit` deaths in a row within 10 seconds of the start it is given up: see
    /// [`P2PDaemon::failure`]. With 0, the default, it is not started again.
    ///
    /// Clients made by [`P2PDaemon::client`] have their handlers registered again. Restarts go to
    /// the [`log`] crate.
    pub fn restart(mut self, limit: u32) -> Self {
        self.options.restart = limit;
        self
    }

    /// A file with a private key as libp2p encodes it; by default, a new identity.
    pub fn identity(mut self, file: impl Into<PathBuf>) -> Self {
        self.options.identity = Some(file.into());
        self
    }

    /// Where to serve the control protocol: a unix or TCP address; for TCP port 0, a free port is
    /// chosen. By default a unix socket that only this user can reach (on Windows, a free TCP port
    /// of 127.0.0.1).
    pub fn control_maddr(mut self, addr: Multiaddr) -> Self {
        self.options.control = Some(addr);
        self
    }

    /// More arguments for the daemon, as they are.
    pub fn extra_args<I>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item: Into<String>>,
    {
        self.options.extra_args = args.into_iter().map(Into::into).collect();
        self
    }

    /// How long a daemon that does not answer is waited for; 30 seconds by default.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// How long after [`shutdown`](P2PDaemon::shutdown) asked it to end the daemon is killed; 5
    /// seconds by default.
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Starts the daemon; done once it answers. If this future is dropped before, the daemon is
    /// killed.
    ///
    /// # Errors
    /// The options are wrong, there is no binary, or the daemon ended, at once when it does, or
    /// was not ready in time. No process and no file is left.
    pub async fn spawn(self) -> Result<P2PDaemon, DaemonError> {
        let binary = find(&Search {
            explicit: self.binary.as_deref(),
            variable: std::env::var_os(VARIABLE).as_deref(),
            path: std::env::var_os("PATH").as_deref(),
            hivemind: Vec::new(),
        })?;
        // From here on, it is destroyed if this fails or is dropped.
        let guard = ProcessGuard(Arc::new(Process::prepare(binary, &self.options, None)?));
        let outcome = match guard.0.spawn() {
            Ok(()) => startup::ready(&guard.0, self.start_timeout).await,
            Err(error) => Err(error),
        };
        match outcome {
            Ok(identity) => Ok(P2PDaemon {
                supervisor: Supervisor::start(&guard.0, self.start_timeout),
                guard,
                identity,
                stop_timeout: self.stop_timeout,
            }),
            Err(error) => {
                destroyed(&guard.0).await;
                Err(error.into())
            }
        }
    }
}

impl P2PDaemon {
    /// What to start a daemon with: by default, one that does nothing unasked and is reached from
    /// this machine only.
    pub fn builder() -> P2PDaemonBuilder {
        P2PDaemonBuilder::default()
    }

    /// The daemon's peer id.
    pub fn peer_id(&self) -> &PeerId {
        &self.identity.peer_id
    }

    /// What it listened on for peers when it had first started, without its peer id.
    pub fn addrs(&self) -> &[Multiaddr] {
        &self.identity.addrs
    }

    /// The same with its peer id: what others take as
    /// [`bootstrap_peers`](P2PDaemonBuilder::bootstrap_peers).
    pub fn peer_addrs(&self) -> Vec<Multiaddr> {
        let with_peer_id = |addr| format!("{addr}/p2p/{}", self.peer_id()).parse().ok();
        self.addrs().iter().filter_map(with_peer_id).collect()
    }

    /// Where it serves the control protocol.
    pub fn control_maddr(&self) -> &Multiaddr {
        self.guard.0.control()
    }

    /// Its process id; none once it has ended, also while it is being started again.
    pub fn pid(&self) -> Option<u32> {
        self.guard.0.pid().filter(|_| self.guard.0.alive())
    }

    /// Its command line.
    pub fn command(&self) -> Vec<String> {
        self.guard.0.command()
    }

    /// A new client of the daemon, which has answered it. On unix it takes inbound streams at a
    /// socket in the daemon's private directory.
    ///
    /// # Errors
    /// The daemon has ended, or does not answer.
    pub async fn client(&self) -> Result<Client, Error> {
        let client = Client::builder(self.guard.0.control().clone())
            .listen_maddr(self.guard.0.listen_maddr())
            .build()?;
        client.identify().await?;
        if let Some(supervisor) = &self.supervisor {
            supervisor.remember(&client);
        }
        Ok(client)
    }

    /// Waits until the daemon has ended: one that is started again
    /// ([`restart`](P2PDaemonBuilder::restart)), until it was stopped or given up. Any number of
    /// tasks may.
    ///
    /// If somebody else in this process has reaped it (who waits for any child, or ignores
    /// SIGCHLD), nobody knows its exit status, and this gives 0.
    pub async fn wait(&self) -> ExitStatus {
        if let Some(supervisor) = &self.supervisor {
            supervisor.finished().await;
        }
        ended(&self.guard.0).await
    }

    /// Why a daemon that is started again ([`restart`](P2PDaemonBuilder::restart)) was given up;
    /// none if it was not.
    pub fn failure(&self) -> Option<StartError> {
        self.supervisor.as_ref()?.failure()
    }

    /// Asks the daemon to end, kills it if it does not within the
    /// [`stop_timeout`](P2PDaemonBuilder::stop_timeout), and removes its files. Gives the exit
    /// status, which is 0 if nobody knows it (see [`wait`](Self::wait); or the kernel does not let
    /// go of it). Does nothing more the second time.
    pub async fn shutdown(&self) -> ExitStatus {
        if let Some(supervisor) = &self.supervisor {
            // Its runtime may be one that nobody runs any more.
            let _ = timeout(self.stop_timeout, supervisor.stop()).await;
        }
        self.guard.0.terminate();
        // Killed it is if need be, by what comes next.
        let _ = timeout(self.stop_timeout, ended(&self.guard.0)).await;
        destroyed(&self.guard.0).await;
        self.guard.0.poll().unwrap_or_default()
    }

    /// The end of what it has printed, also when it has ended: the last MiB.
    pub fn output(&self) -> String {
        self.guard.0.output()
    }

    /// The daemon's output, line by line from the beginning. Only the last 1 to 2 MiB are stored:
    /// older lines are missing, also if the caller reads more slowly than the daemon prints.
    ///
    /// ```no_run
    /// # async fn example(daemon: p2pd_manager::P2PDaemon) {
    /// let mut logs = daemon.logs();
    /// while let Some(line) = logs.next().await {
    ///     eprintln!("p2pd: {line}");
    /// }
    /// # }
    /// ```
    pub fn logs(&self) -> Logs {
        Logs {
            buffer: Vec::new(),
            start: 0,
            position: 0,
            complete: false,
            process: Arc::clone(&self.guard.0),
            pause: None,
        }
    }
}

fn texts(addrs: impl IntoIterator<Item = Multiaddr>) -> Vec<String> {
    addrs.into_iter().map(|addr| addr.to_string()).collect()
}

/// The last place up to `at` at which no character of UTF-8 is cut, if that is what the text is.
fn character_end(text: &[u8], at: usize) -> usize {
    let continues = |place: &usize| text.get(*place).is_some_and(|byte| byte & 0xc0 == 0x80);
    let begins = (at.saturating_sub(3)..=at).rev().find(|at| !continues(at));
    begins.filter(|place| *place > 0).unwrap_or(at)
}

/// The lines of a daemon's output, as they come: a [`Stream`] that ends when the daemon has.
///
/// Lines over 64 KiB come in pieces. Without a line, the output is looked at every 50 ms, but only
/// while this is awaited: in a tokio runtime, for outside of one there is no timer, and it panics.
#[derive(Debug)]
#[must_use = "a stream does nothing until it is awaited"]
pub struct Logs {
    process: Arc<Process>,
    /// Position in the output, in bytes.
    position: u64,
    /// Whether the end was reached.
    complete: bool,
    /// Read but not given yet, from `start` on: a line that is not complete, and what came with it.
    buffer: Vec<u8>,
    start: usize,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Logs {
    /// The next line, without its end; none when the daemon has ended.
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

    /// Reads more; returns how much. The files are local, and reading them blocks for no longer
    /// than handing it to another thread would take.
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
            // Asked before reading: what it has printed until then is there.
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
