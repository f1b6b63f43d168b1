//! Requests as constructors of one Python class, and replies as Python objects.

use super::buffer::extract_bytes;
use super::datastructures::{identity, PyPeerInfo, PyPubsubMessage, PyStreamInfo};
use super::errors;
use super::multiaddr::{extract_multiaddr, extract_multiaddrs};
use super::peer_id::{extract_peer_id, PyPeerId};
use p2pd_protocol::command::{connmgr, control, dht, peerstore, pubsub, streams, unary};
use p2pd_protocol::command::{Answered, Reply, Typed};
use p2pd_protocol::policy::pool::Permit;
use p2pd_protocol::{EncodedRequest, PeerInfo, StreamInfo};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::time::Duration;

/// An encoded request. Timeouts are in seconds.
#[pyclass(frozen, name = "Request", module = "p2pclient_rs._native")]
pub struct PyRequest(pub EncodedRequest);

type Peer<'a, 'py> = &'a Bound<'py, PyAny>;
type Buffer<'a, 'py> = &'a Bound<'py, PyAny>;

#[pymethods]
impl PyRequest {
    /// Which limit the request counts against: 0 if the daemon answers at once, 1 if it asks other
    /// peers.
    #[getter]
    fn permit(&self) -> usize {
        Permit::of(&self.0) as usize
    }

    /// Whether the daemon replies without asking other peers: such requests may be pipelined.
    #[getter]
    fn is_query(&self) -> bool {
        self.0.answered() == Answered::AtOnce
    }

    #[staticmethod]
    fn identify() -> Self {
        control::Identify.into()
    }

    #[staticmethod]
    fn persistent_conn_upgrade() -> Self {
        unary::Upgrade.into()
    }

    #[staticmethod]
    fn connect(
        peer: Peer<'_, '_>,
        addrs: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let request = control::Connect {
            addrs: extract_multiaddrs(addrs)?,
            peer: extract_peer_id(peer)?,
            timeout: seconds(timeout)?,
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn disconnect(peer: Peer<'_, '_>) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(control::Disconnect { peer }.into())
    }

    #[staticmethod]
    fn list_peers() -> Self {
        control::ListPeers.into()
    }

    #[staticmethod]
    fn stream_open(
        peer: Peer<'_, '_>,
        protocols: Vec<String>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let request = streams::StreamOpen {
            peer: extract_peer_id(peer)?,
            protocols,
            timeout: seconds(timeout)?,
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn stream_handler(addr: &Bound<'_, PyAny>, proto: String, balanced: bool) -> PyResult<Self> {
        let request = streams::StreamHandler {
            addr: extract_multiaddr(addr)?,
            protocols: vec![proto],
            balanced,
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn remove_stream_handler(addr: &Bound<'_, PyAny>, proto: String) -> PyResult<Self> {
        let request = streams::RemoveStreamHandler {
            addr: extract_multiaddr(addr)?,
            protocols: vec![proto],
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn dht_find_peer(peer: Peer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (peer, timeout) = (extract_peer_id(peer)?, seconds(timeout)?);
        Ok(dht::FindPeer { peer, timeout }.into())
    }

    #[staticmethod]
    fn dht_find_peers_connected_to_peer(
        peer: Peer<'_, '_>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let (peer, timeout) = (extract_peer_id(peer)?, seconds(timeout)?);
        Ok(dht::FindPeersConnectedToPeer { peer, timeout }.into())
    }

    #[staticmethod]
    fn dht_find_providers(cid: Buffer<'_, '_>, count: i32, timeout: Option<f64>) -> PyResult<Self> {
        let request = dht::FindProviders {
            cid: extract_bytes(cid)?,
            count,
            timeout: seconds(timeout)?,
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn dht_get_closest_peers(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (key, timeout) = (extract_bytes(key)?, seconds(timeout)?);
        Ok(dht::GetClosestPeers { key, timeout }.into())
    }

    #[staticmethod]
    fn dht_get_public_key(peer: Peer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (peer, timeout) = (extract_peer_id(peer)?, seconds(timeout)?);
        Ok(dht::GetPublicKey { peer, timeout }.into())
    }

    #[staticmethod]
    fn dht_get_value(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (key, timeout) = (extract_bytes(key)?, seconds(timeout)?);
        Ok(dht::GetValue { key, timeout }.into())
    }

    #[staticmethod]
    fn dht_search_value(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (key, timeout) = (extract_bytes(key)?, seconds(timeout)?);
        Ok(dht::SearchValue { key, timeout }.into())
    }

    #[staticmethod]
    fn dht_put_value(
        key: Buffer<'_, '_>,
        value: Buffer<'_, '_>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let request = dht::PutValue {
            key: extract_bytes(key)?,
            value: extract_bytes(value)?,
            timeout: seconds(timeout)?,
        };
        Ok(request.into())
    }

    #[staticmethod]
    fn dht_provide(cid: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        let (cid, timeout) = (extract_bytes(cid)?, seconds(timeout)?);
        Ok(dht::Provide { cid, timeout }.into())
    }

    #[staticmethod]
    fn connmgr_tag_peer(peer: Peer<'_, '_>, tag: String, weight: i64) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(connmgr::TagPeer { peer, tag, weight }.into())
    }

    #[staticmethod]
    fn connmgr_untag_peer(peer: Peer<'_, '_>, tag: String) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(connmgr::UntagPeer { peer, tag }.into())
    }

    #[staticmethod]
    fn connmgr_trim() -> Self {
        connmgr::Trim.into()
    }

    #[staticmethod]
    fn peerstore_probe() -> Self {
        peerstore::Probe.into()
    }

    #[staticmethod]
    fn peerstore_get_protocols(peer: Peer<'_, '_>) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(peerstore::GetProtocols { peer }.into())
    }

    #[staticmethod]
    fn peerstore_get_peer_info(peer: Peer<'_, '_>) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(peerstore::GetPeerInfo { peer }.into())
    }

    #[staticmethod]
    fn pubsub_get_topics() -> Self {
        pubsub::GetTopics.into()
    }

    #[staticmethod]
    fn pubsub_list_peers(topic: String) -> Self {
        pubsub::ListTopicPeers { topic }.into()
    }

    #[staticmethod]
    fn pubsub_publish(topic: String, data: Buffer<'_, '_>) -> PyResult<Self> {
        let data = extract_bytes(data)?;
        Ok(pubsub::Publish { topic, data }.into())
    }

    #[staticmethod]
    fn pubsub_subscribe(topic: String) -> Self {
        pubsub::Subscribe { topic }.into()
    }
}

impl<R: Typed> From<R> for PyRequest {
    fn from(request: R) -> Self {
        Self(request.encoded())
    }
}

/// A timeout in seconds. Negative numbers and NaN are a ValueError.
fn seconds(timeout: Option<f64>) -> PyResult<Option<Duration>> {
    let Some(seconds) = timeout else {
        return Ok(None);
    };
    if seconds.is_nan() || seconds < 0.0 {
        return Err(PyValueError::new_err(format!(
            "a timeout is a number of seconds from 0 on, not {seconds}"
        )));
    }
    Ok(Some(
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX),
    ))
}

/// Converts a reply: None, a value, or a tuple of values.
pub fn reply_to_python(py: Python<'_>, reply: Reply) -> PyResult<Bound<'_, PyAny>> {
    use dht::Reply::{
        FindPeer, FindPeersConnectedToPeer, FindProviders, GetClosestPeers, GetPublicKey, GetValue,
        SearchValue,
    };
    Ok(match reply {
        Reply::Control(control::Reply::Identify(it)) => identity(py, it.peer_id, &it.addrs)?,
        Reply::Control(control::Reply::ListPeers(peers)) => {
            tuple(py, peers.into_iter().map(peer_info))?
        }
        Reply::Streams(streams::Reply::StreamOpen(info)) => {
            Bound::new(py, stream_info(info))?.into_any()
        }
        Reply::Dht(FindPeer(info) | FindPeersConnectedToPeer(info) | FindProviders(info))
        | Reply::Peerstore(peerstore::Reply::GetPeerInfo(info)) => {
            Bound::new(py, peer_info(info))?.into_any()
        }
        Reply::Dht(GetClosestPeers(peer)) => Bound::new(py, PyPeerId::from(peer))?.into_any(),
        Reply::Dht(GetPublicKey(value) | GetValue(value) | SearchValue(value)) => {
            PyBytes::new(py, &value).into_any()
        }
        Reply::Pubsub(pubsub::Reply::GetTopics(names))
        | Reply::Peerstore(peerstore::Reply::GetProtocols(names)) => {
            PyTuple::new(py, names)?.into_any()
        }
        Reply::Pubsub(pubsub::Reply::ListTopicPeers(peers)) => {
            tuple(py, peers.into_iter().map(PyPeerId::from))?
        }
        // The others only say that the request succeeded.
        _ => py.None().into_bound(py),
    })
}

/// Converts several replies to a tuple.
pub fn replies_to_python(py: Python<'_>, replies: Vec<Reply>) -> PyResult<Bound<'_, PyAny>> {
    let replies = replies.into_iter().map(|reply| reply_to_python(py, reply));
    Ok(PyTuple::new(py, replies.collect::<PyResult<Vec<_>>>()?)?.into_any())
}

/// Decodes the header of an inbound stream.
#[pyfunction]
pub fn decode_stream_info(frame: &[u8]) -> PyResult<PyStreamInfo> {
    let info = streams::decode_stream_info(frame).map_err(errors::from_core)?;
    Ok(stream_info(info))
}

/// Decodes a message of a subscription.
#[pyfunction]
pub fn decode_pubsub_message(frame: &[u8]) -> PyResult<PyPubsubMessage> {
    let message = pubsub::decode_message(frame).map_err(errors::from_core)?;
    Ok(message.into())
}

fn peer_info(info: PeerInfo) -> PyPeerInfo {
    PyPeerInfo::from_core(info.peer_id, info.addrs)
}

fn stream_info(info: StreamInfo) -> PyStreamInfo {
    PyStreamInfo::from_core(info.peer_id, info.addr, info.protocol)
}

fn tuple<'py, T>(
    py: Python<'py>,
    items: impl ExactSizeIterator<Item = T>,
) -> PyResult<Bound<'py, PyAny>>
where
    T: IntoPyObject<'py>,
{
    Ok(PyTuple::new(py, items)?.into_any())
}
