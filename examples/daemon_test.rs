//! Starts a libp2p daemon, requests its identity, and stops it.
//!
//! `cargo run --example daemon_test`, with p2pd in PATH or its path in P2PD_PATH.

use p2pclient_rs::P2PDaemon;
use p2pd_client::Error as ClientError;
use std::error::Error;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let daemon = P2PDaemon::builder().spawn().await?;
    let pid = daemon.pid().ok_or("the daemon has ended")?;
    println!("p2pd runs as process {pid}");

    let client = daemon.client().await?;
    let identity = client.identify().await?;
    println!("it is the peer {}", identity.peer_id);
    for addr in &identity.addrs {
        println!("and listens at {addr}");
    }
    assert_eq!(&identity.peer_id, daemon.peer_id());

    daemon.shutdown().await;
    match client.identify().await {
        Err(error @ ClientError::Unreachable { .. }) => println!("stopped: {error}"),
        other => return Err(format!("the daemon should have stopped: {other:?}").into()),
    }
    Ok(())
}
