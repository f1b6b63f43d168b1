//! What requests return: `PeerInfo`, `StreamInfo`, `Identity`, `PubsubMessage`.

use super::convert::{extract_multiaddr, extract_multiaddrs, extract_peer_id};
use super::multiaddr::PyMultiaddr;
use super::peer_id::PyPeerId;
use crate::core::{Multiaddr, PeerId, PubsubMessage};
use bytes::Bytes;
use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyIterator, PyList, PyString, PyTuple, PyType};

/// A peer and the addresses it can be reached at.
#[pyclass(
    frozen,
    subclass,
    eq,
    hash,
    weakref,
    name = "PeerInfo",
    module = "p2pclient_rs"
)]
#[derive(PartialEq, Eq, Hash)]
pub struct PyPeerInfo {
    peer_id: PeerId,
    addrs: Vec<Multiaddr>,
}

impl PyPeerInfo {
    /// From what a daemon said.
    pub fn from_core(peer_id: PeerId, addrs: Vec<Multiaddr>) -> Self {
        Self { peer_id, addrs }
    }
}

#[pymethods]
impl PyPeerInfo {
    #[new]
    fn new(peer_id: &Bound<'_, PyAny>, addrs: &Bound<'_, PyAny>) -> PyResult<Self> {
        let peer_id = extract_peer_id(peer_id)?;
        Ok(Self {
            peer_id,
            addrs: extract_multiaddrs(addrs)?,
        })
    }

    /// The peer.
    #[getter]
    fn peer_id(&self) -> PyPeerId {
        self.peer_id.clone().into()
    }

    /// Its addresses, in a new list.
    #[getter]
    fn addrs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        PyList::new(py, multiaddrs(py, &self.addrs)?)
    }

    fn __str__(&self) -> String {
        let addrs: Vec<_> = self.addrs.iter().map(Multiaddr::to_string).collect();
        format!("{} {}", self.peer_id, addrs.join(","))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let (name, info) = (slf.get_type().name()?, slf.get());
        let (peer_id, addrs) = (Bound::new(slf.py(), info.peer_id())?, info.addrs(slf.py())?);
        Ok(format!(
            "{name}(peer_id={}, addrs={})",
            peer_id.repr()?,
            addrs.repr()?
        ))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let (py, info) = (slf.py(), slf.get());
        Ok((
            slf.get_type(),
            (info.peer_id(), info.addrs(py)?).into_pyobject(py)?,
        ))
    }
}

/// An open stream: its remote peer, the address it came from or goes to, and its protocol.
#[pyclass(
    frozen,
    subclass,
    eq,
    hash,
    weakref,
    name = "StreamInfo",
    module = "p2pclient_rs"
)]
#[derive(PartialEq, Eq, Hash)]
pub struct PyStreamInfo {
    peer_id: PeerId,
    addr: Multiaddr,
    proto: String,
}

impl PyStreamInfo {
    /// From what a daemon said.
    pub fn from_core(peer_id: PeerId, addr: Multiaddr, proto: String) -> Self {
        Self {
            peer_id,
            addr,
            proto,
        }
    }
}

#[pymethods]
impl PyStreamInfo {
    #[new]
    fn new(peer_id: &Bound<'_, PyAny>, addr: &Bound<'_, PyAny>, proto: String) -> PyResult<Self> {
        Ok(Self {
            peer_id: extract_peer_id(peer_id)?,
            addr: extract_multiaddr(addr)?,
            proto,
        })
    }

    /// The remote peer.
    #[getter]
    fn peer_id(&self) -> PyPeerId {
        self.peer_id.clone().into()
    }

    /// The address of its end of the connection.
    #[getter]
    fn addr(&self) -> PyMultiaddr {
        self.addr.clone().into()
    }

    /// The protocol agreed on.
    #[getter]
    fn proto(&self) -> &str {
        &self.proto
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let (
            name,
            Self {
                peer_id,
                addr,
                proto,
            },
        ) = (slf.get_type().name()?, slf.get());
        Ok(format!(
            "<{name} peer_id={peer_id} addr={addr} proto={proto}>"
        ))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let info = slf.get();
        let args = (info.peer_id(), info.addr(), info.proto()).into_pyobject(slf.py())?;
        Ok((slf.get_type(), args))
    }
}

/// Who a daemon is: its peer id and the addresses it listens on.
///
/// Also the tuple of the two: `peer_id, addrs = await client.identify()`.
#[pyclass(frozen, sequence, weakref, name = "Identity", module = "p2pclient_rs")]
pub struct PyIdentity {
    peer_id: Py<PyPeerId>,
    addrs: Py<PyTuple>,
}

impl PyIdentity {
    /// From what a daemon said.
    pub fn from_core(py: Python<'_>, peer_id: PeerId, addrs: &[Multiaddr]) -> PyResult<Self> {
        let addrs = PyTuple::new(py, multiaddrs(py, addrs)?)?.unbind();
        Ok(Self {
            peer_id: Py::new(py, PyPeerId::from(peer_id))?,
            addrs,
        })
    }

    fn as_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        (&self.peer_id, &self.addrs).into_pyobject(py)
    }
}

#[pymethods]
impl PyIdentity {
    #[new]
    fn new(peer_id: &Bound<'_, PyAny>, addrs: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::from_core(
            peer_id.py(),
            extract_peer_id(peer_id)?,
            &extract_multiaddrs(addrs)?,
        )
    }

    /// The daemon's peer id.
    #[getter]
    fn peer_id(&self, py: Python<'_>) -> Py<PyPeerId> {
        self.peer_id.clone_ref(py)
    }

    /// The same as peer_id.
    #[getter]
    fn id(&self, py: Python<'_>) -> Py<PyPeerId> {
        self.peer_id.clone_ref(py)
    }

    /// The addresses it listens on.
    #[getter]
    fn addrs(&self, py: Python<'_>) -> Py<PyTuple> {
        self.addrs.clone_ref(py)
    }

    fn __len__(&self) -> usize {
        2
    }

    fn __getitem__<'py>(&self, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.as_tuple(index.py())?.as_any().get_item(index)
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        self.as_tuple(py)?.try_iter()
    }

    fn __eq__<'py>(&self, other: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let py = other.py();
        let other = match other.cast::<Self>() {
            Ok(other) => other.get().as_tuple(py)?,
            Err(_) => match other.cast::<PyTuple>() {
                Ok(other) => other.clone(),
                Err(_) => return Ok(py.NotImplemented().into_bound(py)),
            },
        };
        let equal = self.as_tuple(py)?.eq(other)?;
        Ok(equal.into_pyobject(py)?.to_owned().into_any())
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.as_tuple(py)?.hash()
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (peer_id, addrs) = (self.peer_id.bind(py).repr()?, self.addrs.bind(py).repr()?);
        Ok(format!("Identity(peer_id={peer_id}, addrs={addrs})"))
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        Ok((slf.get_type(), slf.get().as_tuple(slf.py())?))
    }
}

/// A message received on a pubsub topic.
///
/// The author's raw bytes are also at `getattr(message, "from")`, their name in the protocol.
#[pyclass(
    frozen,
    eq,
    hash,
    weakref,
    name = "PubsubMessage",
    module = "p2pclient_rs"
)]
#[derive(PartialEq, Eq, Hash)]
pub struct PyPubsubMessage {
    from: Bytes,
    data: Bytes,
    seqno: Bytes,
    topic_ids: Vec<String>,
    signature: Bytes,
    key: Bytes,
}

impl From<PubsubMessage> for PyPubsubMessage {
    fn from(message: PubsubMessage) -> Self {
        Self {
            from: message.from.map(|from| from.to_bytes()).unwrap_or_default(),
            data: message.data,
            seqno: message.seqno,
            topic_ids: message.topic_ids,
            signature: message.signature,
            key: message.key,
        }
    }
}

#[pymethods]
impl PyPubsubMessage {
    #[new]
    #[pyo3(signature = (peer_id, data, seqno, topic_ids, signature = None, key = None))]
    fn new(
        peer_id: Option<&Bound<'_, PyAny>>,
        data: PyBackedBytes,
        seqno: PyBackedBytes,
        topic_ids: Vec<String>,
        signature: Option<PyBackedBytes>,
        key: Option<PyBackedBytes>,
    ) -> PyResult<Self> {
        let from = peer_id.map(extract_peer_id).transpose()?;
        let bytes = |b: Option<PyBackedBytes>| b.map_or_else(Bytes::new, |b| b.to_vec().into());
        Ok(Self {
            from: from.map(|peer_id| peer_id.to_bytes()).unwrap_or_default(),
            data: bytes(Some(data)),
            seqno: bytes(Some(seqno)),
            topic_ids,
            signature: bytes(signature),
            key: bytes(key),
        })
    }

    /// The author, None of an anonymous message.
    #[getter]
    fn peer_id(&self) -> Option<PyPeerId> {
        (!self.from.is_empty()).then(|| PeerId::from_bytes(self.from.clone()).into())
    }

    /// What was published.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.data)
    }

    /// The author's number for the message; with the author, it names the message.
    #[getter]
    fn seqno<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.seqno)
    }

    /// The topics it was published on.
    #[getter]
    fn topic_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.topic_ids)
    }

    /// The author's signature, empty of an unsigned message.
    #[getter]
    fn signature<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.signature)
    }

    /// The author's serialised public key, empty where the peer id holds it.
    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.key)
    }

    // A keyword of Python, so not a property that a stub could declare.
    fn __getattr__<'py>(&self, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyBytes>> {
        if name == "from" {
            return Ok(PyBytes::new(name.py(), &self.from));
        }
        let message = format!("'PubsubMessage' object has no attribute '{name}'");
        Err(PyAttributeError::new_err(message))
    }

    fn __repr__(&self) -> String {
        let author = PeerId::from_bytes(self.from.clone());
        let (topics, length) = (self.topic_ids.join(","), self.data.len());
        format!("<PubsubMessage peer_id={author} topics={topics} {length} bytes>")
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let (py, message) = (slf.py(), slf.get());
        let args = (
            message.peer_id(),
            message.data(py),
            message.seqno(py),
            message.topic_ids(py)?,
            message.signature(py),
            message.key(py),
        );
        Ok((slf.get_type(), args.into_pyobject(py)?))
    }
}

/// What `__reduce__` returns: a class and its constructor's arguments.
type Reduced<'py> = (Bound<'py, PyType>, Bound<'py, PyTuple>);

fn multiaddrs<'py>(py: Python<'py>, addrs: &[Multiaddr]) -> PyResult<Vec<Bound<'py, PyMultiaddr>>> {
    addrs
        .iter()
        .map(|addr| Bound::new(py, PyMultiaddr::from(addr.clone())))
        .collect()
}
