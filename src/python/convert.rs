//! What the Python API accepts where it wants bytes, a peer id or a multiaddr.

use super::multiaddr::{invalid_multiaddr, InvalidMultiaddr, PyMultiaddr};
use super::peer_id::{invalid_peer_id, InvalidPeerID, PyPeerId};
use bytes::Bytes;
use p2pd_protocol::{Multiaddr, PeerId};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyByteArray, PyBytes, PyInt, PyMemoryView, PyString};

/// A peer id out of a `PeerID`, text, bytes, or any object with `to_bytes()`. Bytes are taken as
/// they are.
///
/// # Errors
/// `InvalidPeerID` for text that is no peer id, `TypeError` for other objects.
pub fn extract_peer_id(object: &Bound<'_, PyAny>) -> PyResult<PeerId> {
    if let Ok(peer_id) = object.cast::<PyPeerId>() {
        return Ok(peer_id.get().core().clone());
    }
    if let Ok(text) = object.cast::<PyString>() {
        return parse_peer_id(text);
    }
    match bytes_of(object)? {
        Some(bytes) => Ok(PeerId::from_bytes(bytes)),
        None => Err(wrong_type("a peer id", object)),
    }
}

/// The peer id in a text.
///
/// # Errors
/// `InvalidPeerID`.
pub fn parse_peer_id(text: &Bound<'_, PyString>) -> PyResult<PeerId> {
    let text: PyBackedStr = text
        .extract()
        .map_err(|error: PyErr| InvalidPeerID::new_err(error.to_string()))?;
    text.parse().map_err(|error| invalid_peer_id(&text, &error))
}

/// A multiaddr out of a `Multiaddr`, text, bytes, or any object with `to_bytes()` (such as
/// py-multiaddr's). A unix path without its leading slash gets one, see
/// [`Multiaddr::with_absolute_path`].
///
/// # Errors
/// `InvalidMultiaddr` for what is no multiaddr, `TypeError` for other objects.
pub fn extract_multiaddr(object: &Bound<'_, PyAny>) -> PyResult<Multiaddr> {
    if let Ok(addr) = object.cast::<PyMultiaddr>() {
        return Ok(addr.get().core().clone());
    }
    if let Ok(text) = object.cast::<PyString>() {
        let text: PyBackedStr = text
            .extract()
            .map_err(|error: PyErr| InvalidMultiaddr::new_err(error.to_string()))?;
        return text
            .parse()
            .map_err(|error| invalid_multiaddr(&format!("{text:?}"), &error));
    }
    let Some(bytes) = bytes_of(object)? else {
        return Err(wrong_type("a multiaddr", object));
    };
    let addr = Multiaddr::from_bytes(bytes);
    match addr.validate() {
        Ok(()) => Ok(addr.with_absolute_path()),
        Err(error) => Err(invalid_multiaddr(&format!("{:?}", addr.to_bytes()), &error)),
    }
}

/// As [`extract_multiaddr`], of each item of an iterable.
///
/// # Errors
/// Also `TypeError` for a single text, each character of which would be an item.
pub fn extract_multiaddrs(iterable: &Bound<'_, PyAny>) -> PyResult<Vec<Multiaddr>> {
    if iterable.is_instance_of::<PyString>() {
        return Err(wrong_type("an iterable of multiaddrs", iterable));
    }
    iterable
        .try_iter()?
        .map(|item| extract_multiaddr(&item?))
        .collect()
}

/// The bytes of a bytes-like object or of one with `to_bytes()`; `None` of others.
///
/// # Errors
/// Whatever its `to_bytes` raises, or `TypeError` when that returns no bytes.
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
    // `(5).to_bytes()` is b"\x05", which nobody means.
    if object.is_instance_of::<PyInt>() {
        return Ok(None);
    }
    let Some(to_bytes) = object.getattr_opt("to_bytes")? else {
        return Ok(None);
    };
    let bytes = to_bytes.call0()?.extract::<PyBackedBytes>()?;
    Ok(Some(Bytes::copy_from_slice(&bytes)))
}

/// As [`bytes_of`], where nothing but bytes will do.
///
/// # Errors
/// `TypeError` for other objects.
pub fn extract_bytes(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    bytes_of(object)?.ok_or_else(|| wrong_type("bytes", object))
}

/// Whether an object is of a class with one of these names: how a peer id or multiaddr of another
/// library is told from anything else that has bytes.
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
            // Of other items than bytes, as an array of floats: rare enough for a copy.
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
    // SAFETY: the buffer is contiguous and `len_bytes` long, its exporter keeps it in place while
    // the PyBuffer is held, and no Python code, which could change it, runs in `f`: `f` writes to
    // a socket. Copying instead would cost a pass over every large payload sent.
    let bytes =
        unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.len_bytes()) };
    f(bytes)
}

fn wrong_type(wanted: &str, object: &Bound<'_, PyAny>) -> PyErr {
    let found = object.get_type();
    PyTypeError::new_err(format!("expected {wanted}, not {found}"))
}
