//! Call ids, which match replies to their calls.

use sha2::{Digest, Sha256};
use std::hash::Hasher;

/// Matches a reply to its call.
pub type CallId = [u8; 16];

/// Generates unpredictable call ids. The daemons match replies by the id alone, so a peer that could guess
/// the next ids could receive replies meant for others.
#[derive(Debug)]
pub(super) struct CallIds {
    seed: [u8; 32],
    counter: u64,
    spare: Option<CallId>,
}

impl CallIds {
    /// `seed` must be random, and used for no other connection.
    pub fn new(seed: [u8; 32]) -> Self {
        Self {
            seed,
            counter: 0,
            spare: None,
        }
    }

    /// Returns the next id. One hash yields two of them.
    pub fn next(&mut self) -> CallId {
        if let Some(id) = self.spare.take() {
            return id;
        }
        let mut hash = Sha256::new();
        hash.update(self.seed);
        hash.update(self.counter.to_le_bytes());
        self.counter += 1;
        let hash = hash.finalize();
        let (first, second) = hash.split_at(16);
        self.spare = second.try_into().ok();
        first.try_into().expect("half of 32 bytes")
    }
}

/// A hasher for random keys, such as call ids: it takes their first 8 bytes.
#[derive(Debug, Default)]
pub(super) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(first) = bytes.first_chunk::<8>() {
            self.0 = u64::from_ne_bytes(*first);
        }
    }

    fn write_usize(&mut self, _: usize) {} // the length, which all ids share
}
