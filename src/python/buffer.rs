//! The bytes of Python objects, and the `TypeError` for objects without bytes.

use bytes::Bytes;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyMemoryView};

/// Returns the bytes of a bytes-like object or of one with `to_bytes()`; `None` for other objects.
///
/// # Errors
/// The exception of its `to_bytes`, or `TypeError` if that does not return bytes.
pub fn bytes_of(object: &Bound<'_, PyAny>) -> PyResult<Option<Bytes>> {
    if let Ok(bytes) = object.cast::<PyBytes>() {
        return Ok(Some(Bytes::copy_from_slice(bytes.as_bytes())));
    }
    if let Ok(bytes) = object.cast::<PyByteArray>() {
        return Ok(Some(bytes.to_vec().into()));
    }
    if object.is_instance_of::<PyMemoryView>() {
        let bytes = object.call_method0("tobytes")?.extract::<PyBackedBytes>()?;
        return Ok(Some(Bytes::copy_from_slice(&bytes)));
    }
    // `(5).to_bytes()` is b"\x05", which is never intended.
    if object.is_instance_of::<PyInt>() {
        return Ok(None);
    }
    let Some(to_bytes) = object.getattr_opt("to_bytes")? else {
        return Ok(None);
    };
    let bytes = to_bytes.call0()?.extract::<PyBackedBytes>()?;
    Ok(Some(Bytes::copy_from_slice(&bytes)))
}

/// Like [`bytes_of`], but objects without bytes are an error.
///
/// # Errors
/// `TypeError` for other objects.
pub fn extract_bytes(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    bytes_of(object)?.ok_or_else(|| wrong_type("bytes", object))
}

/// Returns whether an object's class has one of these names. Used to recognise peer ids and multiaddrs
/// of other libraries.
pub fn is_named(object: &Bound<'_, PyAny>, names: &[&str]) -> PyResult<bool> {
    let name = object.get_type().name()?;
    Ok(names.iter().any(|known| name == *known))
}

/// Calls `f` with the bytes of a bytes object or of any contiguous buffer of bytes.
#[allow(unsafe_code)]
pub fn with_bytes<T>(data: &Bound<'_, PyAny>, f: impl FnOnce(&[u8]) -> PyResult<T>) -> PyResult<T> {
    if let Ok(bytes) = data.cast::<PyBytes>() {
        return f(bytes.as_bytes());
    }
    let buffer = match PyBuffer::<u8>::get(data) {
        Ok(buffer) => buffer,
        Err(error) if error.is_instance_of::<PyBufferError>(data.py()) => {
            // The items are not bytes, for example floats. This is rare, so a copy is fine.
            let bytes = PyMemoryView::from(data)?.call_method0("tobytes")?;
            return f(bytes.cast::<PyBytes>()?.as_bytes());
        }
        Err(error) => return Err(error),
    };
    if !buffer.is_c_contiguous() {
        return f(&buffer.to_vec(data.py())?);
    }
    if buffer.len_bytes() == 0 {
        return f(&[]);
    }
    // SAFETY: the buffer is contiguous and `len_bytes` long, and its exporter keeps it in place while
    // the PyBuffer is held. `f` writes to a socket and runs no Python code, which could change the
    // bytes. Copying instead would cost a pass over every large payload sent.
    let bytes =
        unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
    f(bytes)
}

/// The `TypeError` for an argument that is not `wanted`.
pub fn wrong_type(wanted: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let found = object.get_type();
    PyTypeError::new_err(format!("expected {wanted}, not {found}"))
}
