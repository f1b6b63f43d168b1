//! Answers to every kind of request.

use super::{bounded, pieces};
use bytes::Bytes;
use p2pclient_rs::core::framing::encode_frame;
use p2pclient_rs::core::pb::p2pd::{self, dht_response, response};
use p2pclient_rs::core::{
    connmgr, control, dht, peerstore, pubsub, streams, unary, Answer, Error, Event, Exchange,
    Limits, Multiaddr, PeerId, PeerInfo, Request, Results, State,
};

/// How many kinds of request there are.
pub const KINDS: u8 = 26;

/// A request of each kind.
fn request(kind: u8) -> Request {
    let peer = PeerId::from_bytes(&[0, 2, 7, 7][..]);
    let addr = Multiaddr::from_bytes(&[4, 127, 0, 0, 1][..]);
    let (key, topic) = (Bytes::from_static(b"key"), "topic".to_owned());
    match kind % KINDS {
        0 => control::identify(),
        1 => control::connect(&peer, &[addr], None),
        2 => control::disconnect(&peer),
        3 => control::list_peers(),
        4 => streams::stream_open(&peer, vec![topic], None),
        5 => streams::stream_handler(&addr, vec![topic], false),
        6 => streams::remove_stream_handler(&addr, vec![topic]),
        7 => dht::find_peer(&peer, None),
        8 => dht::find_peers_connected_to_peer(&peer, None),
        9 => dht::find_providers(key, 5, None),
        10 => dht::get_closest_peers(key, None),
        11 => dht::get_public_key(&peer, None),
        12 => dht::get_value(key, None),
        13 => dht::search_value(key, None),
        14 => dht::put_value(key.clone(), key, None),
        15 => dht::provide(key, None),
        16 => connmgr::tag_peer(&peer, topic, 3),
        17 => connmgr::untag_peer(&peer, topic),
        18 => connmgr::trim(),
        19 => pubsub::get_topics(),
        20 => pubsub::list_peers(topic),
        21 => pubsub::publish(topic, key),
        22 => pubsub::subscribe(topic),
        23 => peerstore::get_protocols(&peer),
        24 => peerstore::get_peer_info(&peer),
        _ => unary::upgrade(),
    }
}

#[derive(Debug, Clone, PartialEq)]
struct Outcome {
    events: Vec<Event>,
    end: Result<State, Error>,
    rest: Bytes,
}

/// Gives the bytes to an exchange as a driver does.
fn run(request: &Request, limits: Limits, bytes: &[u8], seed: u8) -> Outcome {
    let mut exchange = Exchange::new(limits);
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
        // What nobody asked for is found before the next request, not taken for its answer.
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

/// What a daemon says: a byte for the kind of request, one for the pieces, one for the limits, then
/// the bytes.
pub fn exchange(data: &[u8]) {
    let &[kind, seed, limit, ref bytes @ ..] = data else {
        return;
    };
    let request = request(kind);
    let limits = Limits {
        max_frame: 128 + usize::from(limit) * 64,
        max_answer: usize::from(limit) * 64,
    };
    let run = |bytes: &[u8], seed| bounded(bytes.len(), 96, || run(&request, limits, bytes, seed));
    let outcome = run(bytes, 255);
    for seed in [0, seed] {
        assert_eq!(run(bytes, seed), outcome);
    }

    let items = outcome
        .events
        .iter()
        .filter(|event| matches!(event, Event::Item(_)));
    let ended = outcome
        .events
        .iter()
        .filter(|event| !matches!(event, Event::Item(_)));
    let (items, ended) = (items.count(), ended.count());
    assert!(ended <= 1, "an exchange ends once");
    assert!(items == 0 || request.results().is_some());
    assert!(items <= limits.max_answer / 32 + 1, "{items} results");
    if ended == 1 {
        if request.results() == Some(Results::One) && outcome.events.len() > 1 {
            assert_eq!(items, 1);
        }
        let mut again = encode(&outcome.events, request.results().is_some());
        // What the daemon says is written in one way here, which may take more bytes than its own.
        let limits = Limits {
            max_frame: limits.max_frame + 256,
            max_answer: 2 * limits.max_answer + 256,
        };
        again.extend_from_slice(&outcome.rest);
        if outcome.end.is_ok() {
            assert_eq!(self::run(&request, limits, &again, 255), outcome);
        }
    }
}

/// The bytes in which a daemon says this.
pub fn encode(events: &[Event], values: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if values && !matches!(events, [Event::Refused(_)]) {
        let begin = dht_message(dht_response::Type::Begin);
        out.extend(encode_frame(&p2pd::Response {
            dht: Some(begin),
            ..ok()
        }));
    }
    for event in events {
        let frame = match event {
            Event::Item(item) => encode_frame(&value(item.clone())),
            Event::Answer(Answer::Done) if values => {
                encode_frame(&dht_message(dht_response::Type::End))
            }
            Event::Answer(answer) => encode_frame(&answered(answer.clone())),
            Event::Refused(words) => encode_frame(&p2pd::Response {
                r#type: Some(response::Type::Error as i32),
                error: Some(p2pd::ErrorResponse {
                    msg: Some(words.clone().into()),
                }),
                ..Default::default()
            }),
        };
        out.extend_from_slice(&frame);
    }
    out
}

fn ok() -> p2pd::Response {
    p2pd::Response {
        r#type: Some(response::Type::Ok as i32),
        ..Default::default()
    }
}

fn dht_message(r#type: dht_response::Type) -> p2pd::DhtResponse {
    p2pd::DhtResponse {
        r#type: Some(r#type as i32),
        ..Default::default()
    }
}

fn value(item: Answer) -> p2pd::DhtResponse {
    let message = dht_message(dht_response::Type::Value);
    match item {
        Answer::PeerInfo(info) => p2pd::DhtResponse {
            peer: Some(peer_info(info)),
            ..message
        },
        Answer::PeerId(peer) => p2pd::DhtResponse {
            value: Some(peer.to_bytes()),
            ..message
        },
        Answer::Value(value) => p2pd::DhtResponse {
            value: Some(value),
            ..message
        },
        other => panic!("{other:?} is no result of a DHT query"),
    }
}

fn answered(answer: Answer) -> p2pd::Response {
    match answer {
        Answer::Done | Answer::Subscribed => ok(),
        Answer::Identity { peer_id, addrs } => p2pd::Response {
            identify: Some(p2pd::IdentifyResponse {
                id: Some(peer_id.to_bytes()),
                addrs: addrs.iter().map(Multiaddr::to_bytes).collect(),
            }),
            ..ok()
        },
        Answer::Peers(peers) => p2pd::Response {
            peers: peers.into_iter().map(peer_info).collect(),
            ..ok()
        },
        Answer::StreamOpened(info) => p2pd::Response {
            stream_info: Some(p2pd::StreamInfo {
                peer: Some(info.peer_id.to_bytes()),
                addr: Some(info.addr.to_bytes()),
                proto: Some(info.protocol),
            }),
            ..ok()
        },
        Answer::Topics(topics) => pubsub_response(topics, Vec::new()),
        Answer::PeerIds(peers) => pubsub_response(Vec::new(), peers),
        Answer::Protocols(protos) => p2pd::Response {
            peer_store: Some(p2pd::PeerstoreResponse { peer: None, protos }),
            ..ok()
        },
        Answer::PeerInfo(info) => p2pd::Response {
            peer_store: Some(p2pd::PeerstoreResponse {
                peer: Some(peer_info(info)),
                protos: Vec::new(),
            }),
            ..ok()
        },
        other => panic!("{other:?} answers no request"),
    }
}

fn pubsub_response(topics: Vec<String>, peers: Vec<PeerId>) -> p2pd::Response {
    let body = p2pd::PsResponse {
        topics,
        peer_i_ds: peers.iter().map(PeerId::to_bytes).collect(),
    };
    p2pd::Response {
        pubsub: Some(body),
        ..ok()
    }
}

fn peer_info(info: PeerInfo) -> p2pd::PeerInfo {
    p2pd::PeerInfo {
        id: Some(info.peer_id.to_bytes()),
        addrs: info.addrs.iter().map(Multiaddr::to_bytes).collect(),
    }
}
