//! A stream to or from a peer.

use super::socket::Socket;
use bytes::{Buf, Bytes};
use p2pd_protocol::StreamInfo;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{self, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream to a peer, through the daemon: tokio's [`AsyncRead`] and [`AsyncWrite`].
///
/// Dropping it closes it. Data written before the drop still reaches the peer. The Go daemons end both
/// directions when one is shut down, so data that the peer sends after a
/// [`shutdown`](tokio::io::AsyncWriteExt::shutdown) is lost. Mark the end of a message in its
/// protocol instead, for example by sending its length first.
///
/// ```no_run
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// # async fn example(client: p2pd_client::Client, peer: p2pd_protocol::PeerId) -> Result<(), Box<dyn std::error::Error>> {
/// let mut stream = client.stream_open(&peer, ["/echo/1"]).await?;
/// stream.write_all(b"hello").await?;
/// let mut answer = [0; 5];
/// stream.read_exact(&mut answer).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    /// Look-ahead data: the stream's first bytes, if they arrived together with the header.
    ahead: Bytes,
    info: StreamInfo,
}

impl Stream {
    pub(super) fn new(socket: Socket, ahead: Bytes, info: StreamInfo) -> Self {
        Self {
            socket,
            ahead,
            info,
        }
    }

    /// The remote peer, its address, and the protocol agreed on.
    pub fn info(&self) -> &StreamInfo {
        &self.info
    }

    /// Serves the read from look-ahead data; returns whether it did.
    fn take_ahead(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let count = self.ahead.len().min(buffer.remaining());
        buffer.put_slice(&self.ahead[..count]);
        self.ahead.advance(count);
        count > 0
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.socket.drain();
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.take_ahead(buffer) {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.socket).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut task::Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
