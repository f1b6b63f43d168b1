//! The handlers of protocols: those of one protocol take turns.

use super::round_robin::RoundRobin;
use crate::error::NodeError;
use crate::swarm::{Host, Service};
use std::collections::hash_map::Entry;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Handlers by protocol. The host serves a protocol as long as it has a handler.
pub(crate) struct Registry<T> {
    host: Host,
    handlers: Mutex<HashMap<String, RoundRobin<T>>>,
}

impl<T: Clone> Registry<T> {
    pub(crate) fn new(host: Host) -> Self {
        Self {
            host,
            handlers: Mutex::default(),
        }
    }

    /// Adds a handler. The first one of a protocol makes the host serve it by `service`.
    ///
    /// # Errors
    /// The protocol has a handler and this one is not balanced.
    pub(crate) fn add(
        &self,
        protocol: &str,
        handler: T,
        balanced: bool,
        service: Arc<dyn Service>,
    ) -> Result<(), NodeError> {
        match self.lock().entry(protocol.to_owned()) {
            Entry::Vacant(vacant) => {
                vacant.insert(RoundRobin::new(handler));
                self.host.serve(protocol, service);
            }
            Entry::Occupied(mut handlers) if balanced => handlers.get_mut().push(handler),
            Entry::Occupied(_) => return Err(NodeError::HandlerExists(protocol.to_owned())),
        }
        Ok(())
    }

    /// Removes the first handler of a protocol for which `found` returns true; returns whether there was
    /// one.
    ///
    /// # Errors
    /// The protocol has no handler.
    pub(crate) fn remove(
        &self,
        protocol: &str,
        found: impl Fn(&T) -> bool,
    ) -> Result<bool, NodeError> {
        let mut all = self.lock();
        let Some(handlers) = all.get_mut(protocol) else {
            return Err(NodeError::NoHandler(protocol.to_owned()));
        };
        let removed = handlers.remove(found);
        if handlers.is_empty() {
            all.remove(protocol);
            self.host.withdraw(protocol);
        }
        Ok(removed)
    }

    /// Removes all handlers for which `found` returns true.
    pub(crate) fn remove_all(&self, found: impl Fn(&T) -> bool) {
        self.lock().retain(|protocol, handlers| {
            while handlers.remove(&found) {}
            if handlers.is_empty() {
                self.host.withdraw(protocol);
            }
            !handlers.is_empty()
        });
    }

    /// Returns the handlers of a protocol, starting with the one whose turn it is.
    pub(crate) fn turn(&self, protocol: &str) -> Vec<T> {
        let handlers = self.lock().get_mut(protocol).map(RoundRobin::turn);
        handlers.unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, RoundRobin<T>>> {
        self.handlers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
