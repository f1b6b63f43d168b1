//! Two daemons and what they keep for each other in the DHT: a public key record, put by one and got by
//! the other, and a file that one provides and the other finds.
//!
//! `cargo run --example dht_test`, with p2pd in PATH or its path in P2PD_PATH.

use p2pclient_rs::Client;
use p2pd_manager::{Dht, P2PDaemon};
use sha2::{Digest, Sha256};
use std::error::Error;
use std::time::Duration;
use tokio::time::{sleep, timeout};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    timeout(Duration::from_secs(30), run()).await?
}

async fn run() -> Result<(), Box<dyn Error>> {
    // On one machine nobody is publicly reachable, so they are told to serve.
    let alice_daemon = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
    let bob_daemon = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
    let (alice, bob) = (alice_daemon.client().await?, bob_daemon.client().await?);
    println!("alice is {}", alice_daemon.peer_id());
    println!("bob is   {}", bob_daemon.peer_id());
    alice
        .connect(bob_daemon.peer_id(), bob_daemon.addrs())
        .await?;
    knows_somebody(&alice).await;
    knows_somebody(&bob).await;

    // The daemons check what they store: under /pk/ and a peer id, they take that peer's public key.
    let key = alice.dht_get_public_key(alice_daemon.peer_id()).await?;
    let name = [b"/pk/", alice_daemon.peer_id().as_bytes()].concat();
    alice.dht_put_value(name.clone(), key.encode()).await?;
    let found = bob.dht_get_value(name.clone()).await?;
    println!(
        "alice put her public key, and bob got {} bytes",
        found.len()
    );
    assert_eq!(found, key.encode());
    match alice.dht_put_value(name, "something else").await {
        Err(error) => println!("nothing else can be put there: {error}"),
        Ok(()) => return Err("a wrong key was taken".into()),
    }

    // A file is named by the CID of its content: version 1, raw bytes, sha2-256 of 32 bytes.
    let cid = [&[1, 0x55, 0x12, 32][..], &Sha256::digest("a file")].concat();
    alice.dht_provide(cid.clone()).await?;
    let provider = loop {
        // As they come: there can be many.
        let mut providers = bob.dht_find_providers(cid.clone(), 10);
        if let Some(provider) = providers.next().await {
            break provider?;
        }
        sleep(Duration::from_millis(50)).await;
    };
    println!("bob found that {} provides the file", provider.peer_id);
    assert_eq!(&provider.peer_id, alice_daemon.peer_id());
    Ok(())
}

/// Waits until a peer is in the routing table, which takes a moment after it was connected to.
async fn knows_somebody(client: &Client) {
    while !matches!(
        client.dht_get_closest_peers("anybody").next().await,
        Some(Ok(_))
    ) {
        sleep(Duration::from_millis(50)).await;
    }
}
