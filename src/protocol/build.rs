//! Compiles `proto/` to Rust with protox and prost, so that no protoc is needed.
//!
//! Also writes the descriptors to `OUT_DIR/descriptors.bin`, from which the Python package builds the
//! protobuf classes of the compatibility layer for p2pclient.

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut files = protox::compile(["p2pd.proto", "crypto.proto"], ["proto"])?;
    std::fs::write(out.join("descriptors.bin"), files.encode_to_vec())?;

    // prost reads a missing `required` field as its default, so an absent `type` would pass for
    // IDENTIFY or OK. All fields are therefore optional here, and the crate checks which are required.
    for file in &mut files.file {
        for message in &mut file.message_type {
            let quotes_peers = matches!(
                message.name(),
                "ErrorResponse" | "DaemonError" | "CallUnaryRequest"
            );
            for field in &mut message.field {
                if field.label == Some(Label::Required as i32) {
                    field.label = Some(Label::Optional as i32);
                }
                // These messages can quote a peer, so their text can have any encoding. A request must
                // not fail because its error message is not UTF-8, nor a connection because a peer's
                // protocol name is not.
                if quotes_peers {
                    field.r#type = Some(Type::Bytes as i32);
                }
            }
        }
    }
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}
