//! Streams between local programs and peers.
