//! `Multiaddr` and `Protocol`, and their exceptions.

use super::buffer::{bytes_of, extract_bytes, is_named, wrong_type};
use p2pd_protocol::endpoint::{Endpoint, Host};
use p2pd_protocol::multiaddr::{Component, MultiaddrError};
use p2pd_protocol::Multiaddr;
use pyo3::exceptions::{PyLookupError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::pyclass::CompareOp;
use pyo3::types::{PyBytes, PyString, PyTuple};
use unsigned_varint::encode;

pyo3::create_exception!(
    p2pclient_rs,
    InvalidMultiaddr,
    PyValueError,
    "A value is not a multiaddr, or is one that cannot be taken apart; the message says why."
);

pyo3::create_exception!(
    p2pclient_rs,
    ProtocolLookupError,
    PyLookupError,
    "A multiaddr has no such protocol in it."
);

/// The exception for a value that is not a multiaddr, shown as `shown`.
pub fn invalid_multiaddr(shown: &str, error: &MultiaddrError) -> PyErr {
    InvalidMultiaddr::new_err(format!("{shown} is not a multiaddr: {error}"))
}

/// Converts a `Multiaddr`, text, bytes, or an object with `to_bytes()`, such as py-multiaddr's. A
/// unix path without its leading slash gets one; see [`Multiaddr::with_absolute_path`].
///
/// # Errors
/// `InvalidMultiaddr` for a value that is not a multiaddr, `TypeError` for other objects.
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

/// Converts each item of an iterable as [`extract_multiaddr`] does.
///
/// # Errors
/// Also `TypeError` for a single text, whose items would be its characters.
pub fn extract_multiaddrs(iterable: &Bound<'_, PyAny>) -> PyResult<Vec<Multiaddr>> {
    if iterable.is_instance_of::<PyString>() {
        return Err(wrong_type("an iterable of multiaddrs", iterable));
    }
    iterable
        .try_iter()?
        .map(|item| extract_multiaddr(&item?))
        .collect()
}

/// A network address: a sequence of protocols with their values.
///
/// Takes a text such as "/ip4/127.0.0.1/tcp/4001" or "/unix/tmp/p2pd.sock", the binary form, or an
/// object whose to_bytes() returns that. Raises InvalidMultiaddr. A binary form may contain a
/// protocol that this version does not know. Such an address prints as "/unknown/" and hexadecimal
/// digits from there on, and cannot be taken apart.
#[pyclass(frozen, weakref, name = "Multiaddr", module = "p2pclient_rs")]
pub struct PyMultiaddr(Multiaddr);

impl From<Multiaddr> for PyMultiaddr {
    fn from(addr: Multiaddr) -> Self {
        Self(addr)
    }
}

impl PyMultiaddr {
    /// The address itself.
    pub fn core(&self) -> &Multiaddr {
        &self.0
    }

    fn components(&self) -> PyResult<Vec<Component<'_>>> {
        self.0.components().map_err(|error| {
            InvalidMultiaddr::new_err(format!("{} cannot be taken apart: {error}", self.0))
        })
    }
}

#[pymethods]
impl PyMultiaddr {
    #[new]
    fn new(addr: &Bound<'_, PyAny>) -> PyResult<Self> {
        extract_multiaddr(addr).map(Self)
    }

    /// Returns the address with this binary form, which is not validated.
    #[staticmethod]
    fn from_bytes(data: &Bound<'_, PyAny>) -> PyResult<Self> {
        extract_bytes(data).map(|bytes| Self(Multiaddr::from_bytes(bytes)))
    }

    /// Returns these addresses, one after the other. Raises InvalidMultiaddr.
    #[staticmethod]
    #[pyo3(signature = (*addrs))]
    fn join(addrs: &Bound<'_, PyTuple>) -> PyResult<Self> {
        let mut bytes = Vec::new();
        for addr in addrs {
            bytes.extend_from_slice(extract_multiaddr(&addr)?.as_bytes());
        }
        let addr = Multiaddr::from_bytes(bytes);
        match addr.validate() {
            Ok(()) => Ok(Self(addr)),
            Err(error) => Err(invalid_multiaddr(&addr.to_string(), &error)),
        }
    }

    /// Returns the binary form. In it the path of /unix has its leading slash, as in Go.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.as_bytes())
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.to_bytes(py)
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        format!("<Multiaddr {}>", self.0)
    }

    /// Returns the protocols, in order. Raises InvalidMultiaddr.
    fn protocols(&self) -> PyResult<Vec<PyProtocol>> {
        Ok(self.components()?.iter().map(PyProtocol::from).collect())
    }

    /// Returns the protocols with their values; None for a protocol without a value. Raises
    /// InvalidMultiaddr.
    fn items(&self) -> PyResult<Vec<(PyProtocol, Option<String>)>> {
        let parts = self.components()?;
        Ok(parts
            .into_iter()
            .map(|part| (PyProtocol::from(&part), part.value))
            .collect())
    }

    /// Returns the value of the first protocol with this name or code; None for a protocol without
    /// a value. The value of "unix" is the path with its leading slash. Raises ProtocolLookupError
    /// if there is no such protocol, InvalidMultiaddr.
    fn value_for_protocol(&self, proto: WantedProtocol) -> PyResult<Option<String>> {
        let found = self.components()?.into_iter().find(|part| match &proto {
            WantedProtocol::Name(name) => part.name == &**name,
            WantedProtocol::Code(code) | WantedProtocol::Protocol { code } => part.code == *code,
        });
        let absent = || {
            let wanted = match &proto {
                WantedProtocol::Name(name) => name.to_string(),
                WantedProtocol::Code(code) | WantedProtocol::Protocol { code } => code.to_string(),
            };
            ProtocolLookupError::new_err(format!("{} has no protocol {wanted}", self.0))
        };
        found.ok_or_else(absent).map(|part| part.value)
    }

    fn __getitem__(&self, proto: WantedProtocol) -> PyResult<Option<String>> {
        self.value_for_protocol(proto)
    }

    /// Returns each protocol with its value as an address; after maxsplit of them, if that is not
    /// negative, the rest as one address. Raises InvalidMultiaddr.
    #[pyo3(signature = (maxsplit = -1), text_signature = "($self, maxsplit=-1)")]
    fn split(&self, maxsplit: isize) -> PyResult<Vec<Self>> {
        let mut rest = self.0.to_bytes();
        let mut addrs = Vec::new();
        for part in self.components()? {
            if usize::try_from(maxsplit).is_ok_and(|most| addrs.len() == most) {
                break;
            }
            addrs.push(Self(Multiaddr::from_bytes(rest.split_to(part.bytes.len()))));
        }
        if !rest.is_empty() {
            addrs.push(Self(Multiaddr::from_bytes(rest)));
        }
        Ok(addrs)
    }

    /// Returns this address followed by another. Raises InvalidMultiaddr, also if this address
    /// ends with /unix.
    fn encapsulate(slf: &Bound<'_, Self>, other: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::join(&PyTuple::new(slf.py(), [slf.as_any(), other])?)
    }

    /// Returns this address up to the last occurrence of the other. Raises ValueError if there is
    /// none, InvalidMultiaddr.
    fn decapsulate(&self, addr: &Bound<'_, PyAny>) -> PyResult<Self> {
        let inner = Self(extract_multiaddr(addr)?);
        let (mine, theirs) = (self.components()?, inner.components()?);
        let last = match theirs.len() {
            0 => None,
            length => mine.windows(length).rposition(|parts| parts == theirs),
        };
        let last = last.ok_or_else(|| {
            PyValueError::new_err(format!("{:?} is not in {}", inner.0.to_string(), self.0))
        })?;
        let end: usize = mine[..last].iter().map(|part| part.bytes.len()).sum();
        Ok(Self(Multiaddr::from_bytes(self.0.to_bytes().slice(..end))))
    }

    // Equal to the same address of another library. Orders by the binary form.
    fn __richcmp__<'py>(
        &self,
        other: &Bound<'py, PyAny>,
        op: CompareOp,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = other.py();
        let theirs = if let Ok(other) = other.cast::<Self>() {
            Some(other.get().0.to_bytes())
        } else if matches!(op, CompareOp::Eq | CompareOp::Ne) && is_named(other, &["Multiaddr"])? {
            // Without with_absolute_path, no unix address would equal one of py-multiaddr.
            bytes_of(other)?.map(|b| Multiaddr::from_bytes(b).with_absolute_path().to_bytes())
        } else {
            None
        };
        match theirs {
            Some(theirs) => {
                let answer = op.matches(self.0.as_bytes().cmp(&*theirs));
                Ok(answer.into_pyobject(py)?.to_owned().into_any())
            }
            None => Ok(py.NotImplemented().into_bound(py)),
        }
    }

    fn __hash__(&self, py: Python<'_>) -> PyResult<isize> {
        self.to_bytes(py).hash()
    }

    // Uses from_bytes, since an address from a daemon need not be well-formed.
    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let from_bytes = slf.get_type().getattr("from_bytes")?;
        Ok((from_bytes, (slf.get().to_bytes(slf.py()),)))
    }
}

#[derive(FromPyObject)]
enum WantedProtocol {
    #[pyo3(transparent)]
    Name(PyBackedStr),
    #[pyo3(transparent)]
    Code(u32),
    // A `Protocol` of this or another library.
    Protocol {
        #[pyo3(attribute)]
        code: u32,
    },
}

/// A protocol of a multiaddr.
#[pyclass(frozen, eq, hash, get_all, name = "Protocol", module = "p2pclient_rs")]
#[derive(PartialEq, Eq, Hash)]
pub struct PyProtocol {
    /// The number.
    code: u32,
    /// The name in the text of a multiaddr.
    name: &'static str,
}

impl From<&Component<'_>> for PyProtocol {
    fn from(part: &Component<'_>) -> Self {
        Self {
            code: part.code,
            name: part.name,
        }
    }
}

#[pymethods]
impl PyProtocol {
    /// The number as a varint, as it is in the binary form.
    #[getter]
    fn vcode<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, encode::u32(self.code, &mut encode::u32_buffer()))
    }

    fn __repr__(&self) -> String {
        format!("Protocol(code={}, name='{}')", self.code, self.name)
    }
}

/// Returns the endpoint of a control or listen address: `("unix", path, 0)`, or
/// `("ip4" | "ip6" | "dns" | "dns4" | "dns6", host, port)`.
///
/// # Errors
/// `InvalidMultiaddr` if it is another kind of address.
#[pyfunction]
pub fn endpoint(addr: &Bound<'_, PyAny>) -> PyResult<(&'static str, String, u16)> {
    let endpoint = extract_multiaddr(addr)?
        .endpoint()
        .map_err(|error| InvalidMultiaddr::new_err(error.to_string()))?;
    Ok(match endpoint {
        Endpoint::Unix(path) => ("unix", path, 0),
        Endpoint::Tcp { host, port } => {
            let kind = match host {
                Host::Ip4(_) => "ip4",
                Host::Ip6(_) => "ip6",
                Host::Dns(_) => "dns",
                Host::Dns4(_) => "dns4",
                Host::Dns6(_) => "dns6",
            };
            (kind, host.to_string(), port)
        }
    })
}
