//! Calls between daemons: one call and one reply on a stream of their own, both as a
//! `PersistentConnectionRequest`.

use super::call_id::CallId;
use super::encode::{cut, put_call, put_handler_error, put_reply, reply_len};
use super::message::{empty_reply, Direction, Message, INVALID_CALL};
use super::payload::Payload;
use super::reader::Reader;
use crate::{framing, Error};
use bytes::BytesMut;

/// Direction of the messages: both daemons write what a client would send.
const DIRECTION: Direction = Direction::ToDaemon;

/// A message from another daemon. `P` is a payload.
#[derive(Debug, PartialEq, Eq)]
pub enum PeerMessage<P> {
    /// A call.
    Call {
        /// Id of the call, chosen by the caller; only the reply on the same stream has it, too.
        id: CallId,
        /// Argument of the call.
        payload: P,
    },
    /// A handler's result.
    Reply(P),
    /// A handler's error message.
    HandlerFailed(String),
}

/// Reads the messages of a stream from bytes that arrive in pieces of any size.
///
/// ```
/// use bytes::BytesMut;
/// use p2pd_protocol::unary::peer::{encode_call, PeerMessage, PeerReader};
///
/// let (id, mut out) = ([7; 16], BytesMut::new());
/// encode_call(&id, b"peer", "echo", 2, &mut out);
/// out.extend_from_slice(b"hi"); // the payload follows the head
///
/// let mut reader = PeerReader::new(4 << 20);
/// let payload = b"hi".to_vec();
/// assert_eq!(reader.poll(&mut &out[..])?, Some(PeerMessage::Call { id, payload }));
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct PeerReader<P> {
    reader: Reader<P>,
}

impl<P: Payload> PeerReader<P> {
    /// A reader that refuses messages larger than `max_message` bytes.
    pub fn new(max_message: usize) -> Self {
        Self {
            reader: Reader::new(DIRECTION, max_message),
        }
    }

    /// Returns the next message, and removes its bytes from the front of `input`. `None` if all of `input`
    /// was read and more is needed.
    ///
    /// # Errors
    /// The message is too large or malformed, or neither a call nor a reply.
    pub fn poll(&mut self, input: &mut &[u8]) -> Result<Option<PeerMessage<P>>, Error> {
        if self.reader.payload_buffer().is_none() {
            self.check_length(input)?;
        }
        let message = self.reader.poll(input, |_, payload| Some(payload))?;
        Ok(match message {
            None => None,
            Some(Message::Call { id, payload, .. }) => Some(PeerMessage::Call { id, payload }),
            Some(Message::Reply { payload, .. }) => Some(PeerMessage::Reply(payload)),
            Some(Message::HandlerError { error, .. }) => Some(PeerMessage::HandlerFailed(error)),
            Some(Message::InvalidCall { .. }) => {
                return Err(Error::Unexpected(INVALID_CALL.to_owned()))
            }
            Some(Message::EmptyReply { .. }) => return Err(empty_reply()),
            Some(Message::Skipped { error, .. }) => return Err(error),
            Some(Message::UnwantedReply { .. } | Message::Other { .. }) => {
                let what = "a message that is neither a call nor a reply";
                return Err(Error::Unexpected(what.to_owned()));
            }
        })
    }

    /// Refuses a message that is too large before the rest of it arrives.
    fn check_length(&self, input: &[u8]) -> Result<(), Error> {
        let mut prefix = [0; 10];
        let start = &self.reader.buffer[..];
        let bytes = start.iter().chain(input).take(prefix.len());
        let len = prefix.iter_mut().zip(bytes).map(|(to, byte)| *to = *byte);
        let len = len.count();
        framing::split_length(&prefix[..len], self.reader.max_incoming).map(drop)
    }

    /// The unfilled part of the payload that is being received. The driver may read into it directly, and
    /// then must call [`payload_filled`](Self::payload_filled).
    pub fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        self.reader.payload_buffer()
    }

    /// Notes that `count` bytes were read into [`payload_buffer`](Self::payload_buffer).
    pub fn payload_filled(&mut self, count: usize) {
        self.reader.payload_filled(count);
    }
}

/// Size of the message with a reply, in bytes.
pub fn reply_size(payload: usize) -> usize {
    reply_len(DIRECTION, payload)
}

/// Appends a call up to its payload of `len` bytes, which must follow.
pub fn encode_call(id: &CallId, peer: &[u8], protocol: &str, len: usize, out: &mut BytesMut) {
    put_call(out, id, (peer, protocol), len);
}

/// Appends a reply up to its payload of `len` bytes, which must follow.
pub fn encode_reply(id: &CallId, len: usize, out: &mut BytesMut) {
    put_reply(out, DIRECTION, id, len);
}

/// Appends a handler's error message, truncated to fit a message of `limit` bytes.
pub fn encode_handler_error(id: &CallId, error: &str, limit: usize, out: &mut BytesMut) {
    put_handler_error(out, DIRECTION, id, cut(error, limit), limit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::p2pd::{self, persistent_connection_request as request};
    use bytes::Bytes;
    use prost::Message as _;

    const ID: CallId = [7; 16];

    fn poll(max: usize, bytes: &[u8]) -> Result<Option<PeerMessage<Vec<u8>>>, Error> {
        PeerReader::new(max).poll(&mut &bytes[..])
    }

    #[test]
    fn reads_a_reply_one_byte_at_a_time() {
        for len in [0, 5, 40_000] {
            let mut frame = BytesMut::new();
            encode_reply(&ID, len, &mut frame);
            frame.resize(frame.len() + len, 3);
            let mut reader = PeerReader::new(50_000);
            let (last, before) = frame.split_last().unwrap();
            for byte in before {
                assert_eq!(reader.poll(&mut &[*byte][..]), Ok(None));
            }
            let reply = reader.poll(&mut &[*last][..]).unwrap();
            assert_eq!(reply, Some(PeerMessage::Reply(vec![3; len])));
        }
    }

    #[test]
    fn writes_a_reply_into_the_field_that_go_reads() {
        let mut frame = BytesMut::new();
        encode_reply(&ID, 2, &mut frame);
        frame.extend_from_slice(b"ok");
        let read = p2pd::PersistentConnectionRequest::decode_length_delimited(frame).unwrap();
        let Some(request::Message::UnaryResponse(reply)) = read.message else {
            panic!("{read:?}");
        };
        let data = Bytes::from_static(b"ok");
        assert_eq!(
            reply.result,
            Some(p2pd::call_unary_response::Result::Response(data))
        );
    }

    #[test]
    fn handler_error_round_trips() {
        let mut frame = BytesMut::new();
        encode_handler_error(&ID, "no such key", 1000, &mut frame);
        let read = poll(1000, &frame).unwrap();
        assert_eq!(
            read,
            Some(PeerMessage::HandlerFailed("no such key".to_owned()))
        );
    }

    #[test]
    fn refuses_a_message_over_the_limit_before_it_arrives() {
        for split in [0, 1, 2] {
            let mut reader = PeerReader::<Vec<u8>>::new(1000);
            let (first, second) = [0xe9, 0x07].split_at(split);
            let first = reader.poll(&mut &first[..]);
            let error = first.and_then(|_| reader.poll(&mut &second[..]));
            assert!(
                matches!(error, Err(Error::FrameTooLarge { .. })),
                "{error:?}"
            );
        }
    }

    #[test]
    fn refuses_other_messages() {
        let cancel = p2pd::PersistentConnectionRequest {
            call_id: Some(Bytes::copy_from_slice(&ID)),
            message: Some(request::Message::Cancel(p2pd::Cancel {})),
        };
        let frame = framing::encode_frame(&cancel);
        assert!(matches!(poll(1000, &frame), Err(Error::Unexpected(_))));
        assert!(poll(1000, b"\x03abc").is_err());
    }
}
