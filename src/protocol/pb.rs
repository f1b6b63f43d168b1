//! The protobuf messages, generated from `proto/`, which documents the fields.

/// The daemon control protocol (`proto/p2pd.proto`).
#[allow(missing_docs, clippy::doc_markdown)]
pub mod p2pd {
    include!(concat!(env!("OUT_DIR"), "/p2pd.pb.rs"));
}

/// libp2p's serialised keys (`proto/crypto.proto`).
#[allow(missing_docs)]
pub mod crypto {
    include!(concat!(env!("OUT_DIR"), "/crypto.pb.rs"));
}

/// The descriptors of both files, as a serialised `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
