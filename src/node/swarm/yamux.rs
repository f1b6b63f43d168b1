//! A stream muxer on the yamux crate.
//!
//! libp2p-yamux hides the limits of its connections and allows 512 streams, so a node uses the crate itself.

use futures::{ready, AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use std::future::{ready, Ready};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use yamux::{ConnectionError, Mode};

/// Largest number of streams of a connection. Go has no limit.
const MAX_STREAMS: usize = 64 * 1024;
/// The window of a stream is 256 KiB at first, and grows up to twice what its peer can send in a round trip.
const WINDOW: usize = 256 * 1024;
/// Largest number of bytes that are read from the socket before the connection takes them.
const READ_AHEAD: usize = 256 * 1024;

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
pub struct Muxer<S>(yamux::Connection<ReadAhead<S>>);

impl<S: AsyncRead + AsyncWrite + Unpin> Muxer<S> {
    fn new(socket: S, mode: Mode) -> Self {
        let mut config = yamux::Config::default();
        // In this order: the crate checks that the windows suffice for the streams.
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(MAX_STREAMS);
        config.set_max_connection_receive_window(Some(MAX_STREAMS * WINDOW));
        Self(yamux::Connection::new(ReadAhead::new(socket), config, mode))
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

/// A socket that is also read while it takes no bytes.
///
/// yamux does not read while an answer of its own is unsent. If two peers fill each other's sockets, neither
/// would read again. Here each goes on to read, so the other can send its answer, and then reads too.
#[derive(Debug)]
struct ReadAhead<S> {
    socket: S,
    /// Contains the unread bytes from `start` to `end`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The end or failure of the socket, once it was met.
    ended: Option<io::Result<()>>,
}

impl<S: AsyncRead + Unpin> ReadAhead<S> {
    fn new(socket: S) -> Self {
        Self {
            socket,
            buffer: vec![0; READ_AHEAD].into_boxed_slice(),
            start: 0,
            end: 0,
            ended: None,
        }
    }

    /// Reads more bytes. Ready when it has read some, and at the end of the socket. There must be room.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.ended.is_some() {
            return Poll::Ready(());
        }
        let socket = Pin::new(&mut self.socket);
        match ready!(socket.poll_read(cx, &mut self.buffer[self.end..])) {
            Ok(0) => self.ended = Some(Ok(())),
            Ok(count) => self.end += count,
            Err(error) => self.ended = Some(Err(error)),
        }
        Poll::Ready(())
    }

    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        while self.ended.is_none() && self.end < self.buffer.len() && self.poll_fill(cx).is_ready()
        {
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.start == this.end {
            ready!(this.poll_fill(cx));
        }
        let unread = &this.buffer[this.start..this.end];
        if unread.is_empty() {
            return Poll::Ready(match this.ended.replace(Ok(())) {
                Some(Err(error)) => Err(error),
                _ => Ok(0),
            });
        }
        let count = unread.len().min(buffer.len());
        buffer[..count].copy_from_slice(&unread[..count]);
        this.start += count;
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write(cx, bytes);
        if written.is_pending() {
            this.read_ahead(cx);
        }
        written
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write_vectored(cx, pieces);
        if written.is_pending() {
            this.read_ahead(cx);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let flushed = Pin::new(&mut this.socket).poll_flush(cx);
        if flushed.is_pending() {
            this.read_ahead(cx);
        }
        flushed
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::{AsyncReadExt, AsyncWriteExt};
    use std::future::poll_fn;
    use std::time::Duration;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    /// Number of bytes in each direction: many times what all the buffers in between hold.
    const SIZE: usize = 16 << 20;

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

    /// yamux does not read while its answer to a ping is unsent. Two such peers would wait for each other.
    #[tokio::test]
    async fn peer_that_does_not_read_can_still_write() {
        let (a, mut peer) = tokio::io::duplex(4096);
        let mut muxer = Muxer::new(a.compat(), Mode::Server);
        let driving = tokio::spawn(async move {
            poll_fn(|cx| Pin::new(&mut muxer).poll_inbound(cx))
                .await
                .map(drop)
        });
        let ping = [0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7];
        let pings = ping.repeat((64 << 10) / ping.len());
        let writing = tokio::io::AsyncWriteExt::write_all(&mut peer, &pings);
        let limit = Duration::from_secs(20);
        tokio::time::timeout(limit, writing).await.unwrap().unwrap();
        let mut pongs = vec![0; pings.len()];
        let reading = tokio::io::AsyncReadExt::read_exact(&mut peer, &mut pongs);
        tokio::time::timeout(limit, reading).await.unwrap().unwrap();
        drop(peer);
        let ended = tokio::time::timeout(limit, driving).await.unwrap().unwrap();
        assert!(ended.is_err());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn two_peers_that_fill_each_others_small_sockets_go_on() {
        let (a, b) = tokio::io::duplex(4096);
        let mut client = Muxer::new(a.compat(), Mode::Client);
        let mut server = Muxer::new(b.compat(), Mode::Server);
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
}
