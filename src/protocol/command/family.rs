//! The macros that join the requests of a family.

/// Joins the requests of a family in an enum `Command`, and their replies in an enum `Reply`. Each variant has
/// the name of its request. `requests` implement `Request`, `queries` implement `Query`.
macro_rules! family {
    (requests { $($request:ident),* $(,)? } queries { $($query:ident),* $(,)? }) => {
        /// A request of this family.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(missing_docs)] // each variant is the struct of its name
        pub enum Command {
            $($request($request),)*
            $($query($query),)*
        }

        impl Command {
            /// Encodes the request, with its length prefix.
            pub fn encode(&self) -> bytes::Bytes {
                match self {
                    $(Self::$request(request) => $crate::command::request::Request::encode(request),)*
                    $(Self::$query(query) => $crate::command::request::Query::encode(query),)*
                }
            }

            /// Encodes the request for a client that reads replies of type `R`.
            pub(crate) fn encoded<R: From<Reply>>(
                &self,
            ) -> $crate::command::request::EncodedRequest<R> {
                match self {
                    $(Self::$request(request) => $crate::command::request::Member::encode_for(request),)*
                    $(Self::$query(query) => $crate::command::request::Member::encode_for(query),)*
                }
            }

            /// Name of the request in the protocol.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$request(_) => <$request as $crate::command::request::Request>::NAME,)*
                    $(Self::$query(_) => <$query as $crate::command::request::Query>::NAME,)*
                }
            }

            /// How the request must be answered.
            pub fn answered(&self) -> $crate::command::request::Answered {
                match self {
                    $(Self::$request(_) => <$request as $crate::command::request::Request>::ANSWERED,)*
                    $(Self::$query(_) => <$query as $crate::command::request::Query>::ANSWERED,)*
                }
            }
        }

        /// A reply to a request of this family, or one value of the answer to a query.
        #[derive(Debug, Clone, PartialEq, Eq)]
        #[non_exhaustive]
        #[allow(missing_docs)] // each variant is the reply to the request of its name
        pub enum Reply {
            $($request(<$request as $crate::command::request::Request>::Reply),)*
            $($query(<$query as $crate::command::request::Query>::Value),)*
        }

        impl Reply {
            pub(crate) fn encode(&self) -> $crate::command::request::EncodedReply {
                use $crate::command::request::EncodedReply;
                match self {
                    $(Self::$request(reply) => EncodedReply::Reply(
                        <$request as $crate::command::request::Request>::NAME,
                        <$request as $crate::command::request::Request>::encode_reply(reply),
                    ),)*
                    $(Self::$query(value) => EncodedReply::Value(
                        <$query as $crate::command::request::Query>::NAME,
                        <$query as $crate::command::request::Query>::encode_value(value),
                    ),)*
                }
            }
        }

        $(
            impl From<$request> for Command {
                fn from(request: $request) -> Self {
                    Self::$request(request)
                }
            }

            impl $crate::command::request::Member for $request {
                type Output = <Self as $crate::command::request::Request>::Reply;
                $crate::command::family::family!(@member $request);

                fn encode_for<R: From<Reply>>(&self) -> $crate::command::request::EncodedRequest<R> {
                    $crate::command::request::EncodedRequest::new(self)
                }
            }
        )*
        $(
            impl From<$query> for Command {
                fn from(query: $query) -> Self {
                    Self::$query(query)
                }
            }

            impl $crate::command::request::Member for $query {
                type Output = <Self as $crate::command::request::Query>::Value;
                $crate::command::family::family!(@member $query);

                fn encode_for<R: From<Reply>>(&self) -> $crate::command::request::EncodedRequest<R> {
                    $crate::command::request::EncodedRequest::of_query(self)
                }
            }
        )*
    };
    (@member $name:ident) => {
        type Command = Command;
        type Reply = Reply;

        fn into_family(output: Self::Output) -> Reply {
            Reply::$name(output)
        }

        fn from_family(reply: Reply) -> Option<Self::Output> {
            match reply {
                Reply::$name(output) => Some(output),
                #[allow(unreachable_patterns)] // a family of one request
                _ => None,
            }
        }
    };
}
pub(super) use family;

/// Implements the reply of a request that is answered with OK alone.
macro_rules! replies_done {
    () => {
        type Reply = ();

        fn encode_reply((): &()) -> $crate::pb::p2pd::Response {
            $crate::command::message::ok()
        }

        fn decode_reply(_: $crate::pb::p2pd::Response) -> Result<(), $crate::Error> {
            Ok(())
        }
    };
}
pub(super) use replies_done;
