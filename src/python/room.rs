//! A bytes object that is received into: what comes is where Python wants it, without another copy.

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

#[allow(unsafe_code)]
extern "C" {
    /// Of the stable ABI, but not of PyO3's bindings.
    fn _PyBytes_Resize(object: *mut *mut ffi::PyObject, size: ffi::Py_ssize_t) -> i32;
}

/// A bytes object nobody else has seen, of which the first `filled` bytes are written.
pub struct Room {
    object: Py<PyBytes>,
    filled: usize,
}

#[allow(unsafe_code)]
impl Room {
    /// Room for `size` bytes, at least one.
    ///
    /// # Errors
    /// `MemoryError`.
    pub fn new(py: Python<'_>, size: usize) -> PyResult<Self> {
        let size = isize::try_from(size.max(1)).unwrap_or(isize::MAX);
        // SAFETY: a null pointer asks for an uninitialised object of that size; what comes back is
        // a new reference, or null with an exception set. Zeroing it would cost a pass over all
        // that is received; `finish` gives out only what was written.
        let object = unsafe {
            let new = ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
            Bound::from_owned_ptr_or_err(py, new)?
        };
        Ok(Self {
            object: object.cast_into::<PyBytes>()?.unbind(),
            filled: 0,
        })
    }

    /// How many bytes there is room for, in all.
    pub fn size(&self, py: Python<'_>) -> usize {
        self.object.bind(py).as_bytes().len()
    }

    pub fn filled<'a>(&'a self, py: Python<'a>) -> &'a [u8] {
        &self.object.bind(py).as_bytes()[..self.filled]
    }

    /// What is still to be written.
    pub fn rest<'a>(&'a mut self, py: Python<'a>) -> &'a mut [u8] {
        let size = self.size(py);
        // SAFETY: the object is a bytes object of that size, and nothing but this `&mut self`
        // refers to it.
        let all = unsafe {
            let data = ffi::PyBytes_AsString(self.object.as_ptr());
            std::slice::from_raw_parts_mut(data.cast::<u8>(), size)
        };
        &mut all[self.filled..]
    }

    /// Says that `count` bytes more are written.
    pub fn advance(&mut self, py: Python<'_>, count: usize) {
        self.filled = (self.filled + count).min(self.size(py));
    }

    /// Adds what fits of `bytes`.
    pub fn push(&mut self, py: Python<'_>, bytes: &[u8]) {
        let rest = self.rest(py);
        let count = bytes.len().min(rest.len());
        rest[..count].copy_from_slice(&bytes[..count]);
        self.filled += count;
    }

    /// What was written.
    ///
    /// # Errors
    /// `MemoryError`.
    pub fn finish(self, py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
        let size = self.size(py);
        if self.filled == size {
            return Ok(self.object.into_bound(py));
        }
        if self.filled < size / 2 {
            return Ok(PyBytes::new(py, self.filled(py)));
        }
        let count = isize::try_from(self.filled).unwrap_or(isize::MAX);
        let mut object = self.object.into_ptr();
        // SAFETY: the reference is the only one to the object, which was never hashed nor seen by
        // Python code; the call takes it and leaves a new one, or null with an exception set.
        unsafe {
            _PyBytes_Resize(&mut object, count);
            Ok(Bound::from_owned_ptr_or_err(py, object)?.cast_into::<PyBytes>()?)
        }
    }
}
