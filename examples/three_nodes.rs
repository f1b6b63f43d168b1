//! A bootstrap node and two joining nodes. Each joining node knows only the bootstrap node, and finds the
//! other one through it: the bootstrap node learns from Identify where each node listens, and passes this
//! on in the Kademlia DHT.
//!
//! `cargo run --example three_nodes`, with p2pd in PATH or its path in P2PD_PATH.

use p2pclient_rs::Client;
use p2pd_manager::{Dht, P2PDaemon};
use p2pd_protocol::{Multiaddr, PeerId, PeerInfo};
use std::error::Error;
use std::time::Duration;
use tokio::time::{sleep, timeout};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    timeout(Duration::from_secs(30), run()).await?
}

async fn run() -> Result<(), Box<dyn Error>> {
    // On one machine no peer is publicly reachable, so the daemons must be DHT servers explicitly.
    let bootstrap = P2PDaemon::builder().dht(Dht::Server).spawn().await?;
    println!("bootstrap is {}", bootstrap.peer_id());
    let join = || {
        let joiner = P2PDaemon::builder().dht(Dht::Server);
        joiner.bootstrap_peers(bootstrap.peer_addrs()).spawn()
    };
    let (one, two) = (join().await?, join().await?);
    println!("one is       {}", one.peer_id());
    println!("two is       {}", two.peer_id());
    let name = |peer: &PeerId| match peer {
        peer if peer == bootstrap.peer_id() => "bootstrap".to_owned(),
        peer if peer == one.peer_id() => "one".to_owned(),
        peer if peer == two.peer_id() => "two".to_owned(),
        unknown => unknown.to_string(),
    };

    // The joining nodes connected from ephemeral ports. Identify has their listen addresses.
    let center = bootstrap.client().await?;
    for joiner in [&one, &two] {
        let info = find(&center, joiner.peer_id()).await?;
        let joiner_name = name(&info.peer_id);
        println!(
            "bootstrap knows from Identify that {joiner_name} listens at {}",
            list(&info.addrs)
        );
        assert_eq!(info.addrs, joiner.addrs());
    }

    for (seeker, sought) in [(&one, &two), (&two, &one)] {
        let client = seeker.client().await?;
        let info = find(&client, sought.peer_id()).await?;
        let (own, other) = (name(seeker.peer_id()), name(sought.peer_id()));
        println!(
            "{own} found in the DHT that {other} listens at {}",
            list(&info.addrs)
        );
        assert_eq!(info.addrs, sought.addrs());
        client.connect(&info.peer_id, &info.addrs).await?;
    }

    for daemon in [&bootstrap, &one, &two] {
        let peers = daemon.client().await?.list_peers().await?;
        let mut names: Vec<_> = peers.iter().map(|info| name(&info.peer_id)).collect();
        // The list has one entry per connection.
        names.sort();
        names.dedup();
        println!(
            "{} is connected to {}",
            name(daemon.peer_id()),
            names.join(" and ")
        );
        assert_eq!(names.len(), 2);
    }
    Ok(())
}

/// Finds a peer's addresses; retries while the peer is still joining.
async fn find(client: &Client, peer: &PeerId) -> Result<PeerInfo, Box<dyn Error>> {
    let mut attempts = 0;
    loop {
        match client.dht_find_peer(peer).await {
            Ok(info) if !info.addrs.is_empty() => return Ok(info),
            Err(error) if attempts == 100 => return Err(error.into()),
            _ => attempts += 1,
        }
        sleep(Duration::from_millis(50)).await;
    }
}

fn list(addrs: &[Multiaddr]) -> String {
    let addrs: Vec<_> = addrs.iter().map(Multiaddr::to_string).collect();
    addrs.join(", ")
}
