//! [`Payload`]: the driver's buffer, into which a payload is received directly.

/// A buffer for a payload.
pub trait Payload: Sized {
    /// Allocates `len` bytes, all of which will be written; `None` if there is not enough memory.
    fn with_len(len: usize) -> Option<Self>;
    /// Copies a payload.
    fn copy_from(bytes: &[u8]) -> Self;
    /// The bytes to write to.
    fn as_mut(&mut self) -> &mut [u8];
}

impl Payload for Vec<u8> {
    fn with_len(len: usize) -> Option<Self> {
        Some(vec![0; len])
    }

    fn copy_from(bytes: &[u8]) -> Self {
        bytes.to_vec()
    }

    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}
