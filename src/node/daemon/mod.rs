//! The program p2pd-rs: command line, output, life cycle.

mod bootstrap;
mod flags;
mod identity;
mod log;
mod options;
mod output;

use self::log::Time;
use crate::server::{Persistent, Server, ServerConfig};
use crate::{Node, NodeHandle};
use flags::{Flags, Refused};
use options::Options;
use output::{stderr, stdout};
use std::ffi::OsString;
use std::future::pending;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;

/// Exit status after a fatal error, an invalid flag, and SIGTERM.
const FATAL: i32 = 1;
const INVALID_FLAG: i32 = 2;
const TERMINATED: i32 = 128 + 15;

/// Time that closing the connections may take at the end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Time that a reader has to take the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Runs the daemon with the arguments of a program, of which the first is its name. Returns the exit
/// status.
pub fn main(arguments: Vec<OsString>) -> i32 {
    let mut arguments = arguments
        .into_iter()
        .map(|argument| argument.to_string_lossy().into_owned());
    let program = arguments.next().unwrap_or_else(|| "p2pd-rs".to_owned());
    let status = start(&program, &arguments.collect::<Vec<_>>());
    stdout().flush(FLUSH_TIMEOUT);
    stderr().flush(FLUSH_TIMEOUT);
    status
}

fn start(program: &str, arguments: &[String]) -> i32 {
    let flags = match Flags::parse(program, arguments) {
        Ok(flags) => flags,
        Err(Refused::Help(usage)) => {
            stderr().push(&usage);
            return 0;
        }
        Err(Refused::Invalid(words)) => {
            stderr().push(&words);
            return INVALID_FLAG;
        }
    };
    log::start();
    raise_descriptor_limit();
    let options = match Options::new(&flags) {
        Ok(options) => options,
        Err(words) => return fatal(&words),
    };
    for line in flags.missing_features() {
        stderr().push(&line);
    }
    // One thread is the fastest on small machines: waking another core costs more than a small call.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return fatal(&error.to_string()),
    };
    let result = runtime.block_on(async {
        let mut signals = Signals::new().map_err(|error| error.to_string())?;
        let mut node = None;
        let result = tokio::select! {
            result = run(options, &mut node) => result.map(|()| 0),
            () = signals.terminated() => Ok(TERMINATED),
        };
        if let Some(node) = node {
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, node.shutdown()).await;
        }
        result
    });
    runtime.shutdown_background();
    result.unwrap_or_else(|words| fatal(&words))
}

/// Starts the daemon, and serves clients until the daemon is idle.
async fn run(options: Options, running: &mut Option<NodeHandle>) -> Result<(), String> {
    let config = ServerConfig {
        max_message: options.node.max_message,
    };
    let node = Node::start(options.node)
        .await
        .map_err(|error| error.to_string())?;
    *running = Some(node.clone());
    let server = Server::bind(&options.listen, node.clone(), config)
        .await
        .map_err(|error| error.to_string())?;
    let bootstrap = options.bootstrap.unwrap_or_default();
    let named: Vec<_> = bootstrap.iter().map(|peer| peer.text.clone()).collect();
    if !bootstrap.is_empty() {
        if let Err(failures) = bootstrap::connect(&node, bootstrap).await {
            failures.iter().for_each(|failure| stderr().push(failure));
            return Err("failed to connect to bootstrap peers".to_owned());
        }
    }
    if !options.is_quiet {
        let identity = node.identify();
        let mut lines = vec![
            format!("Control socket: {}", server.addr()),
            format!("Peer ID: {}", identity.peer_id.to_base58()),
            "Peer Addrs:".to_owned(),
        ];
        lines.extend(identity.addrs.iter().map(ToString::to_string));
        if options.shows_bootstrap {
            lines.push("Bootstrap peers:".to_owned());
            lines.extend(named);
        }
        stdout().push(&lines.join("\n"));
    }
    tokio::select! {
        () = server.serve() => {}
        () = idle(server.persistent(), options.idle_timeout) => {}
        () = report(&node) => {}
    }
    Ok(())
}

/// Waits until no client needs the daemon: none has opened a persistent connection in time, or the last
/// one has closed. Without a time limit, waits forever.
async fn idle(mut persistent: watch::Receiver<Persistent>, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return pending().await;
    };
    let first = persistent.wait_for(|count| count.opened > 0);
    if tokio::time::timeout(limit, first).await.is_ok() {
        let _ = persistent.wait_for(|count| count.open == 0).await;
    }
}

/// Prints the connections at each SIGUSR1.
#[cfg(unix)]
async fn report(node: &NodeHandle) {
    use tokio::signal::unix::{signal, SignalKind};
    let Ok(mut signals) = signal(SignalKind::user_defined1()) else {
        return pending().await;
    };
    while signals.recv().await.is_some() {
        let peers = node.list_peers();
        stdout().push(&format!("Connections: {}", peers.len()));
        for peer in peers {
            let addrs: Vec<_> = peer.addrs.iter().map(ToString::to_string).collect();
            stdout().push(&format!(
                "  {} {}",
                peer.peer_id.to_base58(),
                addrs.join(" ")
            ));
        }
    }
}

#[cfg(not(unix))]
async fn report(_: &NodeHandle) {
    pending().await
}

/// The signals that do not have their default effect.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    /// Ctrl-C in a terminal or notebook goes to its other programs as well. Those end the daemon.
    #[cfg(unix)]
    _ignored: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{signal, SignalKind};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            _ignored: signal(SignalKind::interrupt())?,
        })
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    async fn terminated(&mut self) {
        #[cfg(unix)]
        if self.terminate.recv().await.is_some() {
            return;
        }
        pending().await
    }
}

/// Prints a fatal error as Go's `log` package does; returns the exit status.
fn fatal(words: &str) -> i32 {
    stderr().push(&format!("{} {words}", Time::from(SystemTime::now()).go()));
    FATAL
}

/// Allows as many open files as the system lets this user have.
fn raise_descriptor_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{getrlimit, setrlimit, Resource};
        let mut limit = getrlimit(Resource::Nofile);
        limit.current = limit.maximum;
        let _ = setrlimit(Resource::Nofile, limit);
    }
}
