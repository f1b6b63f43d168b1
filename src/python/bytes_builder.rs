//! Receives data directly into the bytes object that Python gets, which saves a copy.

use pyo3::exceptions::PyMemoryError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

#[allow(unsafe_code)]
extern "C" {
    /// Part of the stable ABI, but missing from PyO3's bindings.
    fn _PyBytes_Resize(object: *mut *mut ffi::PyObject, size: ffi::Py_ssize_t) -> i32;
}

/// The interpreter cannot allocate a bytes object. Converted to a `MemoryError` only while no lock is
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
    // SAFETY: guaranteed by the caller.
    match unsafe { Bound::from_owned_ptr_or_opt(py, new) } {
        // SAFETY: guaranteed by the caller.
        Some(object) => Ok(unsafe { object.cast_into_unchecked::<PyBytes>() }),
        None => {
            // SAFETY: the GIL is held. A MemoryError is preallocated, so clearing it runs no code.
            unsafe { ffi::PyErr_Clear() };
            Err(NoMemory)
        }
    }
}

/// Returns a bytes object with a copy of `bytes`. Unlike `PyBytes::new`, does not panic if there is no
/// memory.
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

/// Returns an uninitialised bytes object, which must not be shared before all of it is written. Zeroing it
/// would cost a pass over all received data.
#[allow(unsafe_code)]
pub fn uninitialised(py: Python<'_>, size: usize) -> Result<Bound<'_, PyBytes>, NoMemory> {
    let size = isize::try_from(size).map_err(|_| NoMemory)?;
    // SAFETY: a null pointer requests an uninitialised object of that size; the result is a new
    // reference, or null with an exception set.
    unsafe {
        let new = ffi::PyBytes_FromStringAndSize(std::ptr::null(), size);
        owned(py, new)
    }
}

/// Returns the content of a bytes object, to be written.
///
/// # Safety
/// The object must not be shared yet: nothing but `object` refers to it.
#[allow(unsafe_code)]
pub unsafe fn content_mut<'a>(py: Python<'_>, object: &'a mut Py<PyBytes>) -> &'a mut [u8] {
    let size = object.bind(py).as_bytes().len();
    // SAFETY: the object is a bytes object of that size. The caller guarantees that it is not shared.
    unsafe {
        let data = ffi::PyBytes_AsString(object.as_ptr());
        std::slice::from_raw_parts_mut(data.cast::<u8>(), size)
    }
}

/// A bytes object that is not shared yet. Its first `filled` bytes are written.
pub struct BytesBuilder {
    object: Py<PyBytes>,
    filled: usize,
}

#[allow(unsafe_code)]
impl BytesBuilder {
    /// A buffer of `size` bytes, at least one.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(py: Python<'_>, size: usize) -> Result<Self, NoMemory> {
        // `finish` returns only the bytes that were written.
        Ok(Self {
            object: uninitialised(py, size.max(1))?.unbind(),
            filled: 0,
        })
    }

    /// Size of the buffer, in bytes.
    pub fn size(&self, py: Python<'_>) -> usize {
        self.object.bind(py).as_bytes().len()
    }

    pub fn filled<'a>(&'a self, py: Python<'a>) -> &'a [u8] {
        &self.object.bind(py).as_bytes()[..self.filled]
    }

    /// The unwritten part of the buffer.
    pub fn rest<'a>(&'a mut self, py: Python<'a>) -> &'a mut [u8] {
        // SAFETY: nothing but this `&mut self` refers to the object.
        let all = unsafe { content_mut(py, &mut self.object) };
        &mut all[self.filled..]
    }

    /// Marks the next `count` bytes as written.
    pub fn advance(&mut self, py: Python<'_>, count: usize) {
        self.filled = (self.filled + count).min(self.size(py));
    }

    /// Appends as much of `bytes` as fits.
    pub fn push(&mut self, py: Python<'_>, bytes: &[u8]) {
        let rest = self.rest(py);
        let count = bytes.len().min(rest.len());
        rest[..count].copy_from_slice(&bytes[..count]);
        self.filled += count;
    }

    /// Returns the bytes that were written.
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
        // SAFETY: this is the only reference to the object, which was never hashed nor seen by Python
        // code. The call takes the reference and leaves a new one, or null with an exception set.
        unsafe {
            _PyBytes_Resize(&mut object, count);
            owned(py, object)
        }
    }
}
