//! Tests of the negotiation, over streams in memory.
