//! The client's end of a persistent connection: arbitrary bytes between calls, cancels and replies.

use super::{allocations::measured, pieces};
use bytes::{Bytes, BytesMut};
use p2pd_protocol::framing::encode_frame;
use p2pd_protocol::pb::p2pd::{
    self, call_unary_response::Result as Outcome, persistent_connection_response::Message,
};
use p2pd_protocol::unary::{CallId, Payload};
use p2pd_protocol::{Error, PersistentClient, UnaryEvent, UnaryLimits};
use prost::Message as _;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

type Event = UnaryEvent<u32, Buffer>;

/// A payload, whose debug form is its beginning and size.
#[derive(Clone, PartialEq, PartialOrd, Eq, Ord)]
pub struct Buffer(pub Vec<u8>);

impl Payload for Buffer {
    fn with_len(len: usize) -> Option<Self> {
        Some(Self(vec![0; len]))
    }

    fn copy_from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }

    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.0[..self.0.len().min(40)];
        write!(
            f,
            "{:?} ({} bytes)",
            Bytes::copy_from_slice(shown),
            self.0.len()
        )
    }
}

/// How bytes are fed.
#[derive(Clone, Copy)]
struct Feeding {
    /// Seed of the pieces.
    seed: u8,
    /// Whether large payloads are read into their buffers.
    in_place: bool,
}

/// Log of one script.
#[derive(Debug, PartialEq)]
struct Log {
    events: Vec<Event>,
    error: Option<Error>,
    /// What went out, in the order of its bytes: the calls at work are left in none.
    sent: Vec<Buffer>,
}

/// A script. The input is a byte for the pieces, one for the limits, then operations.
pub fn persistent(data: &[u8]) {
    let &[seed, limits, ref script @ ..] = data else {
        return;
    };
    let max_message = [300, 20_000, 300_000][usize::from(limits % 3)];
    let limits = UnaryLimits::default()
        .with_max_message(max_message)
        .with_max_unanswered(2 + usize::from(limits / 3 % 8))
        .with_max_unanswered_bytes(100_000);
    let run = |seed, in_place| {
        let feeding = Feeding { seed, in_place };
        let ((log, bytes), peak) = measured(|| Run::new(limits, feeding, script).finish());
        // The buffer of one payload is allocated before all of its bytes arrive.
        let buffer = max_message + (64 << 10);
        assert!(
            peak <= buffer + 96 * (script.len() + bytes) + 16_384,
            "{bytes} bytes in and out made it hold {peak}"
        );
        log
    };
    let log = run(255, false);
    assert_eq!(run(seed, true), log);
    if script.len() < 512 {
        assert_eq!(run(0, seed % 2 == 0), log);
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Asked {
    Call,
    Registration,
}

struct Run<'a> {
    connection: PersistentClient<u32, Buffer>,
    limits: UnaryLimits,
    feeding: Feeding,
    script: &'a [u8],
    out: BytesMut,
    elapsed: Duration,
    /// All call ids so far.
    ids: Vec<CallId>,
    /// The calls and requests that may be answered, at most once.
    waiting: BTreeMap<u32, (CallId, Asked)>,
    /// The incoming calls: the size of their payloads, and whether they were cancelled.
    serving: BTreeMap<CallId, (usize, bool)>,
    events: Vec<Event>,
    /// Number of bytes fed.
    fed: usize,
}

impl<'a> Run<'a> {
    fn new(limits: UnaryLimits, feeding: Feeding, script: &'a [u8]) -> Self {
        Self {
            connection: PersistentClient::new([7; 32], limits),
            limits,
            feeding,
            script,
            out: BytesMut::new(),
            elapsed: Duration::ZERO,
            ids: vec![[9; 16]],
            waiting: BTreeMap::new(),
            serving: BTreeMap::new(),
            events: Vec::new(),
            fed: 0,
        }
    }

    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.script.split_first() else {
            return 0;
        };
        self.script = rest;
        first
    }

    fn bytes(&mut self) -> &'a [u8] {
        let count = usize::from(self.byte()).min(self.script.len());
        let (bytes, rest) = self.script.split_at(count);
        self.script = rest;
        bytes
    }

    fn now(&self) -> Instant {
        static START: OnceLock<Instant> = OnceLock::new();
        *START.get_or_init(Instant::now) + self.elapsed
    }

    fn id(&mut self) -> CallId {
        let at = usize::from(self.byte());
        self.ids[at % self.ids.len()]
    }

    /// Runs the script until it or the connection ends.
    fn finish(mut self) -> (Log, usize) {
        let mut error = None;
        while error.is_none() && !self.script.is_empty() {
            error = self.step().err();
            self.check();
        }
        if error.is_none() {
            assert!(matches!(
                self.connection.end_of_file(),
                Error::Closed { .. }
            ));
        }
        let lost = self.connection.take_pending();
        assert_eq!(lost.len(), self.waiting.len());
        assert!(lost.iter().all(|token| self.waiting.contains_key(token)));
        let bytes = self.fed + self.out.len();
        let mut sent = messages(self.out.freeze(), self.limits.max_message);
        sent.sort();
        let events = self.events;
        (
            Log {
                events,
                error,
                sent,
            },
            bytes,
        )
    }

    fn check(&self) {
        let connection = &self.connection;
        assert_eq!(connection.pending(), self.waiting.len());
        assert_eq!(connection.unanswered(), self.serving.len());
        let sizes: usize = self.serving.values().map(|(size, _)| size).sum();
        assert!(self.serving.len() <= 4 * self.limits.max_unanswered);
        assert!(
            sizes <= 4 * self.limits.max_unanswered_bytes + self.limits.max_message + (64 << 10)
        );
    }

    fn step(&mut self) -> Result<(), Error> {
        let token = u32::try_from(self.ids.len()).unwrap_or(0);
        match self.byte() % 16 {
            0 | 1 => {
                let (peer, len) = (self.bytes(), usize::from(self.byte()) * 100);
                let now = self.now();
                let asked = self
                    .connection
                    .call(peer, "echo", len, token, now, &mut self.out);
                if asked.is_ok() {
                    self.out.resize(self.out.len() + len, b'x');
                }
                self.asked(token, asked, Asked::Call);
            }
            2 => {
                let name = String::from_utf8_lossy(self.bytes()).into_owned();
                let asked = self
                    .connection
                    .add_handler(&name, true, token, &mut self.out);
                self.asked(token, asked, Asked::Registration);
            }
            3 => {
                let name = String::from_utf8_lossy(self.bytes()).into_owned();
                let asked = self.connection.remove_handler(&name, token, &mut self.out);
                self.asked(token, asked, Asked::Registration);
            }
            4 => {
                let (id, now) = (self.id(), self.now());
                let given_up = self.connection.cancel(&id, now, &mut self.out);
                self.given_up(&id, given_up);
            }
            5 => {
                let id = self.id();
                let given_up = self.connection.forget(&id);
                self.given_up(&id, given_up);
            }
            6 => {
                let passed = u64::from(self.byte()) * 4;
                self.elapsed += Duration::from_millis(passed);
                let now = self.now();
                self.connection.repeat_cancels(now, &mut self.out);
            }
            7 => {
                let (id, len) = (self.id(), usize::from(self.byte()) * 100);
                let at_work = self.serving.remove(&id);
                let waited_for = at_work.is_some_and(|(_, cancelled)| !cancelled);
                let replied = self.connection.reply(&id, len, &mut self.out);
                assert!(waited_for || !replied);
                if replied {
                    self.out.resize(self.out.len() + len, b'y');
                }
            }
            8 => {
                let (id, words) = (self.id(), String::from_utf8_lossy(self.bytes()));
                self.serving.remove(&id);
                self.connection.reply_error(&id, &words, &mut self.out);
            }
            9 => {
                self.connection.shut_down("bye", &mut self.out);
                self.serving.clear();
                assert!(!self.connection.has_unconfirmed_cancels());
            }
            10 => self.connection.stop_back_pressure(),
            11 => {
                let bytes = self.bytes();
                self.feed(bytes)?;
            }
            op => {
                let frame = self.message(op);
                self.feed(&frame)?;
            }
        }
        Ok(())
    }

    fn asked(&mut self, token: u32, asked: Result<CallId, Error>, what: Asked) {
        match asked {
            Ok(id) => {
                assert!(!self.ids.contains(&id));
                self.ids.push(id);
                self.waiting.insert(token, (id, what));
            }
            Err(error) => assert!(matches!(error, Error::RequestTooLarge { .. })),
        }
    }

    fn given_up(&mut self, id: &CallId, token: Option<u32>) {
        let known = self.waiting.iter().find(|(_, (known, _))| known == id);
        assert_eq!(token, known.map(|(token, _)| *token));
        if let Some(token) = token {
            self.waiting.remove(&token);
        }
    }

    /// Makes a message that is well-formed, except for what the script puts into it.
    fn message(&mut self, op: u8) -> Bytes {
        let (kind, id, len) = (self.byte(), self.id(), usize::from(self.byte()));
        let payload = Bytes::from(vec![b'z'; len * [1, 100, 1000][usize::from(op % 3)]]);
        self.fed += payload.len(); // counted even if not fed
        let message = match kind % 8 {
            0 | 1 => Some(Message::CallUnaryResponse(p2pd::CallUnaryResponse {
                result: Some(Outcome::Response(payload)),
            })),
            2 => Some(Message::CallUnaryResponse(p2pd::CallUnaryResponse {
                result: Some(Outcome::Error(payload)),
            })),
            3 | 4 => Some(Message::RequestHandling(p2pd::CallUnaryRequest {
                peer: Some(Bytes::from_static(b"peer")),
                proto: Some(Bytes::copy_from_slice(self.bytes())),
                data: Some(payload),
            })),
            5 => Some(Message::DaemonError(p2pd::DaemonError {
                message: Some(payload),
            })),
            6 => Some(Message::Cancel(p2pd::Cancel {})),
            _ => None,
        };
        let id = match kind / 8 % 4 {
            // An id that the peer chose.
            0 if matches!(kind % 8, 3 | 4) => [kind; 16].to_vec(),
            3 if kind > 200 => self.bytes().to_vec(),
            _ => id.to_vec(),
        };
        if let Ok(id) = CallId::try_from(&id[..]) {
            if !self.ids.contains(&id) {
                self.ids.push(id);
            }
        }
        let mut encoded = p2pd::PersistentConnectionResponse {
            call_id: Some(id.into()),
            message,
        }
        .encode_to_vec();
        if kind >= 128 {
            encoded.extend_from_slice(self.bytes());
        }
        let mut frame = BytesMut::new();
        prost::encode_length_delimiter(encoded.len(), &mut frame).unwrap();
        frame.extend_from_slice(&encoded);
        frame.freeze()
    }

    fn feed(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.fed += bytes.len();
        let seed = self.feeding.seed;
        for mut input in pieces(
            bytes,
            if bytes.len() > 4096 {
                seed.max(100)
            } else {
                seed
            },
        ) {
            if self.feeding.in_place {
                if let Some(buffer) = self.connection.payload_buffer() {
                    assert!(!buffer.is_empty());
                    let count = buffer.len().min(input.len());
                    buffer[..count].copy_from_slice(&input[..count]);
                    self.connection.payload_filled(count);
                    input = &input[count..];
                }
            }
            while let Some(event) = self.connection.poll(&mut input)? {
                self.happened(&event);
                self.events.push(event);
            }
            assert!(input.is_empty());
        }
        Ok(())
    }

    fn happened(&mut self, event: &Event) {
        let mut answered = |token: &u32| {
            let (_, asked) = self.waiting.remove(token).expect("it was waited for");
            asked
        };
        match event {
            UnaryEvent::Reply { token, .. } | UnaryEvent::HandlerFailed { token, .. } => {
                assert!(answered(token) == Asked::Call);
            }
            UnaryEvent::Acknowledged { token } => assert!(answered(token) == Asked::Registration),
            UnaryEvent::Refused { token, .. } | UnaryEvent::InvalidReply { token, .. } => {
                answered(token);
            }
            UnaryEvent::Call { id, payload, .. } => {
                assert!(self.serving.insert(*id, (payload.0.len(), false)).is_none());
            }
            UnaryEvent::Cancelled { id } => {
                let call = self.serving.get_mut(id).expect("it is at work");
                assert!(!std::mem::replace(&mut call.1, true));
            }
            UnaryEvent::Rejected { id, reason } => {
                self.connection.refuse(id, reason, &mut self.out);
            }
            UnaryEvent::Oversized { token, error } => {
                assert!(matches!(error, Error::ReplyTooLarge { .. }));
                answered(token);
            }
            UnaryEvent::Skipped { error } => {
                assert!(matches!(error, Error::ReplyTooLarge { .. }));
            }
        }
    }
}

/// Splits the output into messages, each of which the daemon accepts.
fn messages(mut out: Bytes, max_message: usize) -> Vec<Buffer> {
    let mut messages = Vec::new();
    while !out.is_empty() {
        let message = p2pd::PersistentConnectionRequest::decode_length_delimited(&mut out).unwrap();
        let size = message.encoded_len();
        assert!(
            size <= max_message,
            "{size} bytes sent, {max_message} taken"
        );
        assert_eq!(message.call_id.as_ref().map(Bytes::len), Some(16));
        assert!(message.message.is_some());
        messages.push(Buffer(message.encode_to_vec()));
    }
    messages
}

/// A script that makes a call and is fed these bytes.
pub fn script(bytes: &[&[u8]]) -> Vec<u8> {
    let mut script = vec![3, 1, 0, 4, b'p', b'e', b'e', b'r', 2];
    for bytes in bytes {
        for bytes in bytes.chunks(255) {
            script.extend([11, u8::try_from(bytes.len()).unwrap_or(0)]);
            script.extend_from_slice(bytes);
        }
    }
    script
}

/// A daemon's messages of each kind, which answer the first calls of the client.
pub fn samples() -> Vec<Bytes> {
    let mut connection = PersistentClient::<u32, Vec<u8>>::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let id = connection.call(b"peer", "echo", 200, 1, Instant::now(), &mut out);
    let id = Bytes::copy_from_slice(&id.expect("it is small"));
    let data = Bytes::from_static(b"some data");
    let response = |result| {
        Message::CallUnaryResponse(p2pd::CallUnaryResponse {
            result: Some(result),
        })
    };
    let messages = [
        None,
        Some(response(Outcome::Response(data.clone()))),
        Some(response(Outcome::Error(data.clone()))),
        Some(Message::RequestHandling(p2pd::CallUnaryRequest {
            peer: Some(data.clone()),
            proto: Some(Bytes::from_static(b"echo")),
            data: Some(data.clone()),
        })),
        Some(Message::DaemonError(p2pd::DaemonError {
            message: Some(data),
        })),
        Some(Message::Cancel(p2pd::Cancel {})),
    ];
    messages
        .into_iter()
        .map(|message| {
            encode_frame(&p2pd::PersistentConnectionResponse {
                call_id: Some(id.clone()),
                message,
            })
        })
        .collect()
}
