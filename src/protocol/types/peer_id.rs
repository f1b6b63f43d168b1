//! Peer ids: the multihash of a peer's public key.

use crate::framing::decode_varint;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;
use unsigned_varint::encode;

// https://github.com/multiformats/multicodec/blob/master/table.csv
const IDENTITY: u64 = 0x00;
const SHA2_256: u64 = 0x12;
const LIBP2P_KEY: u64 = 0x72;
const CID_V1: u64 = 1;

/// Longest serialised key that a peer id contains unhashed (Ed25519 and secp256k1), in bytes. Fixed by the
/// specification.
const MAX_INLINE_KEY_LENGTH: usize = 42;

/// Longest accepted peer id, in bytes and as text. Base58 takes quadratic time.
const MAX_LENGTH: usize = 512;
const MAX_TEXT: usize = 2048;

/// The identity of a libp2p peer, as the bytes of a multihash.
///
/// ```
/// use p2pd_protocol::PeerId;
///
/// let peer: PeerId = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7".parse()?;
/// assert_eq!(peer.as_bytes().len(), 34);
/// assert_eq!(peer.to_cid().parse::<PeerId>()?, peer);
/// # Ok::<(), p2pd_protocol::peer_id::ParsePeerIdError>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(Bytes);

impl PeerId {
    /// Makes a peer id from any bytes; [`validate`](Self::validate) checks them.
    pub fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        Self(bytes.into())
    }

    /// Returns the peer id of a public key, a serialised `crypto.pb.PublicKey`.
    pub fn from_public_key(serialized: &[u8]) -> Self {
        if serialized.len() <= MAX_INLINE_KEY_LENGTH {
            multihash(IDENTITY, serialized)
        } else {
            multihash(SHA2_256, &Sha256::digest(serialized))
        }
    }

    /// The bytes of the multihash.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The bytes of the multihash, without a copy.
    pub fn to_bytes(&self) -> Bytes {
        self.0.clone()
    }

    /// Returns the usual text form: `Qm…` or `12D3Koo…`. For a peer id of more than 512 bytes, returns
    /// [`to_cid`](Self::to_cid): base58 could take minutes. Only a faulty daemon sends such a peer id.
    pub fn to_base58(&self) -> String {
        if self.0.len() > MAX_LENGTH {
            return self.to_cid();
        }
        bs58::encode(&self.0).into_string()
    }

    /// The text form as a CIDv1 in base32: `bafz…`.
    pub fn to_cid(&self) -> String {
        let mut cid = Vec::with_capacity(self.0.len() + 2);
        push_varint(&mut cid, CID_V1);
        push_varint(&mut cid, LIBP2P_KEY);
        cid.extend_from_slice(&self.0);
        multibase::encode(multibase::Base::Base32Lower, cid)
    }

    /// Checks that the bytes are a multihash, of any hash function.
    ///
    /// # Errors
    /// The bytes are not a multihash, or the digest does not have the declared length.
    pub fn validate(&self) -> Result<(), ParsePeerIdError> {
        use ParsePeerIdError::{DigestLength, NotAMultihash};
        let (_code, rest) = decode_varint(&self.0).map_err(|_| NotAMultihash)?;
        let (declared, digest) = decode_varint(rest).map_err(|_| NotAMultihash)?;
        if declared != digest.len() as u64 {
            let actual = digest.len();
            return Err(DigestLength { declared, actual });
        }
        Ok(())
    }

    /// Whether the bytes are a multihash; see [`validate`](Self::validate).
    pub fn is_valid(&self) -> bool {
        self.validate().is_ok()
    }
}

/// Reason why a text is not a peer id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParsePeerIdError {
    /// It is empty.
    #[error("it is empty")]
    Empty,
    /// It is longer than any peer id, in bytes.
    #[error("it is too long for a peer id ({0} bytes)")]
    TooLong(usize),
    /// It looks like base58 but is not.
    #[error("it is not base58: {0}")]
    Base58(bs58::decode::Error),
    /// It begins neither like a base58 peer id nor like a CID.
    #[error(
        "it is neither base58 (Qm…, 12D3Koo…) nor a CID in a known multibase (bafz…, k51…): {0}"
    )]
    Multibase(multibase::Error),
    /// It is multibase, but not a CIDv1.
    #[error("it is not a CID of version 1")]
    NotCidV1,
    /// It is a CID, but not of a key.
    #[error("it is a CID, but of codec {0:#x} rather than libp2p-key (0x72)")]
    NotAKey(u64),
    /// The bytes are not a multihash.
    #[error("its bytes are not a multihash")]
    NotAMultihash,
    /// The digest does not have the declared length.
    #[error("its multihash declares a digest of {declared} bytes and has {actual}")]
    DigestLength {
        /// Declared length, in bytes.
        declared: u64,
        /// Actual length, in bytes.
        actual: usize,
    },
}

impl FromStr for PeerId {
    type Err = ParsePeerIdError;

    /// Parses base58 (`Qm…`, `1…`) or a CIDv1 of codec libp2p-key in any multibase.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(ParsePeerIdError::Empty);
        }
        if text.len() > MAX_TEXT {
            return Err(ParsePeerIdError::TooLong(text.len()));
        }
        let bytes = if text.starts_with("Qm") || text.starts_with('1') {
            bs58::decode(text)
                .into_vec()
                .map_err(ParsePeerIdError::Base58)?
        } else {
            let (_base, cid) = multibase::decode(text).map_err(ParsePeerIdError::Multibase)?;
            let Ok((CID_V1, rest)) = decode_varint(&cid) else {
                return Err(ParsePeerIdError::NotCidV1);
            };
            match decode_varint(rest) {
                Ok((LIBP2P_KEY, multihash)) => multihash.to_vec(),
                Ok((codec, _)) => return Err(ParsePeerIdError::NotAKey(codec)),
                Err(_) => return Err(ParsePeerIdError::NotCidV1),
            }
        };
        if bytes.len() > MAX_LENGTH {
            return Err(ParsePeerIdError::TooLong(bytes.len()));
        }
        let peer_id = Self::from_bytes(bytes);
        peer_id.validate()?;
        Ok(peer_id)
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_base58())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

fn multihash(code: u64, digest: &[u8]) -> PeerId {
    let mut bytes = Vec::with_capacity(digest.len() + 2);
    push_varint(&mut bytes, code);
    push_varint(&mut bytes, digest.len() as u64);
    bytes.extend_from_slice(digest);
    PeerId::from_bytes(bytes)
}

fn push_varint(out: &mut Vec<u8>, number: u64) {
    out.extend_from_slice(encode::u64(number, &mut encode::u64_buffer()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RSA: &str = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7";
    // Both from https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    const SPEC_BASE58: &str = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";
    const SPEC_CID: &str = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe";
    const ED25519: &str = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA";

    #[test]
    fn base58_and_cid_are_the_same_peer() {
        let peer: PeerId = SPEC_BASE58.parse().unwrap();
        assert_eq!(peer.to_cid(), SPEC_CID);
        assert_eq!(SPEC_CID.parse::<PeerId>().unwrap(), peer);
        assert_eq!(peer.to_string(), SPEC_BASE58);
        assert!(peer.is_valid());
    }

    #[test]
    fn inlines_a_short_key_and_hashes_a_long_one() {
        let inlined: PeerId = ED25519.parse().unwrap();
        let key = &inlined.as_bytes()[2..];
        assert_eq!(PeerId::from_public_key(key), inlined);
        assert_eq!(PeerId::from_public_key(&[7; 42]).as_bytes()[..2], [0, 42]);
        assert_eq!(
            PeerId::from_public_key(&[7; 43]).as_bytes()[..2],
            [0x12, 32]
        );
    }

    #[test]
    fn refuses_invalid_text_with_the_reason() {
        use ParsePeerIdError as E;
        let parse = |text: &str| text.parse::<PeerId>().unwrap_err();
        assert_eq!(parse(""), E::Empty);
        assert!(matches!(parse("Qm0OIl"), E::Base58(_)));
        assert!(matches!(parse("hello, world"), E::Multibase(_)));
        assert_eq!(parse(&RSA[..45]), {
            let bytes = bs58::decode(&RSA[..45]).into_vec().unwrap();
            PeerId::from_bytes(bytes).validate().unwrap_err()
        });
        // A CID of a file (raw, 0x55).
        assert_eq!(
            parse("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"),
            E::NotAKey(0x55)
        );
        assert_eq!(parse("f02"), E::NotCidV1);
        assert_eq!(parse("f0172"), E::NotAMultihash);
        assert_eq!(
            parse("f0172120501"),
            E::DigestLength {
                declared: 5,
                actual: 1
            }
        );
    }

    #[test]
    fn refuses_overlong_input_quickly() {
        let peer = PeerId::from_bytes(vec![7; 4 << 20]);
        assert_eq!(peer.to_string(), peer.to_cid());
        for text in [peer.to_cid(), "1".repeat(1 << 20), "z".repeat(1 << 20)] {
            let parsed = text.parse::<PeerId>();
            assert_eq!(parsed, Err(ParsePeerIdError::TooLong(text.len())));
        }
        let longest = multihash(IDENTITY, &[7; MAX_LENGTH - 3]);
        assert_eq!(longest.to_cid().parse::<PeerId>(), Ok(longest.clone()));
        assert_eq!(longest.to_string().parse::<PeerId>(), Ok(longest));
        let longer = multihash(IDENTITY, &[7; MAX_LENGTH]);
        let parsed = longer.to_cid().parse::<PeerId>();
        assert_eq!(parsed, Err(ParsePeerIdError::TooLong(MAX_LENGTH + 3)));
    }

    #[test]
    fn debug_and_display_are_base58() {
        let peer: PeerId = RSA.parse().unwrap();
        assert_eq!(format!("{peer} {peer:?}"), format!("{RSA} PeerId({RSA})"));
    }

    proptest! {
        #[test]
        fn valid_peer_id_round_trips_in_both_forms(
            code in 0_u64..3, digest in prop::collection::vec(any::<u8>(), 0..70),
        ) {
            let peer = multihash([IDENTITY, SHA2_256, 0x1b][code as usize], &digest);
            prop_assert_eq!(&peer.to_cid().parse::<PeerId>().unwrap(), &peer);
            // Go, too, reads only `Qm…` and `1…` as base58.
            let base58 = peer.to_base58();
            if base58.starts_with("Qm") || base58.starts_with('1') {
                prop_assert_eq!(&base58.parse::<PeerId>().unwrap(), &peer);
            }
        }

        #[test]
        fn arbitrary_bytes_and_text_do_not_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..80), text in "\\PC{0,60}",
        ) {
            let peer = PeerId::from_bytes(bytes);
            let shown = peer.to_string();
            prop_assert_eq!(bs58::decode(shown).into_vec().unwrap(), peer.as_bytes());
            if let Ok(parsed) = text.parse::<PeerId>() {
                prop_assert!(parsed.is_valid());
            }
        }
    }
}
