//! Public keys as libp2p serialises them (`crypto.pb.PublicKey`).

use crate::pb::crypto;
use crate::PeerId;
use bytes::Bytes;
use prost::Message as _;

/// A public key and its kind. The key itself is opaque.
///
/// ```
/// use p2pd_protocol::PublicKey;
///
/// let serialized = [&[8, 1, 18, 32][..], &[7; 32]].concat(); // Ed25519
/// let key = PublicKey::decode(&serialized)?;
/// assert!(key.peer_id().to_base58().starts_with("12D3Koo"));
/// # Ok::<(), p2pd_protocol::public_key::DecodePublicKeyError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PublicKey {
    /// The kind of key: 0 RSA, 1 Ed25519, 2 secp256k1, 3 ECDSA. Other numbers are kept unchanged.
    pub key_type: i32,
    /// The key, in the usual encoding of its kind.
    pub data: Bytes,
}

impl PublicKey {
    /// Decodes the serialised form.
    ///
    /// # Errors
    /// The bytes are not a `crypto.pb.PublicKey`, or a field is missing.
    pub fn decode(serialized: &[u8]) -> Result<Self, DecodePublicKeyError> {
        let message = crypto::PublicKey::decode(serialized)?;
        Ok(Self {
            key_type: message
                .key_type
                .ok_or(DecodePublicKeyError::Missing("key_type"))?,
            data: message.data.ok_or(DecodePublicKeyError::Missing("data"))?,
        })
    }

    /// Returns the serialised form, from which the peer id is derived.
    pub fn encode(&self) -> Vec<u8> {
        let message = crypto::PublicKey {
            key_type: Some(self.key_type),
            data: Some(self.data.clone()),
        };
        message.encode_to_vec()
    }

    /// Returns the id of the peer with this key.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_public_key(&self.encode())
    }
}

/// Reason why bytes are not a serialised public key.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum DecodePublicKeyError {
    /// It is not protobuf.
    #[error("not a serialised public key: {0}")]
    Protobuf(#[from] prost::DecodeError),
    /// A required field is missing.
    #[error("not a serialised public key: it has no {0}")]
    Missing(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_fields_are_required() {
        use DecodePublicKeyError::Missing;
        assert_eq!(PublicKey::decode(&[]), Err(Missing("key_type")));
        assert_eq!(PublicKey::decode(&[8, 1]), Err(Missing("data")));
        let key = PublicKey::decode(&[8, 1, 18, 2, 5, 6]).unwrap();
        assert_eq!((key.key_type, &key.data[..]), (1, &[5, 6][..]));
    }

    #[test]
    fn encodes_the_default_key_type() {
        let key = PublicKey {
            key_type: 0,
            data: Bytes::from_static(b"k"),
        };
        assert_eq!(key.encode(), [8, 0, 18, 1, b'k']);
    }

    proptest! {
        #[test]
        fn round_trips(key_type: i32, data: Vec<u8>) {
            let key = PublicKey { key_type, data: data.into() };
            prop_assert_eq!(PublicKey::decode(&key.encode()).unwrap(), key);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = PublicKey::decode(&bytes);
        }
    }
}
