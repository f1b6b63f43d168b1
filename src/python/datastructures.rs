//! The Python classes of replies and messages: `PeerInfo`, `StreamInfo`, `Identity`, `PubsubMessage`.

use super::buffer::extract_bytes;
use super::multiaddr::{extract_multiaddr, extract_multiaddrs, PyMultiaddr};
use super::peer_id::{extract_peer_id, PyPeerId};
use bytes::Bytes;
use p2pd_protocol::{Multiaddr, PeerId, PubsubMessage};
use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{IntoPyDict, PyBytes, PyList, PyString, PyTuple, PyType};

/// A peer and its addresses.
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
    /// Makes one from the values of a daemon's reply.
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

    /// Same as peer_id.
    #[getter]
    fn id(&self) -> PyPeerId {
        self.peer_id()
    }

    /// The addresses, in a new list.
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

/// The remote peer of a stream, its address, and the protocol of the stream.
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
    /// Makes one from the values of a daemon's reply.
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

    /// The address of the remote peer.
    #[getter]
    fn addr(&self) -> PyMultiaddr {
        self.addr.clone().into()
    }

    /// The protocol that was agreed on.
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

/// The class `Identity`: a daemon's peer id and addresses.
///
/// A named tuple, because programs for p2pclient and hivemind unpack a tuple, and a `#[pyclass]`
/// cannot be one.
pub fn identity_type(py: Python<'_>) -> PyResult<&Bound<'_, PyAny>> {
    static IDENTITY: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let class = IDENTITY.get_or_try_init(py, || {
        let module = [("module", "p2pclient_rs")].into_py_dict(py)?;
        let class = py.import("collections")?.getattr("namedtuple")?;
        let class = class.call(("Identity", ("peer_id", "addrs")), Some(&module))?;
        class.setattr("id", class.getattr("peer_id")?)?;
        let doc = "Who a daemon is: its peer id (also as id) and the addresses it listens on.";
        class.setattr("__doc__", doc)?;
        Ok::<_, PyErr>(class.unbind())
    })?;
    Ok(class.bind(py))
}

/// An `Identity` with the values of a daemon's reply.
pub fn identity<'py>(
    py: Python<'py>,
    peer_id: PeerId,
    addrs: &[Multiaddr],
) -> PyResult<Bound<'py, PyAny>> {
    let addrs = PyTuple::new(py, multiaddrs(py, addrs)?)?;
    identity_type(py)?.call1((PyPeerId::from(peer_id), addrs))
}

/// A message received on a pubsub topic.
///
/// The raw bytes of the author are also at `getattr(message, "from")`, their name in the protocol.
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
    #[pyo3(
        signature = (peer_id, data, seqno, topic_ids, signature = None, key = None),
        text_signature = "(peer_id, data, seqno, topic_ids, signature=b'', key=b'')"
    )]
    fn new(
        peer_id: Option<&Bound<'_, PyAny>>,
        data: &Bound<'_, PyAny>,
        seqno: &Bound<'_, PyAny>,
        topic_ids: &Bound<'_, PyAny>,
        signature: Option<&Bound<'_, PyAny>>,
        key: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let from = peer_id.map(extract_peer_id).transpose()?;
        Ok(Self {
            from: from.map(|peer_id| peer_id.to_bytes()).unwrap_or_default(),
            data: extract_bytes(data)?,
            seqno: extract_bytes(seqno)?,
            topic_ids: topic_ids
                .try_iter()?
                .map(|id| id?.extract())
                .collect::<PyResult<_>>()?,
            signature: signature
                .map(extract_bytes)
                .transpose()?
                .unwrap_or_default(),
            key: key.map(extract_bytes).transpose()?.unwrap_or_default(),
        })
    }

    /// The author; None if the message is anonymous.
    #[getter]
    fn peer_id(&self) -> Option<PyPeerId> {
        (!self.from.is_empty()).then(|| PeerId::from_bytes(self.from.clone()).into())
    }

    /// The published data.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.data)
    }

    /// The author's number for the message. Together with the author it identifies it.
    #[getter]
    fn seqno<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.seqno)
    }

    /// The topics on which the message was published.
    #[getter]
    fn topic_ids<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.topic_ids)
    }

    /// The author's signature; empty if the message is unsigned.
    #[getter]
    fn signature<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.signature)
    }

    /// The author's serialised public key; empty if the peer id contains it.
    #[getter]
    fn key<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.key)
    }

    // Not a property: `from` is a keyword of Python, so no stub could declare it.
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

/// The return type of `__reduce__`: a class and the arguments of its constructor.
type Reduced<'py> = (Bound<'py, PyType>, Bound<'py, PyTuple>);

fn multiaddrs<'py>(py: Python<'py>, addrs: &[Multiaddr]) -> PyResult<Vec<Bound<'py, PyMultiaddr>>> {
    addrs
        .iter()
        .map(|addr| Bound::new(py, PyMultiaddr::from(addr.clone())))
        .collect()
}
