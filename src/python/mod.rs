//! The extension module `p2pclient_rs._native`.

use pyo3::prelude::*;

/// The Rust half of `p2pclient_rs`.
#[pymodule]
mod _native {
    use super::*;

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))?;
        m.add("DEBUG_BUILD", cfg!(debug_assertions))
    }
}
