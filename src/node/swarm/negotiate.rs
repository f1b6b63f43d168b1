//! Negotiation of a stream's protocol: multistream-select 1.0.0.
