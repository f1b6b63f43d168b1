//! The control protocol without I/O: bytes in, events out.
//!
//! - [`framing`]: length-prefixed messages out of arbitrary pieces of bytes.
//! - [`command`]: what a client asks and what the daemon answers, one file per family of requests.
//! - [`exchange`]: one control connection as a state machine, one for each end: requests and replies
//!   become frames, and frames become requests and replies.
//! - [`unary`]: a connection that was upgraded for unary calls as another state machine;
//!   [`output`]: the bytes waiting to be sent on it.
//! - [`policy`]: decisions that drivers make alike, such as the pause before a retry.
//! - [`types`], [`pb`]: the values they are made of.
//! - [`error`]: the failures, and whose fault each is.
//!
//! There are no sockets, no clock and no Python here; drivers bring those.
//!
//! ```
//! use p2pd_protocol::command::{control::Identify, Typed};
//! use p2pd_protocol::{ClientExchange, Event, Limits};
//!
//! let mut exchange = ClientExchange::new(Limits::default());
//! let frame = exchange.send(&Identify.encoded())?; // write this to the socket
//! assert_eq!(frame[..], [2, 8, 0]);
//!
//! // Whatever was read from the socket goes in, in pieces of any size.
//! exchange.receive(&[8, 8, 0, 34, 4, 10, 2]);
//! assert_eq!(exchange.poll()?, None);
//! exchange.receive(&[1, 2]);
//! let Some(Event::Reply(reply)) = exchange.poll()? else { panic!() };
//! let identity = Identify::from_reply(reply).expect("it was asked for");
//! assert_eq!(identity.peer_id.as_bytes(), [1, 2]);
//! # Ok::<(), p2pd_protocol::Error>(())
//! ```

pub mod command;
pub mod error;
pub mod exchange;
mod fields;
pub mod framing;
pub mod output;
pub mod pb;
pub mod policy;
pub mod types;
pub mod unary;

pub use command::control::{Identity, PeerInfo};
pub use command::pubsub::PubsubMessage;
pub use command::streams::StreamInfo;
pub use command::{Command, EncodedRequest, Reply};
pub use error::{Error, Fault};
pub use exchange::client::{ClientExchange, Event};
pub use exchange::server::ServerExchange;
pub use exchange::State;
pub use framing::{FrameDecoder, Limits};
pub use output::Output;
pub use types::endpoint::{self, Endpoint};
pub use types::multiaddr::{self, Multiaddr};
pub use types::peer_id::{self, PeerId};
pub use types::public_key::{self, PublicKey};
pub use unary::{PersistentClient, UnaryEvent, UnaryLimits};
