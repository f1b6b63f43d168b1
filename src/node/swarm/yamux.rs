//! A stream muxer on the yamux crate.
