//! A decorator of stream muxers, which owns the negotiation of application streams.
