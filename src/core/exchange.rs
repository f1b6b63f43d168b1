//! One control connection as a state machine.
//!
//! ```text
//!            send            answer or refusal
//!   Ready ─────────▶ Busy ───────────────────▶ Ready
//!                      ├── STREAM_OPEN, SUBSCRIBE succeeded ──▶ Consumed
//!                      └── broken protocol, end of file ──────▶ Failed
//! ```
//!
//! Requests that only ask may follow each other: it is busy until the last of them is answered.

pub mod server;

use super::pb::p2pd::{self, response};
use super::request::{DhtValue, Expect};
use super::{control, dht, peerstore, pubsub, streams};
use super::{Error, FrameDecoder, Limits, Multiaddr, PeerId, PeerInfo, Request, StreamInfo};
use bytes::Bytes;
use prost::Message as _;
use std::collections::VecDeque;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It can take a request.
    Ready,
    /// It waits for an answer.
    Busy,
    /// It carries a stream, a subscription or unary calls and takes no requests any more.
    Consumed,
    /// The protocol was broken or the connection lost.
    Failed,
}

/// What came of the bytes received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// One of the results of a DHT query; more may follow, and then the [`Event::Answer`].
    Item(Answer),
    /// The request succeeded, and this is the end of its answer.
    Answer(Answer),
    /// The daemon refused the request, in these words.
    Refused(String),
}

/// The content of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// There is nothing more to say.
    Done,
    /// To IDENTIFY.
    Identity {
        /// The daemon's peer id.
        peer_id: PeerId,
        /// Where it listens.
        addrs: Vec<Multiaddr>,
    },
    /// To LIST_PEERS.
    Peers(Vec<PeerInfo>),
    /// To STREAM_OPEN: the connection is now this stream.
    StreamOpened(StreamInfo),
    /// To SUBSCRIBE: the connection now carries PSMessages.
    Subscribed,
    /// To PUBSUB GET_TOPICS.
    Topics(Vec<String>),
    /// To PUBSUB LIST_PEERS.
    PeerIds(Vec<PeerId>),
    /// A peer with its addresses.
    PeerInfo(PeerInfo),
    /// A peer.
    PeerId(PeerId),
    /// A value or key.
    Value(Bytes),
    /// To PEERSTORE GET_PROTOCOLS.
    Protocols(Vec<String>),
}

impl Answer {
    /// About what one of a DHT query's results occupies besides its bytes: an endless row of empty
    /// ones has its end too.
    fn overhead(&self) -> usize {
        64 + match self {
            Answer::PeerInfo(info) => 32 * info.addrs.len(),
            _ => 0,
        }
    }
}

/// What the answer being awaited has come to.
#[derive(Debug)]
struct Pending {
    expect: Expect,
    /// Inside a DHT query's BEGIN … END.
    values: Option<Values>,
}

impl Pending {
    fn new(expect: Expect) -> Self {
        Self {
            expect,
            values: None,
        }
    }
}

#[derive(Debug, Default)]
struct Values {
    count: usize,
    bytes: usize,
}

/// A control connection: requests in, frames out; bytes in, events out.
#[derive(Debug)]
pub struct Exchange {
    decoder: FrameDecoder,
    limits: Limits,
    state: State,
    pending: Option<Pending>,
    /// What follows it: the answers to further queries.
    following: VecDeque<Expect>,
    /// The answer that ends a query answered by a single VALUE.
    last: Option<Event>,
}

impl Exchange {
    /// A new connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            decoder: FrameDecoder::new(limits.max_frame),
            limits,
            state: State::Ready,
            pending: None,
            following: VecDeque::new(),
            last: None,
        }
    }

    /// Where the connection stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether another request can be sent: nothing is awaited and nothing unasked has come.
    pub fn is_reusable(&self) -> bool {
        self.state == State::Ready && self.decoder.is_empty()
    }

    /// Begins an exchange; what is returned is to be written to the connection. While the answers
    /// to queries are awaited, another [query](Request::is_query) may follow them.
    pub fn send(&mut self, request: &Request) -> Result<Bytes, Error> {
        let asking = matches!(&self.pending, Some(pending) if pending.expect.is_query());
        let follows = asking && self.state == State::Busy && request.is_query();
        if !follows && !self.is_reusable() {
            return Err(Error::NotReady(self.state));
        }
        if request.frame.len() > self.limits.max_frame {
            return Err(Error::RequestTooLarge {
                size: request.frame.len(),
                limit: self.limits.max_frame,
            });
        }
        if follows {
            self.following.push_back(request.expect);
        } else {
            self.state = State::Busy;
            self.pending = Some(Pending::new(request.expect));
        }
        Ok(request.frame.clone())
    }

    /// Takes bytes read from the connection.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.decoder.extend(bytes);
    }

    /// What is to be said of the end of the connection, seen now.
    pub fn end_of_file(&mut self) -> Error {
        let mid_message =
            !self.decoder.is_empty() || self.pending.as_ref().is_some_and(|p| p.values.is_some());
        self.state = State::Failed;
        Error::Closed { mid_message }
    }

    /// The next event, or `None` until more bytes arrive. After an error the connection is of no
    /// more use.
    pub fn poll(&mut self) -> Result<Option<Event>, Error> {
        let event = self.next_event();
        if event.is_err() {
            self.state = State::Failed;
        }
        event
    }

    /// What followed the answer on a connection that was consumed: the stream's first bytes.
    pub fn into_remainder(self) -> Bytes {
        self.decoder.into_remainder()
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        if let Some(last) = self.last.take() {
            return Ok(Some(self.finish(last, State::Ready)));
        }
        loop {
            let Some(pending) = &mut self.pending else {
                return match self.state {
                    State::Ready if !self.decoder.is_empty() => {
                        Err(Error::Unexpected("bytes that answer no request".to_owned()))
                    }
                    _ => Ok(None),
                };
            };
            let expect = pending.expect;
            let in_values = pending.values.is_some();
            let Some(frame) = self.decoder.next_frame()? else {
                return Ok(None);
            };
            if let (true, Expect::Dht { value, one }) = (in_values, expect) {
                // However little of the frame is kept, it keeps all of it in memory.
                let size = frame.len();
                let response = p2pd::DhtResponse::decode(frame)
                    .map_err(|e| Error::malformed("DHTResponse", &e))?;
                let step = dht::step(response, value)?;
                return self.dht_value(step, one, size).map(Some);
            }
            let response =
                p2pd::Response::decode(frame).map_err(|e| Error::malformed("Response", &e))?;
            if let Some(event) = self.response(response, expect)? {
                return Ok(Some(event));
            }
        }
    }

    /// Reads the Response; `None` if it only begins a row of DHT values.
    fn response(
        &mut self,
        response: p2pd::Response,
        expect: Expect,
    ) -> Result<Option<Event>, Error> {
        let r#type = response.r#type.ok_or(Error::MissingField {
            message: "Response",
            field: "type",
        })?;
        match response::Type::try_from(r#type) {
            Ok(response::Type::Ok) => {}
            Ok(response::Type::Error) => {
                let words = response
                    .error
                    .and_then(|error| error.msg)
                    .unwrap_or_default();
                let words = String::from_utf8_lossy(&words).into_owned();
                return Ok(Some(self.finish(Event::Refused(words), State::Ready)));
            }
            Err(_) => {
                return Err(Error::Unexpected(format!(
                    "Response of unknown type {type}"
                )));
            }
        }
        let answer = match expect {
            Expect::Done | Expect::Persistent => Answer::Done,
            Expect::Identity => control::identity(response)?,
            Expect::Peers => control::peers(response)?,
            Expect::Stream => streams::opened(response)?,
            Expect::Subscription => Answer::Subscribed,
            Expect::Topics => pubsub::topics(response)?,
            Expect::TopicPeers => pubsub::topic_peers(response)?,
            Expect::PeerstoreProtocols => peerstore::protocols(response)?,
            Expect::PeerstorePeer => peerstore::peer(response)?,
            Expect::Dht { value, .. } => return self.dht_response(response, value),
        };
        let next = match expect {
            Expect::Stream | Expect::Subscription | Expect::Persistent => State::Consumed,
            _ => State::Ready,
        };
        Ok(Some(self.finish(Event::Answer(answer), next)))
    }

    /// The Response to a DHT query: BEGIN, or the one VALUE there is.
    fn dht_response(
        &mut self,
        response: p2pd::Response,
        value: DhtValue,
    ) -> Result<Option<Event>, Error> {
        let response = response.dht.ok_or(Error::MissingField {
            message: "Response",
            field: "dht",
        })?;
        match dht::step(response, value)? {
            dht::Step::Begin => {
                if let Some(pending) = &mut self.pending {
                    pending.values = Some(Values::default());
                }
                Ok(None)
            }
            dht::Step::Value(answer) => {
                self.last = Some(Event::Answer(Answer::Done));
                Ok(Some(Event::Item(answer)))
            }
            dht::Step::End => Err(Error::Unexpected("DHT END before BEGIN".to_owned())),
        }
    }

    /// A DHTResponse of `size` bytes between BEGIN and END.
    fn dht_value(&mut self, step: dht::Step, one: bool, size: usize) -> Result<Event, Error> {
        let values = self
            .pending
            .as_mut()
            .and_then(|pending| pending.values.as_mut())
            .expect("only called between BEGIN and END");
        match step {
            dht::Step::Begin => Err(Error::Unexpected("DHT BEGIN after BEGIN".to_owned())),
            dht::Step::Value(answer) => {
                values.count += 1;
                values.bytes += size + answer.overhead();
                if values.bytes > self.limits.max_answer {
                    return Err(Error::AnswerTooLarge {
                        limit: self.limits.max_answer,
                    });
                }
                Ok(Event::Item(answer))
            }
            dht::Step::End if one && values.count != 1 => Err(Error::Unexpected(format!(
                "{} results of a DHT query that has one",
                values.count
            ))),
            dht::Step::End => Ok(self.finish(Event::Answer(Answer::Done), State::Ready)),
        }
    }

    fn finish(&mut self, event: Event, state: State) -> Event {
        self.pending = self.following.pop_front().map(Pending::new);
        self.state = match self.pending {
            Some(_) => State::Busy,
            None => state,
        };
        event
    }
}

#[cfg(test)]
mod tests;
