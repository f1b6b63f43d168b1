//! Message framing: each message is preceded by its length as an unsigned varint.

use super::Error;
use bytes::{Buf, Bytes, BytesMut};
use unsigned_varint::decode;

/// Limits of a control connection.
///
/// ```
/// use p2pd_protocol::Limits;
///
/// let limits = Limits::default().with_max_frame(1 << 20);
/// assert_eq!(limits.max_answer, 64 << 20);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Largest message in either direction, in bytes. Default: 4 MiB (the limit of the Go daemons) plus
    /// 64 KiB for the fields around a payload of that size.
    pub max_frame: usize,
    /// Largest total size of the results of one DHT query, in bytes. Default: 64 MiB.
    pub max_answer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_frame: (4 << 20) + (64 << 10),
            max_answer: 64 << 20,
        }
    }
}

impl Limits {
    /// Sets [`max_frame`](Self::max_frame), in bytes.
    #[must_use]
    pub fn with_max_frame(mut self, bytes: usize) -> Self {
        self.max_frame = bytes;
        self
    }

    /// Sets [`max_answer`](Self::max_answer), in bytes.
    #[must_use]
    pub fn with_max_answer(mut self, bytes: usize) -> Self {
        self.max_answer = bytes;
        self
    }
}

/// Splits bytes that arrive in pieces of any size into messages.
///
/// ```
/// use p2pd_protocol::FrameDecoder;
///
/// let mut decoder = FrameDecoder::new(1024);
/// decoder.extend(&[5, b'h', b'e']);
/// assert_eq!(decoder.next_frame()?, None);
/// decoder.extend(b"llo");
/// assert_eq!(decoder.next_frame()?.as_deref(), Some(&b"hello"[..]));
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: BytesMut,
    max_frame: usize,
}

impl FrameDecoder {
    /// A decoder that refuses messages larger than `max_frame` bytes.
    pub fn new(max_frame: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            max_frame,
        }
    }

    /// Appends bytes that were read.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next whole message, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// Those of [`split_frame`].
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, Error> {
        split_frame(&mut self.buffer, self.max_frame)
    }

    /// Number of buffered bytes.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether no bytes are buffered.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Returns the buffered bytes. If the connection became a stream, these are the first bytes of the
    /// stream.
    pub fn into_remainder(self) -> Bytes {
        self.buffer.freeze()
    }
}

/// Removes the first whole message from the front of `buffer`, if there is one.
///
/// A declared length alone costs no memory.
///
/// # Errors
/// The length is malformed, or exceeds `max_frame` bytes.
pub fn split_frame(buffer: &mut BytesMut, max_frame: usize) -> Result<Option<Bytes>, Error> {
    match split_length(buffer, max_frame)? {
        Some((prefix, length)) if buffer.len() - prefix >= length => {
            buffer.advance(prefix);
            Ok(Some(buffer.split_to(length).freeze()))
        }
        _ => Ok(None),
    }
}

/// Reads the length prefix of `bytes`. Returns the size of the prefix and the length that it declares;
/// `None` if the prefix is incomplete.
///
/// # Errors
/// The length is malformed, or exceeds `max_frame` bytes.
pub fn split_length(bytes: &[u8], max_frame: usize) -> Result<Option<(usize, usize)>, Error> {
    let (declared, prefix) = match decode_varint(bytes) {
        Ok((length, rest)) => (length, bytes.len() - rest.len()),
        Err(decode::Error::Insufficient) => return Ok(None),
        Err(decode::Error::NotMinimal) => return Err(Error::MalformedLength("not minimal")),
        Err(_) => return Err(Error::MalformedLength("more than 64 bits")),
    };
    let length = usize::try_from(declared)
        .ok()
        .filter(|length| *length <= max_frame)
        .ok_or(Error::FrameTooLarge {
            declared,
            limit: max_frame,
        })?;
    Ok(Some((prefix, length)))
}

/// Reads a varint; returns it and the bytes after it. Refuses a varint of more than 64 bits, which
/// `unsigned_varint` would truncate.
pub(super) fn decode_varint(bytes: &[u8]) -> Result<(u64, &[u8]), decode::Error> {
    let (number, rest) = decode::u64(bytes)?;
    match bytes.len() - rest.len() {
        10 if bytes[9] > 1 => Err(decode::Error::Overflow),
        _ => Ok((number, rest)),
    }
}

/// Encodes `message` with its length prefix.
pub fn encode_frame(message: &impl prost::Message) -> Bytes {
    let mut frame = BytesMut::with_capacity(message.encoded_len() + 10);
    message
        .encode_length_delimited(&mut frame)
        .expect("a BytesMut grows as needed");
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut buffer = unsigned_varint::encode::u64_buffer();
        let mut bytes = unsigned_varint::encode::u64(payload.len() as u64, &mut buffer).to_vec();
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn refuses_length_over_the_limit_before_the_message_arrives() {
        let mut decoder = FrameDecoder::new(1000);
        decoder.extend(&[0xe9, 0x07]);
        assert_eq!(
            decoder.next_frame(),
            Err(Error::FrameTooLarge {
                declared: 1001,
                limit: 1000
            })
        );
    }

    #[test]
    fn accepts_length_equal_to_the_limit() {
        let mut decoder = FrameDecoder::new(1000);
        decoder.extend(&frame(&[7; 1000]));
        assert_eq!(decoder.next_frame().unwrap().unwrap(), vec![7; 1000]);
    }

    #[test]
    fn refuses_huge_declared_length_without_allocating() {
        for bytes in [
            vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            vec![0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x40],
        ] {
            let mut decoder = FrameDecoder::new(Limits::default().max_frame);
            decoder.extend(&bytes);
            assert!(matches!(
                decoder.next_frame(),
                Err(Error::FrameTooLarge { .. })
            ));
        }
    }

    #[test]
    fn refuses_length_of_65_bits() {
        for last in [2, 3, 0x7f] {
            let mut decoder = FrameDecoder::new(1000);
            decoder.extend(&[0x85, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, last]);
            decoder.extend(b"hello");
            assert_eq!(
                decoder.next_frame(),
                Err(Error::MalformedLength("more than 64 bits"))
            );
        }
    }

    #[test]
    fn refuses_length_of_eleven_bytes() {
        let mut decoder = FrameDecoder::new(1000);
        decoder.extend(&[0x80; 11]);
        assert!(matches!(
            decoder.next_frame(),
            Err(Error::MalformedLength(_))
        ));
    }

    proptest! {
        #[test]
        fn returns_the_same_frames_however_the_bytes_are_split(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..8),
            sizes in prop::collection::vec(1usize..50, 1..20),
        ) {
            let bytes: Vec<u8> = payloads.iter().flat_map(|p| frame(p)).collect();
            let mut decoder = FrameDecoder::new(300);
            let mut frames = Vec::new();
            let mut rest = &bytes[..];
            for size in sizes.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (piece, tail) = rest.split_at((*size).min(rest.len()));
                rest = tail;
                decoder.extend(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    frames.push(frame.to_vec());
                }
            }
            prop_assert_eq!(frames, payloads);
            prop_assert!(decoder.is_empty());
        }
    }
}
