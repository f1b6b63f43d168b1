//! Streams and unary calls between native daemons, and between a native one and hivemind's, named by
//! P2PD_PATH.
#![cfg(unix)]

mod support;

use bytes::Bytes;
use futures_util::future::join_all;
use p2pd_client::{Error, UnaryCall};
use p2pd_protocol::command::{streams::StreamOpen, Request as _};
use p2pd_protocol::pb::p2pd::persistent_connection_response::Message as Answer;
use p2pd_test_support::{
    echo_streams, echoed, endless, eventually, must, pattern, stranger, within, Limit,
};
use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};
use support::{dial, read_frame, Kind, RawClient, Two, PAIRINGS, WITH_NATIVE};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::join;

/// Size of a tail, in bytes: larger than all buffers between the clients.
const TAIL: usize = 6 << 20;

async fn echo(call: UnaryCall) -> Result<Bytes, Infallible> {
    Ok(call.payload)
}

fn message<T: std::fmt::Debug>(outcome: Result<T, Error>) -> String {
    outcome.expect_err("it must fail").to_string()
}

#[tokio::test]
async fn connected_daemons_list_each_other_until_they_disconnect() {
    for pairing in WITH_NATIVE {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        for (client, peer) in [(&two.caller, &two.far), (&two.server, &two.near)] {
            eventually(async || {
                let peers = client.list_peers().await?;
                must(
                    peers.iter().any(|info| info.peer_id == *peer.peer_id()),
                    "it is not listed",
                )
            })
            .await;
        }
        let peer = two.far.peer_id();
        // Does nothing the second time.
        two.caller.connect(peer, two.far.addrs()).await.unwrap();
        two.caller.disconnect(peer).await.unwrap();
        for client in [&two.caller, &two.server] {
            eventually(async || {
                let peers = client.list_peers().await?;
                must(peers.is_empty(), "it is still listed")
            })
            .await;
        }
        two.caller.disconnect(peer).await.unwrap();
    }
}

#[tokio::test]
async fn streams_echo_in_all_pairings() {
    for pairing in PAIRINGS {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        // hivemind's names have no leading slash.
        for protocol in ["/echo/1", "DHTProtocol.rpc_ping"] {
            let incoming = two.server.stream_handler(protocol, false).await.unwrap();
            let serving = tokio::spawn(echo_streams(incoming));
            let payload = pattern(3 << 20, 1);
            let received = echoed(&two.caller, two.far.peer_id(), protocol, &payload).await;
            assert!(received == payload, "{pairing:?}");
            let many = (0..50).map(|number| {
                let payload = pattern(10_000 + number, number);
                let (client, peer) = (&two.caller, two.far.peer_id());
                async move { echoed(client, peer, protocol, &payload).await == payload }
            });
            assert!(join_all(many).await.into_iter().all(|same| same));
            serving.abort();
        }
    }
}

#[tokio::test]
async fn unsupported_protocol_and_unknown_peer_are_refused() {
    for pairing in WITH_NATIVE {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        let open = two.caller.stream_open(two.far.peer_id(), ["/none/1"]);
        let words = message(open.await);
        assert!(words.contains("protocols not supported"), "{words}");
        let call = two.caller.call_unary(two.far.peer_id(), "none", "");
        let words = message(call.await);
        assert!(words.contains("protocols not supported"), "{words}");
        let (unknown, _) = stranger();
        let words = message(two.caller.stream_open(&unknown, ["/echo"]).await);
        assert!(words.contains("failed to dial"), "{words}");
        let own = two.near.peer_id();
        let words = message(two.caller.connect(own, two.far.addrs()).await);
        assert!(words.contains("dial to self attempted"), "{words}");
        let words = message(two.caller.connect(&unknown, two.far.addrs()).await);
        assert!(words.contains("all dials failed"), "{words}");
    }
}

#[tokio::test]
async fn end_of_file_leaves_the_answer_of_a_native_peer_intact() {
    let _limit = Limit::new();
    let two = Two::connected((Kind::Native, Kind::Native)).await;
    let mut incoming = two.server.stream_handler("/ends", false).await.unwrap();
    let opening = two.caller.stream_open(two.far.peer_id(), ["/ends"]);
    let mut near = opening.await.unwrap();
    let request = pattern(TAIL, 1);
    let (sent, received) = join!(
        async {
            near.write_all(&request).await.unwrap();
            near.shutdown().await.unwrap();
            let mut answer = Vec::new();
            within("the answer", near.read_to_end(&mut answer))
                .await
                .unwrap();
            answer
        },
        async {
            let mut far = within("a stream", incoming.next()).await.unwrap();
            let mut request = Vec::new();
            within("the request", far.read_to_end(&mut request))
                .await
                .unwrap();
            // Only now does the answer begin.
            tokio::time::sleep(Duration::from_millis(100)).await;
            far.write_all(&request).await.unwrap();
            request
        }
    );
    assert!(received == request && sent == request);
}

#[tokio::test]
async fn tails_arrive_in_all_pairings() {
    for pairing in WITH_NATIVE {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        let mut incoming = two.server.stream_handler("/tail", false).await.unwrap();
        let opening = two.caller.stream_open(two.far.peer_id(), ["/tail"]);
        let mut near = opening.await.unwrap();
        let tail = pattern(TAIL, 1);
        let (received, ()) = join!(
            async {
                near.write_all(b"go").await.unwrap();
                let mut received = Vec::new();
                within("the tail", near.read_to_end(&mut received))
                    .await
                    .unwrap();
                received
            },
            async {
                let mut far = within("a stream", incoming.next()).await.unwrap();
                far.read_exact(&mut [0; 2]).await.unwrap();
                far.write_all(&tail).await.unwrap();
                drop(far);
            }
        );
        assert!(received == tail, "{pairing:?}");
    }
}

#[tokio::test]
async fn writer_ends_when_its_peers_client_goes() {
    for pairing in WITH_NATIVE {
        for half_closes in [false, true] {
            let _limit = Limit::new();
            let two = Two::connected(pairing).await;
            let mut incoming = two.server.stream_handler("/gone", false).await.unwrap();
            let opening = two.caller.stream_open(two.far.peer_id(), ["/gone"]);
            let mut near = opening.await.unwrap();
            near.write_all(b"begin").await.unwrap();
            let mut far = within("a stream", incoming.next()).await.unwrap();
            if half_closes {
                far.shutdown().await.unwrap();
                // Go has closed both directions now.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let payload = vec![7; TAIL];
            let writing = async {
                // It may fail, but it must not wait forever.
                let _ = near.write_all(&payload).await;
            };
            join!(within("the writer", writing), async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                drop(far);
            });
        }
    }
}

#[tokio::test]
async fn bytes_sent_ahead_with_stream_open_reach_the_stream() {
    for far in [Kind::Native, Kind::Go] {
        let _limit = Limit::new();
        let two = Two::connected((Kind::Native, far)).await;
        let incoming = two.server.stream_handler("/ahead", false).await.unwrap();
        let serving = tokio::spawn(echo_streams(incoming));
        let open = StreamOpen {
            peer: two.far.peer_id().clone(),
            protocols: vec!["/ahead".to_owned()],
            timeout: None,
        };
        let control = two.near.control_maddr().clone();
        let echoed = tokio::task::spawn_blocking(move || {
            let mut socket = dial(&control);
            let frames = [&open.encode()[..], b"sent ahead"].concat();
            socket.write_all(&frames).unwrap();
            read_frame(&socket).unwrap();
            let mut received = [0; 10];
            socket.read_exact(&mut received).unwrap();
            received
        });
        assert_eq!(echoed.await.unwrap(), *b"sent ahead");
        serving.abort();
    }
}

#[tokio::test]
async fn calls_pass_payload_error_and_caller_in_all_pairings() {
    for pairing in PAIRINGS {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        for (server, caller, callee, from) in [
            (&two.server, &two.caller, &two.far, &two.near),
            (&two.caller, &two.server, &two.near, &two.far),
        ] {
            let name = async |call: UnaryCall| Ok::<_, Infallible>(call.peer.to_string());
            server.add_unary_handler("who", false, name).await.unwrap();
            let fail = async |_: UnaryCall| Err::<Bytes, _>("it is broken");
            server.add_unary_handler("fail", false, fail).await.unwrap();
            let reply = caller.call_unary(callee.peer_id(), "who", "").await;
            assert_eq!(reply.unwrap(), from.peer_id().to_string());
            match caller.call_unary(callee.peer_id(), "fail", "").await {
                Err(Error::HandlerFailed { message, .. }) => assert_eq!(message, "it is broken"),
                other => panic!("{pairing:?}: {other:?}"),
            }
        }
        let echoing = two.server.add_unary_handler("echo", false, echo);
        echoing.await.unwrap();
        for size in [0, 1, 16 << 10, 1 << 20, 4_100_000] {
            let payload = Bytes::from(pattern(size, size));
            let call = two
                .caller
                .call_unary(two.far.peer_id(), "echo", payload.clone());
            assert!(call.await.unwrap() == payload, "{pairing:?} {size}");
        }
        let large = Bytes::from(vec![0; 5 << 20]);
        message(
            two.caller
                .call_unary(two.far.peer_id(), "echo", large)
                .await,
        );
        let call = two.caller.call_unary(two.far.peer_id(), "echo", "after");
        assert_eq!(call.await.unwrap(), "after", "{pairing:?}");
    }
}

#[tokio::test]
async fn sixty_four_calls_of_64_kib_at_once_in_all_pairings() {
    for pairing in PAIRINGS {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        let echoing = two.server.add_unary_handler("echo", false, echo);
        echoing.await.unwrap();
        for round in 0..10 {
            let calls = (0..64).map(|number| {
                let payload = Bytes::from(pattern(64 << 10, round * 64 + number));
                let (client, peer) = (&two.caller, two.far.peer_id());
                async move {
                    let call = client.call_unary(peer, "echo", payload.clone());
                    call.await.unwrap() == payload
                }
            });
            let echoed = within("the replies", join_all(calls)).await;
            assert!(echoed.into_iter().all(|same| same), "{pairing:?}");
        }
    }
}

#[tokio::test]
async fn thousand_calls_at_once_are_answered_in_all_pairings() {
    for pairing in WITH_NATIVE {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        let echoing = two.server.add_unary_handler("echo", false, echo);
        echoing.await.unwrap();
        let calls = (0..1000).map(|number: usize| {
            let payload = Bytes::from(number.to_string());
            let call = two
                .caller
                .call_unary(two.far.peer_id(), "echo", payload.clone());
            async move { call.await.map(|reply| reply == payload) }
        });
        for reply in within("the replies", join_all(calls)).await {
            assert!(reply.unwrap(), "{pairing:?}");
        }
    }
}

#[tokio::test]
async fn cancel_reaches_the_handler_in_all_pairings() {
    for pairing in PAIRINGS {
        let _limit = Limit::new();
        let two = Two::connected(pairing).await;
        let (handler, mut events) = endless();
        let adding = two.server.add_unary_handler("endless", false, handler);
        adding.await.unwrap();
        let caller = two.caller.clone();
        let peer = two.far.peer_id().clone();
        let call = tokio::spawn(async move { caller.call_unary(&peer, "endless", "").await });
        assert_eq!(within("the call", events.recv()).await, Some("begun"));
        // Cancels of younger calls are delayed by the client.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let begun = Instant::now();
        call.abort();
        assert_eq!(within("the cancel", events.recv()).await, Some("given up"));
        assert!(begun.elapsed() < Duration::from_secs(1), "{pairing:?}");
    }
}

#[tokio::test]
async fn call_held_by_a_killed_client_is_answered_and_others_take_over() {
    for near in [Kind::Native, Kind::Go] {
        let _limit = Limit::new();
        let two = Two::connected((near, Kind::Native)).await;
        let control = two.far.control_maddr().clone();
        let doomed = tokio::task::spawn_blocking(move || {
            let client = RawClient::connect(&control);
            client.add_handler("echo", true);
            client
        });
        let doomed = doomed.await.unwrap();
        let caller = two.caller.clone();
        let peer = two.far.peer_id().clone();
        let call = tokio::spawn(async move { caller.call_unary(&peer, "echo", "").await });
        let doomed = tokio::task::spawn_blocking(move || {
            let (_, message) = doomed.receive();
            assert!(matches!(message, Some(Answer::RequestHandling(_))));
            doomed
        });
        let doomed = doomed.await.unwrap();
        // The same name, served by a client that stays.
        let adding = two.server.add_unary_handler("echo", true, echo);
        adding.await.unwrap();
        drop(doomed);
        message(within("an answer", call).await.unwrap());
        for _ in 0..4 {
            let call = two
                .caller
                .call_unary(two.far.peer_id(), "echo", "still here");
            assert_eq!(call.await.unwrap(), "still here");
        }
    }
}

#[tokio::test]
async fn handler_is_removed_with_its_client() {
    let _limit = Limit::new();
    let two = Two::connected((Kind::Native, Kind::Native)).await;
    let adding = two.server.add_unary_handler("brief", false, echo);
    adding.await.unwrap();
    let call = two.caller.call_unary(two.far.peer_id(), "brief", "x");
    assert_eq!(call.await.unwrap(), "x");
    let other = two.far.client().await.unwrap();
    let words = message(other.add_unary_handler("brief", false, echo).await);
    assert!(words.contains("already set"), "{words}");
    two.server.close().await;
    eventually(async || {
        let adding = other.add_unary_handler("brief", false, echo);
        Ok(adding.await?)
    })
    .await;
    let call = two.caller.call_unary(two.far.peer_id(), "brief", "y");
    assert_eq!(call.await.unwrap(), "y");
}

#[tokio::test]
async fn client_that_does_not_read_blocks_neither_callers_nor_other_clients() {
    let _limit = Limit::new();
    let two = Two::connected((Kind::Native, Kind::Native)).await;
    let control = two.far.control_maddr().clone();
    let deaf = tokio::task::spawn_blocking(move || {
        let client = RawClient::connect(&control);
        client.add_handler("deaf", true);
        client
    });
    let deaf = deaf.await.unwrap();
    let echoing = two.server.add_unary_handler("echo", false, echo);
    echoing.await.unwrap();
    let payload = Bytes::from(vec![7; 1 << 20]);
    let calls: Vec<_> = (0..64)
        .map(|_| {
            let (caller, peer) = (two.caller.clone(), two.far.peer_id().clone());
            let payload = payload.clone();
            tokio::spawn(async move { caller.call_unary(&peer, "deaf", payload).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let call = two.caller.call_unary(two.far.peer_id(), "echo", "hello");
    assert_eq!(within("the echo", call).await.unwrap(), "hello");
    drop(deaf);
    for call in calls {
        message(within("an answer", call).await.unwrap());
    }
}
