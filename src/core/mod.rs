//! The control protocol without I/O: bytes in, events out.
//!
//! - [`framing`]: length-prefixed messages out of arbitrary pieces of bytes.
//! - [`exchange`]: one control connection as a state machine: a [`Request`] goes out, [`Event`]s
//!   come back, and the connection is ready again, has become a stream, or has failed.
//! - one file per family of requests, each with its requests and how their answers are read:
//!   [`control`], [`streams`], [`dht`], [`connmgr`], [`pubsub`], [`peerstore`].
//! - [`unary`]: a connection that was upgraded for unary calls as another state machine;
//!   [`output`]: what waits to be sent on it.
//! - [`peer_id`], [`multiaddr`], [`public_key`], [`pb`]: the values they are made of.
//! - [`error`]: what can go wrong, and whose fault it is.
//!
//! There are no sockets, no clock and no Python here; drivers bring those.
//!
//! ```
//! use p2pclient_rs::core::{control, Answer, Event, Exchange, Limits};
//!
//! let mut exchange = Exchange::new(Limits::default());
//! let frame = exchange.send(&control::identify())?; // write this to the socket
//! assert_eq!(frame[..], [2, 8, 0]);
//!
//! // Whatever was read from the socket goes in, in pieces of any size.
//! exchange.receive(&[8, 8, 0, 34, 4, 10, 2]);
//! assert_eq!(exchange.poll()?, None);
//! exchange.receive(&[1, 2]);
//! let Some(Event::Answer(Answer::Identity { peer_id, .. })) = exchange.poll()? else { panic!() };
//! assert_eq!(peer_id.as_bytes(), [1, 2]);
//! # Ok::<(), p2pclient_rs::core::Error>(())
//! ```

pub mod command;
pub mod connmgr;
pub mod control;
pub mod dht;
pub mod error;
pub mod exchange;
pub mod framing;
pub mod multiaddr;
pub mod output;
pub mod pb;
pub mod peer_id;
pub mod peerstore;
pub mod public_key;
pub mod pubsub;
pub mod request;
pub mod streams;
pub mod unary;

pub use control::PeerInfo;
pub use error::{Error, Fault};
pub use exchange::{Answer, Event, Exchange, State};
pub use framing::{FrameDecoder, Limits};
pub use multiaddr::Multiaddr;
pub use output::Output;
pub use peer_id::PeerId;
pub use public_key::PublicKey;
pub use pubsub::PubsubMessage;
pub use request::{Request, Results};
pub use streams::StreamInfo;
pub use unary::{Persistent, UnaryEvent, UnaryLimits};
