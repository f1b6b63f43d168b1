//! The client's end of a control connection as a state machine.
//!
//! ```text
//!            send            reply or refusal
//!   Ready ─────────▶ Busy ───────────────────▶ Ready
//!                      ├── STREAM_OPEN, SUBSCRIBE, upgrade succeeded ──▶ Consumed
//!                      └── protocol violated, end of file ─────────────▶ Failed
//! ```
//!
//! Requests that the daemon answers at once may be pipelined. The connection is busy until the last of
//! them is answered.

use super::State;
use crate::command::{required, Answered, EncodedRequest, Reader, Reply};
use crate::pb::p2pd::{self, dht_response, response};
use crate::{Error, FrameDecoder, Limits};
use bytes::Bytes;
use prost::Message as _;
use std::collections::VecDeque;

/// An event of a control connection, decoded from the bytes received.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// One value of the answer to a query. More values may follow, and then [`Event::End`].
    Value(Reply),
    /// The request succeeded.
    Reply(Reply),
    /// The query succeeded and has no more values.
    End,
    /// The daemon refused the request, with this error message.
    Refused(String),
}

impl Event {
    /// Returns the error to report if this event was not expected.
    pub fn unexpected(&self) -> Error {
        Error::Unexpected(format!("{self:?}"))
    }
}

/// How to read the answer to a request.
#[derive(Debug, Clone, Copy)]
struct Expected {
    answered: Answered,
    reader: Reader<Reply>,
}

impl Expected {
    fn of(request: &EncodedRequest) -> Self {
        Self {
            answered: request.answered(),
            reader: request.reader,
        }
    }
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Pending {
    expected: Expected,
    /// The number and size of a query's values so far. Set between BEGIN and END.
    values: Option<Values>,
}

impl Pending {
    fn new(expected: Expected) -> Self {
        Self {
            expected,
            values: None,
        }
    }
}

#[derive(Debug, Default)]
struct Values {
    count: usize,
    bytes: usize,
}

/// A control connection as a client sees it: requests in, frames out; bytes in, events out.
///
/// ```
/// use p2pd_protocol::command::{control, Typed};
/// use p2pd_protocol::{ClientExchange, Event, Limits, State};
///
/// let mut exchange = ClientExchange::new(Limits::default());
/// let frame = exchange.send(&control::ListPeers.encoded())?; // write this to the socket
/// assert_eq!(frame[..], [2, 8, 5]);
/// exchange.receive(&[2, 8, 0]); // the bytes read from the socket
/// let reply = control::ListPeers::into_reply(vec![]);
/// assert_eq!(exchange.poll()?, Some(Event::Reply(reply)));
/// assert_eq!(exchange.state(), State::Ready);
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct ClientExchange {
    decoder: FrameDecoder,
    limits: Limits,
    state: State,
    pending: Option<Pending>,
    /// The pipelined requests behind `pending`.
    following: VecDeque<Expected>,
    /// Whether the next event is the end of a query that was answered with a single value.
    at_end: bool,
}

impl ClientExchange {
    /// A new connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            decoder: FrameDecoder::new(limits.max_frame),
            limits,
            state: State::Ready,
            pending: None,
            following: VecDeque::new(),
            at_end: false,
        }
    }

    /// State of the connection.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether the connection is ready for any request: none is pending, and no unexpected bytes arrived.
    pub fn is_reusable(&self) -> bool {
        self.state == State::Ready && self.decoder.is_empty()
    }

    /// Starts a request. Write the returned bytes to the connection. A request that is [answered at
    /// once](Answered::AtOnce) may be sent while others of that kind are unanswered.
    ///
    /// # Errors
    /// [`Error::NotReady`] or [`Error::RequestTooLarge`]; the connection is as before.
    pub fn send(&mut self, request: &EncodedRequest) -> Result<Bytes, Error> {
        let expected = Expected::of(request);
        let pipelining = matches!(&self.pending, Some(pending)
            if pending.expected.answered == Answered::AtOnce);
        let follows =
            pipelining && self.state == State::Busy && expected.answered == Answered::AtOnce;
        if !follows && !self.is_reusable() {
            return Err(Error::NotReady(self.state));
        }
        let size = request.frame().len();
        if size > self.limits.max_frame {
            return Err(Error::RequestTooLarge {
                size,
                limit: self.limits.max_frame,
            });
        }
        if follows {
            self.following.push_back(expected);
        } else {
            self.state = State::Busy;
            self.pending = Some(Pending::new(expected));
        }
        Ok(request.frame().clone())
    }

    /// Takes the bytes that were read from the connection.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.decoder.extend(bytes);
    }

    /// Puts the connection in the failed state, since its input has ended. Returns the error to report.
    pub fn end_of_file(&mut self) -> Error {
        let mid_message =
            !self.decoder.is_empty() || self.pending.as_ref().is_some_and(|p| p.values.is_some());
        self.state = State::Failed;
        Error::Closed { mid_message }
    }

    /// Returns the next event, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// The protocol was violated. The connection must be closed.
    pub fn poll(&mut self) -> Result<Option<Event>, Error> {
        let event = self.next_event();
        if event.is_err() {
            self.state = State::Failed;
        }
        event
    }

    /// Returns the bytes after the reply that consumed the connection: the first bytes of the stream.
    pub fn into_remainder(self) -> Bytes {
        self.decoder.into_remainder()
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        if std::mem::take(&mut self.at_end) {
            self.finish(State::Ready);
            return Ok(Some(Event::End));
        }
        loop {
            let Some(pending) = &self.pending else {
                return match self.state {
                    State::Ready if !self.decoder.is_empty() => {
                        Err(Error::Unexpected("bytes that answer no request".to_owned()))
                    }
                    _ => Ok(None),
                };
            };
            let (expected, in_values) = (pending.expected, pending.values.is_some());
            let Some(frame) = self.decoder.next_frame()? else {
                return Ok(None);
            };
            if let (true, Reader::Value(read)) = (in_values, expected.reader) {
                // Counts the whole frame, because the value keeps all of it in memory.
                let size = frame.len();
                let response = p2pd::DhtResponse::decode(frame)
                    .map_err(|e| Error::malformed("DHTResponse", &e))?;
                return self.value(response, read, size).map(Some);
            }
            let response =
                p2pd::Response::decode(frame).map_err(|e| Error::malformed("Response", &e))?;
            if let Some(event) = self.response(response, expected)? {
                return Ok(Some(event));
            }
        }
    }

    /// Reads a Response; `None` if it is the BEGIN of a query.
    fn response(
        &mut self,
        response: p2pd::Response,
        expected: Expected,
    ) -> Result<Option<Event>, Error> {
        let r#type = required(response.r#type, "Response", "type")?;
        match response::Type::try_from(r#type) {
            Ok(response::Type::Ok) => {}
            Ok(response::Type::Error) => {
                let message = response
                    .error
                    .and_then(|error| error.msg)
                    .unwrap_or_default();
                let message = String::from_utf8_lossy(&message).into_owned();
                self.finish(State::Ready);
                return Ok(Some(Event::Refused(message)));
            }
            Err(_) => {
                return Err(Error::Unexpected(format!(
                    "Response of unknown type {type}"
                )));
            }
        }
        match expected.reader {
            Reader::Reply(read) => {
                let reply = read(response)?;
                self.finish(match expected.answered {
                    Answered::ByTakeover => State::Consumed,
                    _ => State::Ready,
                });
                Ok(Some(Event::Reply(reply)))
            }
            Reader::Value(read) => self.first_value(response, read),
        }
    }

    /// Reads the Response to a query: BEGIN, or the only value.
    fn first_value(
        &mut self,
        response: p2pd::Response,
        read: fn(p2pd::DhtResponse) -> Result<Reply, Error>,
    ) -> Result<Option<Event>, Error> {
        let response = required(response.dht, "Response", "dht")?;
        match step(&response)? {
            dht_response::Type::Begin => {
                if let Some(pending) = &mut self.pending {
                    pending.values = Some(Values::default());
                }
                Ok(None)
            }
            dht_response::Type::Value => {
                let value = read(response)?;
                self.at_end = true;
                Ok(Some(Event::Value(value)))
            }
            dht_response::Type::End => Err(Error::Unexpected("DHT END before BEGIN".to_owned())),
        }
    }

    /// Reads a DHTResponse of `size` bytes between BEGIN and END.
    fn value(
        &mut self,
        response: p2pd::DhtResponse,
        read: fn(p2pd::DhtResponse) -> Result<Reply, Error>,
        size: usize,
    ) -> Result<Event, Error> {
        let pending = self.pending.as_mut().expect("a query is being answered");
        let one = pending.expected.answered == Answered::WithOneValue;
        let values = pending.values.get_or_insert_default();
        match step(&response)? {
            dht_response::Type::Begin => Err(Error::Unexpected("DHT BEGIN after BEGIN".to_owned())),
            dht_response::Type::Value => {
                values.count += 1;
                // Adds the approximate overhead of a value, so that an endless series of empty values
                // reaches the limit too.
                let addrs = response.peer.as_ref().map_or(0, |peer| peer.addrs.len());
                values.bytes += size + 64 + 32 * addrs;
                if values.bytes > self.limits.max_answer {
                    return Err(Error::AnswerTooLarge {
                        limit: self.limits.max_answer,
                    });
                }
                Ok(Event::Value(read(response)?))
            }
            dht_response::Type::End if one && values.count != 1 => Err(Error::Unexpected(format!(
                "{} results of a DHT query that has one",
                values.count
            ))),
            dht_response::Type::End => {
                self.finish(State::Ready);
                Ok(Event::End)
            }
        }
    }

    /// Continues with the next pipelined request, or enters `state` if there is none.
    fn finish(&mut self, state: State) {
        self.pending = self.following.pop_front().map(Pending::new);
        self.state = match self.pending {
            Some(_) => State::Busy,
            None => state,
        };
    }
}

/// Returns which part of a query's answer this is.
fn step(response: &p2pd::DhtResponse) -> Result<dht_response::Type, Error> {
    let r#type = required(response.r#type, "DHTResponse", "type")?;
    dht_response::Type::try_from(r#type)
        .map_err(|_| Error::Unexpected(format!("DHTResponse of unknown type {type}")))
}

#[cfg(test)]
mod tests;
