//! `PeerID`, and the exception for invalid ones.

use super::buffer::{bytes_of, extract_bytes, is_named, wrong_type};
use p2pd_protocol::peer_id::ParsePeerIdError;
use p2pd_protocol::{PeerId, PublicKey};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::pyclass::CompareOp;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyString, PyType};
use sha2::{Digest, Sha256};

pyo3::create_exception!(
    p2pclient_rs,
    InvalidPeerID,
    PyValueError,
    "A value is not a peer id; the message says why."
);

/// The exception for a text that is not a peer id.
pub fn invalid_peer_id(text: &str, error: &ParsePeerIdError) -> PyErr {
    InvalidPeerID::new_err(format!("{text:?} is not a peer id: {error}"))
}

/// Converts a `PeerID`, text, bytes, or an object with `to_bytes()`. Bytes are not validated.
///
/// # Errors
/// `InvalidPeerID` for a text that is not a peer id, `TypeError` for other objects.
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

/// Parses a text.
///
/// # Errors
/// `InvalidPeerID`.
pub fn parse_peer_id(text: &Bound<'_, PyString>) -> PyResult<PeerId> {
    let text: PyBackedStr = text
        .extract()
        .map_err(|error: PyErr| InvalidPeerID::new_err(error.to_string()))?;
    text.parse().map_err(|error| invalid_peer_id(&text, &error))
}

/// The identity of a libp2p peer.
///
/// Takes the bytes of a multihash, which are not validated; a text, base58 or CID; or another peer
/// id. Raises InvalidPeerID if the text is not a peer id.
#[pyclass(frozen, subclass, weakref, name = "PeerID", module = "p2pclient_rs")]
pub struct PyPeerId {
    peer_id: PeerId,
    // Cached, because peer ids are keys of dicts and are logged: Python's bytes cache their hash, and
    // base58 takes quadratic time.
    bytes: PyOnceLock<Py<PyBytes>>,
    base58: PyOnceLock<Py<PyString>>,
}

impl From<PeerId> for PyPeerId {
    fn from(peer_id: PeerId) -> Self {
        Self {
            peer_id,
            bytes: PyOnceLock::new(),
            base58: PyOnceLock::new(),
        }
    }
}

impl PyPeerId {
    /// The peer id itself.
    pub fn core(&self) -> &PeerId {
        &self.peer_id
    }

    /// An instance of `class`, which may be a subclass.
    fn instance<'py>(class: &Bound<'py, PyType>, peer_id: PeerId) -> PyResult<Bound<'py, PyAny>> {
        let py = class.py();
        if class.is(py.get_type::<Self>()) {
            return Ok(Bound::new(py, Self::from(peer_id))?.into_any());
        }
        class.call1((PyBytes::new(py, peer_id.as_bytes()),))
    }

    fn equals(&self, other: &Bound<'_, PyAny>) -> PyResult<Option<bool>> {
        if let Ok(other) = other.cast::<Self>() {
            return Ok(Some(self.peer_id == other.get().peer_id));
        }
        if let Ok(text) = other.cast::<PyString>() {
            if self.text(other.py()).as_any().eq(text)? {
                return Ok(Some(true));
            }
            return Ok(Some(
                parse_peer_id(text).is_ok_and(|other| other == self.peer_id),
            ));
        }
        if other.is_instance_of::<PyBytes>() || is_named(other, &["PeerID", "ID"])? {
            return Ok(bytes_of(other)?.map(|other| self.peer_id.as_bytes() == other));
        }
        Ok(None)
    }

    fn text<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        let new = || PyString::new(py, &self.peer_id.to_base58()).unbind();
        self.base58.get_or_init(py, new).bind(py).clone()
    }
}

#[pymethods]
impl PyPeerId {
    #[new]
    fn new(peer_id_bytes: &Bound<'_, PyAny>) -> PyResult<Self> {
        extract_peer_id(peer_id_bytes).map(Self::from)
    }

    /// Parses a base58 text. Raises InvalidPeerID.
    #[classmethod]
    fn from_base58<'py>(
        cls: &Bound<'py, PyType>,
        b58_encoded_peer_id_str: &Bound<'py, PyString>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::instance(cls, parse_peer_id(b58_encoded_peer_id_str)?)
    }

    /// Parses a base58 text or a CIDv1 text. Raises InvalidPeerID.
    #[classmethod]
    fn from_string<'py>(
        cls: &Bound<'py, PyType>,
        text: &Bound<'py, PyString>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::instance(cls, parse_peer_id(text)?)
    }

    /// Returns the peer id with these bytes, which are not validated.
    #[classmethod]
    fn from_bytes<'py>(
        cls: &Bound<'py, PyType>,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        Self::instance(cls, PeerId::from_bytes(extract_bytes(data)?))
    }

    /// Returns the id of the peer with a public key: a PublicKey, a serialised one, or an object
    /// with serialize(). Raises InvalidPeerID if the bytes are not a public key.
    #[classmethod]
    fn from_pubkey<'py>(
        cls: &Bound<'py, PyType>,
        key: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let serialized = match key.getattr_opt("serialize")? {
            Some(serialize) => extract_bytes(&serialize.call0()?)?,
            None => extract_bytes(key)?,
        };
        PublicKey::decode(&serialized)
            .map_err(|error| InvalidPeerID::new_err(error.to_string()))?;
        Self::instance(cls, PeerId::from_public_key(&serialized))
    }

    /// Returns the bytes of the multihash.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let new = || PyBytes::new(py, self.peer_id.as_bytes()).unbind();
        self.bytes.get_or_init(py, new).bind(py).clone()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.to_bytes(py)
    }

    /// Returns the base58 text: Qm… or 12D3Koo….
    fn to_base58<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.text(py)
    }

    /// Returns the base58 text.
    fn to_string<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.text(py)
    }

    /// Returns the base58 text.
    fn pretty<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.text(py)
    }

    /// Returns the text as a CIDv1 in base32: bafz….
    fn to_cid(&self) -> String {
        self.peer_id.to_cid()
    }

    /// Returns whether the bytes are a multihash, as those of every real peer id are.
    fn is_valid(&self) -> bool {
        self.peer_id.is_valid()
    }

    /// The SHA-256 of the bytes as a number: the position in a Kademlia table.
    #[getter]
    fn xor_id<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let digest = Sha256::digest(self.peer_id.as_bytes());
        py.get_type::<PyInt>()
            .call_method1("from_bytes", (PyBytes::new(py, &digest), "big"))
    }

    fn __str__<'py>(&self, py: Python<'py>) -> Bound<'py, PyString> {
        self.text(py)
    }

    // As p2pclient and hivemind print it; users search logs for this form.
    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<libp2p.peer.id.ID ({})>", self.text(py))
    }

    // Also equal to its text and its bytes, as in p2pclient and hivemind. Has the hash of its bytes, so
    // only the bytes are interchangeable with it as a key of a dict.
    fn __richcmp__<'py>(
        &self,
        other: &Bound<'py, PyAny>,
        op: CompareOp,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = other.py();
        let answer = match op {
            CompareOp::Eq => self.equals(other)?,
            CompareOp::Ne => self.equals(other)?.map(|equal| !equal),
            // Ordered by text, as in hivemind. The order of the bytes differs for ids of different
            // lengths.
            _ => match other.cast::<Self>() {
                Ok(other) => {
                    let (mine, theirs) = (self.text(py), other.get().text(py));
                    Some(op.matches(mine.to_str()?.cmp(theirs.to_str()?)))
                }
                Err(_) => None,
            },
        };
        match answer {
            Some(answer) => Ok(answer.into_pyobject(py)?.to_owned().into_any()),
            None => Ok(py.NotImplemented().into_bound(py)),
        }
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.to_bytes(py).hash()
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> (Bound<'py, PyType>, (Bound<'py, PyBytes>,)) {
        (slf.get_type(), (slf.get().to_bytes(slf.py()),))
    }
}
