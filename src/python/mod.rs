//! The extension module `p2pclient_rs._native`.

use pyo3::prelude::*;

mod convert;
#[allow(dead_code)] // until there are requests that return them
mod datastructures;
mod multiaddr;
mod peer_id;
mod public_key;

/// The Rust half of `p2pclient_rs`.
#[pymodule]
mod _native {
    use super::*;

    // --- types ---
    #[pymodule_export]
    use super::datastructures::{PyPeerInfo, PyPubsubMessage, PyStreamInfo};
    #[pymodule_export]
    use super::multiaddr::{InvalidMultiaddr, ProtocolLookupError, PyMultiaddr, PyProtocol};
    #[pymodule_export]
    use super::peer_id::{InvalidPeerID, PyPeerId};
    #[pymodule_export]
    use super::public_key::PyPublicKey;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("Identity", super::datastructures::identity_type(m.py())?)?;
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        m.add("DEBUG_BUILD", cfg!(debug_assertions))
    }
}
