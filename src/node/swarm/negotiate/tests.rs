//! Tests of the negotiation, over streams in memory.

use super::*;
use futures::io::{AsyncReadExt, AsyncWriteExt};
use futures::FutureExt;
use std::time::Duration;
use tokio::io::{duplex, DuplexStream};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

const HEADER: &[u8] = b"\x13/multistream/1.0.0\n";

fn pair() -> (Compat<DuplexStream>, Compat<DuplexStream>) {
    let (a, b) = duplex(64 * 1024);
    (a.compat(), b.compat())
}

fn lines(lines: &[&str]) -> Vec<u8> {
    let mut out = BytesMut::new();
    for line in lines {
        put_line(&mut out, line);
    }
    out.to_vec()
}

fn served(protocol: &str) -> Offer {
    match protocol {
        "echo" | "/echo" => Offer::Served,
        "/kad" => Offer::Delegated,
        _ => Offer::Unknown,
    }
}

async fn accepted(stream: Compat<DuplexStream>) -> io::Result<Accepted<Compat<DuplexStream>>> {
    accept(stream, served, || {
        vec!["echo".to_owned(), "/kad".to_owned()]
    })
    .await
}

/// Reads exactly these bytes.
async fn expect(stream: &mut (impl AsyncRead + Unpin), expected: &[u8]) {
    let mut read = vec![0; expected.len()];
    let reading = stream.read_exact(&mut read);
    let limit = Duration::from_secs(10);
    tokio::time::timeout(limit, reading).await.unwrap().unwrap();
    assert_eq!(read, expected);
}

#[tokio::test]
async fn lazy_stream_sends_name_and_payload_together_and_reads_the_reply() {
    let (dialer, mut listener) = pair();
    let mut dialer = Negotiated::lazy(dialer, "echo");
    dialer.write_all(b"hello").await.unwrap();
    let mut first = [0; 100];
    let count = listener.read(&mut first).await.unwrap();
    let sent = [HEADER, b"\x05echo\n", b"hello"].concat();
    assert_eq!(&first[..count], sent);
    let reply = [HEADER, b"\x05echo\n", b"reply"].concat();
    listener.write_all(&reply).await.unwrap();
    expect(&mut dialer, b"reply").await;
    listener.write_all(b"more").await.unwrap();
    expect(&mut dialer, b"more").await;
}

#[tokio::test]
async fn lazy_stream_sends_its_name_before_it_waits_for_a_reply() {
    let (dialer, mut listener) = pair();
    let mut dialer = Negotiated::lazy(dialer, "/x");
    let reading = tokio::spawn(async move {
        expect(&mut dialer, b"first").await;
    });
    expect(&mut listener, &[HEADER, b"\x03/x\n"].concat()).await;
    let reply = [HEADER, b"\x03/x\n", b"first"].concat();
    for byte in reply {
        listener.write_all(&[byte]).await.unwrap();
    }
    reading.await.unwrap();
}

#[tokio::test]
async fn refused_lazy_stream_fails_each_read() {
    let (dialer, mut listener) = pair();
    let mut dialer = Negotiated::lazy(dialer, "gone");
    dialer.write_all(b"hello").await.unwrap();
    listener.write_all(&lines(&[VERSION, "na"])).await.unwrap();
    for _ in 0..2 {
        let error = dialer.read(&mut [0; 9]).await.unwrap_err();
        assert_eq!(error.to_string(), "protocols not supported: [gone]");
        let inner = error.into_inner().unwrap();
        let inner = inner.downcast::<OpenError>().unwrap();
        assert!(matches!(*inner, OpenError::Unsupported(names) if names == ["gone"]));
    }
}

#[tokio::test]
async fn large_payload_of_a_lazy_stream_arrives_whole() {
    let (dialer, mut listener) = pair();
    let payload: Vec<u8> = (0..1_000_000_u32).map(|i| i as u8).collect();
    let sent = payload.clone();
    let sending = tokio::spawn(async move {
        let mut dialer = Negotiated::lazy(dialer, "echo");
        dialer.write_all(&sent).await.unwrap();
        dialer.close().await.unwrap();
    });
    let mut received = Vec::new();
    listener.read_to_end(&mut received).await.unwrap();
    sending.await.unwrap();
    assert_eq!(received, [HEADER, b"\x05echo\n", &payload[..]].concat());
}

#[tokio::test]
async fn select_takes_the_first_protocol_that_the_peer_accepts() {
    let (dialer, listener) = pair();
    let names = ["/a", "/b", "echo"].map(str::to_owned);
    let listening = async {
        let Ok(Accepted::Served(name, mut listener)) = accepted(listener).await else {
            panic!("not served");
        };
        listener.flush().await.unwrap();
        (name, listener)
    };
    let (selected, (name, mut listener)) = tokio::join!(select(dialer, &names), listening);
    let (protocol, mut dialer) = selected.unwrap();
    assert_eq!((&*protocol, &*name), ("echo", "echo"));
    listener.write_all(b"hi").await.unwrap();
    expect(&mut dialer, b"hi").await;
    dialer.write_all(b"ho").await.unwrap();
    expect(&mut listener, b"ho").await;
}

#[tokio::test]
async fn select_fails_when_the_peer_accepts_no_protocol() {
    let (dialer, listener) = pair();
    let names = ["/a", "b"].map(str::to_owned);
    let listening = tokio::spawn(accepted(listener));
    let Err(OpenError::Unsupported(refused)) = select(dialer, &names).await else {
        panic!("not refused");
    };
    assert_eq!(refused, names);
    let error = listening.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn listener_confirms_with_its_first_bytes() {
    let (mut dialer, listener) = pair();
    let proposal = [&lines(&[VERSION, "/echo"])[..], b"early"].concat();
    dialer.write_all(&proposal).await.unwrap();
    let Ok(Accepted::Served(_, mut listener)) = accepted(listener).await else {
        panic!("not served");
    };
    let mut early = [0; 5];
    listener.read_exact(&mut early).await.unwrap();
    assert_eq!(&early, b"early");
    assert!(dialer.read(&mut [0]).now_or_never().is_none());
    listener.write_all(b"late").await.unwrap();
    let confirmed = [&lines(&[VERSION, "/echo"])[..], b"late"].concat();
    expect(&mut dialer, &confirmed).await;
}

#[tokio::test]
async fn listener_confirms_before_it_waits_for_a_read() {
    let (mut dialer, listener) = pair();
    dialer.write_all(&lines(&[VERSION, "/echo"])).await.unwrap();
    let Ok(Accepted::Served(_, mut listener)) = accepted(listener).await else {
        panic!("not served");
    };
    let mut late = [0; 4];
    let dialing = async {
        expect(&mut dialer, &lines(&[VERSION, "/echo"])).await;
        dialer.write_all(b"late").await
    };
    let (read, written) = futures::join!(listener.read_exact(&mut late), dialing);
    read.unwrap();
    written.unwrap();
    assert_eq!(&late, b"late");
}

#[tokio::test]
async fn listener_reads_names_that_arrive_byte_by_byte() {
    let (mut dialer, listener) = pair();
    let listening = tokio::spawn(accepted(listener));
    for byte in lines(&[VERSION, "/unknown", "echo"]) {
        dialer.write_all(&[byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let Ok(Accepted::Served(protocol, mut listener)) = listening.await.unwrap() else {
        panic!("not served");
    };
    assert_eq!(protocol, "echo");
    listener.write_all(b"hello").await.unwrap();
    let answer = [&lines(&[VERSION, "na", "echo"])[..], b"hello"].concat();
    expect(&mut dialer, &answer).await;
}

#[tokio::test]
async fn listener_sends_its_header_to_a_dialer_that_waits_for_it() {
    let (mut dialer, listener) = pair();
    let listening = tokio::spawn(accepted(listener));
    dialer.write_all(HEADER).await.unwrap();
    expect(&mut dialer, HEADER).await;
    dialer.write_all(&lines(&["echo"])).await.unwrap();
    let Ok(Accepted::Served(_, mut listener)) = listening.await.unwrap() else {
        panic!("not served");
    };
    listener.flush().await.unwrap();
    expect(&mut dialer, &lines(&["echo"])).await;
}

#[tokio::test]
async fn delegated_stream_replays_the_negotiation() {
    for waits in [false, true] {
        let (mut dialer, listener) = pair();
        let listening = tokio::spawn(accepted(listener));
        let payload = [&lines(&["/kad"])[..], b"payload"].concat();
        if waits {
            dialer
                .write_all(&lines(&[VERSION, "nobody"]))
                .await
                .unwrap();
            expect(&mut dialer, &lines(&[VERSION, "na"])).await;
            dialer.write_all(&payload).await.unwrap();
        } else {
            dialer
                .write_all(&[HEADER, &payload[..]].concat())
                .await
                .unwrap();
        }
        let Ok(Accepted::Delegated(mut stream)) = listening.await.unwrap() else {
            panic!("not delegated");
        };
        expect(&mut stream, &[HEADER, &payload[..]].concat()).await;
        stream.write_all(&lines(&[VERSION, "/kad"])).await.unwrap();
        let header: &[u8] = if waits { b"" } else { HEADER };
        expect(&mut dialer, &[header, &lines(&["/kad"])[..]].concat()).await;
    }
}

#[tokio::test]
async fn listener_lists_its_protocols() {
    let (mut dialer, listener) = pair();
    let listening = tokio::spawn(accepted(listener));
    dialer.write_all(&lines(&[VERSION, "ls"])).await.unwrap();
    let list = lines(&["echo", "/kad"]);
    let length = [list.len() as u8 + 1];
    expect(&mut dialer, &[HEADER, &length, &list[..], b"\n"].concat()).await;
    drop(dialer);
    assert!(listening.await.unwrap().is_err());
}

#[tokio::test]
async fn hostile_dialers_get_an_error() {
    let long = [HEADER, &[0xff, 0xff, 0x7f]].concat();
    let endless = [HEADER, &[0xff; 20]].concat();
    let without_newline = [HEADER, b"\x04echo"].concat();
    let binary = [HEADER, b"\x03\xff\xfe\n"].concat();
    let empty = [HEADER, b"\x00"].concat();
    let http = [&b"GET / HTTP/1.1\r\n"[..], &[b'x'; 80]].concat();
    for bytes in [
        &long[..],
        &endless,
        &without_newline,
        &binary,
        &empty,
        &http,
    ] {
        let (mut dialer, listener) = pair();
        dialer.write_all(bytes).await.unwrap();
        let error = accepted(listener).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{bytes:?}");
    }
    let (mut dialer, listener) = pair();
    let proposals = vec!["/x"; MAX_PROPOSALS + 1];
    let listening = tokio::spawn(accepted(listener));
    dialer
        .write_all(&[HEADER, &lines(&proposals)[..]].concat())
        .await
        .unwrap();
    let error = listening.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("too many protocols"));
}

#[tokio::test]
async fn hostile_listeners_get_an_error() {
    for answer in [&lines(&[VERSION, "other"])[..], b"\x03ab\n", b"\x00"] {
        let (dialer, mut listener) = pair();
        listener.write_all(answer).await.unwrap();
        let error = Negotiated::lazy(dialer, "echo")
            .read(&mut [0; 9])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        let (dialer, mut listener) = pair();
        listener.write_all(answer).await.unwrap();
        assert!(select(dialer, &["echo".to_owned()]).await.is_err());
    }
}
