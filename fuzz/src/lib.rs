//! The fuzz targets. Each feeds bytes to one entry point of the protocol and checks its invariants.
//! `fuzz_targets/` runs them with libFuzzer; `tests/fuzz_corpus.rs` replays the committed corpus. A target
//! fails on a panic, on too much memory for the size of the input, and on a result that depends on how the
//! bytes were split.

mod allocations;
mod commands;
mod exchange;
mod persistent;
mod persistent_server;
mod seeds;

pub use commands::commands;
pub use exchange::exchange;
pub use persistent::persistent;
pub use persistent_server::persistent_server;
pub use seeds::seeds;

use allocations::measured;
use bytes::Bytes;
use p2pd_protocol::command::{pubsub, streams};
use p2pd_protocol::endpoint::Endpoint;
use p2pd_protocol::pb::p2pd;
use p2pd_protocol::{FrameDecoder, Multiaddr, PeerId, PublicKey};
use prost::Message as _;

/// A fuzz target.
pub type Target = fn(&[u8]);

/// All targets, by the names of their corpora.
pub const TARGETS: [(&str, Target); 10] = [
    ("commands", commands),
    ("exchange", exchange),
    ("framing", framing),
    ("heads", heads),
    ("multiaddr_bytes", multiaddr_bytes),
    ("multiaddr_text", multiaddr_text),
    ("peer_id", peer_id),
    ("persistent", persistent),
    ("persistent_server", persistent_server),
    ("public_key", public_key),
];

/// Runs `run` and bounds its memory: `times` bytes per byte of input, and a constant.
fn bounded<T>(input: usize, times: usize, run: impl FnOnce() -> T) -> T {
    let (result, peak) = measured(run);
    assert!(
        peak <= input * times + 4096,
        "{input} bytes of input made it hold {peak}"
    );
    result
}

/// Splits `bytes`, differently for each seed: 0 into single bytes, 255 not at all.
fn pieces(bytes: &[u8], seed: u8) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    let mut state = u32::from(seed);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let size = match seed {
            0 => 1,
            255 => rest.len(),
            _ => 1 + (state >> 16) as usize % (usize::from(seed) * 4),
        };
        let (piece, tail) = rest.split_at(size.min(rest.len()));
        rest = tail;
        Some(piece)
    })
}

/// Framing. The input is a byte for the pieces, one for the limit, then the bytes.
pub fn framing(data: &[u8]) {
    let &[seed, limit, ref bytes @ ..] = data else {
        return;
    };
    let max_frame = usize::from(limit) * 64;
    let run = |seed| {
        let mut decoder = FrameDecoder::new(max_frame);
        let mut frames: Vec<Bytes> = Vec::new();
        for piece in pieces(bytes, seed) {
            decoder.extend(piece);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Err(error)),
                }
            }
        }
        (frames, Ok(decoder.into_remainder()))
    };
    let (frames, rest) = bounded(bytes.len(), 128, || run(255));
    for seed in [0, seed] {
        assert_eq!(
            bounded(bytes.len(), 128, || run(seed)),
            (frames.clone(), rest.clone())
        );
    }
    let mut again = Vec::new();
    for frame in frames {
        assert!(frame.len() <= max_frame);
        prost::encode_length_delimiter(frame.len(), &mut again).unwrap();
        again.extend_from_slice(&frame);
    }
    match rest {
        Ok(rest) => {
            again.extend_from_slice(&rest);
            assert_eq!(again, bytes);
        }
        Err(_) => assert!(bytes.starts_with(&again)),
    }
}

/// The messages outside of exchanges: the header of an inbound stream, and those of a subscription.
pub fn heads(data: &[u8]) {
    if let Ok(info) = bounded(data.len(), 64, || streams::decode_stream_info(data)) {
        let message = p2pd::StreamInfo {
            peer: Some(info.peer_id.to_bytes()),
            addr: Some(info.addr.to_bytes()),
            proto: Some(info.protocol.clone()),
        };
        let again = streams::decode_stream_info(&message.encode_to_vec());
        assert_eq!(again, Ok(info));
    }
    if let Ok(message) = bounded(data.len(), 64, || pubsub::decode_message(data)) {
        let given = message.clone();
        let encoded = p2pd::PsMessage {
            from: given.from.map(|peer| peer.to_bytes()),
            data: Some(given.data),
            seqno: Some(given.seqno),
            topic_i_ds: given.topic_ids,
            signature: Some(given.signature),
            key: Some(given.key),
        };
        let again = pubsub::decode_message(&encoded.encode_to_vec());
        assert_eq!(again, Ok(message));
    }
}

/// The text of a multiaddr.
pub fn multiaddr_text(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let Ok(addr) = bounded(text.len(), 64, || text.parse::<Multiaddr>()) else {
        return;
    };
    assert_eq!(addr.validate(), Ok(()));
    assert_eq!(addr.to_string().parse().as_ref(), Ok(&addr));
    assert_eq!(addr.clone().with_absolute_path(), addr);
    whatever_it_is(&addr);
}

/// The bytes of a multiaddr.
pub fn multiaddr_bytes(data: &[u8]) {
    let addr = Multiaddr::from_bytes(Bytes::copy_from_slice(data));
    bounded(data.len(), 192, || whatever_it_is(&addr)); // in one piece
    if addr.components().is_ok() {
        // Text does not preserve a missing leading slash or trailing slashes of a path, as in Go.
        let text = addr.to_string();
        if let Ok(again) = text.parse::<Multiaddr>() {
            assert_eq!(again.to_string(), text.trim_end_matches('/'));
            whatever_it_is(&again);
        }
    }
}

fn whatever_it_is(addr: &Multiaddr) {
    let text = addr.to_string();
    match addr.components() {
        Ok(parts) => {
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.bytes).copied().collect();
            assert_eq!(bytes, addr.as_bytes());
            let shown: String = parts.iter().map(ToString::to_string).collect();
            assert_eq!(text, shown);
            let protocols: Vec<_> = parts.iter().map(|part| (part.code, part.name)).collect();
            assert_eq!(addr.protocols(), Ok(protocols));
        }
        Err(error) => {
            assert!(text.contains("/unknown/"));
            assert_eq!(addr.protocols(), Err(error));
        }
    }
    let absolute = addr.clone().with_absolute_path();
    assert_eq!(absolute.clone().with_absolute_path(), absolute);
    match addr.endpoint() {
        Ok(endpoint @ Endpoint::Unix(_)) => assert_eq!(Multiaddr::from(&endpoint), absolute),
        Ok(endpoint) => assert_eq!(Multiaddr::from(&endpoint).endpoint(), Ok(endpoint)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A peer id, as bytes and as text.
pub fn peer_id(data: &[u8]) {
    let peer = PeerId::from_bytes(Bytes::copy_from_slice(data));
    let (text, cid) = bounded(data.len(), 16, || (peer.to_string(), peer.to_cid()));
    assert!(!cid.is_empty());
    match peer.validate() {
        Ok(()) if data.len() < 300 => {
            assert_eq!(cid.parse().as_ref(), Ok(&peer));
            // Like Go, reads nothing else as base58.
            if text.starts_with("Qm") || text.starts_with('1') {
                assert_eq!(text.parse(), Ok(peer));
            }
        }
        Ok(()) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    assert!(PeerId::from_public_key(data).is_valid());
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(peer) = bounded(text.len(), 16, || text.parse::<PeerId>()) {
        assert!(peer.is_valid());
        assert_eq!(peer.to_cid().parse(), Ok(peer));
    }
}

/// A serialised public key.
pub fn public_key(data: &[u8]) {
    if let Ok(key) = bounded(data.len(), 16, || PublicKey::decode(data)) {
        let encoded = key.encode();
        // A negative type may be encoded in fewer bytes than here.
        assert!(encoded.len() <= data.len() + 9);
        assert_eq!(PublicKey::decode(&encoded).as_ref(), Ok(&key));
        assert!(key.peer_id().is_valid());
    }
}
