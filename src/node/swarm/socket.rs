//! A socket that is read in large pieces, and also while a write blocks.
//!
//! TLS reads 4 KiB at a time and noise 8 KiB, so each system call fetches more for them.
//!
//! yamux does not read while an answer of its own is unsent. If two peers fill each other's sockets, neither
//! would read again. Here each goes on to read, so the other can send its answer, and then reads too.

use futures::{ready, AsyncRead, AsyncWrite};
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

/// Largest number of bytes that are read before the upper layer takes them.
const READ_AHEAD: usize = 256 * 1024;

/// A socket with a read buffer.
#[derive(Debug)]
pub struct ReadAhead<S> {
    socket: S,
    /// Contains the unread bytes from `start` to `end`.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The end or failure of the socket, once it was met.
    ended: Option<io::Result<()>>,
}

impl<S: AsyncRead + Unpin> ReadAhead<S> {
    pub fn new(socket: S) -> Self {
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
