//! The payloads of unary calls.

use p2pd_protocol::unary::Payload;
use std::cell::RefCell;

thread_local! {
    /// Buffers that this thread may reuse.
    static SPARE: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Smallest buffer that is kept for reuse, in bytes, and the largest number of them.
const REUSED: usize = 16 << 10;
const MAX_SPARE: usize = 8;

/// A payload. Large buffers are reused, since allocating and zeroing one costs more than a copy.
pub(super) struct Buffer(pub(super) Vec<u8>);

impl Payload for Buffer {
    fn with_len(len: usize) -> Option<Self> {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        let spare = spare.filter(|buffer| buffer.len() == len);
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
            let buffer = std::mem::take(&mut self.0);
            // Fails in a thread that is ending.
            let _ = SPARE.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                spare.truncate(MAX_SPARE - 1);
                spare.push(buffer);
            });
        }
    }
}
