//! The locked state of a persistent connection: the protocol's state machine and its channel.

use super::payload::PyPayload;
use crate::channel::{Channel, Decoder, Tail};
use crate::driver::{DrivenState, Registered, Registrations};
use crate::errors::Loss;
use crate::socket::Socket;
use bytes::BytesMut;
use p2pd_protocol::unary::{self, UnaryLimits};
use p2pd_protocol::{Error, PersistentClient, UnaryEvent};
use pyo3::prelude::*;
use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

/// A future, or an object with the same methods, that a reply completes.
pub type Token = Py<PyAny>;
pub type Event = UnaryEvent<Token, PyPayload>;

pub struct State {
    pub channel: Channel,
    pub core: PersistentClient<Token, PyPayload>,
    /// The buffer in which the head of a frame is encoded.
    pub head: BytesMut,
    loss: Option<Loss>,
    pub registered: Registered,
    /// When reading was paused; `None` while it is not.
    pub paused: Option<Instant>,
    /// Whether a timer will end the pause.
    pub hold_timer: bool,
    /// Whether a timer will repeat the Cancel messages.
    pub cancel_timer: bool,
    /// The futures of callers that wait for room in the output.
    pub callers: VecDeque<Token>,
}

/// Loop operations, carried out after the lock is released.
#[derive(Default)]
pub struct FollowUp {
    pub registrations: Registrations,
    /// The time after which the pause must end.
    pub hold_later: Option<Duration>,
    pub cancel_later: bool,
    /// The future of a waiting caller, now that the output has room for its call.
    pub caller: Option<Token>,
}

impl State {
    pub fn new(socket: Socket, seed: [u8; 32], limits: UnaryLimits) -> Self {
        Self {
            channel: Channel::new(socket, unary::KEPT_OUTPUT),
            core: PersistentClient::new(seed, limits),
            head: BytesMut::new(),
            loss: None,
            registered: Registered::default(),
            paused: None,
            hold_timer: false,
            cancel_timer: false,
            callers: VecDeque::new(),
        }
    }

    /// Sends the message that `encode` writes, if any. The message has no payload.
    pub fn send_head(
        &mut self,
        encode: impl FnOnce(&mut PersistentClient<Token, PyPayload>, &mut BytesMut),
    ) -> io::Result<()> {
        self.head.clear();
        encode(&mut self.core, &mut self.head);
        self.send(Tail::None)
    }

    /// Sends the head that was encoded, if any, and its tail.
    pub fn send(&mut self, tail: Tail<'_, '_>) -> io::Result<()> {
        if !self.head.is_empty() {
            self.channel.send(&self.head, tail)?;
        }
        Ok(())
    }

    /// Decodes input that was read together with the reply to the upgrade.
    pub fn start(&mut self, input: &[u8], events: &mut Vec<Event>) {
        let received = self.core.receive(input, events);
        self.loss = received.map_err(Loss::Protocol).err();
    }

    fn wants_input(&self) -> bool {
        Decoder::wants_input(&self.core, self.channel.unsent())
    }

    /// How much longer reading may pause; `None` if it is not paused, or may pause without limit.
    pub fn hold_left(&self) -> Option<Duration> {
        let hold = self.core.limits().hold?;
        Some(hold.saturating_sub(self.paused?.elapsed()))
    }
}

impl DrivenState for State {
    type Event = Event;
    type FollowUp = FollowUp;

    fn channel(&mut self) -> &mut Channel {
        &mut self.channel
    }

    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), Loss> {
        Ok(self.channel.read(&mut self.core, events)?)
    }

    fn flush(&mut self) -> Result<(), Loss> {
        self.channel.flush()?;
        Ok(())
    }

    fn loss(&mut self) -> &mut Option<Loss> {
        &mut self.loss
    }

    fn follow_up(&mut self) -> FollowUp {
        let mut follow_up = FollowUp::default();
        if !self.channel.is_open() {
            return follow_up;
        }
        let read = self.wants_input();
        if read != self.registered.reader {
            self.paused = (!read).then(Instant::now);
        }
        follow_up.registrations = self.registered.update(read, self.channel.is_blocked());
        // Not for a pause because of unsent output, which no timer ends.
        if !self.hold_timer && !self.core.wants_input() {
            follow_up.hold_later = self.hold_left();
            self.hold_timer = follow_up.hold_later.is_some();
        }
        if !self.cancel_timer && self.core.has_unconfirmed_cancels() {
            self.cancel_timer = true;
            follow_up.cancel_later = true;
        }
        if self.channel.unsent() <= unary::LOW_WATER {
            follow_up.caller = self.callers.pop_front();
        }
        follow_up
    }
}

impl Decoder for PersistentClient<Token, PyPayload> {
    type Event = Event;

    const READ: usize = unary::READ_SIZE;
    const READ_BEHIND: usize = unary::LOOK_AHEAD;
    const BUDGET: usize = unary::READ_BUDGET;

    fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        PersistentClient::payload_buffer(self)
    }

    fn payload_filled(&mut self, count: usize) {
        PersistentClient::payload_filled(self, count);
    }

    fn receive(&mut self, mut bytes: &[u8], events: &mut Vec<Event>) -> Result<(), Error> {
        while let Some(event) = self.poll(&mut bytes)? {
            events.push(event);
        }
        Ok(())
    }

    fn end_of_file(&mut self) -> Error {
        PersistentClient::end_of_file(self)
    }

    fn wants_input(&self, unsent: usize) -> bool {
        PersistentClient::wants_input(self) && unsent <= unary::MAX_OUTPUT
    }
}
