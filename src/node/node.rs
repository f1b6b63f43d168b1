//! Starts a node, and drives its swarm.

use crate::command::Command;
use crate::config::Config;
use crate::convert::multiaddr;
use crate::dial::Dialer;
use crate::error::os_message;
use crate::handle::{Inner, NodeHandle};
use crate::services::identify::Identify;
use crate::services::peers::AddressBook;
use crate::services::streams::StreamHandlers;
use crate::services::unary::UnaryHandlers;
use crate::swarm::{self, Host};
use futures::StreamExt;
use libp2p::core::transport::{ListenerId, TransportError};
use libp2p::swarm::dial_opts::DialOpts;
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{ping, Multiaddr, Swarm};
use p2pd_protocol::{endpoint, Endpoint};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Time after which the swarm would close an idle connection. Streams that bypass the swarm do not count
/// as use, so it must never pass.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Largest number of the swarm's inbound streams per connection that negotiate at the same time.
const MAX_NEGOTIATING: usize = 1024;
/// Time to wait for the addresses of the listeners.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for connections to close when the node stops.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Number of requests to the swarm that may wait.
const MAX_COMMANDS: usize = 256;

/// A libp2p node.
pub struct Node;

impl Node {
    /// Starts a node in the current tokio runtime, and waits until it listens.
    ///
    /// # Errors
    /// No listen address could be bound, or no security protocol is enabled.
    pub async fn start(config: Config) -> io::Result<NodeHandle> {
        if config.security.is_empty() {
            let words = "at least one channel security protocol must be enabled";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        let peer = config.keypair.public().to_peer_id();
        let host = Host::new(peer);
        host.delegate(ping::PROTOCOL_NAME.as_ref());
        let transport = swarm::build(&config.keypair, &config.security, &host)?;
        let settings = libp2p::swarm::Config::with_tokio_executor()
            .with_idle_connection_timeout(IDLE_TIMEOUT)
            .with_max_negotiating_inbound_streams(MAX_NEGOTIATING)
            .with_smart_dial();
        let swarm = Swarm::new(transport, ping::Behaviour::default(), peer, settings);

        let (commands, receiver) = mpsc::channel(MAX_COMMANDS);
        let mut driver = Driver {
            swarm,
            host: host.clone(),
            commands: receiver,
            dials: HashMap::new(),
            addrs: Vec::new(),
            listening: watch::Sender::default(),
            announced: watch::Sender::new(config.announce.clone()),
            is_announced_fixed: !config.announce.is_empty(),
        };
        driver.listen(config.listen).await?;
        let (listening, announced) = (driver.listening.subscribe(), driver.announced.subscribe());

        let book = Arc::new(AddressBook::default());
        let identify = Identify::start(
            host.clone(),
            config.keypair,
            &config.agent,
            announced.clone(),
            book.clone(),
        );
        let stopped = CancellationToken::new();
        tokio::spawn(driver.run(stopped.clone()));
        Ok(NodeHandle::new(Inner {
            streams: StreamHandlers::new(host.clone(), identify.clone()),
            unary: UnaryHandlers::new(host.clone(), config.max_message, stopped.clone()),
            dialer: Dialer::new(host.clone(), book.clone(), listening, commands.clone()),
            max_message: config.max_message,
            host,
            identify,
            book,
            announced,
            commands,
            stopped,
        }))
    }
}

/// Drives the swarm until all handles are dropped or one shuts it down.
struct Driver {
    swarm: Swarm<ping::Behaviour>,
    host: Host,
    commands: mpsc::Receiver<Command>,
    dials: HashMap<ConnectionId, oneshot::Sender<Result<(), DialError>>>,
    /// Addresses of the listeners.
    addrs: Vec<(ListenerId, Multiaddr)>,
    listening: watch::Sender<Vec<Multiaddr>>,
    announced: watch::Sender<Vec<Multiaddr>>,
    is_announced_fixed: bool,
}

impl Driver {
    /// Binds the listen addresses, and waits until the real addresses are known.
    async fn listen(&mut self, addrs: Vec<Multiaddr>) -> io::Result<()> {
        let (mut listeners, mut failures) = (Vec::new(), Vec::new());
        for addr in addrs {
            match self.swarm.listen_on(addr.clone()) {
                Ok(id) => listeners.push(id),
                Err(error) => failures.push((addr.clone(), listen_words(&addr, &error))),
            }
        }
        if listeners.is_empty() && !failures.is_empty() {
            let causes: Vec<_> = failures.into_iter().map(|(_, cause)| cause).collect();
            return Err(io::Error::new(
                io::ErrorKind::AddrNotAvailable,
                format!("failed to listen on any addresses: [{}]", causes.join(" ")),
            ));
        }
        for (addr, cause) in failures {
            log::warn!("does not listen at {addr}: {cause}");
        }
        let deadline = tokio::time::sleep(LISTEN_TIMEOUT);
        tokio::pin!(deadline);
        while !listeners.iter().all(|id| self.has_addr(*id)) {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                () = &mut deadline => break,
            }
        }
        Ok(())
    }

    fn has_addr(&self, listener: ListenerId) -> bool {
        self.addrs.iter().any(|(id, _)| *id == listener)
    }

    async fn run(mut self, stopped: CancellationToken) {
        let _stopped = stopped.drop_guard();
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = self.commands.recv() => match command {
                    Some(Command::Dial { opts, result }) => self.dial(opts, result),
                    Some(Command::Shutdown) | None => break,
                },
            }
        }
        self.close().await;
    }

    /// Closes all connections, and breaks the circle of the host and the services that it serves.
    async fn close(mut self) {
        let mut closings = self.host.events();
        for connection in self.host.connections() {
            connection.close();
        }
        let closed = async {
            while !self.host.connections().is_empty() {
                tokio::select! {
                    event = self.swarm.select_next_some() => self.on_event(event),
                    _ = closings.recv() => {}
                }
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, closed).await;
        for protocol in self.host.protocols() {
            self.host.withdraw(&protocol);
        }
    }

    fn dial(&mut self, opts: DialOpts, result: oneshot::Sender<Result<(), DialError>>) {
        let id = opts.connection_id();
        match self.swarm.dial(opts) {
            Ok(()) => drop(self.dials.insert(id, result)),
            Err(error) => drop(result.send(Err(error))),
        }
    }

    fn on_event(&mut self, event: SwarmEvent<ping::Event>) {
        match event {
            SwarmEvent::ConnectionEstablished { connection_id, .. } => {
                if let Some(result) = self.dials.remove(&connection_id) {
                    let _ = result.send(Ok(()));
                }
            }
            SwarmEvent::OutgoingConnectionError {
                connection_id,
                error,
                ..
            } => {
                if let Some(result) = self.dials.remove(&connection_id) {
                    let _ = result.send(Err(error));
                }
            }
            SwarmEvent::IncomingConnectionError {
                send_back_addr,
                error,
                ..
            } => log::debug!("a connection from {send_back_addr} failed: {error}"),
            SwarmEvent::NewListenAddr {
                listener_id,
                address,
            } => {
                self.addrs.push((listener_id, address));
                self.on_addrs_changed();
            }
            SwarmEvent::ExpiredListenAddr {
                listener_id,
                address,
            } => {
                self.addrs
                    .retain(|it| *it != (listener_id, address.clone()));
                self.on_addrs_changed();
            }
            SwarmEvent::ListenerClosed {
                listener_id,
                reason,
                addresses,
            } => {
                if let Err(error) = reason {
                    log::error!("no longer listens at {addresses:?}: {error}");
                }
                self.addrs.retain(|(id, _)| *id != listener_id);
                self.on_addrs_changed();
            }
            SwarmEvent::ListenerError { error, .. } => log::warn!("a listener failed: {error}"),
            _ => {}
        }
    }

    fn on_addrs_changed(&mut self) {
        let mut addrs: Vec<Multiaddr> = Vec::new();
        for (_, addr) in &self.addrs {
            if !addrs.contains(addr) {
                addrs.push(addr.clone());
            }
        }
        if !self.is_announced_fixed {
            self.announced.send_replace(addrs.clone());
        }
        self.listening.send_replace(addrs);
    }
}

/// Describes why a listen address cannot be used, as the Go daemons do.
fn listen_words(addr: &Multiaddr, error: &TransportError<io::Error>) -> String {
    let error = match error {
        TransportError::MultiaddrNotSupported(_) => return "no transport for protocol".to_owned(),
        TransportError::Other(error) => os_message(error),
    };
    match multiaddr(addr).endpoint() {
        Ok(Endpoint::Tcp { host, port }) => match host {
            endpoint::Host::Ip4(ip) => format!("listen tcp4 {ip}:{port}: bind: {error}"),
            endpoint::Host::Ip6(ip) => format!("listen tcp6 [{ip}]:{port}: bind: {error}"),
            name => format!("listen tcp {name}:{port}: bind: {error}"),
        },
        _ => format!("listen {addr}: bind: {error}"),
    }
}

#[cfg(test)]
mod tests;
