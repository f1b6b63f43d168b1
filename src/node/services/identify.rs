//! Identify: sends peers this node's addresses and protocols, and receives theirs.

mod message;

use super::peers::AddressBook;
use crate::swarm::{Connection, Host, HostEvent, Service, Substream};
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{AsyncWriteExt, FutureExt};
use libp2p::core::{PeerRecord, SignedEnvelope};
use libp2p::identity::Keypair;
use libp2p::multiaddr::Protocol;
use libp2p::{Multiaddr, PeerId};
use message::Message;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::timeout;

const IDENTIFY: &str = "/ipfs/id/1.0.0";
const PUSH: &str = "/ipfs/id/push/1.0.0";

/// Begins the agent version of peers that keep reading a stream after they have closed their direction.
pub(crate) const NATIVE_AGENT: &str = "p2pclient-rs/";

/// Time limit for one exchange with a peer.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Time for which changes are collected before they are pushed.
const COALESCE: Duration = Duration::from_millis(10);
/// Least time between two pushes to a peer.
const PUSH_INTERVAL: Duration = Duration::from_millis(100);

/// Serves identify on all connections, and identifies each peer.
pub(crate) struct Identify {
    host: Host,
    keypair: Keypair,
    public_key: Bytes,
    agent: Bytes,
    /// Addresses that the node announces.
    addrs: watch::Receiver<Vec<Multiaddr>>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    book: Arc<AddressBook>,
    connections: Mutex<HashMap<u64, Arc<Entry>>>,
}

/// What this node tells about itself.
#[derive(Debug, Default)]
struct Snapshot {
    /// Counts the changes.
    version: u64,
    protocols: Vec<String>,
    addrs: Vec<Multiaddr>,
    record: Option<Bytes>,
}

/// State of a connection.
struct Entry {
    /// Whether the peer has answered, or failed to.
    identified: watch::Sender<bool>,
    /// Version of the last snapshot that was sent.
    sent: AtomicU64,
    /// Whether the peer's agent is this one.
    is_native: AtomicBool,
    /// The task that identifies the peer, and then pushes changes.
    task: Mutex<Option<AbortHandle>>,
}

impl Identify {
    /// Starts to serve identify. The tasks end when the sender of `addrs` is dropped.
    pub(crate) fn start(
        host: Host,
        keypair: Keypair,
        agent: &str,
        addrs: watch::Receiver<Vec<Multiaddr>>,
        book: Arc<AddressBook>,
    ) -> Arc<Self> {
        let identify = Arc::new(Self {
            public_key: keypair.public().encode_protobuf().into(),
            keypair,
            agent: Bytes::copy_from_slice(agent.as_bytes()),
            addrs,
            snapshot: watch::Sender::new(Arc::default()),
            book,
            connections: Mutex::default(),
            host,
        });
        let serve = |protocol, is_push| {
            let service = IdentifyService {
                identify: identify.clone(),
                is_push,
            };
            identify.host.serve(protocol, Arc::new(service));
        };
        serve(IDENTIFY, false);
        serve(PUSH, true);
        identify.snapshot();
        tokio::spawn(identify.clone().follow_connections());
        tokio::spawn(identify.clone().follow_changes());
        identify
    }

    /// Waits until the peer of a connection has been identified, or cannot be.
    pub(crate) async fn wait(self: &Arc<Self>, connection: &Connection) {
        if let Some(entry) = self.entry(connection) {
            let mut identified = entry.identified.subscribe();
            drop(entry);
            let _ = identified.wait_for(|done| *done).await;
        }
    }

    /// Whether the peer keeps reading after it has closed its direction of a stream.
    pub(crate) fn keeps_reading(&self, connection: &Connection) -> bool {
        let entry = self.lock().get(&connection.id()).cloned();
        entry.is_some_and(|entry| entry.is_native.load(Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the state of a connection, and starts to identify its peer if nothing has. `None` if the
    /// connection is closed.
    fn entry(self: &Arc<Self>, connection: &Connection) -> Option<Arc<Entry>> {
        let mut connections = self.lock();
        if let Some(entry) = connections.get(&connection.id()) {
            return Some(entry.clone());
        }
        if !connection.is_open() {
            return None;
        }
        let entry = Arc::new(Entry {
            identified: watch::Sender::new(false),
            // The peer asks for the present state itself.
            sent: AtomicU64::new(self.snapshot.borrow().version),
            is_native: AtomicBool::new(false),
            task: Mutex::default(),
        });
        connections.insert(connection.id(), entry.clone());
        let attend = self.clone().attend(connection.clone(), entry.clone());
        let task = tokio::spawn(attend).abort_handle();
        *entry.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        Some(entry)
    }

    /// Identifies the peer of each new connection.
    async fn follow_connections(self: Arc<Self>) {
        let mut events = self.host.events();
        let mut addrs = self.addrs.clone();
        for connection in self.host.connections() {
            self.entry(&connection);
        }
        loop {
            let event = tokio::select! {
                event = events.recv() => event,
                () = closed(&mut addrs) => break,
            };
            match event {
                Ok(HostEvent::Opened(connection)) => drop(self.entry(&connection)),
                Ok(HostEvent::Closed(connection)) => self.forget(&connection),
                Err(RecvError::Lagged(_)) => self.catch_up(),
                Err(RecvError::Closed) => break,
            }
        }
        for (_, entry) in self.lock().drain() {
            entry.abort();
        }
    }

    /// Compares the entries with the live connections, since events were missed.
    fn catch_up(self: &Arc<Self>) {
        let live = self.host.connections();
        self.lock().retain(|id, entry| {
            let is_live = live.iter().any(|connection| connection.id() == *id);
            if !is_live {
                entry.abort();
            }
            is_live
        });
        for connection in live {
            self.entry(&connection);
        }
    }

    fn forget(&self, connection: &Connection) {
        if let Some(entry) = self.lock().remove(&connection.id()) {
            entry.abort();
        }
        self.book.disconnected(&connection.peer());
    }

    /// Updates the snapshot when a protocol or an address was added or removed.
    async fn follow_changes(self: Arc<Self>) {
        let mut protocols = self.host.changes();
        let mut addrs = self.addrs.clone();
        loop {
            let changed = tokio::select! {
                changed = protocols.changed() => changed,
                changed = addrs.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            tokio::time::sleep(COALESCE).await;
            protocols.mark_unchanged();
            addrs.mark_unchanged();
            self.snapshot();
        }
    }

    /// Returns what to tell about this node now.
    fn snapshot(&self) -> Arc<Snapshot> {
        let mut protocols = self.host.protocols();
        protocols.sort_unstable();
        protocols.dedup();
        let addrs = self.addrs.borrow().clone();
        self.snapshot.send_if_modified(|snapshot| {
            let same_addrs = snapshot.addrs == addrs && snapshot.version > 0;
            if same_addrs && snapshot.protocols == protocols {
                return false;
            }
            let record = match same_addrs {
                true => snapshot.record.clone(),
                false => self.sign(&addrs),
            };
            *snapshot = Arc::new(Snapshot {
                version: snapshot.version + 1,
                protocols,
                addrs,
                record,
            });
            true
        });
        self.snapshot.borrow().clone()
    }

    /// Returns a signed record of the node's addresses.
    fn sign(&self, addrs: &[Multiaddr]) -> Option<Bytes> {
        match PeerRecord::new_interop(&self.keypair, addrs.to_vec()) {
            Ok(record) => Some(
                record
                    .into_signed_envelope()
                    .into_protobuf_encoding()
                    .into(),
            ),
            Err(error) => {
                log::warn!("cannot sign the node's addresses: {error}");
                None
            }
        }
    }

    /// Identifies the peer of a connection, and then pushes changes to it.
    async fn attend(self: Arc<Self>, connection: Connection, entry: Arc<Entry>) {
        let peer = connection.peer();
        match timeout(TIMEOUT, self.ask(&connection, &entry)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::debug!("cannot identify {peer}: {error}"),
            Err(_) => log::debug!("cannot identify {peer}: it does not answer"),
        }
        entry.identified.send_replace(true);
        let mut snapshots = self.snapshot.subscribe();
        loop {
            let is_new = |it: &Arc<Snapshot>| it.version > entry.sent.load(Ordering::Relaxed);
            let Ok(snapshot) = snapshots.wait_for(is_new).await.map(|it| it.clone()) else {
                return;
            };
            entry.sent.fetch_max(snapshot.version, Ordering::Relaxed);
            let protocols = connection.peer_protocols();
            if !protocols.is_empty() && !protocols.iter().any(|protocol| protocol == PUSH) {
                continue;
            }
            match timeout(TIMEOUT, self.push(&connection, &snapshot)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => log::debug!("cannot push identify to {peer}: {error}"),
                Err(_) => log::debug!("cannot push identify to {peer}: it does not read"),
            }
            tokio::time::sleep(PUSH_INTERVAL).await;
        }
    }

    /// Requests the peer's messages.
    async fn ask(&self, connection: &Connection, entry: &Entry) -> io::Result<()> {
        let stream = connection.open_lazily(IDENTIFY).await;
        let mut stream = stream.map_err(io::Error::other)?;
        let message = message::read(&mut stream).await?;
        self.learn(message, connection, entry);
        stream.close().await
    }

    async fn push(&self, connection: &Connection, snapshot: &Snapshot) -> io::Result<()> {
        let stream = connection.open_lazily(PUSH).await;
        self.send(&mut stream.map_err(io::Error::other)?, connection, snapshot)
            .await
    }

    async fn send(
        &self,
        stream: &mut Substream,
        connection: &Connection,
        snapshot: &Snapshot,
    ) -> io::Result<()> {
        let message = self.describe(connection.remote_addr(), snapshot);
        stream.write_all(&message::encode(message)).await?;
        stream.close().await
    }

    /// Describes this node to a peer.
    fn describe(&self, remote: &Multiaddr, snapshot: &Snapshot) -> Message {
        let via_loopback = is_loopback(remote);
        let addrs = snapshot.addrs.iter();
        let addrs = addrs.filter(|addr| via_loopback || !is_loopback(addr));
        let protocols = snapshot.protocols.iter();
        Message {
            public_key: Some(self.public_key.clone()),
            listen_addrs: addrs.map(|addr| addr.to_vec().into()).collect(),
            protocols: protocols
                .map(|it| Bytes::copy_from_slice(it.as_bytes()))
                .collect(),
            observed_addr: Some(remote.to_vec().into()),
            protocol_version: Some(Bytes::new()),
            agent_version: Some(self.agent.clone()),
            signed_peer_record: snapshot.record.clone(),
        }
    }

    /// Records what a peer tells about itself.
    fn learn(&self, message: Message, connection: &Connection, entry: &Entry) {
        let agent = message.agent_version.as_deref().unwrap_or_default();
        let is_native = agent.starts_with(NATIVE_AGENT.as_bytes());
        entry.is_native.store(is_native, Ordering::Relaxed);
        let names = message.protocols.into_iter();
        let names = names.filter_map(|name| String::from_utf8(name.into()).ok());
        connection.set_peer_protocols(names.collect());
        let peer = connection.peer();
        let signed = message.signed_peer_record.as_deref();
        let addrs = signed.and_then(|record| signed_addrs(record, peer));
        let addrs = addrs.unwrap_or_else(|| {
            let addrs = message.listen_addrs.into_iter();
            let addrs = addrs.filter_map(|addr| Multiaddr::try_from(Vec::from(addr)).ok());
            addrs.collect()
        });
        self.book.told(peer, addrs);
    }
}

impl Entry {
    fn abort(&self) {
        self.identified.send_replace(true);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(task) = &*task {
            task.abort();
        }
    }
}

/// Returns when the sender of a value has been dropped.
async fn closed<T>(value: &mut watch::Receiver<T>) {
    while value.changed().await.is_ok() {}
}

/// The addresses in a signed record, if the peer signed it.
fn signed_addrs(record: &[u8], peer: PeerId) -> Option<Vec<Multiaddr>> {
    let envelope = SignedEnvelope::from_protobuf_encoding(record).ok()?;
    let record = PeerRecord::from_signed_envelope_interop(envelope).ok()?;
    (record.peer_id() == peer).then(|| record.addresses().to_vec())
}

fn is_loopback(addr: &Multiaddr) -> bool {
    match addr.iter().next() {
        Some(Protocol::Ip4(ip)) => ip.is_loopback(),
        Some(Protocol::Ip6(ip)) => ip.is_loopback(),
        _ => false,
    }
}

/// Answers identify, or receives a push.
struct IdentifyService {
    identify: Arc<Identify>,
    is_push: bool,
}

impl Service for IdentifyService {
    fn inbound(
        &self,
        _protocol: String,
        mut stream: Substream,
        from: Connection,
    ) -> BoxFuture<'static, ()> {
        let (identify, is_push) = (self.identify.clone(), self.is_push);
        let serve = async move {
            let Some(entry) = identify.entry(&from) else {
                return Ok(());
            };
            if is_push {
                let message = message::read(&mut stream).await?;
                identify.learn(message, &from, &entry);
                return stream.close().await;
            }
            let snapshot = identify.snapshot();
            entry.sent.fetch_max(snapshot.version, Ordering::Relaxed);
            identify.send(&mut stream, &from, &snapshot).await
        };
        timeout(TIMEOUT, serve)
            .map(|served| {
                if let Ok(Err(error)) = served {
                    log::debug!("identify failed: {error}");
                }
            })
            .boxed()
    }
}

#[cfg(test)]
mod tests;
