//! What a client asks of a daemon, and what the daemon answers: one file per family of requests,
//! with both directions of each request side by side.
//!
//! A [`Request`] is one kind of request with a typed reply. A client encodes it and decodes the
//! reply; a server decodes it, as one of the [`Command`]s, and encodes the reply. [`Query`] is the
//! same for requests that are answered value by value (the DHT's).
//!
//! ```
//! use p2pd_protocol::command::{control::Identify, Command, Request};
//!
//! // The client's side …
//! let frame = Identify.encode();
//! assert_eq!(frame[..], [2, 8, 0]);
//! // … and the server's, which gets the message without its length.
//! let command = Command::decode(frame.slice(1..))?;
//! assert_eq!(command, Identify.into());
//! # Ok::<(), p2pd_protocol::Error>(())
//! ```

pub mod connmgr;
pub mod control;
pub mod dht;
pub mod peerstore;
pub mod pubsub;
pub mod streams;
pub mod unary;

use super::pb::p2pd::{self, request::Type, response};
use super::{framing, Error, Multiaddr, PeerId};
use bytes::Bytes;
use prost::Message as _;
use std::time::Duration;

/// How the daemon answers a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// At once, in one message, from what the daemon knows. Such requests may be pipelined: sent
    /// before the ones in front of them are answered.
    AtOnce,
    /// In one message, when the daemon is done.
    Once,
    /// In one message; if that is a success, the connection carries something else from then on.
    ByTakeover,
    /// With exactly one value.
    WithOneValue,
    /// With any number of values.
    WithValues,
}

/// One kind of request.
pub trait Request: Sized {
    /// What a successful request is answered with.
    type Reply;

    /// The request's name in the protocol, for messages to people.
    const NAME: &'static str;
    /// How the daemon answers.
    const ANSWERED: Answered = Answered::Once;
    /// Whether the daemon asks other peers before it answers, which can take as long as the
    /// request's timeout.
    const WAITS_FOR_PEERS: bool = false;

    /// The request as it goes over the wire, length first.
    fn encode(&self) -> Bytes;

    /// The reply as a message.
    fn encode_reply(reply: &Self::Reply) -> p2pd::Response;

    /// Reads the reply.
    ///
    /// # Errors
    /// When a field is missing that the reply must have.
    fn decode_reply(response: p2pd::Response) -> Result<Self::Reply, Error>;
}

/// One kind of request that is answered value by value.
pub trait Query: Sized {
    /// One of the values.
    type Value;

    /// The request's name in the protocol, for messages to people.
    const NAME: &'static str;
    /// [`Answered::WithOneValue`] or [`Answered::WithValues`].
    const ANSWERED: Answered;

    /// The request as it goes over the wire, length first.
    fn encode(&self) -> Bytes;

    /// A value as a message.
    fn encode_value(value: &Self::Value) -> p2pd::DhtResponse;

    /// Reads a value.
    ///
    /// # Errors
    /// When a field is missing that the value must have.
    fn decode_value(response: p2pd::DhtResponse) -> Result<Self::Value, Error>;
}

/// A request or query together with the enums of all: what is generic over every kind of request
/// needs this.
pub trait Typed: Sized {
    /// The reply, or one value of it.
    type Output;

    /// The reply as one of all.
    fn wrap(output: Self::Output) -> Reply;

    /// The reply in its own type; `None` if it is another request's.
    fn unwrap(reply: Reply) -> Option<Self::Output>;

    /// The request as a client sends it.
    fn encoded(&self) -> EncodedRequest;
}

/// A reply that a client has received: one of any request's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reply {
    /// Identity and connections.
    Control(control::Reply),
    /// Streams and their handlers.
    Streams(streams::Reply),
    /// The DHT.
    Dht(dht::Reply),
    /// The connection manager.
    ConnManager(connmgr::Reply),
    /// Pubsub.
    Pubsub(pubsub::Reply),
    /// The peer store.
    Peerstore(peerstore::Reply),
    /// The upgrade to a persistent connection.
    Unary(unary::Reply),
}

/// A reply as a message, with the name of its request.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // it lives for as long as it takes to encode it
pub(super) enum EncodedReply {
    Reply(&'static str, p2pd::Response),
    Value(&'static str, p2pd::DhtResponse),
}

impl Reply {
    pub(super) fn encode(&self) -> EncodedReply {
        match self {
            Self::Control(reply) => reply.encode(),
            Self::Streams(reply) => reply.encode(),
            Self::Dht(reply) => reply.encode(),
            Self::ConnManager(reply) => reply.encode(),
            Self::Pubsub(reply) => reply.encode(),
            Self::Peerstore(reply) => reply.encode(),
            Self::Unary(reply) => reply.encode(),
        }
    }
}

/// A request as a client sends it, with what it takes to read the reply.
#[derive(Debug, Clone)]
pub struct EncodedRequest {
    frame: Bytes,
    name: &'static str,
    answered: Answered,
    waits_for_peers: bool,
    pub(super) reader: Reader,
}

/// How a reply is read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reader {
    Reply(fn(p2pd::Response) -> Result<Reply, Error>),
    Value(fn(p2pd::DhtResponse) -> Result<Reply, Error>),
}

impl EncodedRequest {
    fn new<R: Request + Typed<Output = <R as Request>::Reply>>(request: &R) -> Self {
        Self {
            frame: request.encode(),
            name: R::NAME,
            answered: R::ANSWERED,
            waits_for_peers: R::WAITS_FOR_PEERS,
            reader: Reader::Reply(|response| R::decode_reply(response).map(R::wrap)),
        }
    }

    fn of_query<Q: Query + Typed<Output = <Q as Query>::Value>>(query: &Q) -> Self {
        Self {
            frame: query.encode(),
            name: Q::NAME,
            answered: Q::ANSWERED,
            waits_for_peers: true,
            reader: Reader::Value(|response| Q::decode_value(response).map(Q::wrap)),
        }
    }

    /// The request as it goes over the wire, length first.
    pub fn frame(&self) -> &Bytes {
        &self.frame
    }

    /// The request's name in the protocol.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// How the daemon answers.
    pub fn answered(&self) -> Answered {
        self.answered
    }

    /// Whether the daemon asks other peers before it answers. That can take as long as the
    /// request's timeout, and the connection serves nothing else meanwhile.
    pub fn waits_for_peers(&self) -> bool {
        self.waits_for_peers
    }
}

impl<R: Typed> From<R> for EncodedRequest {
    fn from(request: R) -> Self {
        request.encoded()
    }
}

/// A request that a server has received.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Command {
    /// Identity and connections.
    Control(control::Command),
    /// Streams and their handlers.
    Streams(streams::Command),
    /// The DHT.
    Dht(dht::Command),
    /// The connection manager.
    ConnManager(connmgr::Command),
    /// Pubsub.
    Pubsub(pubsub::Command),
    /// The peer store, which only the JavaScript daemon has.
    Peerstore(peerstore::Command),
    /// The upgrade to a persistent connection, which only hivemind's fork has.
    Unary(unary::Command),
}

impl Command {
    /// Reads a request's message, without its length.
    ///
    /// Type 9 is PEERSTORE in the JavaScript daemon and PERSISTENT_CONN_UPGRADE in hivemind's fork.
    /// It is read as PEERSTORE only if field 9 is there and begins with a varint of its own.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`] for a type that no daemon has; the connection is still good then.
    /// Every other error means that the bytes are no request.
    pub fn decode(frame: Bytes) -> Result<Self, Error> {
        if let Some(command) = peerstore::Command::decode(&frame)? {
            return Ok(command.into());
        }
        let request = p2pd::Request::decode(frame).map_err(|e| Error::malformed("Request", &e))?;
        let number = request.r#type.ok_or(Error::MissingField {
            message: "Request",
            field: "type",
        })?;
        let r#type = Type::try_from(number).map_err(|_| Error::UnknownRequest(number))?;
        match r#type {
            Type::Identify | Type::Connect | Type::Disconnect | Type::ListPeers => {
                control::Command::decode(r#type, request).map(Self::Control)
            }
            Type::StreamOpen | Type::StreamHandler | Type::RemoveStreamHandler => {
                streams::Command::decode(r#type, request).map(Self::Streams)
            }
            Type::Dht => dht::Command::decode(request).map(Self::Dht),
            Type::Connmanager => connmgr::Command::decode(request).map(Self::ConnManager),
            Type::Pubsub => pubsub::Command::decode(request).map(Self::Pubsub),
            Type::PersistentConnUpgrade => Ok(unary::Upgrade.into()),
        }
    }

    /// The request as it goes over the wire, length first.
    pub fn encode(&self) -> Bytes {
        match self {
            Self::Control(command) => command.encode(),
            Self::Streams(command) => command.encode(),
            Self::Dht(command) => command.encode(),
            Self::ConnManager(command) => command.encode(),
            Self::Pubsub(command) => command.encode(),
            Self::Peerstore(command) => command.encode(),
            Self::Unary(command) => command.encode(),
        }
    }

    /// The request as a client sends it.
    pub fn encoded(&self) -> EncodedRequest {
        match self {
            Self::Control(command) => command.encoded(),
            Self::Streams(command) => command.encoded(),
            Self::Dht(command) => command.encoded(),
            Self::ConnManager(command) => command.encoded(),
            Self::Pubsub(command) => command.encoded(),
            Self::Peerstore(command) => command.encoded(),
            Self::Unary(command) => command.encoded(),
        }
    }

    /// The request's name in the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Control(command) => command.name(),
            Self::Streams(command) => command.name(),
            Self::Dht(command) => command.name(),
            Self::ConnManager(command) => command.name(),
            Self::Pubsub(command) => command.name(),
            Self::Peerstore(command) => command.name(),
            Self::Unary(command) => command.name(),
        }
    }

    /// How the request must be answered.
    pub fn answered(&self) -> Answered {
        match self {
            Self::Control(command) => command.answered(),
            Self::Streams(command) => command.answered(),
            Self::Dht(command) => command.answered(),
            Self::ConnManager(command) => command.answered(),
            Self::Pubsub(command) => command.answered(),
            Self::Peerstore(command) => command.answered(),
            Self::Unary(command) => command.answered(),
        }
    }
}

/// A family's requests as one enum, each variant named as its struct. `requests` implement
/// [`Request`], `queries` implement [`Query`].
macro_rules! family {
    ($family:ident: requests { $($request:ident),* $(,)? } queries { $($query:ident),* $(,)? }) => {
        /// One of this family's requests.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(missing_docs)] // each variant is the struct of its name
        pub enum Command {
            $($request($request),)*
            $($query($query),)*
        }

        impl Command {
            /// The request as it goes over the wire, length first.
            pub fn encode(&self) -> bytes::Bytes {
                match self {
                    $(Self::$request(request) => $crate::command::Request::encode(request),)*
                    $(Self::$query(query) => $crate::command::Query::encode(query),)*
                }
            }

            /// The request as a client sends it.
            pub fn encoded(&self) -> $crate::command::EncodedRequest {
                match self {
                    $(Self::$request(request) => $crate::command::Typed::encoded(request),)*
                    $(Self::$query(query) => $crate::command::Typed::encoded(query),)*
                }
            }

            /// The request's name in the protocol.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$request(_) => <$request as $crate::command::Request>::NAME,)*
                    $(Self::$query(_) => <$query as $crate::command::Query>::NAME,)*
                }
            }

            /// How the request must be answered.
            pub fn answered(&self) -> $crate::command::Answered {
                match self {
                    $(Self::$request(_) => <$request as $crate::command::Request>::ANSWERED,)*
                    $(Self::$query(_) => <$query as $crate::command::Query>::ANSWERED,)*
                }
            }
        }

        /// One of the replies to this family's requests, named as the request. Queries have one such
        /// reply for each value.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(missing_docs)] // each variant is the reply to the request of its name
        pub enum Reply {
            $($request(<$request as $crate::command::Request>::Reply),)*
            $($query(<$query as $crate::command::Query>::Value),)*
        }

        impl Reply {
            pub(crate) fn encode(&self) -> $crate::command::EncodedReply {
                use $crate::command::EncodedReply;
                match self {
                    $(Self::$request(reply) => EncodedReply::Reply(
                        <$request as $crate::command::Request>::NAME,
                        <$request as $crate::command::Request>::encode_reply(reply),
                    ),)*
                    $(Self::$query(value) => EncodedReply::Value(
                        <$query as $crate::command::Query>::NAME,
                        <$query as $crate::command::Query>::encode_value(value),
                    ),)*
                }
            }
        }

        impl From<Command> for $crate::command::Command {
            fn from(command: Command) -> Self {
                Self::$family(command)
            }
        }

        impl From<Reply> for $crate::command::Reply {
            fn from(reply: Reply) -> Self {
                Self::$family(reply)
            }
        }

        $(
            $crate::command::family!(@convert $family $request);

            impl $crate::command::Typed for $request {
                type Output = <Self as $crate::command::Request>::Reply;

                $crate::command::family!(@wrap $family $request);

                fn encoded(&self) -> $crate::command::EncodedRequest {
                    $crate::command::EncodedRequest::new(self)
                }
            }
        )*
        $(
            $crate::command::family!(@convert $family $query);

            impl $crate::command::Typed for $query {
                type Output = <Self as $crate::command::Query>::Value;

                $crate::command::family!(@wrap $family $query);

                fn encoded(&self) -> $crate::command::EncodedRequest {
                    $crate::command::EncodedRequest::of_query(self)
                }
            }
        )*
    };
    (@convert $family:ident $name:ident) => {
        impl From<$name> for Command {
            fn from(request: $name) -> Self {
                Self::$name(request)
            }
        }

        impl From<$name> for $crate::command::Command {
            fn from(request: $name) -> Self {
                Self::$family(Command::$name(request))
            }
        }
    };
    (@wrap $family:ident $name:ident) => {
        fn wrap(output: Self::Output) -> $crate::command::Reply {
            $crate::command::Reply::$family(Reply::$name(output))
        }

        fn unwrap(reply: $crate::command::Reply) -> Option<Self::Output> {
            match reply {
                $crate::command::Reply::$family(Reply::$name(output)) => Some(output),
                _ => None,
            }
        }
    };
}
use family;

/// Implements the reply of a request that is answered with OK and nothing else.
macro_rules! replies_done {
    () => {
        type Reply = ();

        fn encode_reply((): &()) -> $crate::pb::p2pd::Response {
            $crate::command::ok()
        }

        fn decode_reply(_: $crate::pb::p2pd::Response) -> Result<(), $crate::Error> {
            Ok(())
        }
    };
}
use replies_done;

/// The response OK, and nothing else yet.
pub(super) fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

/// The response to a request that the daemon refuses.
pub fn refusal(words: &str) -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Error as i32),
        error: Some(p2pd::ErrorResponse {
            msg: Some(Bytes::copy_from_slice(words.as_bytes())),
        }),
        ..Default::default()
    }
}

/// A request of type `r#type`, length first, with what `fill` adds to it.
fn encode(r#type: Type, fill: impl FnOnce(&mut p2pd::Request)) -> Bytes {
    let mut request = p2pd::Request {
        r#type: Some(r#type as i32),
        ..Default::default()
    };
    fill(&mut request);
    framing::encode_frame(&request)
}

/// A field that a message must have.
fn required<T>(value: Option<T>, message: &'static str, field: &'static str) -> Result<T, Error> {
    value.ok_or(Error::MissingField { message, field })
}

fn peer_id(value: Option<Bytes>, message: &'static str) -> Result<PeerId, Error> {
    required(value, message, "peer").map(PeerId::from_bytes)
}

fn multiaddrs(addrs: Vec<Bytes>) -> Vec<Multiaddr> {
    addrs.into_iter().map(Multiaddr::from_bytes).collect()
}

/// A timeout as the protocol has it: whole seconds, rounded up. A zero would mean the daemon's
/// default of 60 s.
fn whole_seconds(timeout: Option<Duration>) -> Option<i64> {
    timeout.map(|timeout| {
        let partial = u64::from(timeout.subsec_nanos() > 0);
        let seconds = timeout.as_secs().saturating_add(partial);
        // The Go daemons multiply by 10^9 in 64 bits. More than a century is as good as no limit.
        i64::try_from(seconds.clamp(1, 100 * 366 * 86_400)).unwrap_or(i64::MAX)
    })
}

/// The timeout that a server reads: none if the client left it to the daemon.
fn duration(seconds: Option<i64>) -> Option<Duration> {
    let seconds = u64::try_from(seconds?).ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

#[cfg(test)]
pub(super) mod tests;
