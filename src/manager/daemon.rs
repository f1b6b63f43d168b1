//! [`P2PDaemon`]: starts, supervises and stops a daemon on tokio.

use super::discovery::{find, Search, VARIABLE};
use super::guard::{destroyed, ended, ProcessGuard};
use super::logs::Logs;
use super::options::{Bootstrap, ConnectionManager, DaemonOptions, Dht, Pubsub};
use super::process::Process;
use super::start::{DaemonError, StartError};
use super::startup;
use super::supervisor::Supervisor;
use p2pd_client::{Client, Error, Identity};
use p2pd_protocol::{Multiaddr, PeerId};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// A libp2p daemon in a child process. Dropping this kills the daemon.
///
/// Its sockets and its log are in a private directory. On unix, neither the daemon nor that
/// directory outlives this process, however it ends.
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
    // Dropped before `guard`: otherwise the supervisor would treat the killed process as a crash.
    supervisor: Option<Supervisor>,
    guard: ProcessGuard,
    identity: Identity,
    stop_timeout: Duration,
}

/// The options of a [`P2PDaemon`].
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
    /// variable `P2PD_PATH`, else `p2pd` in `PATH`. (Only Python also finds the binary of an
    /// installed hivemind.) A binary named `jsp2pd` gets the arguments of the JavaScript daemon.
    pub fn binary(mut self, binary: impl Into<PathBuf>) -> Self {
        self.binary = Some(binary.into());
        self
    }

    /// The DHT; off by default. True means [`Dht::Auto`]: the daemon becomes a server once it finds
    /// that it is publicly reachable. That never happens on loopback: daemons on one machine need
    /// [`Dht::Server`].
    pub fn dht(mut self, dht: impl Into<Dht>) -> Self {
        self.options.dht = dht.into();
        self
    }

    /// Circuit relay. By default the daemon decides; all known daemons switch it on.
    pub fn relay(mut self, relay: bool) -> Self {
        self.options.relay = Some(relay);
        self
    }

    /// Pubsub; off by default. True means the daemon's default router.
    pub fn pubsub(mut self, pubsub: impl Into<Pubsub>) -> Self {
        self.options.pubsub = pubsub.into();
        self
    }

    /// The connection manager; off by default. True means the daemon's default limits.
    pub fn connection_manager(mut self, manager: impl Into<ConnectionManager>) -> Self {
        self.options.connection_manager = manager.into();
        self
    }

    /// The addresses to listen on for peers; by default an unused port of 127.0.0.1. If empty, the
    /// daemon listens on every interface.
    pub fn host_addrs(mut self, addrs: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.host_addrs = texts(addrs);
        self
    }

    /// The addresses to announce to peers instead of those listened on.
    pub fn announce_addrs(mut self, addrs: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.announce_addrs = texts(addrs);
        self
    }

    /// Peers to join the network through, each an address that ends in `/p2p/<peer id>`; see
    /// [`P2PDaemon::peer_addrs`]. The daemon connects to them before it is ready, and one of them
    /// must be reachable, unless [`bootstrap`](Self::bootstrap) says otherwise.
    pub fn bootstrap_peers(mut self, peers: impl IntoIterator<Item = Multiaddr>) -> Self {
        self.options.bootstrap_peers = texts(peers);
        self
    }

    /// Who connects to the bootstrap peers, and when. With [`Bootstrap::Background`] none need be
    /// reachable: once the daemon is ready, its supervisor connects to each with a backoff of 1 to
    /// 60 seconds, and again every 15 seconds in case the connection was lost. Failures are logged
    /// with the [`log`] crate, with the peer and the reason.
    pub fn bootstrap(mut self, when: Bootstrap) -> Self {
        self.options.bootstrap = when;
        self
    }

    /// Restarts the daemon when it dies, with a backoff of 0.1 to 30 seconds. The daemon keeps its
    /// options, control address, TCP ports and identity (a temporary one if there is no file). The
    /// supervisor gives up after `limit` deaths in a row, each within 10 seconds of the start: see
    /// [`P2PDaemon::failure`]. With 0, the default, the daemon is never restarted.
    ///
    /// The supervisor is a task on the runtime on which the daemon was spawned. After a restart, it
    /// registers the handlers of all clients that [`P2PDaemon::client`] returned. It logs restarts
    /// with the [`log`] crate.
    pub fn restart(mut self, limit: u32) -> Self {
        self.options.restart = limit;
        self
    }

    /// A file with a private key in libp2p's encoding; by default, a new identity.
    pub fn identity(mut self, file: impl Into<PathBuf>) -> Self {
        self.options.identity = Some(file.into());
        self
    }

    /// The address at which to serve the control protocol, a unix or TCP address; TCP port 0 is
    /// replaced by an unused port. By default a unix socket that only this user can reach (on
    /// Windows, an unused TCP port of 127.0.0.1).
    pub fn control_maddr(mut self, addr: Multiaddr) -> Self {
        self.options.control = Some(addr);
        self
    }

    /// Further arguments for the daemon, passed unchanged.
    pub fn extra_args<I>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item: Into<String>>,
    {
        self.options.extra_args = args.into_iter().map(Into::into).collect();
        self
    }

    /// How long the daemon may take to become ready; 30 seconds by default.
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// How long the daemon may take to end after SIGTERM, before [`shutdown`](P2PDaemon::shutdown)
    /// kills it; 5 seconds by default.
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Spawns the daemon and waits until it is ready. Dropping the future kills the daemon.
    ///
    /// # Errors
    /// The options are invalid, no binary was found, or the daemon ended or was not ready in time.
    /// If the daemon ends, this fails at once. A failure leaves no process and no file behind.
    pub async fn spawn(self) -> Result<P2PDaemon, DaemonError> {
        let binary = find(&Search {
            explicit: self.binary.as_deref(),
            variable: std::env::var_os(VARIABLE).as_deref(),
            path: std::env::var_os("PATH").as_deref(),
            hivemind: Vec::new(),
        })?;
        // From here on, an error or a dropped future destroys the process.
        let guard = ProcessGuard(Arc::new(Process::prepare(binary, &self.options, None)?));
        match startup::start(&guard.0, self.start_timeout).await {
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
    /// Returns a builder with the default options: without DHT, pubsub and connection manager,
    /// listening on loopback only.
    pub fn builder() -> P2PDaemonBuilder {
        P2PDaemonBuilder::default()
    }

    /// The daemon's peer id.
    pub fn peer_id(&self) -> &PeerId {
        &self.identity.peer_id
    }

    /// The addresses on which it listened for peers after its first start, without its peer id.
    pub fn addrs(&self) -> &[Multiaddr] {
        &self.identity.addrs
    }

    /// Returns [`addrs`](Self::addrs) with the peer id appended, for the
    /// [`bootstrap_peers`](P2PDaemonBuilder::bootstrap_peers) of other daemons.
    pub fn peer_addrs(&self) -> Vec<Multiaddr> {
        let with_peer_id = |addr| format!("{addr}/p2p/{}", self.peer_id()).parse().ok();
        self.addrs().iter().filter_map(with_peer_id).collect()
    }

    /// The address at which it serves the control protocol.
    pub fn control_maddr(&self) -> &Multiaddr {
        self.guard.0.control()
    }

    /// Its process id; `None` once it has ended, and while it is being restarted.
    pub fn pid(&self) -> Option<u32> {
        self.guard.0.pid().filter(|_| self.guard.0.alive())
    }

    /// The binary and its arguments.
    pub fn command(&self) -> Vec<String> {
        self.guard.0.command()
    }

    /// Returns a new client of the daemon. On unix it listens for inbound streams at a socket in
    /// the daemon's private directory.
    ///
    /// # Errors
    /// The daemon has ended, or does not reply to IDENTIFY.
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

    /// Waits until the daemon has ended. With [`restart`](P2PDaemonBuilder::restart), waits until
    /// it was stopped or the supervisor has given up. Any number of tasks may wait.
    ///
    /// Returns 0 if another part of the program has reaped the daemon (by waiting for any child, or
    /// ignoring SIGCHLD), as the true exit status is then lost.
    pub async fn wait(&self) -> ExitStatus {
        if let Some(supervisor) = &self.supervisor {
            supervisor.finished().await;
        }
        ended(&self.guard.0).await
    }

    /// Why the supervisor gave up [restarting](P2PDaemonBuilder::restart) the daemon; `None` if it
    /// did not.
    pub fn failure(&self) -> Option<StartError> {
        self.supervisor.as_ref()?.failure()
    }

    /// Stops the daemon: sends SIGTERM, kills it after the
    /// [`stop_timeout`](P2PDaemonBuilder::stop_timeout), and removes its files. A second call only
    /// returns the status.
    ///
    /// Returns the exit status; 0 if it is unknown (see [`wait`](Self::wait)), or if the daemon is
    /// stuck in an uninterruptible system call.
    pub async fn shutdown(&self) -> ExitStatus {
        if let Some(supervisor) = &self.supervisor {
            // Needs a timeout, because the supervisor's runtime may have ended.
            let _ = timeout(self.stop_timeout, supervisor.stop()).await;
        }
        self.guard.0.terminate();
        // If this times out, `destroyed` kills the daemon.
        let _ = timeout(self.stop_timeout, ended(&self.guard.0)).await;
        destroyed(&self.guard.0).await;
        self.guard.0.poll().unwrap_or_default()
    }

    /// The last MiB of the daemon's output. It stays available after the daemon has ended.
    pub fn output(&self) -> String {
        self.guard.0.output()
    }

    /// Returns the daemon's output, line by line from the beginning. Only the last 1 to 2 MiB are
    /// stored: older lines are missing, also for a caller that reads more slowly than the daemon
    /// prints.
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
        Logs::new(Arc::clone(&self.guard.0))
    }
}

fn texts(addrs: impl IntoIterator<Item = Multiaddr>) -> Vec<String> {
    addrs.into_iter().map(|addr| addr.to_string()).collect()
}
