//! An echo server and a caller, each with its own daemon, in one program.
//!
//! `cargo run --example echo`, with p2pd in PATH or its path in P2PD_PATH.

use p2pclient_rs::P2PDaemon;
use p2pd_client::{Error as ClientError, IncomingStreams};
use std::error::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Echoes everything until the caller closes the stream, in one task per stream.
async fn serve(mut incoming: IncomingStreams) {
    while let Some(stream) = incoming.next().await {
        println!("server: a stream from {}", stream.info().peer_id);
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(stream);
            tokio::io::copy(&mut reader, &mut writer).await
        });
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server_daemon = P2PDaemon::builder().spawn().await?;
    let caller_daemon = P2PDaemon::builder().spawn().await?;

    let server = server_daemon.client().await?;
    tokio::spawn(serve(server.stream_handler("/echo/1", false).await?));

    let caller = caller_daemon.client().await?;
    let peer = server_daemon.peer_id();
    caller.connect(peer, server_daemon.addrs()).await?;
    let mut stream = caller.stream_open(peer, ["/echo/1"]).await?;
    stream.write_all(b"hello, libp2p").await?;
    let mut answer = [0; 13];
    stream.read_exact(&mut answer).await?;
    println!("caller: {}", String::from_utf8_lossy(&answer));
    assert_eq!(&answer, b"hello, libp2p");

    match caller.stream_open(peer, ["/unknown/1"]).await {
        Err(ClientError::Refused { message, .. }) => println!("refused: {message}"),
        other => return Err(format!("/unknown/1 should have no handler: {other:?}").into()),
    }
    Ok(())
}
