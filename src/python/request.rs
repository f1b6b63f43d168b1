//! Every request of the core, as constructors of one opaque Python class.

use super::convert::{extract_bytes, extract_multiaddr, extract_multiaddrs, extract_peer_id};
use crate::core::{connmgr, control, dht, peerstore, pubsub, streams, unary, Request};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::time::Duration;

/// An encoded request. Timeouts are in seconds.
#[pyclass(frozen, name = "Request", module = "p2pclient_rs._native")]
pub struct PyRequest(pub Request);

type Peer<'a, 'py> = &'a Bound<'py, PyAny>;
type Buffer<'a, 'py> = &'a Bound<'py, PyAny>;

#[pymethods]
impl PyRequest {
    /// Whether the daemon asks other peers before it answers, which can take long.
    #[getter]
    fn waits_for_peers(&self) -> bool {
        self.0.waits_for_peers()
    }

    /// Whether it only asks what the daemon knows: such requests may follow each other.
    #[getter]
    fn is_query(&self) -> bool {
        self.0.is_query()
    }

    #[staticmethod]
    fn identify() -> Self {
        Self(control::identify())
    }

    #[staticmethod]
    fn persistent_conn_upgrade() -> Self {
        Self(unary::upgrade())
    }

    #[staticmethod]
    fn connect(
        peer: Peer<'_, '_>,
        addrs: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let addrs = extract_multiaddrs(addrs)?;
        let peer = extract_peer_id(peer)?;
        Ok(Self(control::connect(&peer, &addrs, seconds(timeout)?)))
    }

    #[staticmethod]
    fn disconnect(peer: Peer<'_, '_>) -> PyResult<Self> {
        Ok(Self(control::disconnect(&extract_peer_id(peer)?)))
    }

    #[staticmethod]
    fn list_peers() -> Self {
        Self(control::list_peers())
    }

    #[staticmethod]
    fn stream_open(
        peer: Peer<'_, '_>,
        protocols: Vec<String>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(Self(streams::stream_open(
            &peer,
            protocols,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn stream_handler(addr: &Bound<'_, PyAny>, proto: String, balanced: bool) -> PyResult<Self> {
        let addr = extract_multiaddr(addr)?;
        Ok(Self(streams::stream_handler(&addr, vec![proto], balanced)))
    }

    #[staticmethod]
    fn remove_stream_handler(addr: &Bound<'_, PyAny>, proto: String) -> PyResult<Self> {
        let addr = extract_multiaddr(addr)?;
        Ok(Self(streams::remove_stream_handler(&addr, vec![proto])))
    }

    #[staticmethod]
    fn dht_find_peer(peer: Peer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::find_peer(
            &extract_peer_id(peer)?,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_find_peers_connected_to_peer(
        peer: Peer<'_, '_>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let peer = extract_peer_id(peer)?;
        Ok(Self(dht::find_peers_connected_to_peer(
            &peer,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_find_providers(cid: Buffer<'_, '_>, count: i32, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::find_providers(
            extract_bytes(cid)?,
            count,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_get_closest_peers(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::get_closest_peers(
            extract_bytes(key)?,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_get_public_key(peer: Peer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::get_public_key(
            &extract_peer_id(peer)?,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_get_value(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::get_value(extract_bytes(key)?, seconds(timeout)?)))
    }

    #[staticmethod]
    fn dht_search_value(key: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::search_value(
            extract_bytes(key)?,
            seconds(timeout)?,
        )))
    }

    #[staticmethod]
    fn dht_put_value(
        key: Buffer<'_, '_>,
        value: Buffer<'_, '_>,
        timeout: Option<f64>,
    ) -> PyResult<Self> {
        let (key, value) = (extract_bytes(key)?, extract_bytes(value)?);
        Ok(Self(dht::put_value(key, value, seconds(timeout)?)))
    }

    #[staticmethod]
    fn dht_provide(cid: Buffer<'_, '_>, timeout: Option<f64>) -> PyResult<Self> {
        Ok(Self(dht::provide(extract_bytes(cid)?, seconds(timeout)?)))
    }

    #[staticmethod]
    fn connmgr_tag_peer(peer: Peer<'_, '_>, tag: String, weight: i64) -> PyResult<Self> {
        Ok(Self(connmgr::tag_peer(
            &extract_peer_id(peer)?,
            tag,
            weight,
        )))
    }

    #[staticmethod]
    fn connmgr_untag_peer(peer: Peer<'_, '_>, tag: String) -> PyResult<Self> {
        Ok(Self(connmgr::untag_peer(&extract_peer_id(peer)?, tag)))
    }

    #[staticmethod]
    fn connmgr_trim() -> Self {
        Self(connmgr::trim())
    }

    #[staticmethod]
    fn peerstore_is_there() -> Self {
        Self(peerstore::is_there())
    }

    #[staticmethod]
    fn peerstore_get_protocols(peer: Peer<'_, '_>) -> PyResult<Self> {
        Ok(Self(peerstore::get_protocols(&extract_peer_id(peer)?)))
    }

    #[staticmethod]
    fn peerstore_get_peer_info(peer: Peer<'_, '_>) -> PyResult<Self> {
        Ok(Self(peerstore::get_peer_info(&extract_peer_id(peer)?)))
    }

    #[staticmethod]
    fn pubsub_get_topics() -> Self {
        Self(pubsub::get_topics())
    }

    #[staticmethod]
    fn pubsub_list_peers(topic: String) -> Self {
        Self(pubsub::list_peers(topic))
    }

    #[staticmethod]
    fn pubsub_publish(topic: String, data: Buffer<'_, '_>) -> PyResult<Self> {
        Ok(Self(pubsub::publish(topic, extract_bytes(data)?)))
    }

    #[staticmethod]
    fn pubsub_subscribe(topic: String) -> Self {
        Self(pubsub::subscribe(topic))
    }
}

/// A timeout; what is no length of time at all is a ValueError.
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
