//! What the daemon answered, as Python objects.

use super::datastructures::{identity, PyPeerInfo, PyPubsubMessage, PyStreamInfo};
use super::errors;
use super::peer_id::PyPeerId;
use crate::core::{pubsub, streams, Answer, PeerInfo, StreamInfo};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

/// The Python form of an answer: None, a value, or a tuple of values.
pub fn to_python(py: Python<'_>, answer: Answer) -> PyResult<Bound<'_, PyAny>> {
    Ok(match answer {
        Answer::Done | Answer::Subscribed => py.None().into_bound(py),
        Answer::Identity { peer_id, addrs } => identity(py, peer_id, &addrs)?,
        Answer::Peers(peers) => tuple(py, peers.into_iter().map(peer_info))?,
        Answer::StreamOpened(info) => Bound::new(py, stream_info(info))?.into_any(),
        Answer::Topics(names) | Answer::Protocols(names) => PyTuple::new(py, names)?.into_any(),
        Answer::PeerIds(peers) => tuple(py, peers.into_iter().map(PyPeerId::from))?,
        Answer::PeerInfo(info) => Bound::new(py, peer_info(info))?.into_any(),
        Answer::PeerId(peer) => Bound::new(py, PyPeerId::from(peer))?.into_any(),
        Answer::Value(value) => PyBytes::new(py, &value).into_any(),
    })
}

/// The Python forms of several answers, as a tuple.
pub fn all_to_python(py: Python<'_>, answers: Vec<Answer>) -> PyResult<Bound<'_, PyAny>> {
    let answers = answers.into_iter().map(|answer| to_python(py, answer));
    Ok(PyTuple::new(py, answers.collect::<PyResult<Vec<_>>>()?)?.into_any())
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
