//! The traits of a kind of request: its name, its encoding, and the type of its reply.

use crate::pb::p2pd;
use crate::Error;
use bytes::Bytes;

/// How the daemon answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// At once, in one message, from what the daemon knows. Such requests may be pipelined: sent before
    /// earlier ones are answered.
    AtOnce,
    /// In one message, when the daemon is done.
    Once,
    /// In one message. If the request succeeds, the connection then becomes a stream, a subscription or
    /// a persistent connection.
    ByTakeover,
    /// With exactly one value.
    WithOneValue,
    /// With any number of values.
    WithValues,
}

/// One kind of request.
pub trait Request: Sized {
    /// Reply to a successful request.
    type Reply;

    /// Name of the request in the protocol, for log and error messages.
    const NAME: &'static str;
    /// How the daemon answers.
    const ANSWERED: Answered = Answered::Once;
    /// Whether the daemon asks other peers before it answers, which can take as long as the
    /// timeout of the request.
    const WAITS_FOR_PEERS: bool = false;

    /// Encodes the request, with its length prefix.
    fn encode(&self) -> Bytes;

    /// Encodes the reply as a message.
    fn encode_reply(reply: &Self::Reply) -> p2pd::Response;

    /// Reads the reply.
    ///
    /// # Errors
    /// A required field is missing.
    fn decode_reply(response: p2pd::Response) -> Result<Self::Reply, Error>;
}

/// One kind of request that is answered value by value.
pub trait Query: Sized {
    /// One of the values.
    type Value;

    /// Name of the request in the protocol, for log and error messages.
    const NAME: &'static str;
    /// [`Answered::WithOneValue`] or [`Answered::WithValues`].
    const ANSWERED: Answered;

    /// Encodes the request, with its length prefix.
    fn encode(&self) -> Bytes;

    /// Encodes a value as a message.
    fn encode_value(value: &Self::Value) -> p2pd::DhtResponse;

    /// Reads a value.
    ///
    /// # Errors
    /// A required field is missing.
    fn decode_value(response: p2pd::DhtResponse) -> Result<Self::Value, Error>;
}

/// A request or query as a member of its family. The macro `family!` implements this trait.
pub trait Member: Sized {
    /// The reply, or one value of it.
    type Output;
    /// The family's requests.
    type Command;
    /// The family's replies.
    type Reply;

    /// Converts a reply to the family's reply type.
    fn into_family(output: Self::Output) -> Self::Reply;
    /// Extracts this request's reply from the family's reply type.
    fn from_family(reply: Self::Reply) -> Option<Self::Output>;
    /// Encodes the request for a client that reads replies of type `R`.
    fn encode_for<R: From<Self::Reply>>(&self) -> EncodedRequest<R>;
}

/// An encoded request, and how to read its reply of type `R`.
#[derive(Debug, Clone)]
pub struct EncodedRequest<R> {
    frame: Bytes,
    name: &'static str,
    answered: Answered,
    waits_for_peers: bool,
    pub(crate) reader: Reader<R>,
}

/// How a reply is read.
#[derive(Debug)]
pub(crate) enum Reader<R> {
    Reply(fn(p2pd::Response) -> Result<R, Error>),
    Value(fn(p2pd::DhtResponse) -> Result<R, Error>),
}

// Not derived: derived implementations would require `R: Clone` and `R: Copy`.
impl<R> Clone for Reader<R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R> Copy for Reader<R> {}

impl<R> EncodedRequest<R> {
    pub(crate) fn new<M>(request: &M) -> Self
    where
        M: Request + Member<Output = <M as Request>::Reply>,
        R: From<<M as Member>::Reply>,
    {
        Self {
            frame: request.encode(),
            name: M::NAME,
            answered: M::ANSWERED,
            waits_for_peers: M::WAITS_FOR_PEERS,
            reader: Reader::Reply(|response| Ok(M::into_family(M::decode_reply(response)?).into())),
        }
    }

    pub(crate) fn of_query<M>(query: &M) -> Self
    where
        M: Query + Member<Output = <M as Query>::Value>,
        R: From<<M as Member>::Reply>,
    {
        Self {
            frame: query.encode(),
            name: M::NAME,
            answered: M::ANSWERED,
            waits_for_peers: true,
            reader: Reader::Value(|response| Ok(M::into_family(M::decode_value(response)?).into())),
        }
    }

    /// The encoded request, with its length prefix.
    pub fn frame(&self) -> &Bytes {
        &self.frame
    }

    /// Name of the request in the protocol.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How the daemon answers.
    pub fn answered(&self) -> Answered {
        self.answered
    }

    /// Whether the daemon asks other peers before it answers. That can take as long as the timeout of
    /// the request, and the connection serves nothing else in the meantime.
    pub fn waits_for_peers(&self) -> bool {
        self.waits_for_peers
    }
}

/// A reply as a message, with the name of its request.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // short-lived
pub(crate) enum EncodedReply {
    Reply(&'static str, p2pd::Response),
    Value(&'static str, p2pd::DhtResponse),
}
