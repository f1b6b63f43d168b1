//! Connects to peers. Failures have the messages of the Go daemons.

use crate::command::Command;
use crate::convert::without_peer;
use crate::error::{os_message, DialCause, DialFailure, NodeError};
use crate::services::peers::AddressBook;
use crate::swarm::{Host, HostEvent};
use futures::future::{BoxFuture, Shared};
use futures::FutureExt;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::DialError;
use libp2p::{Multiaddr, PeerId};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{mpsc, oneshot, watch};

const NO_TRANSPORT: &str = "no transport for protocol";
const DIAL_TO_SELF: &str = "dial to self attempted";

/// Dials peers at all of their known addresses in parallel.
pub(crate) struct Dialer {
    host: Host,
    book: Arc<AddressBook>,
    /// Addresses at which this node listens.
    listening: watch::Receiver<Vec<Multiaddr>>,
    commands: mpsc::Sender<Command>,
    pending: Mutex<HashMap<PeerId, Pending>>,
}

/// A dial that is in progress. Other requests for the same peer wait for it.
struct Pending {
    addrs: Vec<Multiaddr>,
    result: Shared<BoxFuture<'static, Result<(), NodeError>>>,
}

impl Dialer {
    pub(crate) fn new(
        host: Host,
        book: Arc<AddressBook>,
        listening: watch::Receiver<Vec<Multiaddr>>,
        commands: mpsc::Sender<Command>,
    ) -> Arc<Self> {
        Arc::new(Self {
            host,
            book,
            listening,
            commands,
            pending: Mutex::default(),
        })
    }

    /// Connects to a peer. The dial goes on if the future is dropped.
    pub(crate) async fn dial(self: &Arc<Self>, peer: PeerId) -> Result<(), NodeError> {
        let addrs = self.book.get(&peer);
        if addrs.is_empty() {
            let cause = DialCause::NoAddresses;
            return Err(failed(peer, cause, Vec::new()));
        }
        let result = {
            let mut pending = self.lock();
            match pending.get(&peer) {
                Some(dial) if addrs.iter().all(|addr| dial.addrs.contains(addr)) => {
                    dial.result.clone()
                }
                _ => {
                    let task = tokio::spawn(self.clone().run(peer, addrs.clone()));
                    let result = task.map(|ended| ended.unwrap_or(Err(NodeError::ShutDown)));
                    let result = result.boxed().shared();
                    let dial = Pending {
                        addrs,
                        result: result.clone(),
                    };
                    pending.insert(peer, dial);
                    result
                }
            }
        };
        result.await
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, peer: PeerId, addrs: Vec<Multiaddr>) -> Result<(), NodeError> {
        let dialed = addrs.clone();
        let result = tokio::select! {
            result = self.try_all(peer, addrs) => result,
            () = self.connected(&peer) => Ok(()),
        };
        let mut pending = self.lock();
        if pending.get(&peer).is_some_and(|dial| dial.addrs == dialed) {
            pending.remove(&peer);
        }
        // The peer may have dialed this node meanwhile.
        match self.host.newest(&peer) {
            Some(_) => Ok(()),
            None => result,
        }
    }

    /// Returns when there is a connection to the peer, dialed by either side.
    async fn connected(&self, peer: &PeerId) {
        let mut events = self.host.events();
        while self.host.newest(peer).is_none() {
            loop {
                match events.recv().await {
                    Ok(HostEvent::Opened(connection)) if connection.peer() == *peer => break,
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        }
    }

    /// Dials all addresses at once, and again without those of other peers.
    async fn try_all(&self, peer: PeerId, mut addrs: Vec<Multiaddr>) -> Result<(), NodeError> {
        let mut causes = Vec::new();
        let mut tried = false;
        let listening = self.listening.borrow().clone();
        addrs.retain(|addr| {
            let is_own = listening.contains(addr);
            if is_own {
                causes.push((addr.clone(), DIAL_TO_SELF.to_owned()));
            }
            !is_own
        });
        while !addrs.is_empty() {
            let error = match self.try_once(peer, addrs.clone()).await? {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            match error {
                DialError::WrongPeerId { obtained, address } => {
                    let address = without_peer(address);
                    self.book.remove(&peer, &address);
                    let count = addrs.len();
                    addrs.retain(|addr| *addr != address);
                    causes.push((address, mismatch(&peer, &obtained)));
                    tried = true;
                    if addrs.len() == count {
                        break;
                    }
                }
                DialError::LocalPeerId { address } => {
                    let address = without_peer(address);
                    let count = addrs.len();
                    addrs.retain(|addr| *addr != address);
                    causes.push((address, DIAL_TO_SELF.to_owned()));
                    if addrs.len() == count {
                        break;
                    }
                }
                DialError::Transport(errors) => {
                    for (addr, error) in errors {
                        let addr = without_peer(addr);
                        let cause = words(&addr, &error);
                        tried |= cause != NO_TRANSPORT;
                        causes.push((addr, cause));
                    }
                    break;
                }
                DialError::NoAddresses => break,
                other => {
                    let cause = chain(&other);
                    causes.extend(addrs.drain(..).map(|addr| (addr, cause.clone())));
                    tried = true;
                }
            }
        }
        let cause = match tried {
            true => DialCause::AllDialsFailed,
            false => DialCause::NoGoodAddresses,
        };
        Err(failed(peer, cause, causes))
    }

    async fn try_once(
        &self,
        peer: PeerId,
        addrs: Vec<Multiaddr>,
    ) -> Result<Result<(), DialError>, NodeError> {
        // From a port of its own, a dial cannot meet the peer's dial to this node in a TCP simultaneous
        // open, in which both sides would take the dialer's part.
        let opts = DialOpts::peer_id(peer)
            .condition(PeerCondition::Always)
            .addresses(addrs)
            .allocate_new_port()
            .build();
        let (result, dialed) = oneshot::channel();
        let command = Command::Dial { opts, result };
        let sent = self.commands.send(command).await;
        sent.map_err(|_| NodeError::ShutDown)?;
        dialed.await.map_err(|_| NodeError::ShutDown)
    }
}

fn failed(peer: PeerId, cause: DialCause, addrs: Vec<(Multiaddr, String)>) -> NodeError {
    NodeError::Dial(DialFailure { peer, cause, addrs })
}

fn mismatch(expected: &PeerId, obtained: &PeerId) -> String {
    format!(
        "failed to negotiate security protocol: peer id mismatch: expected {expected}, but remote key matches {obtained}"
    )
}

/// Describes why an address could not be dialed.
fn words(addr: &Multiaddr, error: &TransportError<io::Error>) -> String {
    let error = match error {
        TransportError::MultiaddrNotSupported(_) => return NO_TRANSPORT.to_owned(),
        TransportError::Other(error) => error,
    };
    let text = chain(error);
    let Some(socket) = socket_addr(addr) else {
        return text;
    };
    let network = if socket.is_ipv4() { "tcp4" } else { "tcp6" };
    if error.kind() == io::ErrorKind::TimedOut || text.contains("Timeout") {
        return format!("dial {network} {socket}: i/o timeout");
    }
    match os_error(&text).filter(|error| !ends_handshake(error)) {
        Some(error) => format!("dial {network} {socket}: connect: {}", os_message(&error)),
        None => format!("failed to negotiate security protocol: {text}"),
    }
}

/// Finds the operating system's error in an error message: the transports wrap it in types that hide it.
fn os_error(text: &str) -> Option<io::Error> {
    let (_, after) = text.split_once("(os error ")?;
    let (code, _) = after.split_once(')')?;
    code.parse().ok().map(io::Error::from_raw_os_error)
}

/// Whether an error ends a connection that was made.
fn ends_handshake(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset
    )
}

/// The texts of an error and its sources.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts = vec![error.to_string()];
    let mut source = error.source();
    while let Some(error) = source {
        let text = error.to_string();
        if !texts.iter().any(|earlier| earlier.contains(&text)) {
            texts.push(text);
        }
        source = error.source();
    }
    texts.join(": ")
}

fn socket_addr(addr: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = addr.iter();
    let ip: IpAddr = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    match parts.next()? {
        Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operating_system_errors_have_the_messages_of_go() {
        let addr: Multiaddr = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
        let refused = io::Error::from_raw_os_error(111);
        let wrapped = TransportError::Other(io::Error::other(io::Error::other(refused)));
        assert_eq!(
            words(&addr, &wrapped),
            "dial tcp4 127.0.0.1:9: connect: connection refused"
        );
        let timeout = TransportError::Other(io::ErrorKind::TimedOut.into());
        let addr: Multiaddr = "/ip6/::1/tcp/9".parse().unwrap();
        assert_eq!(words(&addr, &timeout), "dial tcp6 [::1]:9: i/o timeout");
        let reset = TransportError::Other(io::Error::from_raw_os_error(104));
        assert!(words(&addr, &reset).starts_with("failed to negotiate security protocol: "));
        let unsupported = TransportError::MultiaddrNotSupported(addr.clone());
        assert_eq!(words(&addr, &unsupported), NO_TRANSPORT);
    }
}
