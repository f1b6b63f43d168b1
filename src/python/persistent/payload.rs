//! The payload of a unary call, received directly into a Python bytes object.

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
        Python::attach(|py| {
            let size = isize::try_from(len).ok()?;
            // SAFETY: a null pointer requests an uninitialised object of that size; the result is a
            // new reference, or null with an exception set. Zeroing the object would cost a pass over
            // every large payload, and the protocol emits it only when all of it is written.
            let bytes = unsafe {
                let new = pyo3::ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
                Bound::from_owned_ptr_or_err(py, new)
            };
            let bytes = bytes.ok()?.cast_into::<PyBytes>().ok()?;
            Some(Self(bytes.unbind()))
        })
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Python::attach(|py| Self(PyBytes::new(py, bytes).unbind()))
    }

    fn as_mut(&mut self) -> &mut [u8] {
        Python::attach(|py| {
            let len = self.0.bind(py).as_bytes().len();
            // SAFETY: the object is a bytes object of that length. It is written to only while it is
            // being received, when nothing but this `&mut self` refers to it.
            unsafe {
                let data = pyo3::ffi::PyBytes_AsString(self.0.as_ptr());
                std::slice::from_raw_parts_mut(data.cast::<u8>(), len)
            }
        })
    }
}
