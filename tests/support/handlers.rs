//! Handlers and peers for tests: echoes, calls that never end, unknown keys.

use crate::deadline::within;
use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use p2pd_client::{Client, IncomingStreams, UnaryCall};
use p2pd_protocol::{PeerId, PublicKey};
use std::future::pending;
use std::io::Read as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::join;
use tokio::sync::mpsc::{unbounded_channel, UnboundedReceiver, UnboundedSender};

/// The id and the random public key of a peer that no daemon knows.
pub fn stranger() -> (PeerId, Vec<u8>) {
    let mut secret = [0; 32];
    getrandom(&mut secret);
    let key = [&[8, 1, 18, 32][..], &secret].concat();
    (PublicKey::decode(&key).unwrap().peer_id(), key)
}

fn getrandom(buffer: &mut [u8]) {
    let mut source = std::fs::File::open("/dev/urandom").unwrap();
    source.read_exact(buffer).unwrap();
}

/// A pattern of bytes that depends on `seed`.
pub fn pattern(len: usize, seed: usize) -> Vec<u8> {
    let byte = |place: usize| (place.wrapping_mul(31).wrapping_add(seed) >> 3) as u8;
    (0..len).map(byte).collect()
}

/// A unary handler that never ends. The receiver gets "begun", and "given up" when the handler is dropped.
pub fn endless() -> (
    impl Fn(UnaryCall) -> BoxFuture<'static, Result<Bytes, String>>,
    UnboundedReceiver<&'static str>,
) {
    struct Told(UnboundedSender<&'static str>);
    impl Drop for Told {
        fn drop(&mut self) {
            let _ = self.0.send("given up");
        }
    }
    let (sender, receiver) = unbounded_channel();
    let handler = move |_: UnaryCall| {
        let told = Told(sender.clone());
        async move {
            told.0.send("begun").unwrap();
            pending().await
        }
        .boxed()
    };
    (handler, receiver)
}

/// Sends `payload` over a stream; returns the same number of bytes read from it.
pub async fn echoed(client: &Client, peer: &PeerId, protocol: &str, payload: &[u8]) -> Vec<u8> {
    let stream = client.stream_open(peer, [protocol]).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut received = vec![0; payload.len()];
    let (written, read) = join!(
        writer.write_all(payload),
        within("the echo", reader.read_exact(&mut received))
    );
    written.unwrap();
    read.unwrap();
    received
}

/// Echoes all streams until `incoming` ends.
pub async fn echo_streams(mut incoming: IncomingStreams) {
    while let Some(stream) = incoming.next().await {
        tokio::spawn(async move {
            let (mut reader, mut writer) = tokio::io::split(stream);
            // The caller may reset the stream once it has everything.
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        });
    }
}
