//! Arbitrary answers to every kind of request.

use super::{bounded, pieces};
use bytes::Bytes;
use p2pd_protocol::command::{
    connmgr, control, dht, peerstore, pubsub, streams, unary, Answered, Command,
};
use p2pd_protocol::{
    ClientExchange, EncodedRequest, Error, Event, Limits, Multiaddr, PeerId, ServerExchange, State,
};

/// Number of kinds of request.
pub const KINDS: u8 = 26;

/// Returns a request of a kind.
pub fn command(kind: u8) -> Command {
    let peer = PeerId::from_bytes(&[0, 2, 7, 7][..]);
    let addr = Multiaddr::from_bytes(&[4, 127, 0, 0, 1][..]);
    let (key, topic) = (Bytes::from_static(b"key"), "topic".to_owned());
    let (cid, value, tag) = (key.clone(), key.clone(), topic.clone());
    let (protocols, timeout) = (vec![topic.clone()], None);
    match kind % KINDS {
        0 => control::Identify.into(),
        1 => {
            let addrs = vec![addr];
            control::Connect {
                peer,
                addrs,
                timeout,
            }
            .into()
        }
        2 => control::Disconnect { peer }.into(),
        3 => control::ListPeers.into(),
        4 => streams::StreamOpen {
            peer,
            protocols,
            timeout,
        }
        .into(),
        5 => {
            let balanced = false;
            streams::StreamHandler {
                addr,
                protocols,
                balanced,
            }
            .into()
        }
        6 => streams::RemoveStreamHandler { addr, protocols }.into(),
        7 => dht::FindPeer { peer, timeout }.into(),
        8 => dht::FindPeersConnectedToPeer { peer, timeout }.into(),
        9 => dht::FindProviders {
            cid,
            count: 5,
            timeout,
        }
        .into(),
        10 => dht::GetClosestPeers { key, timeout }.into(),
        11 => dht::GetPublicKey { peer, timeout }.into(),
        12 => dht::GetValue { key, timeout }.into(),
        13 => dht::SearchValue { key, timeout }.into(),
        14 => dht::PutValue {
            key,
            value,
            timeout,
        }
        .into(),
        15 => dht::Provide { cid, timeout }.into(),
        16 => connmgr::TagPeer {
            peer,
            tag,
            weight: 3,
        }
        .into(),
        17 => connmgr::UntagPeer { peer, tag }.into(),
        18 => connmgr::Trim.into(),
        19 => pubsub::GetTopics.into(),
        20 => pubsub::ListTopicPeers { topic }.into(),
        21 => pubsub::Publish { topic, data: key }.into(),
        22 => pubsub::Subscribe { topic }.into(),
        23 => peerstore::GetProtocols { peer }.into(),
        24 => peerstore::GetPeerInfo { peer }.into(),
        _ => unary::Upgrade.into(),
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    events: Vec<Event>,
    end: Result<State, Error>,
    rest: Bytes,
}

/// Feeds an exchange, as a driver does.
fn run(request: &EncodedRequest, limits: Limits, bytes: &[u8], seed: u8) -> Outcome {
    let mut exchange = ClientExchange::new(limits);
    exchange.send(request).unwrap();
    let mut events = Vec::new();
    let mut failed = None;
    for piece in pieces(bytes, seed) {
        exchange.receive(piece);
        while exchange.state() == State::Busy {
            match exchange.poll() {
                Ok(Some(event)) => events.push(event),
                Ok(None) => break,
                Err(error) => failed = Some(error),
            }
        }
    }
    if exchange.state() == State::Ready {
        // Unexpected bytes fail the connection before the next request.
        let reusable = exchange.is_reusable();
        assert_eq!(exchange.send(request).is_ok(), reusable);
        if reusable {
            assert_eq!(exchange.poll(), Ok(None));
            return Outcome {
                events,
                end: Ok(State::Ready),
                rest: Bytes::new(),
            };
        }
        assert!(matches!(exchange.poll(), Err(Error::Unexpected(_))));
        assert_eq!(exchange.state(), State::Failed);
    }
    let end = match (failed, exchange.state()) {
        (Some(error), state) => {
            assert_eq!(state, State::Failed);
            Err(error)
        }
        (None, State::Busy) => Err(exchange.end_of_file()),
        (None, state) => Ok(state),
    };
    Outcome {
        events,
        end,
        rest: exchange.into_remainder(),
    }
}

/// The bytes of a daemon. The input is a byte for the kind of request, one for the pieces, one for the limits,
/// then the bytes.
pub fn exchange(data: &[u8]) {
    let &[kind, seed, limit, ref bytes @ ..] = data else {
        return;
    };
    let command = command(kind);
    let request = command.encoded();
    let limits = Limits::default()
        .with_max_frame(128 + usize::from(limit) * 64)
        .with_max_answer(usize::from(limit) * 64);
    let run = |bytes: &[u8], seed| bounded(bytes.len(), 96, || run(&request, limits, bytes, seed));
    let outcome = run(bytes, 255);
    for seed in [0, seed] {
        assert_eq!(run(bytes, seed), outcome);
    }

    let items = outcome
        .events
        .iter()
        .filter(|event| matches!(event, Event::Value(_)));
    let ended = outcome
        .events
        .iter()
        .filter(|event| !matches!(event, Event::Value(_)));
    let (items, ended) = (items.count(), ended.count());
    assert!(ended <= 1, "an exchange ends once");
    let one_value = request.answered() == Answered::WithOneValue;
    let is_query = one_value || request.answered() == Answered::WithValues;
    assert!(items == 0 || is_query);
    assert!(items <= limits.max_answer / 32 + 1, "{items} results");
    if ended == 1 {
        if one_value && outcome.events.len() > 1 {
            assert_eq!(items, 1);
        }
        let mut again = encode(&command, &outcome.events);
        // Encoded here, the same answer may be longer than the daemon's.
        let limits = Limits::default()
            .with_max_frame(limits.max_frame + 256)
            .with_max_answer(2 * limits.max_answer + 256);
        again.extend_from_slice(&outcome.rest);
        if outcome.end.is_ok() {
            assert_eq!(self::run(&request, limits, &again, 255), outcome);
        }
    }
}

/// Encodes these events with a server.
fn encode(command: &Command, events: &[Event]) -> Vec<u8> {
    let mut server = ServerExchange::new(Limits::default());
    server.receive(&command.encode());
    assert_eq!(server.poll(), Ok(Some(command.clone())));
    let mut out = Vec::new();
    for event in events {
        let frames = match event {
            Event::Value(reply) | Event::Reply(reply) => server.send(reply),
            Event::Refused(words) => server.refuse(words),
            // The only value of a query is its whole answer.
            Event::End if server.state() == State::Ready => continue,
            Event::End => server.end(),
            other => panic!("{other:?}"),
        };
        out.extend_from_slice(&frames.expect("it answers the request"));
    }
    assert_ne!(server.state(), State::Busy);
    out
}

/// Encodes the answer to a request of this kind with a server.
pub fn answer(kind: u8, events: &[Event]) -> Vec<u8> {
    encode(&command(kind), events)
}
