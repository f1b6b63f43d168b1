//! The pool of control connections: which idle connection a request uses, which ones are closed, and
//! how many requests may run at once.

use crate::EncodedRequest;
use std::collections::VecDeque;

/// Limit on concurrent requests for which the daemon asks other peers. Each can take a minute.
pub const MAX_SLOW_REQUESTS: usize = 64;

/// Limit on other concurrent requests, and on idle connections.
pub const MAX_IDLE: usize = 8;

/// Which limit a request counts against. A slow request never delays a quick one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// The daemon answers at once.
    Quick = 0,
    /// The daemon asks other peers before it answers.
    Slow = 1,
}

impl Permit {
    /// The permit that a request needs.
    pub fn of(request: &EncodedRequest) -> Self {
        if request.waits_for_peers() {
            Self::Slow
        } else {
            Self::Quick
        }
    }
}

/// Identifies the connections that were opened between two calls of [`Pool::close_idle`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Generation(u64);

/// Whether an idle connection can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fitness {
    /// A request can be sent on it.
    Fit,
    /// It must be closed: something has arrived on it, most likely the end of the connection.
    Stale,
    /// Only another part of the program can use it, for example another runtime.
    Elsewhere,
}

/// The idle connections to one daemon.
///
/// Methods that remove connections return them, for the caller to close when it holds no lock.
#[derive(Debug)]
pub struct Pool<C> {
    /// In the order of their last use; the most recently used one is last.
    idle: VecDeque<C>,
    max_idle: usize,
    generation: Generation,
    witness: Option<Witness<C>>,
    witnesses: u64,
}

/// An idle connection that is kept out of the pool.
#[derive(Debug)]
struct Witness<C> {
    connection: C,
    id: WitnessId,
    /// Whether a request is running on it.
    busy: bool,
}

/// Identifies a witness. See [`Pool::choose_witness`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WitnessId(pub u64);

impl<C> Pool<C> {
    /// Makes an empty pool for at most `max_idle` connections.
    pub fn new(max_idle: usize) -> Self {
        Self {
            idle: VecDeque::new(),
            max_idle,
            generation: Generation::default(),
            witness: None,
            witnesses: 0,
        }
    }

    /// The generation of connections that are opened now.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Takes the most recently used fit connection. Moves stale connections that were used after it to
    /// `closed`.
    pub fn take(
        &mut self,
        mut fitness: impl FnMut(&C) -> Fitness,
        closed: &mut Vec<C>,
    ) -> Option<C> {
        let mut place = self.idle.len();
        while place > 0 {
            place -= 1;
            match fitness(&self.idle[place]) {
                Fitness::Fit => return self.idle.remove(place),
                Fitness::Stale => closed.extend(self.idle.remove(place)),
                Fitness::Elsewhere => {}
            }
        }
        None
    }

    /// Takes a connection back after a request. Returns the one to close, if there is one.
    ///
    /// # Arguments
    /// - `generation`: the pool's generation when the connection was opened.
    /// - `reusable`: whether the whole reply was read, and nothing follows it. Otherwise the next
    ///   request would get the rest of this reply.
    pub fn give_back(
        &mut self,
        connection: C,
        generation: Generation,
        reusable: bool,
    ) -> Option<C> {
        if !reusable || generation != self.generation {
            return Some(connection);
        }
        self.idle.push_back(connection);
        // The oldest connection is the most likely one to be stale.
        if self.idle.len() > self.max_idle {
            return self.idle.pop_front();
        }
        None
    }

    /// Removes all idle connections and the witness, for the caller to close. Connections in use are
    /// closed when they are given back.
    pub fn close_idle(&mut self) -> Vec<C> {
        self.generation.0 += 1;
        let witness = self.witness.take().map(|witness| witness.connection);
        self.idle.drain(..).chain(witness).collect()
    }

    /// Chooses the witness of a registration that has just been made: a connection that is kept open. As
    /// long as it is open, the daemon has not been restarted and still has the registration.
    ///
    /// The first witness is the connection given back last, on which the registration was sent. Later
    /// registrations share it.
    ///
    /// # Arguments
    /// - `is_silent`: whether nothing has arrived on a connection, not even its end.
    /// - `closed`: receives the former witness if it is stale.
    ///
    /// # Returns
    /// `None` if there is no suitable connection.
    pub fn choose_witness(
        &mut self,
        is_silent: impl Fn(&C) -> bool,
        closed: &mut Vec<C>,
    ) -> Option<WitnessId> {
        if let Some(witness) = &self.witness {
            // Data that arrives on a busy witness is a reply.
            if witness.busy || is_silent(&witness.connection) {
                return Some(witness.id);
            }
        }
        closed.extend(self.witness.take().map(|witness| witness.connection));
        self.idle.back().filter(|last| is_silent(last))?;
        let connection = self.idle.pop_back()?;
        let id = WitnessId(self.witnesses);
        self.witnesses += 1;
        self.witness = Some(Witness {
            connection,
            id,
            busy: false,
        });
        Some(id)
    }

    /// Begins a request on the witness, which shows whether the daemon is still the same. Call
    /// [`end_probe`](Self::end_probe) afterwards. One request may run at a time.
    ///
    /// # Returns
    /// `None` if the witness named `id` is gone, so that the daemon may have been restarted.
    pub fn begin_probe(&mut self, id: WitnessId) -> Option<&C> {
        let witness = self.witness.as_mut().filter(|witness| witness.id == id)?;
        witness.busy = true;
        Some(&witness.connection)
    }

    /// Ends a request on the witness. Returns the connection to close if it is not `reusable`.
    pub fn end_probe(&mut self, id: WitnessId, reusable: bool) -> Option<C> {
        let witness = self.witness.as_mut().filter(|witness| witness.id == id)?;
        witness.busy = false;
        if reusable {
            return None;
        }
        self.witness.take().map(|witness| witness.connection)
    }

    /// The idle connections and the witness.
    pub fn connections(&self) -> impl Iterator<Item = &C> {
        let witness = self.witness.as_ref().map(|witness| &witness.connection);
        self.idle.iter().chain(witness)
    }
}

#[cfg(test)]
mod tests;
