//! Cancel messages for the client's own calls. Some are delayed or repeated.

use crate::unary::call_id::{CallId, IdHasher};
use crate::unary::encode::put_cancel;
use crate::unary::tuning::{CANCEL_DELAY, CANCEL_INTERVAL};
use bytes::BytesMut;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::time::Instant;

/// Largest number of Cancel messages for one call that the daemon does not answer.
const MAX_SENT: u32 = 7;

/// Largest number of cancelled calls that are remembered.
const MAX_CANCELS: usize = 64 * 1024;

/// The cancelled calls that the daemon may not know of yet.
#[derive(Debug, Default)]
pub(super) struct Cancels(HashMap<CallId, Cancel, BuildHasherDefault<IdHasher>>);

/// The cancel of one call.
#[derive(Debug)]
struct Cancel {
    /// When to send it next.
    due: Instant,
    /// Number of times it was sent. It is repeated because the daemon ignores a Cancel that it reads
    /// before the call.
    sent: u32,
}

impl Cancel {
    /// Sends the message if it is due. The interval doubles each time.
    fn send(&mut self, id: &CallId, now: Instant, out: &mut BytesMut) {
        if self.due <= now {
            put_cancel(out, id);
            self.due = now + CANCEL_INTERVAL * (1 << self.sent);
            self.sent += 1;
        }
    }
}

impl Cancels {
    /// Cancels a call that was made at `called`: now, if the call is old enough, or later.
    pub(super) fn add(&mut self, id: CallId, called: Instant, now: Instant, out: &mut BytesMut) {
        let due = called + CANCEL_DELAY;
        let mut cancel = Cancel { due, sent: 0 };
        cancel.send(&id, now, out);
        if self.0.len() < MAX_CANCELS {
            self.0.insert(id, cancel);
        }
    }

    /// Notes that the daemon has answered the call.
    #[inline]
    pub(super) fn confirm(&mut self, id: &CallId) {
        self.0.remove(id);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sends the cancels that are due.
    pub(super) fn repeat(&mut self, now: Instant, out: &mut BytesMut) {
        self.0.retain(|id, cancel| {
            cancel.send(id, now, out);
            cancel.sent < MAX_SENT
        });
    }

    /// Sends the cancels that were never sent, and forgets all.
    pub(super) fn finish(&mut self, out: &mut BytesMut) {
        for (id, _) in self.0.drain().filter(|(_, cancel)| cancel.sent == 0) {
            put_cancel(out, &id);
        }
    }
}
