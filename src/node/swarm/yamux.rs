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
/// Number of bytes that are read from the socket at once.
const READ: usize = 128 * 1024;
/// Number of unread bytes above which no more are read ahead.
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
    /// The bytes read, of which the first `taken` were taken.
    unread: Vec<u8>,
    taken: usize,
    /// The end or failure of the socket, once it was met.
    end: Option<io::Result<()>>,
}

impl<S: AsyncRead + Unpin> ReadAhead<S> {
    fn new(socket: S) -> Self {
        Self {
            socket,
            unread: Vec::new(),
            taken: 0,
            end: None,
        }
    }

    fn len(&self) -> usize {
        self.unread.len() - self.taken
    }

    /// Reads more bytes. Ready when there are any, or at the end of the socket.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.end.is_some() {
            return Poll::Ready(());
        }
        if self.taken > 0 {
            self.unread.drain(..self.taken);
            self.taken = 0;
        }
        let length = self.unread.len();
        self.unread.resize(length + READ, 0);
        let read = Pin::new(&mut self.socket).poll_read(cx, &mut self.unread[length..]);
        let count = match &read {
            Poll::Ready(Ok(count)) => *count,
            _ => 0,
        };
        self.unread.truncate(length + count);
        match ready!(read) {
            Ok(0) => self.end = Some(Ok(())),
            Ok(_) => {}
            Err(error) => self.end = Some(Err(error)),
        }
        Poll::Ready(())
    }

    fn read_ahead(&mut self, cx: &mut Context<'_>) {
        while self.end.is_none() && self.len() < READ_AHEAD && self.poll_fill(cx).is_ready() {}
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.len() == 0 {
            if buffer.len() >= READ && this.end.is_none() {
                return Pin::new(&mut this.socket).poll_read(cx, buffer);
            }
            ready!(this.poll_fill(cx));
        }
        let unread = &this.unread[this.taken..];
        if unread.is_empty() {
            return Poll::Ready(match this.end.replace(Ok(())) {
                Some(Err(error)) => Err(error),
                _ => Ok(0),
            });
        }
        let count = unread.len().min(buffer.len());
        buffer[..count].copy_from_slice(&unread[..count]);
        this.taken += count;
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
