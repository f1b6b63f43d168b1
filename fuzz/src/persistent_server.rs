//! The daemon's end of a persistent connection: arbitrary bytes of a client, in any pieces.

use super::persistent::Buffer;
use super::{bounded, pieces};
use bytes::BytesMut;
use p2pd_protocol::unary::server::{PersistentServer, ServerEvent, ServerLimits};
use p2pd_protocol::Error;
use std::collections::BTreeSet;

type Event = ServerEvent<u32, Buffer>;

/// Feeds a server, as a driver that answers every call at once or never.
fn run(
    limits: ServerLimits,
    bytes: &[u8],
    seed: u8,
    in_place: bool,
) -> (Vec<Event>, Option<Error>) {
    let mut server = PersistentServer::<u32, Buffer>::new([7; 32], limits);
    let mut out = BytesMut::new();
    // Two calls that the client handles; the seeds have its replies to them.
    let mut handled: BTreeSet<u32> = (0..2)
        .filter(|token| {
            server
                .handle(b"caller", "echo", 0, *token, &mut out)
                .is_ok()
        })
        .collect();
    let mut under_way = BTreeSet::new();
    let mut events = Vec::new();
    for piece in pieces(bytes, seed) {
        let mut input = piece;
        if in_place {
            if let Some(buffer) = server.payload_buffer() {
                let count = buffer.len().min(input.len());
                buffer[..count].copy_from_slice(&input[..count]);
                server.payload_filled(count);
                input = &input[count..];
            }
        }
        loop {
            out.clear();
            let event = match server.poll(&mut input) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(error) => return (events, Some(error)),
            };
            match &event {
                ServerEvent::Call { id, payload, .. } => {
                    assert!(under_way.insert(*id), "its id was free");
                    if payload.0.len() % 2 == 0 {
                        server.reply_error(id, "no", &mut out);
                        under_way.remove(id);
                    }
                }
                ServerEvent::Cancelled { id } => assert!(under_way.remove(id)),
                ServerEvent::Reply { token, .. }
                | ServerEvent::HandlerFailed { token, .. }
                | ServerEvent::InvalidReply { token, .. } => assert!(handled.remove(token)),
                ServerEvent::AddHandler { id, .. } | ServerEvent::RemoveHandler { id, .. } => {
                    server.acknowledge(id, &mut out);
                }
                ServerEvent::Rejected { id, reason } => server.refuse(id, reason, &mut out),
                _ => {}
            }
            events.push(event);
            assert_eq!(server.calls(), under_way.len());
            assert_eq!(server.handled(), handled.len());
        }
        assert!(input.is_empty());
    }
    (events, None)
}

/// The bytes of a client. The input is a byte for the pieces, one for the limits, then the bytes.
pub fn persistent_server(data: &[u8]) {
    let &[seed, limit, ref bytes @ ..] = data else {
        return;
    };
    let mut limits = ServerLimits::default();
    limits.max_message = [300, 20_000, 300_000][usize::from(limit % 3)];
    limits.max_calls = 2 + usize::from(limit / 3 % 8);
    limits.max_call_bytes = 100_000;
    // The buffer of a payload is allocated before all of its bytes arrive.
    let run = |seed, in_place| {
        bounded(bytes.len() + 2048, 160, || {
            run(limits, bytes, seed, in_place)
        })
    };
    let outcome = run(255, false);
    assert_eq!(run(seed, true), outcome);
    assert_eq!(run(0, seed % 2 == 0), outcome);
}

/// A client's messages of each kind, which answer the server's two calls.
pub fn samples() -> Vec<Vec<u8>> {
    use p2pd_protocol::{PersistentClient, UnaryLimits};
    use std::time::{Duration, Instant};
    let mut server = PersistentServer::<u32, Vec<u8>>::new([7; 32], ServerLimits::default());
    let mut client = PersistentClient::<u32, Vec<u8>>::new([8; 32], UnaryLimits::default());
    let (mut given, mut out, now) = (BytesMut::new(), BytesMut::new(), Instant::now());
    let ids = [0, 1].map(|token| {
        let id = server.handle(b"caller", "echo", 0, token, &mut given);
        id.expect("it is small")
    });
    let mut input = &given[..];
    while let Ok(Some(_)) = client.poll(&mut input) {}
    let mut samples = Vec::new();
    let mut take = |out: &mut BytesMut| samples.push(out.split().to_vec());
    let _ = client.add_handler("echo", true, 0, &mut out);
    take(&mut out);
    let _ = client.remove_handler("echo", 0, &mut out);
    take(&mut out);
    let call = client.call(b"peer", "echo", 9, 1, now, &mut out);
    out.extend_from_slice(b"some data");
    take(&mut out);
    client.cancel(
        &call.expect("it is small"),
        now + Duration::from_secs(1),
        &mut out,
    );
    take(&mut out);
    client.reply(&ids[0], 9, &mut out);
    out.extend_from_slice(b"some data");
    take(&mut out);
    client.reply_error(&ids[1], "no", &mut out);
    take(&mut out);
    let _ = client.call(b"peer", "echo", 20_000, 1, now, &mut out);
    out.extend_from_slice(&[7; 20_000]);
    take(&mut out);
    samples
}
