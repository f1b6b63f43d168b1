//! `PublicKey`: a peer's public key.

use super::buffer::extract_bytes;
use super::peer_id::PyPeerId;
use p2pd_protocol::PublicKey;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};

/// A peer's public key, as libp2p serialises it (crypto.pb.PublicKey).
#[pyclass(frozen, eq, hash, weakref, name = "PublicKey", module = "p2pclient_rs")]
#[derive(PartialEq, Eq, Hash)]
pub struct PyPublicKey(PublicKey);

impl From<PublicKey> for PyPublicKey {
    fn from(key: PublicKey) -> Self {
        Self(key)
    }
}

#[pymethods]
impl PyPublicKey {
    #[new]
    fn new(key_type: i32, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let data = extract_bytes(data)?;
        Ok(Self(PublicKey { key_type, data }))
    }

    /// Decodes a serialised crypto.pb.PublicKey. Raises ValueError.
    #[staticmethod]
    fn from_bytes(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let key = PublicKey::decode(&extract_bytes(data)?);
        key.map(Self)
            .map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// 0 RSA, 1 Ed25519, 2 secp256k1, 3 ECDSA.
    #[getter]
    fn key_type(&self) -> i32 {
        self.0.key_type
    }

    /// The key, in the usual encoding for its type.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.data)
    }

    /// The id of the peer with this key.
    #[getter]
    fn peer_id(&self) -> PyPeerId {
        self.0.peer_id().into()
    }

    /// Returns the key as a serialised crypto.pb.PublicKey.
    fn serialize<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.encode())
    }

    /// Same as serialize(), under the name that protobuf messages use.
    #[pyo3(name = "SerializeToString")]
    fn serialize_to_string<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.serialize(py)
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.serialize(py)
    }

    fn __repr__(&self) -> String {
        format!(
            "<PublicKey key_type={} peer_id={}>",
            self.0.key_type,
            self.0.peer_id()
        )
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> (Bound<'py, PyType>, (i32, Bound<'py, PyBytes>)) {
        let key = slf.get();
        (slf.get_type(), (key.0.key_type, key.data(slf.py())))
    }
}
