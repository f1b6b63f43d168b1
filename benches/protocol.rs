//! Cost of the protocol crate: messages to bytes and back, without sockets. criterion measures the time;
//! with `--instructions`, valgrind counts the instructions (benches/instructions).

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput};
use p2pd_protocol::command::{control, dht, streams, Typed};
use p2pd_protocol::pb::p2pd::{
    self, dht_response, persistent_connection_response as response_to_call, response,
};
use p2pd_protocol::{
    framing, ClientExchange, EncodedRequest, Event, Limits, Multiaddr, PeerId, PersistentClient,
    UnaryEvent, UnaryLimits,
};
use prost::Message;
use std::hint::black_box;
use std::time::Instant;

const ADDRS: [&str; 3] = [
    "/ip4/192.0.2.17/tcp/4001",
    "/ip6/2001:db8::17/udp/4001/quic-v1",
    "/dns4/bootstrap.example.org/tcp/443/wss/p2p/QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7",
];

/// Size of one read of a driver, in bytes.
const READ: usize = 64 << 10;

const SIZES: [(&str, usize); 4] = [
    ("64 B", 64),
    ("1 KiB", 1 << 10),
    ("64 KiB", 64 << 10),
    ("1 MiB", 1 << 20),
];

/// Number of runs in which instructions are counted.
const COUNT: usize = 100;

/// An operation to repeat.
struct Operation {
    group: &'static str,
    name: String,
    throughput: Option<Throughput>,
    run: Box<dyn FnMut()>,
}

impl Operation {
    fn new(group: &'static str, name: impl Into<String>, run: impl FnMut() + 'static) -> Self {
        Self {
            group,
            name: name.into(),
            throughput: None,
            run: Box::new(run),
        }
    }

    fn with(self, throughput: Throughput) -> Self {
        Self {
            throughput: Some(throughput),
            ..self
        }
    }
}

/// One of many peers, with an inlined Ed25519 key as is usual.
fn peer(number: u8) -> PeerId {
    PeerId::from_bytes([&[0, 36, 8, 1, 18, 32][..], &[number; 32]].concat())
}

fn addrs() -> Vec<Bytes> {
    let parsed = ADDRS.map(|addr| addr.parse::<Multiaddr>().expect("these are good"));
    parsed.iter().map(Multiaddr::to_bytes).collect()
}

fn peer_info(number: u8) -> p2pd::PeerInfo {
    p2pd::PeerInfo {
        id: Some(peer(number).to_bytes()),
        addrs: addrs(),
    }
}

fn frame(message: &impl Message) -> Bytes {
    message.encode_length_delimited_to_vec().into()
}

fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

/// Sends a request and reads its answer; returns the number of events.
fn exchange(exchange: &mut ClientExchange, request: &EncodedRequest, answer: &[u8]) -> usize {
    black_box(exchange.send(request).expect("the connection is ready"));
    exchange.receive(answer);
    let mut count = 0;
    while let Some(event) = exchange.poll().expect("the answer is good") {
        count += 1;
        match black_box(event) {
            Event::Value(_) => {}
            Event::Reply(_) | Event::End => return count,
            other => panic!("{other:?}"),
        }
    }
    panic!("the answer is not whole");
}

fn framing() -> Vec<Operation> {
    let mut frames = BytesMut::new();
    for _ in 0..1000 {
        frames.extend_from_slice(&[100]);
        frames.extend_from_slice(&[7; 100]);
    }
    let mut buffer = BytesMut::new();
    let split = move || {
        // Like the read of a driver.
        buffer.extend_from_slice(&frames);
        let mut count = 0;
        while let Ok(Some(frame)) = framing::split_frame(&mut buffer, 1000) {
            black_box(frame);
            count += 1;
        }
        assert_eq!(count, 1000);
    };
    let split = Operation::new("framing", "split 1000 frames of 100 B", split);
    vec![split.with(Throughput::Elements(1000))]
}

fn requests() -> Vec<Operation> {
    let identify = frame(&p2pd::Response {
        identify: Some(p2pd::IdentifyResponse {
            id: Some(peer(1).to_bytes()),
            addrs: addrs(),
        }),
        ..ok()
    });
    let peers = frame(&p2pd::Response {
        peers: (0..100).map(peer_info).collect(),
        ..ok()
    });
    let stream_info = p2pd::StreamInfo {
        peer: Some(peer(1).to_bytes()),
        addr: addrs().pop(),
        proto: Some("/echo/1.0.0".to_owned()),
    };
    let step = |r#type: dht_response::Type, peer| p2pd::DhtResponse {
        r#type: Some(r#type as i32),
        peer,
        value: None,
    };
    let mut found = frame(&p2pd::Response {
        dht: Some(step(dht_response::Type::Begin, None)),
        ..ok()
    })
    .to_vec();
    for number in 0..20 {
        let value = step(dht_response::Type::Value, Some(peer_info(number)));
        found.extend(frame(&value));
    }
    found.extend(frame(&step(dht_response::Type::End, None)));

    let opened = frame(&p2pd::Response {
        stream_info: Some(stream_info.clone()),
        ..ok()
    });
    let inbound = stream_info.encode_to_vec();
    let remote = peer(1);
    let cid = Bytes::from(vec![7; 36]);
    let mut connection = ClientExchange::new(Limits::default());
    let mut another = ClientExchange::new(Limits::default());
    let mut third = ClientExchange::new(Limits::default());
    vec![
        Operation::new("requests", "identify", move || {
            exchange(&mut connection, &control::Identify.encoded(), &identify);
        }),
        Operation::new("requests", "list_peers, 100 peers", move || {
            exchange(&mut another, &control::ListPeers.encoded(), &peers);
        }),
        Operation::new("requests", "dht_find_providers, 20 peers", move || {
            let request = dht::FindProviders {
                cid: cid.clone(),
                count: 20,
                timeout: None,
            };
            assert_eq!(exchange(&mut third, &request.encoded(), &found), 21);
        }),
        Operation::new("requests", "stream_open", move || {
            // The connection becomes a stream.
            let mut connection = ClientExchange::new(Limits::default());
            let request = streams::StreamOpen {
                peer: remote.clone(),
                protocols: vec!["/echo/1.0.0".to_owned()],
                timeout: None,
            };
            exchange(&mut connection, &request.encoded(), &opened);
        }),
        Operation::new("requests", "StreamInfo of an inbound stream", move || {
            let info = streams::decode_stream_info(black_box(&inbound));
            black_box(info).expect("it is good");
        }),
    ]
}

fn unary() -> Vec<Operation> {
    let sized = |kind, (name, size): (&str, usize), run: fn(usize) -> Box<dyn FnMut()>| {
        let mut operation = Operation::new("unary", format!("{kind}, {name}"), || {});
        operation.run = run(size);
        operation.with(Throughput::Bytes(size as u64))
    };
    let calls = SIZES.map(|size| sized("call and reply", size, call));
    let served = SIZES.map(|size| sized("call served", size, serve));
    calls.into_iter().chain(served).collect()
}

/// A call, whose payload is not encoded, and its reply, whose payload is received.
fn call(size: usize) -> Box<dyn FnMut()> {
    let remote = peer(1);
    let mut connection = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let result = p2pd::call_unary_response::Result::Response(vec![7; size].into());
    let reply = incoming(response_to_call::Message::CallUnaryResponse(
        p2pd::CallUnaryResponse {
            result: Some(result),
        },
    ));
    let (len, mut reply) = (reply.encoded_len(), frame(&reply).to_vec());
    let id_at = reply.len() - len + 2;
    let now = Instant::now();
    Box::new(move || {
        out.clear();
        let id = connection.call(remote.as_bytes(), "echo", size, (), now, &mut out);
        reply[id_at..id_at + 16].copy_from_slice(&id.expect("it is small enough"));
        let event = receive(&mut connection, &reply);
        assert!(matches!(event, UnaryEvent::Reply { .. }));
    })
}

/// An incoming call and its reply.
fn serve(size: usize) -> Box<dyn FnMut()> {
    let mut connection = PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let call = incoming(response_to_call::Message::RequestHandling(
        p2pd::CallUnaryRequest {
            peer: Some(peer(1).to_bytes()),
            proto: Some(Bytes::from_static(b"echo")),
            data: Some(vec![7; size].into()),
        },
    ));
    let call = frame(&call);
    Box::new(move || {
        out.clear();
        let UnaryEvent::Call { id, .. } = receive(&mut connection, &call) else {
            panic!("it is a call");
        };
        assert!(connection.reply(&id, size, &mut out));
    })
}

/// Encodes a message of the daemon on a persistent connection.
fn incoming(message: response_to_call::Message) -> p2pd::PersistentConnectionResponse {
    p2pd::PersistentConnectionResponse {
        call_id: Some(vec![7; 16].into()),
        message: Some(message),
    }
}

/// Reads one message as a driver does: in pieces, and a large payload straight into its buffer.
fn receive(
    connection: &mut PersistentClient<(), Vec<u8>>,
    mut message: &[u8],
) -> UnaryEvent<(), Vec<u8>> {
    loop {
        let mut input = &[][..];
        if let Some(buffer) = connection.payload_buffer() {
            let (payload, rest) = message.split_at(buffer.len().min(message.len()));
            buffer[..payload.len()].copy_from_slice(payload);
            connection.payload_filled(payload.len());
            message = rest;
        } else {
            (input, message) = message.split_at(READ.min(message.len()));
        }
        if let Some(event) = connection.poll(&mut input).expect("it is good") {
            return event;
        }
        assert!(!message.is_empty(), "the message is not whole");
    }
}

fn values() -> Vec<Operation> {
    let peer_id = peer(1);
    let text = peer_id.to_base58();
    let mut operations = vec![
        Operation::new("values", "peer id to base58", move || {
            black_box(black_box(&peer_id).to_base58());
        }),
        Operation::new("values", "peer id from base58", move || {
            black_box(black_box(&text).parse::<PeerId>()).expect("it is good");
        }),
    ];
    for (name, text) in [("short", ADDRS[0]), ("long", ADDRS[2])] {
        let addr: Multiaddr = text.parse().expect("it is good");
        let from = move || {
            black_box(black_box(text).parse::<Multiaddr>()).expect("it is good");
        };
        let to = move || {
            black_box(black_box(&addr).to_string());
        };
        operations.push(Operation::new(
            "values",
            format!("multiaddr from text, {name}"),
            from,
        ));
        operations.push(Operation::new(
            "values",
            format!("multiaddr to text, {name}"),
            to,
        ));
    }
    operations
}

/// Runs the operations for benches/instructions/callgrind.py: each between two calls of getppid().
fn count(operations: &mut [Operation]) {
    for Operation { name, run, .. } in operations {
        let mut run_and_mark = || {
            (0..COUNT).for_each(|_| run());
            #[cfg(unix)]
            let _ = std::os::unix::process::parent_id();
        };
        run_and_mark();
        run_and_mark();
        println!(r#"{{"name": "{name}", "count": {COUNT}}}"#);
    }
}

fn main() {
    let groups = [framing(), requests(), unary(), values()];
    let mut operations: Vec<_> = groups.into_iter().flatten().collect();
    if std::env::args().any(|argument| argument == "--instructions") {
        return count(&mut operations);
    }
    let mut criterion = Criterion::default().configure_from_args();
    for operations in operations.chunk_by_mut(|one, other| one.group == other.group) {
        let mut group = criterion.benchmark_group(operations[0].group);
        for operation in operations {
            if let Some(throughput) = &operation.throughput {
                group.throughput(throughput.clone());
            }
            group.bench_function(&operation.name, |b| b.iter(&mut operation.run));
        }
        group.finish();
    }
    criterion.final_summary();
}
