//! What the daemon answered, as Python objects.

use super::datastructures::{identity, PyPeerInfo, PyPubsubMessage, PyStreamInfo};
use super::errors;
use super::peer_id::PyPeerId;
use p2pd_protocol::command::{control, dht, peerstore, pubsub, streams, Reply};
use p2pd_protocol::{PeerInfo, StreamInfo};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

/// The Python form of a reply: None, a value, or a tuple of values.
pub fn to_python(py: Python<'_>, reply: Reply) -> PyResult<Bound<'_, PyAny>> {
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
        // All others say that the request succeeded, and nothing else.
        _ => py.None().into_bound(py),
    })
}

/// The Python forms of several replies, as a tuple.
pub fn all_to_python(py: Python<'_>, replies: Vec<Reply>) -> PyResult<Bound<'_, PyAny>> {
    let replies = replies.into_iter().map(|reply| to_python(py, reply));
    Ok(PyTuple::new(py, replies.collect::<PyResult<Vec<_>>>()?)?.into_any())
}

/// Reads the message that begins an inbound stream.
#[pyfunction]
pub fn decode_stream_info(frame: &[u8]) -> PyResult<PyStreamInfo> {
    let info = streams::decode_stream_info(frame).map_err(errors::from_core)?;
    Ok(stream_info(info))
}

/// Reads a message of a subscription.
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
