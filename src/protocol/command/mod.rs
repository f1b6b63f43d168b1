//! The requests of a client and the replies of a daemon, one file per family. Each file holds both the
//! encoding and the decoding.
//!
//! A [`Request`] is one kind of request with a typed reply. A client encodes it and decodes the reply; a
//! server decodes it, as one of the [`Command`]s, and encodes the reply. [`Query`] is the counterpart
//! for requests that are answered value by value, such as DHT queries.
//!
//! ```
//! use p2pd_protocol::command::{control::Identify, Command, Request};
//!
//! // A client encodes it …
//! let frame = Identify.encode();
//! assert_eq!(frame[..], [2, 8, 0]);
//! // … and a server decodes it, without its length.
//! let command = Command::decode(frame.slice(1..))?;
//! assert_eq!(command, Identify.into());
//! # Ok::<(), p2pd_protocol::Error>(())
//! ```

pub mod connmgr;
pub mod control;
pub mod dht;
mod family;
mod message;
pub mod peerstore;
pub mod pubsub;
mod request;
pub mod streams;
pub mod unary;

pub use message::refusal;
pub(crate) use message::required;
pub use request::{Answered, Member, Query, Request};
pub(crate) use request::{EncodedReply, Reader};

use crate::pb::p2pd::{self, request::Type};
use crate::Error;
use bytes::Bytes;
use prost::Message as _;

/// A request or query of any family, for code that is generic over all requests.
pub trait Typed: Member {
    /// Converts the reply to this request to the common type [`Reply`].
    fn into_reply(output: Self::Output) -> Reply;

    /// Extracts the reply to this request; `None` if `reply` belongs to another request.
    fn from_reply(reply: Reply) -> Option<Self::Output>;

    /// Encodes the request for a client.
    fn encoded(&self) -> EncodedRequest;
}

impl<M: Member> Typed for M
where
    Reply: From<M::Reply>,
    M::Reply: TryFrom<Reply>,
    Command: From<M::Command>,
{
    fn into_reply(output: Self::Output) -> Reply {
        M::into_family(output).into()
    }

    fn from_reply(reply: Reply) -> Option<Self::Output> {
        M::from_family(reply.try_into().ok()?)
    }

    fn encoded(&self) -> EncodedRequest {
        self.encode_for()
    }
}

/// An encoded request, and how to read its reply.
pub type EncodedRequest = request::EncodedRequest<Reply>;

impl<R: Typed> From<R> for EncodedRequest {
    fn from(request: R) -> Self {
        request.encoded()
    }
}

impl<R: Member> From<R> for Command
where
    R::Command: From<R> + Into<Command>,
{
    fn from(request: R) -> Self {
        R::Command::from(request).into()
    }
}

/// Joins the families in the enums `Command` and `Reply`. Each family is given as `Variant(module)`.
macro_rules! families {
    ($($(#[$doc:meta])* $family:ident($module:ident),)*) => {
        /// A request that a server has received.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Command {
            $($(#[$doc])* $family($module::Command),)*
        }

        /// A reply that a client has received, to any request.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Reply {
            $($(#[$doc])* $family($module::Reply),)*
        }

        impl Command {
            /// Encodes the request, with its length prefix.
            pub fn encode(&self) -> Bytes {
                match self {
                    $(Self::$family(command) => command.encode(),)*
                }
            }

            /// Encodes the request for a client.
            pub fn encoded(&self) -> EncodedRequest {
                match self {
                    $(Self::$family(command) => command.encoded(),)*
                }
            }

            /// Name of the request in the protocol.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$family(command) => command.name(),)*
                }
            }

            /// How the request must be answered.
            pub fn answered(&self) -> Answered {
                match self {
                    $(Self::$family(command) => command.answered(),)*
                }
            }

            /// Reads a request, by trying each family.
            fn of_type(r#type: Type, mut request: p2pd::Request) -> Result<Option<Self>, Error> {
                $(
                    if let Some(command) = $module::Command::decode(r#type, &mut request)? {
                        return Ok(Some(Self::$family(command)));
                    }
                )*
                Ok(None)
            }
        }

        impl Reply {
            pub(crate) fn encode(&self) -> EncodedReply {
                match self {
                    $(Self::$family(reply) => reply.encode(),)*
                }
            }
        }

        $(
            impl From<$module::Command> for Command {
                fn from(command: $module::Command) -> Self {
                    Self::$family(command)
                }
            }

            impl From<$module::Reply> for Reply {
                fn from(reply: $module::Reply) -> Self {
                    Self::$family(reply)
                }
            }

            impl TryFrom<Reply> for $module::Reply {
                type Error = Reply;

                fn try_from(reply: Reply) -> Result<Self, Reply> {
                    match reply {
                        Reply::$family(reply) => Ok(reply),
                        other => Err(other),
                    }
                }
            }
        )*
    };
}

families! {
    /// Identity and connections.
    Control(control),
    /// Streams and their handlers.
    Streams(streams),
    /// The DHT.
    Dht(dht),
    /// The connection manager.
    ConnManager(connmgr),
    /// Pubsub.
    Pubsub(pubsub),
    /// The peer store, which only the JavaScript daemon has.
    Peerstore(peerstore),
    /// The upgrade to a persistent connection, which only hivemind's fork has.
    Unary(unary),
}

impl Command {
    /// Reads a request's message, without its length prefix.
    ///
    /// Type 9 is PEERSTORE in the JavaScript daemon and PERSISTENT_CONN_UPGRADE in hivemind's fork. It
    /// is read as PEERSTORE only if field 9 is present and its content begins with a varint field.
    ///
    /// # Errors
    /// [`Error::UnknownRequest`] for a type that no daemon has; the connection stays usable.
    /// Any other error means that the bytes are not a request.
    pub fn decode(frame: Bytes) -> Result<Self, Error> {
        if let Some(command) = peerstore::Command::decode_frame(&frame)? {
            return Ok(command.into());
        }
        let request = p2pd::Request::decode(frame).map_err(|e| Error::malformed("Request", &e))?;
        let number = required(request.r#type, "Request", "type")?;
        let r#type = Type::try_from(number).map_err(|_| Error::UnknownRequest(number))?;
        Self::of_type(r#type, request)?.ok_or(Error::UnknownRequest(number))
    }
}

#[cfg(test)]
pub(super) mod tests;
