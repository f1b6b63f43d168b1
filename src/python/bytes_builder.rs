//! A bytes object that is received into: what comes is where Python wants it, without another copy.

use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

#[allow(unsafe_code)]
extern "C" {
    /// Of the stable ABI, but not of PyO3's bindings.
    fn _PyBytes_Resize(object: *mut *mut ffi::PyObject, size: ffi::Py_ssize_t) -> i32;
}

/// The interpreter has no memory for a bytes object. It becomes a `MemoryError` where no lock is
/// held.
#[derive(Debug)]
pub struct NoMemory;

impl From<NoMemory> for PyErr {
    fn from(_: NoMemory) -> Self {
        PyMemoryError::new_err(())
    }
}

/// Takes the new bytes object that `PyBytes_FromStringAndSize` or `_PyBytes_Resize` has returned.
///
/// # Safety
/// `new` must be a new reference to a bytes object, or null with an exception set.
#[allow(unsafe_code)]
#[inline(always)]
unsafe fn owned(py: Python<'_>, new: *mut ffi::PyObject) -> Result<Bound<'_, PyBytes>, NoMemory> {
    // SAFETY: the caller's; a MemoryError, which is preallocated, is cleared without running code.
    match unsafe { Bound::from_owned_ptr_or_opt(py, new) } {
        // SAFETY: the caller's.
        Some(object) => Ok(unsafe { object.cast_into_unchecked::<PyBytes>() }),
        None => {
            // SAFETY: the GIL is held.
            unsafe { ffi::PyErr_Clear() };
            Err(NoMemory)
        }
    }
}

/// A bytes object with a copy of `bytes`. Unlike `PyBytes::new`, it does not panic without memory.
#[allow(unsafe_code)]
#[inline(always)]
pub fn bytes<'py>(py: Python<'py>, bytes: &[u8]) -> Result<Bound<'py, PyBytes>, NoMemory> {
    let size = isize::try_from(bytes.len()).map_err(|_| NoMemory)?;
    // SAFETY: the pointer and the size are those of a slice.
    unsafe {
        let new = ffi::PyBytes_FromStringAndSize(bytes.as_ptr().cast(), size);
        owned(py, new)
    }
}

/// A bytes object nobody else has seen, of which the first `filled` bytes are written.
pub struct BytesBuilder {
    object: Py<PyBytes>,
    filled: usize,
}

#[allow(unsafe_code)]
impl BytesBuilder {
    /// Room for `size` bytes, at least one.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(py: Python<'_>, size: usize) -> Result<Self, NoMemory> {
        let size = isize::try_from(size.max(1)).unwrap_or(isize::MAX);
        // SAFETY: a null pointer asks for an uninitialised object of that size; what comes back is
        // a new reference, or null with an exception set. Zeroing it would cost a pass over all
        // that is received; `finish` gives out only what was written.
        let object = unsafe {
            let new = ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
            owned(py, new)?
        };
        Ok(Self {
            object: object.unbind(),
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
    /// There is no memory.
    pub fn finish(self, py: Python<'_>) -> Result<Bound<'_, PyBytes>, NoMemory> {
        let size = self.size(py);
        if self.filled == size {
            return Ok(self.object.into_bound(py));
        }
        if self.filled < size / 2 {
            return bytes(py, self.filled(py));
        }
        let count = isize::try_from(self.filled).unwrap_or(isize::MAX);
        let mut object = self.object.into_ptr();
        // SAFETY: the reference is the only one to the object, which was never hashed nor seen by
        // Python code; the call takes it and leaves a new one, or null with an exception set.
        unsafe {
            _PyBytes_Resize(&mut object, count);
            owned(py, object)
        }
    }
}
