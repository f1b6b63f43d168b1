//! The handlers of a client by name, each with its pending requests.

use crate::policy::retry::Attempt;
use std::collections::{BTreeMap, VecDeque};

/// The handlers that a client serves, or is about to serve.
#[derive(Debug)]
pub struct Handlers<T> {
    names: BTreeMap<String, Name<T>>,
}

/// The state of one name.
#[derive(Debug)]
pub struct Name<T> {
    /// The handler that is served, until the daemon has acknowledged its removal.
    pub handler: Option<Handler<T>>,
    /// Whether the daemon has registered the handler.
    pub registered: bool,
    /// The request that the daemon has not answered.
    pub in_flight: Option<Request<T>>,
    /// The next changes, in order.
    pub queue: VecDeque<Change<T>>,
}

#[derive(Debug, Clone, Copy)]
pub struct Handler<T> {
    /// The operation that added it.
    pub token: T,
    pub balanced: bool,
}

#[derive(Debug)]
pub enum Request<T> {
    Register(Addition<T>),
    /// Registers the handler again, on a new connection.
    RegisterAgain,
    /// The caller no longer wants the handler: the registration is undone once the daemon has answered.
    RegisterAbandoned,
    /// A cancelled removal has no token.
    Unregister(Option<T>),
}

#[derive(Debug)]
pub enum Change<T> {
    Add(Addition<T>),
    /// A cancelled removal has no token.
    Remove(Option<T>),
}

#[derive(Debug, Clone, Copy)]
pub struct Addition<T> {
    pub token: T,
    pub balanced: bool,
    /// Whether it could not be sent on an earlier connection.
    pub repeated: bool,
}

impl<T> Addition<T> {
    /// Whether to send the registration again after it could not be sent.
    pub fn may_repeat(&self) -> bool {
        let attempt = Attempt {
            pooled: true,
            repeated: self.repeated,
        };
        attempt.may_retry(true)
    }
}

impl<T: Copy + PartialEq> Handlers<T> {
    pub fn new() -> Self {
        Handlers {
            names: BTreeMap::new(),
        }
    }

    pub fn get(&self, name: &str) -> Option<&Name<T>> {
        self.names.get(name)
    }

    pub fn get_mut(&mut self, name: &str) -> Option<&mut Name<T>> {
        self.names.get_mut(name)
    }

    pub fn entry(&mut self, name: &str) -> &mut Name<T> {
        self.names.entry(name.to_owned()).or_default()
    }

    /// Removes a name without handlers and requests.
    pub fn remove_unused(&mut self, name: &str) {
        if self.names.get(name).is_some_and(Name::is_unused) {
            self.names.remove(name);
        }
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&String, &mut Name<T>)> {
        self.names.iter_mut()
    }

    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    /// Names with a handler.
    pub fn served(&self) -> impl Iterator<Item = &str> {
        let names = self.names.iter();
        names
            .filter(|(_, entry)| entry.handler.is_some())
            .map(|(name, _)| name.as_str())
    }

    /// Whether the daemon has registered all handlers.
    pub fn are_registered(&self) -> bool {
        let mut names = self.names.values();
        names.all(|entry| entry.handler.is_none() || entry.registered)
    }

    /// The name that an operation changes, or whose handler it has added.
    pub fn find(&self, token: T) -> Option<String> {
        let mut names = self.names.iter();
        let found = names.find(|(_, entry)| entry.concerns(token));
        found.map(|(name, _)| name.clone())
    }

    /// Removes all queued additions, and returns their operations.
    pub fn take_additions(&mut self) -> Vec<T> {
        let mut taken = Vec::new();
        for entry in self.names.values_mut() {
            entry.queue.retain(|change| match change {
                Change::Add(addition) => {
                    taken.push(addition.token);
                    false
                }
                Change::Remove(_) => true,
            });
        }
        taken
    }
}

impl<T> Default for Name<T> {
    fn default() -> Self {
        Name {
            handler: None,
            registered: false,
            in_flight: None,
            queue: VecDeque::new(),
        }
    }
}

impl<T: Copy + PartialEq> Name<T> {
    fn is_unused(&self) -> bool {
        let is_known = self.handler.is_some() || self.registered;
        !is_known && self.in_flight.is_none() && self.queue.is_empty()
    }

    fn concerns(&self, token: T) -> bool {
        let queued = |change: &Change<T>| match change {
            Change::Add(addition) => addition.token == token,
            Change::Remove(removal) => *removal == Some(token),
        };
        let in_flight = matches!(self.in_flight, Some(Request::Unregister(Some(t))) if t == token);
        self.was_added_by(token) || in_flight || self.queue.iter().any(queued)
    }

    fn was_added_by(&self, token: T) -> bool {
        self.handler.is_some_and(|handler| handler.token == token)
    }

    /// Takes a cancelled operation out of the queue and out of the removal in flight. Returns whether
    /// the handler must be dropped.
    pub fn cancel(&mut self, token: T) -> bool {
        self.queue
            .retain(|change| !matches!(change, Change::Add(it) if it.token == token));
        for change in &mut self.queue {
            if let Change::Remove(removal) = change {
                removal.take_if(|removal| *removal == token);
            }
        }
        let removal = match &mut self.in_flight {
            Some(Request::Unregister(removal)) => removal.take_if(|removal| *removal == token),
            _ => None,
        };
        self.was_added_by(token) || removal.is_some()
    }
}
