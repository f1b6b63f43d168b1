//! The handlers of inbound streams, by protocol. Each protocol has at most one, which owns its name.

use super::lock;
use super::stream::Stream;
use super::Error;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use tokio::sync::{mpsc, Notify};

/// The maximum number of accepted streams of a protocol that wait for the program. Further ones are
/// refused: if they waited in the socket instead, they would block the streams of other protocols.
pub const MAX_WAITING: usize = 256;

/// The handlers of a client, by protocol.
#[derive(Debug, Default)]
pub struct Handlers {
    by_protocol: Mutex<HashMap<String, Entry>>,
    entered: AtomicU64,
    /// Notified when a name may have become free.
    left: Notify,
}

#[derive(Debug)]
struct Entry {
    /// Distinguishes this entry from earlier and later ones of the same name.
    number: u64,
    balanced: bool,
    sender: mpsc::Sender<Stream>,
    /// Dangling once the program has dropped its `IncomingStreams`. The name will then become free soon.
    wanted: Weak<()>,
}

/// A protocol name, taken until this is dropped. It is dropped when the daemon has removed the
/// registration, or when the request to remove it has failed.
#[derive(Debug)]
pub struct Name {
    handlers: Arc<Handlers>,
    protocol: String,
    number: u64,
}

/// A name just taken, with the streams that arrive for it.
#[derive(Debug)]
pub struct Entered {
    pub name: Name,
    pub streams: mpsc::Receiver<Stream>,
    /// The handler from which the name was taken. Dropping it ends its streams.
    pub replaced: Option<Replaced>,
}

/// A handler whose name was taken by another one.
#[derive(Debug)]
pub struct Replaced(Entry);

impl Replaced {
    /// Whether it was registered as balanced.
    pub fn balanced(&self) -> bool {
        self.0.balanced
    }
}

impl Handlers {
    /// Takes a name. If the name's handler was dropped, waits until the daemon has removed it.
    ///
    /// # Arguments
    /// - `wanted`: dangling once the program has dropped its `IncomingStreams`.
    /// - `replace`: whether to take the name from a handler that is still in use.
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if the handler is still in use, unless `replace`.
    pub async fn enter(
        self: &Arc<Self>,
        protocol: String,
        balanced: bool,
        wanted: Weak<()>,
        replace: bool,
    ) -> Result<Entered, Error> {
        loop {
            let left = self.left.notified();
            {
                let mut handlers = lock(&self.by_protocol);
                let in_use = handlers
                    .get(&protocol)
                    .map(|entry| entry.wanted.strong_count() > 0);
                match in_use {
                    Some(true) if !replace => {
                        let context = Box::default();
                        return Err(Error::AlreadyRegistered { context });
                    }
                    Some(false) => {}
                    _ => {
                        let (sender, streams) = mpsc::channel(MAX_WAITING);
                        let number = self.entered.fetch_add(1, Ordering::Relaxed);
                        let entry = Entry {
                            number,
                            balanced,
                            sender,
                            wanted,
                        };
                        let replaced = handlers.insert(protocol.clone(), entry).map(Replaced);
                        let name = Name {
                            handlers: Arc::clone(self),
                            protocol,
                            number,
                        };
                        return Ok(Entered {
                            name,
                            streams,
                            replaced,
                        });
                    }
                }
            }
            left.await;
        }
    }

    /// Removes all handlers.
    pub fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.by_protocol));
        drop(all);
        self.left.notify_waiters();
    }

    /// The protocols, and whether each is balanced.
    pub fn all(&self) -> Vec<(String, bool)> {
        let handlers = lock(&self.by_protocol);
        let pairs = handlers.iter();
        pairs
            .map(|(protocol, entry)| (protocol.clone(), entry.balanced))
            .collect()
    }

    /// The number of protocols.
    pub fn len(&self) -> usize {
        lock(&self.by_protocol).len()
    }

    /// Where the streams of a protocol are sent.
    pub fn get(&self, protocol: &str) -> Option<mpsc::Sender<Stream>> {
        let handlers = lock(&self.by_protocol);
        handlers.get(protocol).map(|entry| entry.sender.clone())
    }
}

impl Name {
    /// The protocol.
    pub fn protocol(&self) -> &str {
        &self.protocol
    }

    /// Gives the name back to the handler that had it. If that handler was dropped meanwhile, returns
    /// the name: the caller must then remove the registration.
    pub fn restore(self, replaced: Replaced) -> Option<Self> {
        let mut handlers = lock(&self.handlers.by_protocol);
        // Under the lock: a dropped handler clears `wanted` before it checks its name.
        if replaced.0.wanted.strong_count() == 0 {
            drop(handlers);
            return Some(self);
        }
        let current = handlers.get(&self.protocol);
        let mut entry = None;
        if current.is_some_and(|entry| entry.number == self.number) {
            entry = handlers.insert(self.protocol.clone(), replaced.0);
        }
        drop(handlers);
        drop(entry);
        None
    }

    /// Whether this still owns the name. When the runtime ends, all names become free, and another
    /// handler may take this one.
    pub fn is_taken(&self) -> bool {
        let handlers = lock(&self.handlers.by_protocol);
        let entry = handlers.get(&self.protocol);
        entry.is_some_and(|entry| entry.number == self.number)
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let mut handlers = lock(&self.handlers.by_protocol);
        let entry = handlers.get(&self.protocol);
        let is_taken = entry.is_some_and(|entry| entry.number == self.number);
        let entry = is_taken.then(|| handlers.remove(&self.protocol));
        drop(handlers);
        drop(entry); // outside the lock, as it may hold the last reference to streams
        self.handlers.left.notify_waiters();
    }
}
