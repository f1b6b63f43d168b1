//! Unary calls between two peers: two servers on one daemon answer in turn.
//!
//! `cargo run --example unary`, with hivemind's p2pd in PATH or its path in P2PD_PATH: other daemons
//! have no unary calls.

use p2pclient_rs::P2PDaemon;
use p2pd_client::{Client, Error as ClientError, UnaryCall};
use std::error::Error;

async fn serve(client: &Client, name: &'static str) -> Result<(), ClientError> {
    let square = move |call: UnaryCall| async move {
        let text = String::from_utf8_lossy(&call.payload).into_owned();
        match text.parse::<i64>() {
            Ok(number) => Ok(format!("{} (says {name})", number * number)),
            Err(error) => Err(format!("{text:?}: {error}")),
        }
    };
    client.add_unary_handler("square", true, square).await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let a = P2PDaemon::builder().spawn().await?;
    let b = P2PDaemon::builder().spawn().await?;
    let (one, two) = (b.client().await?, b.client().await?);
    serve(&one, "one").await?;
    serve(&two, "two").await?;

    let client = a.client().await?;
    client.connect(b.peer_id(), b.addrs()).await?;
    for (number, square) in [("2", "4"), ("3", "9")] {
        let reply = client.call_unary(b.peer_id(), "square", number).await?;
        let reply = String::from_utf8(reply.into())?;
        println!("{number} -> {reply}");
        assert_eq!(reply.split(' ').next(), Some(square));
    }
    match client.call_unary(b.peer_id(), "square", "four").await {
        Err(ClientError::HandlerFailed { message, .. }) => println!("four -> {message}"),
        other => return Err(format!("four is no number: {other:?}").into()),
    }
    Ok(())
}
