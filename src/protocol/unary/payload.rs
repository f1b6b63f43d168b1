//! Payloads, received straight into their final place.

/// Where the bytes of a payload end up.
pub trait Payload: Sized {
    /// Room for `len` bytes, which are going to be written; `None` if there is no memory for it.
    fn with_len(len: usize) -> Option<Self>;
    /// These bytes.
    fn copy_from(bytes: &[u8]) -> Self;
    /// The room.
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
