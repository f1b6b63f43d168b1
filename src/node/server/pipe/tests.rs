//! Pipes between a client's unix socket and a peer that is the other end of a duplex.

use super::*;
use p2pd_protocol::{Multiaddr, PeerId, StreamInfo};
use tokio::io::{AsyncReadExt as _, DuplexStream};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_util::compat::TokioAsyncReadCompatExt as _;

/// Size of the duplex's buffer, in bytes: smaller than what the tests send.
const PEER_BUFFER: usize = 1 << 10;
const TAIL: usize = 3 << 20;

fn peer_stream(half_close: bool) -> (PeerStream, DuplexStream) {
    let (ours, peer) = tokio::io::duplex(PEER_BUFFER);
    let stream = PeerStream {
        info: StreamInfo {
            peer_id: PeerId::from_bytes(vec![7]),
            addr: Multiaddr::from_bytes(vec![4]),
            protocol: "p".to_owned(),
        },
        half_close,
        stream: Substream::new(ours.compat()),
    };
    (stream, peer)
}

/// Starts a pipe; returns its task, the peer and the client.
fn start(half_close: bool, first: &'static [u8]) -> (JoinHandle<()>, DuplexStream, UnixStream) {
    let (stream, peer) = peer_stream(half_close);
    let (socket, client) = UnixStream::pair().unwrap();
    let first = Bytes::from_static(first);
    let task = tokio::spawn(pipe(stream, Socket::Unix(socket), first));
    (task, peer, client)
}

async fn read_all(mut source: impl tokio::io::AsyncRead + Unpin) -> Vec<u8> {
    let mut bytes = Vec::new();
    source.read_to_end(&mut bytes).await.unwrap();
    bytes
}

#[tokio::test]
async fn sends_what_the_client_sent_ahead() {
    let (_task, mut peer, mut client) = start(true, b"first ");
    client.write_all(b"second").await.unwrap();
    client.shutdown().await.unwrap();
    let mut bytes = Vec::new();
    peer.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, b"first second");
}

#[tokio::test]
async fn answers_a_client_that_has_sent_its_end_of_file() {
    let (task, mut peer, mut client) = start(false, b"");
    let tail = vec![7; TAIL];
    let (sent, received) = tokio::join!(
        async {
            client.write_all(&tail).await.unwrap();
            client.shutdown().await.unwrap();
            read_all(&mut client).await
        },
        async {
            let request = read_all(&mut peer).await;
            peer.write_all(&request).await.unwrap();
            peer.shutdown().await.unwrap();
            request
        }
    );
    assert!(sent == tail && received == tail);
    task.await.unwrap();
}

#[tokio::test]
async fn answers_a_peer_that_has_sent_its_end_of_file_if_it_still_reads() {
    let (task, mut peer, mut client) = start(true, b"");
    let tail = vec![7; TAIL];
    let (received, request) = tokio::join!(
        async {
            peer.write_all(&tail).await.unwrap();
            peer.shutdown().await.unwrap();
            read_all(&mut peer).await
        },
        async {
            let request = read_all(&mut client).await;
            client.write_all(&request).await.unwrap();
            client.shutdown().await.unwrap();
            request
        }
    );
    assert!(request == tail && received == tail);
    task.await.unwrap();
}

#[tokio::test]
async fn delivers_the_tail_of_a_peer_that_reads_no_more_and_ends_the_stream() {
    let (task, mut peer, mut client) = start(false, b"");
    let tail = vec![7; TAIL];
    let sender = tokio::spawn(async move {
        // The peer reads nothing of this, and yet its tail must arrive.
        peer.write_all(&vec![7; TAIL]).await.unwrap();
        peer.shutdown().await.unwrap();
        peer
    });
    client.write_all(b"unread").await.unwrap();
    assert!(read_all(&mut client).await == tail);
    task.await.unwrap();
    let error = client.write_all(b"more").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert_eq!(read_all(sender.await.unwrap()).await, b"unread");
}

#[tokio::test]
async fn ends_the_stream_when_its_client_goes() {
    let (task, mut peer, client) = start(true, b"");
    drop(client);
    assert_eq!(read_all(&mut peer).await, b"");
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn peer_is_not_blocked_when_a_half_closed_client_goes() {
    let (task, mut peer, mut client) = start(true, b"");
    client.shutdown().await.unwrap();
    assert_eq!(read_all(&mut peer).await, b"");
    assert!(!task.is_finished());
    drop(client);
    peer.write_all(&vec![7; TAIL]).await.unwrap();
    drop(peer);
    task.await.unwrap();
}

#[tokio::test]
async fn gives_the_stream_back_if_the_handler_refuses() {
    let (stream, mut peer) = peer_stream(true);
    let nowhere = Endpoint::Unix("/no/such/handler".to_owned());
    let (stream, error) = deliver(stream, &nowhere).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    let directory = p2pd_sockets::private_directory(None, "p2pd-", "h.sock").unwrap();
    let path = directory.path().join("h.sock");
    let handler = UnixListener::bind(&path).unwrap();
    let endpoint = Endpoint::Unix(path.to_str().unwrap().to_owned());
    let header = encode_stream_info(&stream.info);
    let task = tokio::spawn(async move { deliver(stream, &endpoint).await.is_ok() });
    let (client, _) = handler.accept().await.unwrap();
    peer.write_all(b"hello").await.unwrap();
    peer.shutdown().await.unwrap();
    let (mut client, mut writer) = client.into_split();
    assert_eq!(
        read_all(&mut client).await,
        [&header[..], b"hello"].concat()
    );
    writer.shutdown().await.unwrap();
    assert!(task.await.unwrap());
}
