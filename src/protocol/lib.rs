//! The control protocol without I/O: bytes in, events out.
//!
//! - [`framing`]: splits bytes into length-prefixed messages.
//! - [`command`]: requests and replies, one file per family.
//! - [`exchange`]: both ends of a control connection as state machines.
//! - [`unary`]: both ends of a persistent connection for unary calls as state machines.
//! - [`output`]: the output queue of a connection.
//! - [`policy`]: decisions common to all drivers, such as the pause before a retry.
//! - [`types`], [`pb`]: peer ids, multiaddrs, keys, and the protobuf messages.
//! - [`error`]: the errors, and whose fault each is.
//!
//! There are no sockets, no clock and no Python here. A driver reads and writes the sockets and passes
//! in the time.
//!
//! ```
//! use p2pd_protocol::command::{control::Identify, Typed};
//! use p2pd_protocol::{ClientExchange, Event, Limits};
//!
//! let mut exchange = ClientExchange::new(Limits::default());
//! let frame = exchange.send(&Identify.encoded())?; // write this to the socket
//! assert_eq!(frame[..], [2, 8, 0]);
//!
//! // Pass in the bytes read from the socket, in pieces of any size.
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
