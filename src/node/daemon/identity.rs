//! Identity files: private keys in libp2p's protobuf encoding.

use crate::error::os_message;
use libp2p::identity::Keypair;
use prost::Message as _;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Largest identity file, in bytes.
const MAX_SIZE: u64 = 64 << 10;

/// The key types, by their number in the file.
const RSA: i32 = 0;
const ED25519: i32 = 1;
const SECP256K1: i32 = 2;
const ECDSA: i32 = 3;

/// Lengths of an Ed25519 key in the file, in bytes. The old form repeats the public key.
const ED25519_LEN: usize = 64;
const OLD_ED25519_LEN: usize = 96;

/// `crypto.pb.PrivateKey`.
#[derive(Clone, PartialEq, prost::Message)]
struct PrivateKey {
    #[prost(int32, optional, tag = "1")]
    r#type: Option<i32>,
    #[prost(bytes = "vec", optional, tag = "2")]
    data: Option<Vec<u8>>,
}

/// Reads an identity file. The error message is that of the Go daemons.
pub(super) fn read(path: &Path) -> Result<Keypair, String> {
    let failed = |operation: &str, error: &io::Error| {
        let words = os_message(error);
        format!("{operation} {}: {words}", path.display())
    };
    let file = File::open(path).map_err(|error| failed("open", &error))?;
    let mut bytes = Vec::new();
    file.take(MAX_SIZE)
        .read_to_end(&mut bytes)
        .map_err(|error| failed("read", &error))?;
    decode(&bytes)
}

fn decode(bytes: &[u8]) -> Result<Keypair, String> {
    let mut key = PrivateKey::decode(bytes)
        .map_err(|_| "proto: cannot parse invalid wire-format data".to_owned())?;
    let missing = |field| format!("proto: required field crypto.pb.PrivateKey.{field} not set");
    let r#type = key.r#type.ok_or_else(|| missing("Type"))?;
    let data = key.data.as_mut().ok_or_else(|| missing("Data"))?;
    match r#type {
        ED25519 => match data.len() {
            ED25519_LEN => {}
            OLD_ED25519_LEN => {
                if data[32..ED25519_LEN] != data[ED25519_LEN..] {
                    let words = "expected redundant ed25519 public key to be redundant";
                    return Err(words.to_owned());
                }
                data.truncate(ED25519_LEN);
            }
            len => {
                let words = "expected ed25519 data size to be 64 or 96, got";
                return Err(format!("{words} {len}"));
            }
        },
        SECP256K1 if data.len() != 32 => {
            return Err("expected secp256k1 data size to be 32".to_owned())
        }
        RSA | SECP256K1 | ECDSA => {}
        _ => return Err("invalid or unsupported key type".to_owned()),
    }
    Keypair::from_protobuf_encoding(&key.encode_to_vec()).map_err(|error| {
        let error = match std::error::Error::source(&error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        };
        match r#type {
            RSA => format!("asn1: structure error: {error}"),
            ECDSA => format!("x509: failed to parse EC private key: asn1: {error}"),
            _ => error,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_files_with_the_messages_of_go() {
        for (bytes, words) in [
            (
                &b""[..],
                "proto: required field crypto.pb.PrivateKey.Type not set",
            ),
            (
                b"hello world",
                "proto: cannot parse invalid wire-format data",
            ),
            (
                b"\x08\x01",
                "proto: required field crypto.pb.PrivateKey.Data not set",
            ),
            (
                b"\x08\x01\x12\x04abcd",
                "expected ed25519 data size to be 64 or 96, got 4",
            ),
            (
                b"\x08\x02\x12\x04abcd",
                "expected secp256k1 data size to be 32",
            ),
            (b"\x08\x09\x12\x04abcd", "invalid or unsupported key type"),
        ] {
            assert_eq!(decode(bytes).unwrap_err(), words, "{bytes:?}");
        }
        for (bytes, start) in [
            (&b"\x08\x00\x12\x04abcd"[..], "asn1: structure error: "),
            (
                b"\x08\x03\x12\x04abcd",
                "x509: failed to parse EC private key: asn1: ",
            ),
        ] {
            let words = decode(bytes).unwrap_err();
            assert!(words.starts_with(start), "{words}");
        }
    }

    #[test]
    fn names_a_file_that_cannot_be_read() {
        let words = |path: &str| read(Path::new(path)).unwrap_err();
        assert_eq!(
            words("/no/such"),
            "open /no/such: no such file or directory"
        );
        assert_eq!(words("/tmp"), "read /tmp: is a directory");
    }

    #[test]
    fn reads_keys_of_each_type() {
        for keypair in [
            Keypair::generate_ed25519(),
            Keypair::generate_secp256k1(),
            Keypair::generate_ecdsa(),
        ] {
            let bytes = keypair.to_protobuf_encoding().unwrap();
            let decoded = decode(&bytes).unwrap();
            assert_eq!(decoded.public(), keypair.public());
        }
    }

    #[test]
    fn reads_the_old_form_of_an_ed25519_key() {
        let keypair = Keypair::generate_ed25519();
        let mut key = PrivateKey::decode(&keypair.to_protobuf_encoding().unwrap()[..]).unwrap();
        let data = key.data.as_mut().unwrap();
        data.extend_from_within(32..);
        assert_eq!(data.len(), OLD_ED25519_LEN);
        assert_eq!(
            decode(&key.encode_to_vec()).unwrap().public(),
            keypair.public()
        );
        key.data.as_mut().unwrap()[95] ^= 1;
        let words = decode(&key.encode_to_vec()).unwrap_err();
        assert_eq!(
            words,
            "expected redundant ed25519 public key to be redundant"
        );
    }
}
