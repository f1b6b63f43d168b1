//! The messages of identify, which may be split into several.

use bytes::Bytes;
use futures::{AsyncRead, AsyncReadExt};
use p2pd_protocol::FrameDecoder;
use prost::encoding::encoded_len_varint;
use prost::Message as _;
use std::io;

/// Largest message that is sent whole, in bytes. Implementations without signed records read no larger one.
const MAX_WHOLE: usize = 2 * 1024;
/// Largest first message, in bytes. rust-libp2p reads only the first, and none that is larger.
const MAX_FIRST: usize = 4 * 1024;
/// Largest message that go-libp2p reads, in bytes.
const MAX_PART: usize = 8 * 1024;
/// Largest number of messages that go-libp2p reads.
const MAX_PARTS: usize = 10;

/// What a peer tells about itself. Strings are bytes here, since peers may send any.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Message {
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub(super) public_key: Option<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub(super) listen_addrs: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub(super) protocols: Vec<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub(super) observed_addr: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub(super) protocol_version: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "6")]
    pub(super) agent_version: Option<Bytes>,
    #[prost(bytes = "bytes", optional, tag = "8")]
    pub(super) signed_peer_record: Option<Bytes>,
}

/// Encodes a message with its length prefix, in several parts if it is large. Protocols that do not fit
/// into what other implementations read are left out.
pub(super) fn encode(mut message: Message) -> Vec<u8> {
    if message.encoded_len() <= MAX_WHOLE {
        return message.encode_length_delimited_to_vec();
    }
    let record = message.signed_peer_record.take();
    let protocols = std::mem::take(&mut message.protocols);
    let mut room = MAX_FIRST.saturating_sub(message.encoded_len());
    let mut parts = vec![message];
    let mut omitted = 0;
    for protocol in protocols {
        let size = 1 + encoded_len_varint(protocol.len() as u64) + protocol.len();
        if size > room && size <= MAX_PART && parts.len() < MAX_PARTS - 1 {
            parts.push(Message::default());
            room = MAX_PART;
        }
        if size > room {
            omitted += 1;
            continue;
        }
        room -= size;
        parts
            .last_mut()
            .expect("it is never empty")
            .protocols
            .push(protocol);
    }
    if omitted > 0 {
        log::warn!("identify has no room for {omitted} protocols");
    }
    if record.is_some() {
        parts.push(Message {
            signed_peer_record: record,
            ..Message::default()
        });
    }
    let parts = parts.iter().map(Message::encode_length_delimited_to_vec);
    parts.collect::<Vec<_>>().concat()
}

/// Reads the messages of a stream until its end, and merges them.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Message> {
    let mut decoder = FrameDecoder::new(MAX_PART);
    let mut buffer = [0; 2048];
    let (mut message, mut parts) = (Message::default(), 0);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return match parts > 0 && decoder.is_empty() {
                true => Ok(message),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            };
        }
        decoder.extend(&buffer[..count]);
        while let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
            parts += 1;
            if parts > MAX_PARTS {
                return Err(io::Error::other("too many parts"));
            }
            message.merge(frame).map_err(io::Error::other)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(protocols: usize, record: usize) -> Message {
        Message {
            public_key: Some(vec![1; 294].into()),
            listen_addrs: vec![Bytes::from_static(&[4, 127, 0, 0, 1, 6, 1, 1])],
            protocols: (0..protocols)
                .map(|i| format!("expert.{i:04}").into())
                .collect(),
            agent_version: Some(Bytes::from_static(b"p2pclient-rs/0.0.0")),
            signed_peer_record: Some(vec![2; record].into()),
            ..Message::default()
        }
    }

    /// Splits bytes into the messages that they hold.
    fn parts(bytes: &[u8]) -> Vec<Message> {
        let mut decoder = FrameDecoder::new(MAX_PART);
        decoder.extend(bytes);
        let mut parts = Vec::new();
        while let Some(frame) = decoder.next_frame().unwrap() {
            parts.push(Message::decode(frame).unwrap());
        }
        assert!(decoder.is_empty());
        parts
    }

    fn merged(parts: &[Message]) -> Message {
        let mut whole = Message::default();
        for part in parts {
            whole.merge(&part.encode_to_vec()[..]).unwrap();
        }
        whole
    }

    #[test]
    fn small_message_is_sent_whole() {
        assert_eq!(parts(&encode(message(5, 600))), [message(5, 600)]);
    }

    #[test]
    fn large_message_is_split_into_parts_that_others_read() {
        for (protocols, count) in [(150, 2), (600, 3), (2000, 5)] {
            let sent = parts(&encode(message(protocols, 600)));
            assert_eq!(sent.len(), count, "{protocols}");
            assert!(sent[0].encoded_len() <= MAX_FIRST);
            assert!(sent.iter().all(|part| part.encoded_len() <= MAX_PART));
            assert!(sent[0].signed_peer_record.is_none());
            assert_eq!(merged(&sent), message(protocols, 600));
        }
    }

    #[tokio::test]
    async fn reads_up_to_ten_messages() {
        let part = |i: usize| message(i, 600).encode_length_delimited_to_vec();
        let bytes = |count| (0..count).flat_map(part).collect::<Vec<_>>();
        let whole = read(&mut &bytes(10)[..]).await.unwrap();
        assert_eq!(whole.protocols.len(), (0..10).sum());
        assert!(read(&mut &bytes(11)[..]).await.is_err());
        assert!(read(&mut &bytes(0)[..]).await.is_err());
        assert!(read(&mut &bytes(2)[..1000]).await.is_err(), "cut off");
        let large = message(700, 600).encode_length_delimited_to_vec();
        assert!(read(&mut &large[..]).await.is_err(), "over 8 KiB");
    }

    #[test]
    fn protocols_without_room_are_left_out() {
        let mut huge = message(20_000, 600);
        huge.protocols.insert(0, vec![b'x'; MAX_PART].into());
        let sent = parts(&encode(huge));
        assert_eq!(sent.len(), MAX_PARTS);
        let whole = merged(&sent);
        assert!(whole.protocols.len() > 4000);
        assert!(whole.signed_peer_record.is_some());
    }
}
