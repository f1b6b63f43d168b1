//! The payload of a unary call, received directly into a Python bytes object.

use crate::bytes_builder::{content_mut, uninitialised};
use p2pd_protocol::unary::Payload;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// A payload in the bytes object that Python gets.
pub struct PyPayload(Py<PyBytes>);

impl PyPayload {
    pub fn into_bytes(self) -> Py<PyBytes> {
        self.0
    }
}

#[allow(unsafe_code)]
impl Payload for PyPayload {
    fn with_len(len: usize) -> Option<Self> {
        // The protocol emits it only when all of it is written.
        Python::attach(|py| Some(Self(uninitialised(py, len).ok()?.unbind())))
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Python::attach(|py| Self(PyBytes::new(py, bytes).unbind()))
    }

    fn as_mut(&mut self) -> &mut [u8] {
        Python::attach(|py| {
            // SAFETY: the payload is written to only while it is being received, when nothing but this
            // `&mut self` refers to it.
            unsafe { content_mut(py, &mut self.0) }
        })
    }
}
