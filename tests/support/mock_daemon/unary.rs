//! Persistent connections. The daemon answers calls itself, or forwards them to handlers of other clients.

use super::buffer::Buffer;
use super::connection::{push, LEFT};
use super::input::Input;
use super::limits::MAX_HANDLERS;
use super::load::{Connection, Forwarded, Load, Order, Outbox, State, Token, UNFIT};
use super::shared::{Failure, Shared};
use crate::lock::lock;
use crate::socket::Socket;
use p2pd_protocol::unary::server::{Offered, ServerEvent};
use p2pd_protocol::unary::{CallId, Receiving};
use std::sync::atomic::Ordering;
use std::sync::Arc;

/// Protocol of unary calls that are answered with their payload.
pub const UNARY_ECHO: &str = "echo";
/// Protocol of unary calls that start a load.
pub const UNARY_LOAD: &str = "load";

/// The thread that serves a persistent connection.
struct Server<'a> {
    shared: &'a Shared,
    outbox: Outbox,
}

pub(super) fn serve(socket: Socket, shared: &Shared, input: Input) -> Result<(), Failure> {
    // Predictable call ids are good enough here.
    let mut seed = [0; 32];
    let number = shared.next.fetch_add(1, Ordering::Relaxed);
    seed[..8].copy_from_slice(&number.to_le_bytes());
    let own = Arc::new(Connection::new(socket, seed));
    let mut server = Server {
        shared,
        outbox: Outbox::new(own),
    };
    let served = server.run(input);
    server.close();
    served
}

/// Answers calls of the echo, and checks replies to a load's calls, without copying them.
fn look<'a>(offered: Offered<'a, '_, Token>) -> Option<&'a [u8]> {
    match offered {
        Offered::Call {
            protocol: UNARY_ECHO,
            payload,
            ..
        } => Some(payload),
        Offered::Reply {
            token: Token::Load(load, number, is_right),
            payload,
        } => {
            *is_right = load.is_echo(*number, payload);
            is_right.then_some(&[])
        }
        _ => None,
    }
}

impl Server<'_> {
    fn run(&mut self, mut input: Input) -> Result<(), Failure> {
        let own = self.outbox.own.clone();
        let mut receiving = None;
        loop {
            let mut bytes = input.take();
            let mut state = lock(&own.state);
            if let Some(receiving) = receiving.take() {
                state.server.resume(receiving);
            }
            loop {
                let State { server, output, .. } = &mut *state;
                let polled = output.append(|out| server.poll_in_place(&mut bytes, out, look));
                let Some(event) = polled? else { break };
                drop(state);
                self.handle(event);
                if self.outbox.is_full {
                    self.outbox.flush()?;
                }
                state = lock(&own.state);
            }
            // A large payload is read into its buffer, without the lock.
            receiving = state.server.take_receiving();
            drop(state);
            self.outbox.flush()?;
            let room = receiving.as_mut().map(Receiving::unfilled);
            let count = input.fill(&own.socket, room.unwrap_or_default())?;
            if count == 0 {
                return Ok(());
            }
            if let Some(receiving) = &mut receiving {
                receiving.filled(count);
            }
        }
    }

    fn handle(&mut self, event: ServerEvent<Token, Buffer>) {
        match event {
            ServerEvent::AddHandler {
                id,
                protocol,
                balanced,
            } => {
                let added = self.add_handler(protocol, balanced);
                self.outbox.update_own(|state| match added {
                    Ok(()) => state.acknowledge(&id),
                    Err(message) => state.refuse_request(&id, message),
                });
            }
            ServerEvent::RemoveHandler { id, protocol } => {
                self.remove_handlers(Some(&protocol));
                self.outbox.update_own(|state| state.acknowledge(&id));
            }
            ServerEvent::Call {
                id,
                peer,
                protocol,
                payload,
            } => {
                let served = match protocol.as_str() {
                    UNARY_ECHO => {
                        self.outbox.update_own(|state| state.reply(&id, payload));
                        Ok(())
                    }
                    UNARY_LOAD => self.start_load(id, &payload.0),
                    name => self.forward(id, &peer, name, payload),
                };
                if let Err(message) = served {
                    self.outbox.update_own(|state| state.refuse(&id, &message));
                }
            }
            ServerEvent::Cancelled { id } => {
                let forwarded = lock(&self.outbox.own.state).forwarded.remove(&id);
                self.cancel(forwarded);
            }
            ServerEvent::Reply {
                token: Token::Call(caller, id),
                payload,
            } => self
                .outbox
                .update(&caller, |state| state.reply(&id, payload)),
            ServerEvent::HandlerFailed {
                token: Token::Call(caller, id),
                error,
            } => self
                .outbox
                .update(&caller, |state| state.reply_error(&id, &error)),
            ServerEvent::InvalidReply {
                token: Token::Call(caller, id),
                error,
            } => self
                .outbox
                .update(&caller, |state| state.refuse(&id, &error.to_string())),
            ServerEvent::Reply {
                token: Token::Load(load, number, is_right),
                payload,
            } => load.go_on(
                is_right || load.is_echo(number, &payload.0),
                &mut self.outbox,
            ),
            ServerEvent::HandlerFailed {
                token: Token::Load(load, ..),
                ..
            }
            | ServerEvent::InvalidReply {
                token: Token::Load(load, ..),
                ..
            } => load.go_on(false, &mut self.outbox),
            ServerEvent::Rejected { id, reason } => {
                self.outbox
                    .update_own(|state| state.refuse_request(&id, &reason));
            }
            ServerEvent::Skipped { error } => eprintln!("skipped a message: {error}"),
            _ => {}
        }
    }

    fn add_handler(&self, name: String, balanced: bool) -> Result<(), &'static str> {
        let mut all = lock(&self.shared.handlers);
        let known = all.get(&name);
        if known.is_some_and(|handlers| !(balanced && handlers.balanced)) {
            return Err("handler for the protocol already set");
        }
        if all.values().map(|of| of.connections.len()).sum::<usize>() >= MAX_HANDLERS {
            return Err("too many handlers");
        }
        let handlers = all.entry(name).or_default();
        handlers.balanced = balanced;
        handlers.connections.push(self.outbox.own.clone());
        Ok(())
    }

    /// Removes this connection from the handlers of a name, or of all names.
    fn remove_handlers(&self, of: Option<&str>) {
        lock(&self.shared.handlers).retain(|name, handlers| {
            if of.is_none_or(|of| of == name) {
                let connections = &mut handlers.connections;
                connections.retain(|connection| !Arc::ptr_eq(connection, &self.outbox.own));
            }
            !handlers.connections.is_empty()
        });
    }

    /// Returns the next connection in turn that handles calls of a name.
    fn handler(&self, name: &str) -> Option<Arc<Connection>> {
        let mut all = lock(&self.shared.handlers);
        let handlers = all.get_mut(name)?;
        handlers.turn = (handlers.turn + 1) % handlers.connections.len();
        Some(handlers.connections[handlers.turn].clone())
    }

    /// Forwards a call of this client to a handler.
    fn forward(
        &mut self,
        id: CallId,
        peer: &[u8],
        name: &str,
        payload: Buffer,
    ) -> Result<(), String> {
        let handler = self.handler(name).ok_or("protocols not supported")?;
        let token = Token::Call(self.outbox.own.clone(), id);
        let forwarded = self.outbox.update(&handler, |state| {
            state.handle((peer, name, payload.0.len()), token, |output| {
                push(output, payload);
            })
        })?;
        let mut state = lock(&self.outbox.own.state);
        // The handler may have replied already.
        if state.server.is_unanswered(&id) {
            let forwarded = Forwarded::Call(handler, forwarded);
            state.forwarded.insert(id, forwarded);
        }
        Ok(())
    }

    /// Starts a load.
    fn start_load(&mut self, id: CallId, payload: &[u8]) -> Result<(), String> {
        let order = Order::parse(payload)?;
        let handler = self.handler(&order.handler).ok_or(UNFIT)?;
        let own = &self.outbox.own;
        let load = Load::start(id, own, order, handler, &self.shared.identity.peer_id);
        let forwarded = Forwarded::Load(load.clone());
        lock(&own.state).forwarded.insert(id, forwarded);
        load.begin(&mut self.outbox);
        Ok(())
    }

    /// Cleans up after the connection has ended: fails the calls that wait for this client, and cancels its own.
    fn close(&mut self) {
        self.remove_handlers(None);
        let mut state = lock(&self.outbox.own.state);
        state.is_closed = true;
        state.server.take_calls();
        let tokens = state.server.take_handled();
        let forwarded = std::mem::take(&mut state.forwarded);
        drop(state);
        for token in tokens {
            match token {
                Token::Call(caller, id) => {
                    self.outbox.update(&caller, |state| state.refuse(&id, LEFT));
                }
                Token::Load(load, ..) => load.fail(LEFT, &mut self.outbox),
            }
        }
        self.cancel(forwarded.into_values());
        let _ = self.outbox.flush();
    }

    /// Cancels calls and loads.
    fn cancel(&mut self, forwarded: impl IntoIterator<Item = Forwarded>) {
        for forwarded in forwarded {
            match forwarded {
                Forwarded::Call(handler, id) => {
                    self.outbox
                        .update(&handler, |State { server, output, .. }| {
                            output.append(|out| server.cancel(&id, out));
                        });
                }
                Forwarded::Load(load) => load.stop(&mut self.outbox),
            }
        }
    }
}
