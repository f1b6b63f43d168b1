//! Two daemons share data in the DHT: a public key record that one puts and the other gets, and a file
//! that one provides and the other finds.
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
    // On one machine no peer is publicly reachable, so the daemons must be DHT servers explicitly.
    let alice_daemon = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
    let bob_daemon = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
    let (alice, bob) = (alice_daemon.client().await?, bob_daemon.client().await?);
    println!("alice is {}", alice_daemon.peer_id());
    println!("bob is   {}", bob_daemon.peer_id());
    alice
        .connect(bob_daemon.peer_id(), bob_daemon.addrs())
        .await?;
    wait_for_routing_table(&alice).await;
    wait_for_routing_table(&bob).await;

    // The daemons validate records: under /pk/ and a peer id they accept only that peer's public key.
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
        Err(error) => println!("another value is refused: {error}"),
        Ok(()) => return Err("an invalid record was accepted".into()),
    }

    // A file is named by the CID of its content: version 1, raw bytes, sha2-256 of 32 bytes.
    let cid = [&[1, 0x55, 0x12, 32][..], &Sha256::digest("a file")].concat();
    alice.dht_provide(cid.clone()).await?;
    let provider = loop {
        // Results arrive one by one; there can be many.
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

/// Waits until a peer is in the routing table, a moment after it was connected.
async fn wait_for_routing_table(client: &Client) {
    while !matches!(
        client.dht_get_closest_peers("anybody").next().await,
        Some(Ok(_))
    ) {
        sleep(Duration::from_millis(50)).await;
    }
}
