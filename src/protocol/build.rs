//! Compiles `proto/` to Rust with protox and prost: no protoc is needed on the machine.
//!
//! Also writes the descriptors to `OUT_DIR/descriptors.bin`, from which the Python package builds
//! protobuf classes for the p2pclient layer, so that the schema is written once.

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut files = protox::compile(["p2pd.proto", "crypto.proto"], ["proto"])?;
    std::fs::write(out.join("descriptors.bin"), files.encode_to_vec())?;

    // prost reads a missing `required` field as its default, so an absent `type` would pass for
    // IDENTIFY or OK. Read everything as optional; the crate says what must be there.
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
                // The daemon's words can quote what a peer sent, in whatever encoding: a request
                // must not fail because its error message is no UTF-8, nor a connection because
                // of the protocol in a peer's call, which the daemon passes on as it is.
                if quotes_peers {
                    field.r#type = Some(Type::Bytes as i32);
                }
            }
        }
    }
    prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    Ok(())
}
