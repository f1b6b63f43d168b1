//! A load: many calls of a handler, which the daemon makes when a client asks for them.

use super::buffer::Buffer;
use super::connection;
use super::limits::MAX_FRAME;
use crate::lock::lock;
use p2pd_protocol::unary::{CallId, Payload as _};
use p2pd_protocol::PeerId;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Largest number of calls in flight of one load.
const MAX_PARALLEL: u64 = 64 << 10;

pub(super) type Connection = connection::Connection<Token, Forwarded>;
pub(super) type State = connection::State<Token, Forwarded>;
pub(super) type Outbox = connection::Outbox<Token, Forwarded>;

/// A call that the client handles.
pub(super) enum Token {
    /// The call of this id, of another client.
    Call(Arc<Connection>, CallId),
    /// The call of this number, of a load, and whether its reply is an echo.
    Load(Arc<Load>, u64, bool),
}

/// Where a client's call was forwarded.
pub(super) enum Forwarded {
    /// To another client, as the call of this id.
    Call(Arc<Connection>, CallId),
    Load(Arc<Load>),
}

/// Parameters of a load, from the payload of the client's call.
pub(super) struct Order {
    pub(super) handler: String,
    /// Size of each payload, in bytes.
    size: usize,
    /// Number of calls at once, and in all.
    parallel: u64,
    count: u64,
}

impl Order {
    /// Reads `HANDLER SIZE PARALLEL COUNT`.
    pub(super) fn parse(payload: &[u8]) -> Result<Self, String> {
        let text = String::from_utf8_lossy(payload);
        let mut words = text.split(' ');
        let handler = words.next().unwrap_or_default().to_owned();
        let numbers: Vec<u64> = words.flat_map(str::parse).collect();
        let &[size, parallel, count] = &numbers[..] else {
            return Err("not HANDLER SIZE PARALLEL COUNT".to_owned());
        };
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        let (8..MAX_FRAME, 1..=MAX_PARALLEL, 1..) = (size, parallel, count) else {
            return Err(UNFIT.to_owned());
        };
        Ok(Self {
            handler,
            size,
            parallel,
            count,
        })
    }
}

/// Error of a load that is refused.
pub(super) const UNFIT: &str = "no such handler, or not that large";

/// Calls that the daemon makes.
pub(super) struct Load {
    /// The client's call that requested the load, and the client's connection.
    id: CallId,
    caller: Arc<Connection>,
    handler: Arc<Connection>,
    /// The daemon, as the caller of the handler.
    peer: PeerId,
    name: String,
    /// The payload, whose first 8 bytes are replaced by the number of the call.
    payload: Vec<u8>,
    parallel: u64,
    count: u64,
    progress: Mutex<Progress>,
}

struct Progress {
    /// Number of calls not made yet.
    left: u64,
    done: u64,
    begun: Instant,
}

impl Load {
    /// Prepares a load for a client's call.
    pub(super) fn start(
        id: CallId,
        caller: &Arc<Connection>,
        order: Order,
        handler: Arc<Connection>,
        peer: &PeerId,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            caller: caller.clone(),
            handler,
            peer: peer.clone(),
            name: order.handler,
            payload: vec![7; order.size],
            parallel: order.parallel,
            progress: Mutex::new(Progress {
                left: order.count,
                done: 0,
                begun: Instant::now(),
            }),
            count: order.count,
        })
    }

    /// Makes the first calls, up to `parallel`.
    pub(super) fn begin(self: &Arc<Self>, outbox: &mut Outbox) {
        for _ in 0..self.parallel {
            let next = self.next(&mut lock(&self.progress));
            let Some(number) = next else { break };
            self.call(number, outbox);
            if outbox.is_full {
                // If the connection has ended, the next read sees it.
                let _ = outbox.flush();
            }
        }
    }

    /// Returns the number of the next call, if any is left.
    fn next(&self, progress: &mut Progress) -> Option<u64> {
        let number = self.count - progress.left;
        progress.left = progress.left.checked_sub(1)?;
        Some(number)
    }

    /// Makes a call.
    fn call(self: &Arc<Self>, number: u64, outbox: &mut Outbox) {
        let call = (self.peer.as_bytes(), self.name.as_str(), self.payload.len());
        let token = Token::Load(self.clone(), number, false);
        let made = outbox.update(&self.handler, |state| {
            state.handle(call, token, |output| {
                output.push_copied(&number.to_le_bytes());
                output.push_copied(&self.payload[8..]);
            })
        });
        if let Err(message) = made {
            self.fail(&message, outbox);
        }
    }

    /// Whether a reply is the payload of its call. Compares the replies to the first calls in full, and only
    /// the length and number of all others, so that comparing does not add to the measured time.
    pub(super) fn is_echo(&self, number: u64, reply: &[u8]) -> bool {
        reply.len() == self.payload.len()
            && reply[..8] == number.to_le_bytes()
            && (number >= self.parallel || reply[8..] == self.payload[8..])
    }

    /// Notes whether a reply was an echo, and makes the next call.
    pub(super) fn go_on(self: &Arc<Self>, is_right: bool, outbox: &mut Outbox) {
        if !is_right {
            return self.fail("the handler's reply is no echo", outbox);
        }
        let mut progress = lock(&self.progress);
        progress.done += 1;
        let is_done = progress.done == self.count;
        let (next, begun) = (self.next(&mut progress), progress.begun);
        drop(progress);
        if is_done {
            let seconds = begun.elapsed().as_secs_f64().to_string();
            let reply = Buffer::copy_from(seconds.as_bytes());
            outbox.update(&self.caller, |state| state.reply(&self.id, reply));
        } else if let Some(number) = next {
            self.call(number, outbox);
        }
    }

    /// Cancels the calls in flight, and makes no more.
    pub(super) fn stop(&self, outbox: &mut Outbox) {
        lock(&self.progress).left = 0;
        let is_own =
            |token: &Token| matches!(token, Token::Load(load, ..) if std::ptr::eq(self, &**load));
        outbox.update(&self.handler, |State { server, output, .. }| {
            output.append(|out| server.cancel_all(is_own, out));
        });
    }

    pub(super) fn fail(&self, message: &str, outbox: &mut Outbox) {
        self.stop(outbox);
        outbox.update(&self.caller, |state| state.refuse(&self.id, message));
    }
}
