//! The daemon's end of a control connection as a state machine.
//!
//! ```text
//!            poll                reply, refuse, end
//!   Ready ─────────▶ Busy ──────────────────────────▶ Ready
//!                      ├── reply to STREAM_OPEN, SUBSCRIBE, upgrade ──▶ Consumed
//!                      └── bytes that are no request ─────────────────▶ Failed
//! ```
//!
//! A client may send requests before earlier ones are answered. They are served one after another, in
//! order.

use super::State;
use crate::command::dht::{in_response, step};
use crate::command::{refusal, Answered, Command, EncodedReply, Query, Reply, Request};
use crate::framing::encode_frame;
use crate::pb::p2pd::{self, dht_response};
use crate::{Error, FrameDecoder, Limits};
use bytes::{Bytes, BytesMut};

/// The request that is being served.
#[derive(Debug)]
struct Serving {
    name: &'static str,
    answered: Answered,
    /// Whether BEGIN was sent.
    begun: bool,
}

/// A control connection as a daemon sees it: bytes in, commands out; replies in, frames out.
///
/// ```
/// use p2pd_protocol::command::{control, Command};
/// use p2pd_protocol::exchange::server::ServerExchange;
/// use p2pd_protocol::Limits;
///
/// let mut server = ServerExchange::new(Limits::default());
/// server.receive(&[2, 8, 5]); // the bytes read from the socket
/// let command = server.poll()?;
/// assert_eq!(command, Some(control::ListPeers.into()));
/// let frame = server.reply::<control::ListPeers>(&vec![])?; // write this to the socket
/// assert_eq!(frame[..], [2, 8, 0]);
/// # Ok::<(), p2pd_protocol::Error>(())
/// ```
#[derive(Debug)]
pub struct ServerExchange {
    decoder: FrameDecoder,
    limits: Limits,
    state: State,
    serving: Option<Serving>,
}

impl ServerExchange {
    /// A new connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            decoder: FrameDecoder::new(limits.max_frame),
            limits,
            state: State::Ready,
            serving: None,
        }
    }

    /// State of the connection.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether to read more from the client. While a request is served, at most one more message is
    /// buffered, which puts back-pressure on a client that keeps sending.
    pub fn wants_input(&self) -> bool {
        match self.state {
            State::Ready => true,
            State::Busy => self.decoder.len() <= self.limits.max_frame,
            State::Consumed | State::Failed => false,
        }
    }

    /// Takes the bytes that were read from the connection.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.decoder.extend(bytes);
    }

    /// Returns the next request, or `None` until more bytes arrive or the current request is answered.
    ///
    /// # Errors
    /// After [`Error::UnknownRequest`], [`refuse`](Self::refuse) the request, or close the connection as
    /// the Go daemons do. After any other error, close the connection.
    pub fn poll(&mut self) -> Result<Option<Command>, Error> {
        if self.state != State::Ready {
            return Ok(None);
        }
        let decoded = match self.decoder.next_frame() {
            Ok(Some(frame)) => Command::decode(frame),
            Ok(None) => return Ok(None),
            Err(error) => Err(error),
        };
        let (name, answered) = match &decoded {
            Ok(command) => (command.name(), command.answered()),
            Err(Error::UnknownRequest(_)) => ("an unknown request", Answered::Once),
            Err(_) => {
                self.state = State::Failed;
                return decoded.map(Some);
            }
        };
        self.state = State::Busy;
        self.serving = Some(Serving {
            name,
            answered,
            begun: false,
        });
        decoded.map(Some)
    }

    /// Answers the current request. Write the returned bytes to the connection.
    ///
    /// # Errors
    /// [`Error::WrongReply`] if the current request is of another kind.
    pub fn reply<R: Request>(&mut self, reply: &R::Reply) -> Result<Bytes, Error> {
        self.send_reply(R::NAME, &R::encode_reply(reply))
    }

    /// Notes that the driver itself sends the reply, in a frame that it encoded earlier with
    /// `encode_frame(&R::encode_reply(…))`.
    ///
    /// # Errors
    /// [`Error::WrongReply`] if the current request is of another kind.
    pub fn replied<R: Request>(&mut self) -> Result<(), Error> {
        self.note_reply(R::NAME)
    }

    /// Sends a [`reply`](Self::reply) or a [`value`](Self::value), depending on the request.
    ///
    /// # Errors
    /// [`Error::WrongReply`] if the current request is of another kind.
    pub fn send(&mut self, reply: &Reply) -> Result<Bytes, Error> {
        match reply.encode() {
            EncodedReply::Reply(name, response) => self.send_reply(name, &response),
            EncodedReply::Value(name, value) => self.send_value(name, value),
        }
    }

    /// Refuses the current request, with an error message for the client's user.
    ///
    /// # Errors
    /// [`Error::WrongReply`] if there is no current request, or if values were already sent in reply to
    /// it.
    pub fn refuse(&mut self, message: &str) -> Result<Bytes, Error> {
        if self.serving.as_ref().is_none_or(|serving| serving.begun) {
            return Err(self.wrong("a refusal"));
        }
        self.finish(State::Ready);
        Ok(encode_frame(&refusal(message)))
    }

    /// Sends one value of the answer to the current query. This completes a query with exactly one
    /// value; any other query ends with [`end`](Self::end).
    ///
    /// # Errors
    /// [`Error::WrongReply`] if the current request is of another kind.
    pub fn value<Q: Query>(&mut self, value: &Q::Value) -> Result<Bytes, Error> {
        self.send_value(Q::NAME, Q::encode_value(value))
    }

    /// Ends the answer to the current query, which may have any number of values.
    ///
    /// # Errors
    /// [`Error::WrongReply`] if the current request is of another kind.
    pub fn end(&mut self) -> Result<Bytes, Error> {
        let serving = self.serving.as_ref();
        if serving.is_none_or(|serving| serving.answered != Answered::WithValues) {
            return Err(self.wrong("END"));
        }
        let mut frames = self.begin();
        frames.extend_from_slice(&encode_frame(&step(dht_response::Type::End)));
        self.finish(State::Ready);
        Ok(frames.freeze())
    }

    /// Returns the bytes after the request that consumed the connection: the first bytes of the stream.
    pub fn into_remainder(self) -> Bytes {
        self.decoder.into_remainder()
    }

    fn send_reply(
        &mut self,
        name: &'static str,
        response: &p2pd::Response,
    ) -> Result<Bytes, Error> {
        self.note_reply(name)?;
        Ok(encode_frame(response))
    }

    fn note_reply(&mut self, name: &'static str) -> Result<(), Error> {
        let state = match self.serving(name)?.answered {
            Answered::ByTakeover => State::Consumed,
            _ => State::Ready,
        };
        self.finish(state);
        Ok(())
    }

    fn send_value(&mut self, name: &'static str, value: p2pd::DhtResponse) -> Result<Bytes, Error> {
        if self.serving(name)?.answered == Answered::WithOneValue {
            self.finish(State::Ready);
            return Ok(encode_frame(&in_response(value)));
        }
        let mut frames = self.begin();
        frames.extend_from_slice(&encode_frame(&value));
        Ok(frames.freeze())
    }

    /// Returns BEGIN, unless it was already sent.
    fn begin(&mut self) -> BytesMut {
        let mut frames = BytesMut::new();
        if let Some(serving) = self.serving.as_mut().filter(|serving| !serving.begun) {
            serving.begun = true;
            let begin = in_response(step(dht_response::Type::Begin));
            frames.extend_from_slice(&encode_frame(&begin));
        }
        frames
    }

    fn serving(&self, reply: &'static str) -> Result<&Serving, Error> {
        match &self.serving {
            Some(serving) if serving.name == reply => Ok(serving),
            _ => Err(self.wrong(reply)),
        }
    }

    fn wrong(&self, reply: &'static str) -> Error {
        let request = self.serving.as_ref().map_or("no request", |it| it.name);
        Error::WrongReply { reply, request }
    }

    fn finish(&mut self, state: State) {
        self.serving = None;
        self.state = state;
    }
}

#[cfg(test)]
mod tests;
