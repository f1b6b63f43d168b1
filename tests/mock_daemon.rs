//! The mock daemon of the benchmarks, with clients on persistent connections.
#![cfg(unix)]

use bytes::BytesMut;
use p2pd_protocol::command::{dht, unary::Upgrade, EncodedRequest, Typed as _};
use p2pd_protocol::unary::CallId;
use p2pd_protocol::{ClientExchange, Event, Limits};
use p2pd_protocol::{Multiaddr, PersistentClient, UnaryEvent, UnaryLimits};
use p2pd_test_support::deadline::Limit;
use p2pd_test_support::mock_daemon::{MockDaemon, UNARY_ECHO, UNARY_LOAD};
use p2pd_test_support::socket::Socket;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};
use tempfile::TempDir;

type Reply = UnaryEvent<u32, Vec<u8>>;

struct Daemon {
    control: Multiaddr,
    _directory: TempDir,
    _limit: Limit,
}

impl Daemon {
    fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("p2p-").tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let control = format!("/unix{}", path.display()).parse().unwrap();
        MockDaemon::bind(&control).unwrap().spawn().unwrap();
        Self {
            control,
            _directory: directory,
            _limit: Limit::of(Duration::from_secs(60)),
        }
    }

    fn control(&self) -> Socket {
        Socket::connect(&self.control.endpoint().unwrap()).unwrap()
    }

    fn client(&self) -> Client {
        let socket = self.control();
        assert!(matches!(ask(&socket, &Upgrade.encoded()), Event::Reply(_)));
        Client {
            socket,
            client: PersistentClient::new([7; 32], UnaryLimits::default()),
            out: BytesMut::new(),
            input: Vec::new(),
        }
    }

    /// A client that handles calls of a name.
    fn handler(&self, name: &str, balanced: bool) -> Client {
        let mut client = self.client();
        client
            .client
            .add_handler(name, balanced, 0, &mut client.out)
            .unwrap();
        assert_eq!(client.event(), UnaryEvent::Acknowledged { token: 0 });
        client
    }
}

fn ask(mut socket: &Socket, request: &EncodedRequest) -> Event {
    let mut exchange = ClientExchange::new(Limits::default());
    socket.write_all(&exchange.send(request).unwrap()).unwrap();
    loop {
        if let Some(event) = exchange.poll().unwrap() {
            return event;
        }
        let mut buffer = [0; 1024];
        let count = socket.read(&mut buffer).unwrap();
        assert_ne!(count, 0, "the daemon closed");
        exchange.receive(&buffer[..count]);
    }
}

/// A blocking client that does not read while it writes.
struct Client {
    socket: Socket,
    client: PersistentClient<u32, Vec<u8>>,
    out: BytesMut,
    input: Vec<u8>,
}

impl Client {
    fn call(&mut self, name: &str, payload: &[u8], token: u32) -> CallId {
        let (len, out) = (payload.len(), &mut self.out);
        let id = self
            .client
            .call(b"peer", name, len, token, Instant::now(), out);
        self.out.extend_from_slice(payload);
        self.flush();
        id.unwrap()
    }

    fn reply(&mut self, id: &CallId, payload: &[u8]) {
        assert!(self.client.reply(id, payload.len(), &mut self.out));
        self.out.extend_from_slice(payload);
        self.flush();
    }

    fn flush(&mut self) {
        (&self.socket).write_all(&self.out.split()).unwrap();
    }

    /// Reads the next event.
    fn event(&mut self) -> Reply {
        self.flush();
        loop {
            let mut input = &self.input[..];
            let event = self.client.poll(&mut input).unwrap();
            self.input = input.to_vec();
            if let Some(event) = event {
                return event;
            }
            let mut buffer = vec![0; 64 << 10];
            let count = (&self.socket).read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the daemon closed");
            self.input.extend_from_slice(&buffer[..count]);
        }
    }

    fn called(&mut self) -> (CallId, Vec<u8>) {
        match self.event() {
            UnaryEvent::Call { id, payload, .. } => (id, payload),
            other => panic!("{other:?} is no call"),
        }
    }
}

fn replied(token: u32, payload: &[u8]) -> Reply {
    let payload = payload.to_vec();
    UnaryEvent::Reply { token, payload }
}

fn refused(token: u32, message: &str) -> Reply {
    let error = message.to_owned();
    UnaryEvent::Refused { token, error }
}

#[test]
fn refuses_unsupported_requests_and_serves_the_next() {
    let (daemon, timeout) = (Daemon::start(), None);
    let control = daemon.control();
    let get = dht::GetValue {
        key: b"key".as_slice().into(),
        timeout,
    };
    for _ in 0..2 {
        let refused = Event::Refused("the mock daemon has no DHT GET_VALUE".to_owned());
        assert_eq!(ask(&control, &get.encoded()), refused);
    }
}

#[test]
fn echoes_payloads_of_every_size() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for size in [0, 1, 5_000, 16_000, 70_000, 200_000, 3 << 20] {
        let payload: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        client.call(UNARY_ECHO, &payload, 1);
        assert!(client.event() == replied(1, &payload), "{size} bytes");
    }
}

#[test]
fn forwards_calls_and_replies() {
    let daemon = Daemon::start();
    let (mut handler, mut caller) = (daemon.handler("name", false), daemon.client());
    for size in [3, 20_000, 300_000] {
        let (payload, reply) = (vec![1; size], vec![2; size + 1]);
        caller.call("name", &payload, 1);
        let (id, received) = handler.called();
        assert_eq!(received, payload);
        handler.reply(&id, &reply);
        assert_eq!(caller.event(), replied(1, &reply));
    }
    caller.call("name", b"", 2);
    let (id, _) = handler.called();
    handler
        .client
        .reply_error(&id, "it failed", &mut handler.out);
    handler.flush();
    let error = "it failed".to_owned();
    assert_eq!(
        caller.event(),
        UnaryEvent::HandlerFailed { token: 2, error }
    );
    caller.call("other", b"", 3);
    assert_eq!(caller.event(), refused(3, "protocols not supported"));
}

#[test]
fn balanced_handlers_serve_in_turn() {
    let daemon = Daemon::start();
    let mut handlers = [daemon.handler("name", true), daemon.handler("name", true)];
    let mut caller = daemon.client();
    caller
        .client
        .add_handler("name", false, 9, &mut caller.out)
        .unwrap();
    let message = "handler for the protocol already set";
    assert_eq!(caller.event(), refused(9, message));
    for _ in 0..2 {
        caller.call("name", b"", 1);
        caller.call("name", b"", 1);
        for handler in &mut handlers {
            let (id, _) = handler.called();
            handler.reply(&id, b"");
            assert_eq!(caller.event(), replied(1, b""));
        }
    }
}

#[test]
fn cancel_reaches_the_handler() {
    let daemon = Daemon::start();
    let (mut handler, mut caller) = (daemon.handler("name", false), daemon.client());
    let call = caller.call("name", b"", 1);
    let (id, _) = handler.called();
    let later = Instant::now() + Duration::from_secs(1);
    caller.client.cancel(&call, later, &mut caller.out);
    caller.flush();
    assert_eq!(handler.event(), UnaryEvent::Cancelled { id });
    // The load's calls are cancelled too.
    let load = caller.call(UNARY_LOAD, b"name 100 3 3", 2);
    let ids = [0; 3].map(|_| handler.called().0);
    caller.client.cancel(&load, later, &mut caller.out);
    caller.flush();
    for _ in ids {
        let event = handler.event();
        assert!(matches!(event, UnaryEvent::Cancelled { id } if ids.contains(&id)));
    }
}

#[test]
fn closed_connection_cancels_its_calls_and_fails_those_it_handles() {
    let daemon = Daemon::start();
    let (mut handler, mut caller) = (daemon.handler("name", false), daemon.client());
    let mut other = daemon.client();
    caller.call("name", b"", 1);
    let (id, _) = handler.called();
    drop(caller);
    assert_eq!(handler.event(), UnaryEvent::Cancelled { id });
    other.call("name", b"", 2);
    other.call(UNARY_LOAD, b"name 100 1 2", 3);
    handler.called();
    handler.called();
    drop(handler);
    let mut events = [other.event(), other.event()];
    events.sort_by_key(|event| matches!(event, UnaryEvent::Refused { token: 3, .. }));
    assert_eq!(
        events,
        [2, 3].map(|token| refused(token, "the handler's client left"))
    );
    daemon.handler("name", false);
}

#[test]
fn measures_a_load_and_checks_its_replies() {
    let daemon = Daemon::start();
    let (mut handler, mut caller) = (daemon.handler("name", false), daemon.client());
    for (size, parallel, count) in [(8, 2, 5), (20_000, 1, 3), (300_000, 4, 4)] {
        let load = format!("name {size} {parallel} {count}");
        caller.call(UNARY_LOAD, load.as_bytes(), 1);
        for _ in 0..count {
            let (id, payload) = handler.called();
            assert_eq!(payload.len(), size);
            handler.reply(&id, &payload);
        }
        let event = caller.event();
        let UnaryEvent::Reply { payload, .. } = event else {
            panic!("{event:?}")
        };
        let seconds: f64 = String::from_utf8(payload).unwrap().parse().unwrap();
        assert!(seconds > 0.0);
    }
    caller.call(UNARY_LOAD, b"name 100 1 2", 2);
    let (id, mut payload) = handler.called();
    payload[50] = 0;
    handler.reply(&id, &payload);
    assert_eq!(caller.event(), refused(2, "the handler's reply is no echo"));
    caller.call(UNARY_LOAD, b"name 1 1 1", 3);
    assert_eq!(
        caller.event(),
        refused(3, "no such handler, or not that large")
    );
}

#[test]
fn handler_that_does_not_read_while_it_writes_serves_more_than_sockets_hold() {
    let daemon = Daemon::start();
    let (mut handler, mut caller) = (daemon.handler("name", false), daemon.client());
    caller.call(UNARY_LOAD, b"name 65536 64 256", 1);
    for _ in 0..256 {
        let (id, payload) = handler.called();
        handler.reply(&id, &payload);
    }
    assert!(matches!(caller.event(), UnaryEvent::Reply { token: 1, .. }));
}
