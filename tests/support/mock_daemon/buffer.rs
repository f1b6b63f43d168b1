//! The payloads of unary calls.

use p2pd_protocol::unary::Payload;
use std::cell::RefCell;

thread_local! {
    /// Room of payloads that this thread is done with.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Size of payloads whose room a thread keeps, in bytes, and the number of them.
const REUSED: usize = 16 << 10;
const MAX_SPARE: usize = 8;

/// A payload. The room of a large one is used again: allocating and zeroing it costs more than copying.
pub(super) struct Buffer(pub(super) Vec<u8>);

impl Payload for Buffer {
    fn with_len(len: usize) -> Option<Self> {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        let spare = spare.filter(|room| room.len() == len);
        Some(Self(spare.unwrap_or_else(|| vec![0; len])))
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.len() >= REUSED {
            let room = std::mem::take(&mut self.0);
            // It fails in a thread that is ending.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                spare.truncate(MAX_SPARE - 1);
                spare.push(room);
            });
        }
    }
}
