//! Every call of the tokio client against hivemind's real p2pd, named by P2PD_PATH. (Unary calls
//! are in `unary.rs`, requests of jsp2pd only in `faults.rs`.)
#![cfg(unix)]

use p2pd_client::{Client, Error, IncomingStreams, Stream};
use p2pd_manager::ConnectionManager;
use p2pd_protocol::{Multiaddr, PeerId};
use p2pd_test_support::{
    bare_daemon, daemon, echo_streams, echoed, eventually, hears, must, next_message, pair,
    pattern, stranger, within, Limit, Pair,
};
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::{join, try_join};

/// Returns the request of a refusal and the daemon's message.
fn refused<T: std::fmt::Debug>(outcome: Result<T, Error>) -> (&'static str, String) {
    match outcome {
        Err(Error::Refused { message, context }) => (context.request, message),
        other => panic!("{other:?}"),
    }
}

async fn greet(mut incoming: IncomingStreams, greeting: &'static str) {
    while let Some(mut stream) = incoming.next().await {
        stream.write_all(greeting.as_bytes()).await.unwrap();
    }
}

async fn read_all(mut stream: Stream) -> io::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    Ok(text)
}

// --- control ---

#[tokio::test]
async fn identify_returns_the_daemons_peer_id_and_addresses() {
    let pair = pair().await;
    for (client, daemon) in [
        (&pair.alice, pair.alice_daemon),
        (&pair.bob, pair.bob_daemon),
    ] {
        let identity = client.identify().await.unwrap();
        assert_eq!(&identity.peer_id, daemon.peer_id());
        assert_eq!(identity.addrs, daemon.addrs());
        let line = format!("Peer ID: {}", identity.peer_id);
        assert!(daemon.output().contains(&line));
    }
}

#[tokio::test]
async fn connected_peers_list_each_other_until_they_disconnect() {
    let _limit = Limit::new();
    // Without a DHT, which would connect them again.
    let (one, other) = try_join!(bare_daemon().spawn(), bare_daemon().spawn()).unwrap();
    let (near, far) = try_join!(one.client(), other.client()).unwrap();
    assert_eq!(near.list_peers().await.unwrap(), []);
    near.connect(other.peer_id(), other.addrs()).await.unwrap();
    let peers = near.list_peers().await.unwrap();
    assert_eq!(&peers[0].peer_id, other.peer_id());
    assert!(other.addrs().contains(&peers[0].addrs[0]));
    eventually(async || {
        let peers = far.list_peers().await?;
        must(
            peers.iter().any(|info| &info.peer_id == one.peer_id()),
            "not yet",
        )
    })
    .await;
    // A connected peer needs no address.
    near.connect(other.peer_id(), &[]).await.unwrap();

    far.disconnect(one.peer_id()).await.unwrap();
    eventually(async || must(near.list_peers().await?.is_empty(), "connected still")).await;
    far.disconnect(one.peer_id()).await.unwrap();
}

#[tokio::test]
async fn failed_connect_is_refused_with_the_daemons_message() {
    let pair = pair().await;
    let (unknown, _) = stranger();
    let outcome = pair.alice.connect(&unknown, pair.bob_daemon.addrs()).await;
    let text = outcome.as_ref().unwrap_err().to_string();
    assert!(text.ends_with(&format!("(request CONNECT, peer {unknown})")));
    let (request, message) = refused(outcome);
    assert_eq!(request, "CONNECT");
    assert!(message.contains("peer id mismatch"), "{message}");

    let nowhere: Multiaddr = "/ip4/127.0.0.1/tcp/1".parse().unwrap();
    let (_, message) = refused(pair.alice.connect(&unknown, &[nowhere]).await);
    assert!(message.contains("dial"), "{message}");
}

#[tokio::test]
async fn call_times_out_and_the_next_one_works() {
    // Accepts connections and sends nothing.
    let black_hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = black_hole.local_addr().unwrap().port();
    let addr: Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}").parse().unwrap();
    let pair = pair().await;
    let (unknown, _) = stranger();
    let limit = Duration::from_millis(200);
    let hasty = pair.alice.with_timeout(limit);
    let outcome = hasty.connect(&unknown, &[addr]).await;
    assert!(matches!(outcome, Err(Error::Timeout { after: Some(after), .. }) if after == limit));
    hasty.identify().await.unwrap();
}

#[tokio::test]
async fn thousand_concurrent_requests_are_all_answered() {
    let pair = pair().await;
    let calls: Vec<_> = (0..1000)
        .map(|_| {
            let client = pair.alice.clone();
            tokio::spawn(async move { client.identify().await })
        })
        .collect();
    for call in calls {
        let identity = call.await.unwrap().unwrap();
        assert_eq!(&identity.peer_id, pair.alice_daemon.peer_id());
    }
}

#[tokio::test]
async fn stopped_daemon_is_unreachable() {
    let _limit = Limit::new();
    let daemon = daemon().spawn().await.unwrap();
    let client = daemon.client().await.unwrap();
    daemon.shutdown().await;
    let error = client.identify().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn control_connections_work_over_tcp() {
    let _limit = Limit::new();
    let tcp = || daemon().control_maddr("/ip4/127.0.0.1/tcp/0".parse().unwrap());
    let (one, other) = try_join!(tcp().spawn(), tcp().spawn()).unwrap();
    let near = Client::new(one.control_maddr().clone()).unwrap();
    let far = Client::new(other.control_maddr().clone()).unwrap();
    near.connect(other.peer_id(), other.addrs()).await.unwrap();
    let incoming = far.stream_handler("/echo", false).await.unwrap();
    let listen = far.listen_maddr().unwrap().to_string();
    assert!(listen.starts_with("/ip4/127.0.0.1/tcp/") && !listen.ends_with("/0"));
    let serving = tokio::spawn(echo_streams(incoming));
    let payload = pattern(1 << 20, 3);
    let received = echoed(&near, other.peer_id(), "/echo", &payload).await;
    assert!(received == payload);
    serving.abort();
    let mut news = near.pubsub_subscribe("news").await.unwrap();
    near.pubsub_publish("news", "hello").await.unwrap();
    assert_eq!(next_message(&mut news).await.data, "hello");
}

// --- streams ---

#[tokio::test]
async fn large_payloads_arrive_intact_in_both_directions() {
    let pair = pair().await;
    let payload = pattern(8 << 20, 1);
    for (server, caller, peer) in [
        (&pair.bob, &pair.alice, pair.bob_daemon.peer_id()),
        (&pair.alice, &pair.bob, pair.alice_daemon.peer_id()),
    ] {
        let incoming = server.stream_handler("/large", false).await.unwrap();
        let serving = tokio::spawn(echo_streams(incoming));
        assert!(echoed(caller, peer, "/large", &payload).await == payload);
        serving.abort();
    }
}

#[tokio::test]
async fn concurrent_streams_are_not_mixed_up() {
    let pair = pair().await;
    let incoming = pair.bob.stream_handler("/many", false).await.unwrap();
    let serving = tokio::spawn(echo_streams(incoming));
    let calls: Vec<_> = (0..100)
        .map(|number| {
            let client = pair.alice.clone();
            tokio::spawn(async move {
                let payload = pattern(10_000 + number, number * 8);
                let peer = pair.bob_daemon.peer_id();
                assert!(echoed(&client, peer, "/many", &payload).await == payload);
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    serving.abort();
}

#[tokio::test]
async fn both_ends_know_peer_and_protocol() {
    let pair = pair().await;
    let mut incoming = pair.bob.stream_handler("/told/2", false).await.unwrap();
    let opening = pair
        .alice
        .stream_open(pair.bob_daemon.peer_id(), ["/told/3", "/told/2"]);
    let mut near = opening.await.unwrap();
    // The daemon negotiates the protocol along with the first data.
    near.write_all(b"hello").await.unwrap();
    let far = within("a stream", incoming.next()).await.unwrap();
    assert_eq!(&near.info().peer_id, pair.bob_daemon.peer_id());
    assert_eq!(&far.info().peer_id, pair.alice_daemon.peer_id());
    assert_eq!(near.info().protocol, "/told/2");
    assert_eq!(far.info().protocol, "/told/2");
    assert!(pair.bob_daemon.addrs().contains(&near.info().addr));
}

#[tokio::test]
async fn data_written_before_a_shutdown_or_drop_arrives_before_eof() {
    let pair = pair().await;
    let mut incoming = pair.bob.stream_handler("/ends", false).await.unwrap();
    let text = "to the last byte ".repeat(10_000);
    for shut_down in [true, false] {
        let peer = pair.bob_daemon.peer_id();
        let mut stream = pair.alice.stream_open(peer, ["/ends"]).await.unwrap();
        let (received, ()) = join!(
            async { read_all(incoming.next().await.unwrap()).await },
            async {
                stream.write_all(text.as_bytes()).await.unwrap();
                if shut_down {
                    stream.shutdown().await.unwrap();
                }
                drop(stream);
            }
        );
        assert!(received.unwrap() == text);
    }
}

#[tokio::test]
async fn protocol_unknown_to_the_peer_is_refused() {
    let pair = pair().await;
    let peer = pair.bob_daemon.peer_id();
    let outcome = pair
        .alice
        .stream_open(peer, ["/unknown/1", "/unknown/2"])
        .await;
    let text = outcome.as_ref().unwrap_err().to_string();
    let about = format!("(request STREAM_OPEN, peer {peer}, protocol /unknown/1, /unknown/2)");
    assert!(text.ends_with(&about), "{text}");
    let (_, message) = refused(outcome);
    assert!(message.contains("protocols not supported"), "{message}");

    let (unknown, _) = stranger();
    let (request, _) = refused(pair.alice.stream_open(&unknown, ["/echo"]).await);
    assert_eq!(request, "STREAM_OPEN");
}

#[tokio::test]
async fn balanced_handlers_of_two_clients_are_served_round_robin() {
    let pair = pair().await;
    let other = pair.bob_daemon.client().await.unwrap();
    let one = pair.bob.stream_handler("/balanced", true).await.unwrap();
    let two = other.stream_handler("/balanced", true).await.unwrap();
    let serving = [
        tokio::spawn(greet(one, "one")),
        tokio::spawn(greet(two, "two")),
    ];
    let mut greetings = Vec::new();
    for _ in 0..6 {
        let peer = pair.bob_daemon.peer_id();
        let stream = pair.alice.stream_open(peer, ["/balanced"]).await.unwrap();
        greetings.push(read_all(stream).await.unwrap());
    }
    let ones = greetings.iter().filter(|greeting| *greeting == "one");
    assert_eq!((ones.count(), greetings.len()), (3, 6), "{greetings:?}");
    for task in serving {
        task.abort();
    }
}

#[tokio::test]
async fn protocol_of_another_client_is_refused() {
    let pair = pair().await;
    let other = pair.bob_daemon.client().await.unwrap();
    let _incoming = pair.bob.stream_handler("/taken", false).await.unwrap();
    let (request, message) = refused(other.stream_handler("/taken", false).await);
    assert_eq!(request, "STREAM_HANDLER");
    assert!(message.contains("already set"), "{message}");
}

#[tokio::test]
async fn removed_handler_is_not_found_and_its_protocol_is_free() {
    let pair = pair().await;
    let peer = pair.bob_daemon.peer_id();
    for by_drop in [false, true, false] {
        let incoming = pair.bob.stream_handler("/passing", false).await.unwrap();
        let stream = pair.alice.stream_open(peer, ["/passing"]).await.unwrap();
        let serving = tokio::spawn(greet(incoming, "hello"));
        assert_eq!(read_all(stream).await.unwrap(), "hello");
        serving.abort();
        let _ = serving.await; // drops the handler
        let incoming = pair.bob.stream_handler("/passing", false).await.unwrap();
        if by_drop {
            drop(incoming);
        } else {
            incoming.close().await.unwrap();
        }
        // Until alice's daemon learns of the removal, it opens a stream without asking, which then
        // ends. The Go daemon may process two updates of bob's protocols in the wrong order, so bob
        // sends more of them.
        eventually(async || {
            let other = pair.bob.stream_handler("/other", false).await.unwrap();
            other.close().await.unwrap();
            let opened = pair.alice.stream_open(peer, ["/passing"]).await;
            must(matches!(opened, Err(Error::Refused { .. })), "it is opened")
        })
        .await;
    }
}

// --- the DHT ---

#[tokio::test]
async fn public_key_record_put_by_one_peer_is_found_by_another() {
    let Pair { alice, bob, .. } = &pair().await;
    let (owner, key) = stranger();
    let name = [b"/pk/", owner.as_bytes()].concat();
    let (request, message) = refused(bob.dht_get_value(name.clone()).await);
    assert_eq!(
        (request, &*message),
        ("DHT GET_VALUE", "routing: not found")
    );
    let missing = bob.dht_search_value(name.clone()).collect_all().await;
    assert_eq!(missing.unwrap(), [""; 0]);

    alice
        .dht_put_value(name.clone(), key.clone())
        .await
        .unwrap();
    assert_eq!(bob.dht_get_value(name.clone()).await.unwrap(), key);
    assert_eq!(alice.dht_get_value(name.clone()).await.unwrap(), key);
    let found = bob
        .dht_search_value(name.clone())
        .collect_all()
        .await
        .unwrap();
    assert!(!found.is_empty() && found.iter().all(|value| *value == key));
    let mut first = bob.dht_search_value(name);
    assert_eq!(first.next().await.unwrap().unwrap(), key);
}

#[tokio::test]
async fn only_valid_records_can_be_put() {
    let Pair { alice, .. } = &pair().await;
    let (request, message) = refused(alice.dht_put_value("/other/key", "value").await);
    assert_eq!(request, "DHT PUT_VALUE");
    assert!(message.contains("invalid record keytype"), "{message}");
    let (owner, _) = stranger();
    let (_, another_key) = stranger();
    let name = [b"/pk/", owner.as_bytes()].concat();
    refused(alice.dht_put_value(name, another_key).await);
}

#[tokio::test]
async fn provider_is_found() {
    let pair = pair().await;
    let (unique, _) = stranger();
    let cid = [&[1, 0x55, 0x12, 0x20][..], &unique.as_bytes()[6..]].concat();
    let find = |limit| {
        pair.bob
            .dht_find_providers(cid.clone(), limit)
            .collect_all()
    };
    assert_eq!(find(5).await.unwrap(), []);
    pair.alice.dht_provide(cid.clone()).await.unwrap();
    let providers = eventually(async || {
        let providers = find(5).await?;
        must(!providers.is_empty(), "none")?;
        Ok(providers)
    })
    .await;
    assert_eq!(providers.len(), 1);
    assert_eq!(&providers[0].peer_id, pair.alice_daemon.peer_id());
    let awaited = pair.bob.dht_find_providers(cid.clone(), 5).await.unwrap();
    assert_eq!(awaited, providers);

    let outcome = pair.alice.dht_provide("no cid").await;
    assert_eq!(refused(outcome).0, "DHT PROVIDE");
    let outcome = pair
        .alice
        .dht_find_providers("no cid", 1)
        .collect_all()
        .await;
    assert_eq!(refused(outcome).0, "DHT FIND_PROVIDERS");
}

#[tokio::test]
async fn find_peer_and_get_closest_peers_return_peers() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let info = pair.alice.dht_find_peer(bob).await.unwrap();
    assert_eq!(&info.peer_id, bob);
    assert_eq!(info.addrs, pair.bob_daemon.addrs());
    let (unknown, _) = stranger();
    assert_eq!(
        refused(pair.alice.dht_find_peer(&unknown).await).0,
        "DHT FIND_PEER"
    );
    let mut closest = pair.alice.dht_get_closest_peers("some key");
    assert_eq!(&closest.next().await.unwrap().unwrap(), bob);
    assert!(closest.next().await.is_none());
}

#[tokio::test]
async fn get_public_key_returns_the_key_of_the_peer() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let key = pair.alice.dht_get_public_key(bob).await.unwrap();
    assert_eq!(&key.peer_id(), bob);
    // A peer id that is a hash does not contain its key.
    let hashed = PeerId::from_bytes([&[0x12, 0x20][..], &pattern(32, 9)].concat());
    assert_eq!(
        refused(pair.alice.dht_get_public_key(&hashed).await).0,
        "DHT GET_PUBLIC_KEY"
    );
}

#[tokio::test]
async fn find_peers_connected_to_peer_is_not_supported_by_go() {
    let pair = pair().await;
    let bob = pair.bob_daemon.peer_id();
    let mut results = pair.alice.dht_find_peers_connected_to_peer(bob);
    let error = results.next().await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the daemon does not support this: not supported (request DHT \
             FIND_PEERS_CONNECTED_TO_PEER, peer {bob})"
        )
    );
    assert!(matches!(error, Error::NotSupported { .. }));
    assert!(results.next().await.is_none());
}

#[tokio::test]
async fn requests_to_disabled_services_are_not_supported() {
    async fn assert_not_supported<T>(call: impl Future<Output = Result<T, Error>>, request: &str) {
        let error = call.await.err().expect("it is supported");
        assert!(matches!(error, Error::NotSupported { .. }), "{error:?}");
        assert_eq!(error.context().unwrap().request, request);
    }
    let _limit = Limit::new();
    let bare = bare_daemon().spawn().await.unwrap();
    let client = bare.client().await.unwrap();
    let (peer, _) = stranger();
    assert_not_supported(client.dht_find_peer(&peer), "DHT FIND_PEER").await;
    assert_not_supported(client.dht_get_public_key(&peer), "DHT GET_PUBLIC_KEY").await;
    assert_not_supported(client.dht_get_value("key"), "DHT GET_VALUE").await;
    assert_not_supported(client.dht_put_value("key", "value"), "DHT PUT_VALUE").await;
    assert_not_supported(client.dht_provide("cid"), "DHT PROVIDE").await;
    let call = client.dht_find_providers("cid", 1).collect_all();
    assert_not_supported(call, "DHT FIND_PROVIDERS").await;
    let call = client.dht_get_closest_peers("key").collect_all();
    assert_not_supported(call, "DHT GET_CLOSEST_PEERS").await;
    let call = client.dht_search_value("key").collect_all();
    assert_not_supported(call, "DHT SEARCH_VALUE").await;
    assert_not_supported(client.pubsub_get_topics(), "PUBSUB GET_TOPICS").await;
    assert_not_supported(client.pubsub_list_peers("news"), "PUBSUB LIST_PEERS").await;
    assert_not_supported(client.pubsub_publish("news", "data"), "PUBSUB PUBLISH").await;
    assert_not_supported(client.pubsub_subscribe("news"), "PUBSUB SUBSCRIBE").await;
}

// --- the connection manager ---

#[tokio::test]
async fn peers_can_be_tagged_and_untagged() {
    let pair = pair().await;
    let (unknown, _) = stranger();
    for peer in [pair.bob_daemon.peer_id(), &unknown] {
        pair.alice
            .connmgr_tag_peer(peer, "friend", 7)
            .await
            .unwrap();
        pair.alice.connmgr_untag_peer(peer, "friend").await.unwrap();
        pair.alice.connmgr_untag_peer(peer, "friend").await.unwrap();
    }
    // Trims nothing below the low-water mark.
    pair.alice.connmgr_trim().await.unwrap();
    let peers = pair.alice.list_peers().await.unwrap();
    assert!(peers
        .iter()
        .any(|info| &info.peer_id == pair.bob_daemon.peer_id()));
}

#[tokio::test]
async fn trim_keeps_the_peer_with_the_highest_weight() {
    let _limit = Limit::new();
    let manager = ConnectionManager::Limits {
        low: 1,
        high: 50,
        grace: Duration::ZERO,
    };
    let (hub, one, two, three) = try_join!(
        bare_daemon().connection_manager(manager).spawn(),
        bare_daemon().spawn(),
        bare_daemon().spawn(),
        bare_daemon().spawn()
    )
    .unwrap();
    let client = hub.client().await.unwrap();
    for spoke in [&one, &two, &three] {
        client
            .connect(spoke.peer_id(), spoke.addrs())
            .await
            .unwrap();
    }
    for (peer, weight) in [(&one, 10), (&two, 100), (&three, 20)] {
        let tagged = client.connmgr_tag_peer(peer.peer_id(), "friend", weight);
        tagged.await.unwrap();
    }
    client
        .connmgr_untag_peer(two.peer_id(), "friend")
        .await
        .unwrap();
    assert_eq!(client.list_peers().await.unwrap().len(), 3);
    client.connmgr_trim().await.unwrap();
    eventually(async || {
        let peers = client.list_peers().await?;
        let kept: Vec<_> = peers.iter().map(|info| &info.peer_id).collect();
        must(kept == [three.peer_id()], "others are there")
    })
    .await;
}

// --- pubsub ---

#[tokio::test]
async fn messages_reach_the_subscribers_of_both_daemons() {
    let pair = pair().await;
    let topic = "of both";
    let mut near = pair.alice.pubsub_subscribe(topic).await.unwrap();
    let mut far = pair.bob.pubsub_subscribe(topic).await.unwrap();
    hears(&mut far, &pair.alice, topic).await;
    hears(&mut near, &pair.bob, topic).await;
    let peers = pair.alice.pubsub_list_peers(topic).await.unwrap();
    assert_eq!(peers, [pair.bob_daemon.peer_id().clone()]);
    let topics = pair.alice.pubsub_get_topics().await.unwrap();
    assert!(topics.iter().any(|name| name == topic));

    let large = pattern(900_000, 1);
    for data in [b"hello".to_vec(), Vec::new(), large] {
        pair.alice
            .pubsub_publish(topic, data.clone())
            .await
            .unwrap();
        for subscription in [&mut near, &mut far] {
            let message = next_message(subscription).await;
            assert!(message.data == data);
            assert_eq!(message.from.as_ref(), Some(pair.alice_daemon.peer_id()));
            assert_eq!(message.topic_ids, [topic]);
        }
    }
    pair.bob.pubsub_publish(topic, "back").await.unwrap();
    let message = next_message(&mut near).await;
    assert_eq!(message.data, "back");
    assert_eq!(message.from.as_ref(), Some(pair.bob_daemon.peer_id()));
}

#[tokio::test]
async fn closing_or_dropping_a_subscription_unsubscribes() {
    let pair = pair().await;
    let topic = "for a while";
    let is_there = async || {
        let topics = pair.alice.pubsub_get_topics().await;
        topics.unwrap().iter().any(|name| name == topic)
    };
    let news = pair.alice.pubsub_subscribe(topic).await.unwrap();
    assert!(is_there().await);
    news.close().await;
    assert!(!is_there().await);

    let news = pair.alice.pubsub_subscribe(topic).await.unwrap();
    assert!(is_there().await);
    drop(news);
    eventually(async || must(!is_there().await, "it is there still")).await;
}

#[tokio::test]
async fn subscription_ends_with_its_daemon() {
    let _limit = Limit::new();
    let daemon = daemon().spawn().await.unwrap();
    let client = daemon.client().await.unwrap();
    let mut news = client.pubsub_subscribe("news").await.unwrap();
    let (message, _) = join!(within("the end", news.next()), daemon.shutdown());
    assert!(matches!(message, Some(Err(Error::ConnectionLost { .. }))));
    assert!(news.next().await.is_none());
}
