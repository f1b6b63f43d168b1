//! Serves one control connection: reads a request, has the node carry it out, and answers.

use super::persistent;
use super::pipe::pipe;
use super::shared::Shared;
use super::socket::Socket;
use crate::error::NodeError;
use crate::handle::{NodeHandle, PeerStream};
use p2pd_protocol::command::{control, dht, refusal, streams, unary, Command};
use p2pd_protocol::framing::encode_frame;
use p2pd_protocol::{Error, Limits, ServerExchange, State};
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Time limit of a request that has none of its own.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Refusal of a request whose time is over, in Go's words.
const TIMED_OUT: &str = "context deadline exceeded";

/// Refusal of a request that this daemon lacks. Clients compare these words.
const NOT_SUPPORTED: &str = "not supported";

/// Size of one read, in bytes.
const READ_SIZE: usize = 16 << 10;

/// Room in a message for the fields around a payload of the largest size, in bytes.
const FIELDS: usize = 64 << 10;

/// Serves a connection until it ends.
pub(super) async fn serve(socket: Socket, shared: Arc<Shared>) {
    let max_frame = shared.config.max_message.saturating_add(FIELDS);
    let mut session = Session {
        socket,
        exchange: ServerExchange::new(Limits::default().with_max_frame(max_frame)),
        shared,
        buffer: vec![0; READ_SIZE],
    };
    match session.run().await {
        Ok(Outcome::Closed) => session.socket.finish().await,
        Ok(Outcome::Stream(stream)) => {
            let first = session.exchange.into_remainder();
            drop(session.buffer);
            pipe(*stream, session.socket, first).await;
        }
        Ok(Outcome::Persistent) => {
            let first = session.exchange.into_remainder();
            drop(session.buffer);
            persistent::serve(session.socket, first, session.shared).await;
        }
        Err(error) => log::debug!("a control connection failed: {error}"),
    }
}

/// What becomes of a connection when its last request was answered.
enum Outcome {
    Closed,
    Stream(Box<PeerStream>),
    Persistent,
}

struct Session {
    socket: Socket,
    exchange: ServerExchange,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Session {
    async fn run(&mut self) -> io::Result<Outcome> {
        loop {
            match self.exchange.poll() {
                Ok(Some(command)) => {
                    if let Some(outcome) = self.answer(command).await? {
                        return Ok(outcome);
                    }
                }
                Ok(None) => {
                    let count = self.socket.read(&mut self.buffer).await?;
                    if count == 0 {
                        return Ok(Outcome::Closed);
                    }
                    self.exchange.receive(&self.buffer[..count]);
                }
                // The Go daemons close the connection without a word.
                Err(error) => {
                    let refusal = encode_frame(&refusal(&words(&error)));
                    self.socket.write_all(&refusal).await?;
                    return Ok(Outcome::Closed);
                }
            }
        }
    }

    /// Answers a request. Returns what becomes of the connection if it serves no further requests.
    async fn answer(&mut self, command: Command) -> io::Result<Option<Outcome>> {
        use control::Command as Control;
        use streams::Command as Streams;
        let node = self.shared.node.clone();
        let frame = match command {
            Command::Control(Control::Identify(_)) => {
                self.exchange.reply::<control::Identify>(&node.identify())
            }
            Command::Control(Control::ListPeers(_)) => self
                .exchange
                .reply::<control::ListPeers>(&node.list_peers()),
            Command::Control(Control::Connect(request)) => {
                let connect = node.connect(&request.peer, &request.addrs);
                match self.within(request.timeout, connect).await? {
                    None => return Ok(Some(Outcome::Closed)),
                    Some(Ok(())) => self.exchange.reply::<control::Connect>(&()),
                    Some(Err(words)) => self.exchange.refuse(&words),
                }
            }
            Command::Control(Control::Disconnect(request)) => {
                let disconnect = node.disconnect(&request.peer);
                match self.within(None, disconnect).await? {
                    None => return Ok(Some(Outcome::Closed)),
                    Some(Ok(())) => self.exchange.reply::<control::Disconnect>(&()),
                    Some(Err(words)) => self.exchange.refuse(&words),
                }
            }
            Command::Streams(Streams::StreamOpen(request)) => {
                let open = node.open_stream(&request.peer, request.protocols);
                match self.within(request.timeout, open).await? {
                    None => return Ok(Some(Outcome::Closed)),
                    Some(Ok(stream)) => {
                        let reply = self.exchange.reply::<streams::StreamOpen>(&stream.info);
                        self.socket
                            .write_all(&reply.map_err(io::Error::other)?)
                            .await?;
                        return Ok(Some(Outcome::Stream(Box::new(stream))));
                    }
                    Some(Err(words)) => self.exchange.refuse(&words),
                }
            }
            Command::Streams(Streams::StreamHandler(request)) => match add(&node, &request) {
                Ok(()) => self.exchange.reply::<streams::StreamHandler>(&()),
                Err(error) => self.exchange.refuse(&error.to_string()),
            },
            Command::Streams(Streams::RemoveStreamHandler(request)) => {
                match remove(&node, &request) {
                    Ok(()) => self.exchange.reply::<streams::RemoveStreamHandler>(&()),
                    Err(error) => self.exchange.refuse(&error.to_string()),
                }
            }
            Command::Unary(_) => {
                let reply = self.exchange.reply::<unary::Upgrade>(&());
                self.socket
                    .write_all(&reply.map_err(io::Error::other)?)
                    .await?;
                return Ok(Some(Outcome::Persistent));
            }
            Command::Dht(dht::Command::FindPeersConnectedToPeer(_)) => {
                self.exchange.refuse(NOT_SUPPORTED)
            }
            Command::Dht(_) => self.exchange.refuse("DHT not enabled"),
            Command::Pubsub(_) => self.exchange.refuse("PubSub not enabled"),
            // This daemon has neither a connection manager nor a peer store yet.
            _ => self.exchange.refuse(NOT_SUPPORTED),
        };
        self.socket
            .write_all(&frame.map_err(io::Error::other)?)
            .await?;
        Ok(None)
    }

    /// Runs a request within its time limit. Returns `None` if the client has gone, and the message of
    /// a refusal if the request failed.
    async fn within<T>(
        &mut self,
        timeout: Option<Duration>,
        request: impl Future<Output = Result<T, NodeError>>,
    ) -> io::Result<Option<Result<T, String>>> {
        let timeout = tokio::time::sleep(timeout.unwrap_or(TIMEOUT));
        tokio::pin!(request, timeout);
        let mut is_reading = true;
        loop {
            is_reading &= self.exchange.state() == State::Busy && self.exchange.wants_input();
            tokio::select! {
                biased;
                result = &mut request => {
                    return Ok(Some(result.map_err(|error| error.to_string())));
                }
                () = &mut timeout => return Ok(Some(Err(TIMED_OUT.to_owned()))),
                read = self.socket.read(&mut self.buffer), if is_reading => match read? {
                    0 if self.is_gone() => return Ok(None),
                    // The client sends nothing more but still reads.
                    0 => is_reading = false,
                    count => self.exchange.receive(&self.buffer[..count]),
                },
            }
        }
    }

    /// Whether a client that has closed its sending direction reads no answer either. On a TCP socket
    /// nothing tells; hardly any program closes only one direction there.
    fn is_gone(&self) -> bool {
        matches!(self.socket, Socket::Tcp(_)) || self.socket.is_hung_up()
    }
}

/// Registers handlers in order. Like the fork, keeps the earlier ones if one is refused.
fn add(node: &NodeHandle, request: &streams::StreamHandler) -> Result<(), NodeError> {
    let mut protocols = request.protocols.iter();
    protocols.try_for_each(|name| node.add_stream_handler(name, &request.addr, request.balanced))
}

fn remove(node: &NodeHandle, request: &streams::RemoveStreamHandler) -> Result<(), NodeError> {
    let mut protocols = request.protocols.iter();
    protocols.try_for_each(|name| node.remove_stream_handler(name, &request.addr))
}

/// Returns the message for a client whose bytes are not a request.
fn words(error: &Error) -> String {
    match error {
        Error::UnknownRequest(_) => NOT_SUPPORTED.to_owned(),
        Error::FrameTooLarge { declared, limit } => {
            format!("the request of {declared} bytes exceeds the limit of {limit} bytes")
        }
        Error::MissingField { message, field } => {
            format!("Malformed request; missing parameters ({field} of {message})")
        }
        Error::Malformed { message, reason } => {
            format!("Malformed request; not a {message}: {reason}")
        }
        Error::MalformedLength(reason) => format!("Malformed request; invalid length: {reason}"),
        error => format!("Malformed request; {error}"),
    }
}
