//! A stream muxer on the yamux crate.
//!
//! libp2p-yamux hides the limits of its connections and allows 512 streams, so a node uses the crate itself.

use futures::{ready, AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use std::future::{ready, Ready};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use yamux::{ConnectionError, Mode};

/// Largest number of streams of a connection. Go has no limit.
const MAX_STREAMS: usize = if usize::BITS < 64 { 8 } else { 64 } * 1024;
/// The window of a stream at first, in bytes.
const WINDOW: usize = 256 * 1024;
/// Number of bytes that the windows of a connection may grow in all. The window of a stream grows while its
/// peer fills half of it within two round trips.
const GROWTH: usize = 16 * 1024 * 1024;
/// Number of bytes that are written to the socket at once. They fit into one message of noise.
const GATHERED: usize = 62 * 1024;

/// The upgrade of a secured connection to yamux.
#[derive(Debug, Clone, Copy, Default)]
pub struct Config;

impl UpgradeInfo for Config {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<S> for Config {
    type Output = Muxer<S>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_inbound(self, socket: S, _: Self::Info) -> Self::Future {
        ready(Ok(Muxer::new(socket, Mode::Server)))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<S> for Config {
    type Output = Muxer<S>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_outbound(self, socket: S, _: Self::Info) -> Self::Future {
        ready(Ok(Muxer::new(socket, Mode::Client)))
    }
}

/// A connection that carries many streams. `poll_inbound` moves the bytes of all of them: the muxer above
/// calls it in each `poll`.
#[derive(Debug)]
pub struct Muxer<S>(yamux::Connection<Gathered<S>>);

impl<S: AsyncRead + AsyncWrite + Unpin> Muxer<S> {
    fn new(socket: S, mode: Mode) -> Self {
        let mut config = yamux::Config::default();
        // In this order: the crate checks that the windows suffice for the streams.
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_STREAMS * WINDOW + GROWTH));
        Self(yamux::Connection::new(Gathered::new(socket), config, mode))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<S> {
    type Substream = yamux::Stream;
    type Error = io::Error;

    fn poll_inbound(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        match ready!(self.get_mut().0.poll_next_inbound(cx)) {
            Some(stream) => Poll::Ready(stream.map_err(into_io)),
            None => Poll::Ready(Err(into_io(ConnectionError::Closed))),
        }
    }

    fn poll_outbound(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        self.get_mut().0.poll_new_outbound(cx).map_err(into_io)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().0.poll_close(cx).map_err(into_io)
    }

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        Poll::Pending
    }
}

fn into_io(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::Io(error) => error,
        ConnectionError::Closed => io::ErrorKind::NotConnected.into(),
        error => io::Error::other(error),
    }
}

/// A socket that combines the small writes of yamux.
///
/// yamux writes the header and the body of each frame separately, and flushes after each frame. It reads only
/// when it has no more frames to write, so the buffer is sent before each read, and when it is full.
#[derive(Debug)]
struct Gathered<S> {
    socket: S,
    /// Contains the unsent bytes from `sent` on.
    buffer: Vec<u8>,
    sent: usize,
    is_flushed: bool,
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    fn new(socket: S) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            sent: 0,
            is_flushed: true,
        }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.buffer.len() {
            let unsent = &self.buffer[self.sent..];
            match ready!(Pin::new(&mut self.socket).poll_write(cx, unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
            self.is_flushed = false;
        }
        self.buffer.clear();
        self.sent = 0;
        if !self.is_flushed {
            ready!(Pin::new(&mut self.socket).poll_flush(cx))?;
            self.is_flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut this.socket).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.buffer.len() == GATHERED {
            ready!(this.poll_send(cx))?;
        }
        let count = bytes.len().min(GATHERED - this.buffer.len());
        this.buffer.extend_from_slice(&bytes[..count]);
        Poll::Ready(Ok(count))
    }

    /// Does nothing: the read that follows sends the buffer.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.socket).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::ReadAhead;
    use super::super::tls;
    use super::*;
    use futures::{AsyncReadExt, AsyncWriteExt};
    use libp2p::identity::Keypair;
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio::io::{DuplexStream, ReadHalf, WriteHalf};
    use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};

    /// Number of bytes in each direction: many times what all the buffers in between hold.
    const SIZE: usize = 100 << 20;

    /// Sends `SIZE` bytes on a stream and receives as many, both at once.
    async fn exchange(stream: yamux::Stream) {
        let (mut reader, mut writer) = stream.split();
        let writing = async {
            let chunk = vec![7; 1 << 20];
            for _ in 0..SIZE / chunk.len() {
                writer.write_all(&chunk).await.unwrap();
            }
            writer.close().await.unwrap();
        };
        let reading = async {
            let (mut received, mut chunk) = (0, vec![0; 1 << 16]);
            loop {
                match reader.read(&mut chunk).await.unwrap() {
                    0 => return received,
                    count => received += count,
                }
            }
        };
        let ((), received) = futures::join!(writing, reading);
        assert_eq!(received, SIZE);
    }

    /// Sends many pings over `peer`, and then reads the replies.
    async fn ping<A, B>(mut muxer: Muxer<A>, mut peer: B)
    where
        A: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        B: AsyncRead + AsyncWrite + Unpin,
    {
        let driving = tokio::spawn(async move {
            poll_fn(|cx| Pin::new(&mut muxer).poll_inbound(cx))
                .await
                .map(drop)
        });
        let ping = [0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7];
        let pings = ping.repeat((256 << 10) / ping.len());
        let limit = Duration::from_secs(20);
        let writing = async {
            peer.write_all(&pings).await?;
            peer.flush().await
        };
        tokio::time::timeout(limit, writing).await.unwrap().unwrap();
        let mut pongs = vec![0; pings.len()];
        let reading = peer.read_exact(&mut pongs);
        tokio::time::timeout(limit, reading).await.unwrap().unwrap();
        drop(peer);
        let ended = tokio::time::timeout(limit, driving).await.unwrap().unwrap();
        assert!(ended.is_err());
    }

    /// yamux does not read while its answer to a ping is unsent. Two such peers would wait for each other.
    #[tokio::test]
    async fn peer_that_does_not_read_can_still_write() {
        let (a, peer) = tokio::io::duplex(4096);
        let socket = ReadAhead::new(a.compat());
        ping(Muxer::new(socket, Mode::Server), peer.compat()).await;
    }

    #[tokio::test]
    async fn peer_that_does_not_read_can_still_write_under_tls() {
        let tls = tls::Config::new(&Keypair::generate_ed25519()).unwrap();
        let (a, peer) = tokio::io::duplex(4096);
        let listening = tls.clone().inbound(ReadAhead::new(a.compat()));
        let dialing = tls.outbound(peer.compat());
        let ((_, socket), (_, peer)) = futures::try_join!(listening, dialing).unwrap();
        ping(Muxer::new(socket, Mode::Server), peer).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_peers_that_fill_each_others_small_sockets_go_on() {
        let (a, b) = tokio::io::duplex(4096);
        let mut client = Muxer::new(ReadAhead::new(a.compat()), Mode::Client);
        let mut server = Muxer::new(ReadAhead::new(b.compat()), Mode::Server);
        let serving = tokio::spawn(async move {
            let mut streams = Vec::new();
            poll_fn(|cx| loop {
                match Pin::new(&mut server).poll_inbound(cx) {
                    Poll::Ready(Ok(stream)) => streams.push(tokio::spawn(exchange(stream))),
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            })
            .await;
            for stream in streams {
                stream.await.unwrap();
            }
        });
        let opened = poll_fn(|cx| Pin::new(&mut client).poll_outbound(cx));
        let calling = tokio::spawn(exchange(opened.await.unwrap()));
        let driving = tokio::spawn(async move {
            poll_fn(|cx| match calling.is_finished() {
                true => Pin::new(&mut client).poll_close(cx),
                false => Pin::new(&mut client).poll_inbound(cx).map_ok(drop),
            })
            .await
        });
        let limit = Duration::from_secs(120);
        let both = futures::future::join(driving, serving);
        let (driven, served) = tokio::time::timeout(limit, both).await.unwrap();
        driven.unwrap().unwrap();
        served.unwrap();
    }

    /// Forwards bytes 10 ms after they arrive.
    async fn delay(from: ReadHalf<DuplexStream>, to: WriteHalf<DuplexStream>) {
        let (mut from, mut to) = (from.compat(), to.compat_write());
        let (queue, mut delayed) = tokio::sync::mpsc::unbounded_channel();
        let sending = async move {
            while let Some((at, bytes)) = delayed.recv().await {
                tokio::time::sleep_until(at).await;
                let bytes: Vec<u8> = bytes;
                if to.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        };
        let receiving = async move {
            let mut chunk = vec![0; 1 << 16];
            while let Ok(count @ 1..) = from.read(&mut chunk).await {
                let at = tokio::time::Instant::now() + Duration::from_millis(10);
                let _ = queue.send((at, chunk[..count].to_vec()));
            }
        };
        futures::join!(sending, receiving);
    }

    #[tokio::test]
    async fn window_grows_over_a_slow_link() {
        let (a, left) = tokio::io::duplex(1 << 16);
        let (right, b) = tokio::io::duplex(1 << 16);
        let (left, right) = (tokio::io::split(left), tokio::io::split(right));
        tokio::spawn(delay(left.0, right.1));
        tokio::spawn(delay(right.0, left.1));
        let mut client = Muxer::new(a.compat(), Mode::Client);
        let mut server = Muxer::new(b.compat(), Mode::Server);
        let mut stream = poll_fn(|cx| Pin::new(&mut client).poll_outbound(cx))
            .await
            .unwrap();
        tokio::spawn(poll_fn(move |cx| {
            Pin::new(&mut client).poll_inbound(cx).map_ok(drop)
        }));
        let chunk = vec![7; 1 << 16];
        stream.write_all(&chunk).await.unwrap();
        let mut accepted = poll_fn(|cx| Pin::new(&mut server).poll_inbound(cx))
            .await
            .unwrap();
        tokio::spawn(poll_fn(move |cx| {
            Pin::new(&mut server).poll_inbound(cx).map_ok(drop)
        }));

        let reading = async {
            let mut received = vec![0; 16 << 20];
            accepted.read_exact(&mut received).await.unwrap();
        };
        let writing = async {
            for _ in 1..(16 << 20) / chunk.len() {
                stream.write_all(&chunk).await.unwrap();
            }
        };
        futures::join!(reading, writing);
        // The receiver has stopped reading, so the sender fills the window.
        let mut unread = 0;
        let wait = Duration::from_millis(500);
        while let Ok(written) = tokio::time::timeout(wait, stream.write(&chunk)).await {
            unread += written.unwrap();
        }
        assert!(unread > 4 * WINDOW, "{unread}");
    }
}
