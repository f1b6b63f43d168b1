//! Copies between a peer's stream and a local program's socket, in both directions.
//!
//! The end of file of one direction is passed on and leaves the other direction open, if the peer
//! supports that. Everything that was received before the end of file is delivered first.

use super::socket::Socket;
use crate::stream::PeerStream;
use crate::swarm::Substream;
use bytes::{Buf, Bytes};
use futures::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use p2pd_protocol::command::streams::encode_stream_info;
use p2pd_protocol::Endpoint;
use std::cell::Cell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::task::{ready, Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};
use tokio::time::timeout;

/// Size of one read, in bytes.
const READ_SIZE: usize = 64 << 10;

/// Largest number of reads before other tasks may run.
const READ_BUDGET: usize = 16;

/// Time limit of connecting to a handler.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval at which a half-closed socket is checked for its client having gone.
const HANG_UP_INTERVAL: Duration = Duration::from_secs(1);

/// Size of one read of [`drain`], and the largest number of bytes that it reads.
const DRAIN_READ: usize = 16 << 10;
const MAX_DRAINED: usize = 64 << 20;

thread_local! {
    /// The buffer of the pipe that is being polled, so that idle pipes need none.
    static SCRATCH: Cell<Option<Box<[u8]>>> = const { Cell::new(None) };
}

/// Connects to a handler, sends the stream's header, and copies until the stream ends.
///
/// # Errors
/// Gives the stream back, untouched, if the handler does not accept a connection in time.
#[allow(clippy::result_large_err)]
pub(crate) async fn deliver(
    stream: PeerStream,
    handler: &Endpoint,
) -> Result<(), (PeerStream, io::Error)> {
    let mut handler = match timeout(CONNECT_TIMEOUT, Socket::connect(handler)).await {
        Ok(Ok(handler)) => handler,
        Ok(Err(error)) => return Err((stream, error)),
        Err(_) => return Err((stream, ErrorKind::TimedOut.into())),
    };
    match handler.write_all(&encode_stream_info(&stream.info)).await {
        Ok(()) => pipe(stream, handler, Bytes::new()).await,
        Err(error) => log::debug!("cannot pass a stream to its handler: {error}"),
    }
    Ok(())
}

/// Copies until the stream ends. `first` are bytes that the local program has already sent.
pub(crate) async fn pipe(stream: PeerStream, mut socket: Socket, first: Bytes) {
    let PeerStream {
        info,
        half_close,
        mut stream,
    } = stream;
    let mut to_peer = Direction::new(first);
    let mut to_client = Direction::new(Bytes::new());
    let mut ending = None;
    let copied = copy(
        (&mut to_peer, &mut to_client),
        (&mut stream, &mut socket),
        half_close,
        &mut ending,
    );
    if let Err(error) = copied.await {
        log::debug!("the stream of {} failed: {error}", info.protocol);
    }
    if ending == Some(Ending::EndOfFile) && !to_client.is_at_end {
        socket.finish().await;
        drain(stream).await;
    } else {
        drop(stream); // resets it, unless both ends have closed it
        socket.finish().await;
    }
}

/// How the direction to the peer ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    EndOfFile,
    /// The stream is reset, since the client has gone and receives no more data. Data sent
    /// before still arrives at a native peer. A Go peer would drop it, but closes its own direction after
    /// an end of file.
    Reset,
}

async fn copy(
    (to_peer, to_client): (&mut Direction, &mut Direction),
    (stream, socket): (&mut Substream, &mut Socket),
    half_close: bool,
    ending: &mut Option<Ending>,
) -> io::Result<()> {
    let mut hang_up = None;
    poll_fn(|cx| {
        let mut from_client = FromClient {
            stream,
            socket,
            may_reset: half_close,
            ending,
        };
        if to_peer.poll(&mut from_client, cx)?.is_ready() {
            // The client has no use for the rest if it has closed its socket.
            if socket.is_hung_up() {
                return Poll::Ready(io::Result::Ok(()));
            }
            let timer = hang_up.get_or_insert_with(|| tokio::time::interval(HANG_UP_INTERVAL));
            while timer.poll_tick(cx).is_ready() {}
        }
        if to_client
            .poll(&mut FromPeer { stream, socket }, cx)?
            .is_ready()
            && (to_peer.is_done || !half_close)
        {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    })
    .await?;
    if !to_peer.is_done {
        // The peer has closed both directions, and drops all data that it receives.
        poll_fn(|cx| Pin::new(&mut *stream).poll_close(cx)).await?;
    }
    Ok(())
}

/// Reads and drops the data that a peer still sends to a client that has gone. yamux cannot reset a stream
/// after an end of file, so the peer would otherwise wait forever for its window.
async fn drain(mut stream: Substream) {
    let mut buffer = vec![0; DRAIN_READ];
    let mut left = MAX_DRAINED;
    while left > 0 {
        match stream.read(&mut buffer).await {
            Ok(count @ 1..) => left = left.saturating_sub(count),
            _ => return,
        }
    }
}

/// The two ends of one direction.
trait Ends {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>>;
    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>>;
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

struct FromClient<'a> {
    stream: &'a mut Substream,
    socket: &'a mut Socket,
    may_reset: bool,
    ending: &'a mut Option<Ending>,
}

impl Ends for FromClient<'_> {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(&mut *self.socket).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let resets = self.may_reset && self.socket.is_hung_up();
        let decided = if resets {
            Ending::Reset
        } else {
            Ending::EndOfFile
        };
        match self.ending.get_or_insert(decided) {
            Ending::EndOfFile => Pin::new(&mut *self.stream).poll_close(cx),
            Ending::Reset => Pin::new(&mut *self.stream).poll_flush(cx),
        }
    }
}

struct FromPeer<'a> {
    stream: &'a mut Substream,
    socket: &'a mut Socket,
}

impl Ends for FromPeer<'_> {
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream).poll_read(cx, buffer)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.socket).poll_flush(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.socket).poll_shutdown(cx)
    }
}

/// The progress of one direction.
struct Direction {
    /// Bytes that were read and not yet written.
    unsent: Bytes,
    needs_flush: bool,
    is_at_end: bool,
    is_done: bool,
}

impl Direction {
    fn new(first: Bytes) -> Self {
        Self {
            unsent: first,
            needs_flush: false,
            is_at_end: false,
            is_done: false,
        }
    }

    /// Copies the available bytes. Ready once the end of file was passed on.
    fn poll(&mut self, ends: &mut impl Ends, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_done {
            return Poll::Ready(Ok(()));
        }
        let mut buffer = SCRATCH
            .take()
            .unwrap_or_else(|| vec![0; READ_SIZE].into_boxed_slice());
        let result = self.poll_with(&mut buffer, ends, cx);
        SCRATCH.set(Some(buffer));
        result
    }

    fn poll_with(
        &mut self,
        buffer: &mut [u8],
        ends: &mut impl Ends,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        for _ in 0..READ_BUDGET {
            while !self.unsent.is_empty() {
                let count = written(ready!(ends.poll_write(cx, &self.unsent)))?;
                self.unsent.advance(count);
                self.needs_flush = true;
            }
            if self.is_at_end {
                ready!(ends.poll_close(cx))?;
                self.is_done = true;
                return Poll::Ready(Ok(()));
            }
            let count = match ends.poll_read(cx, buffer) {
                Poll::Ready(read) => read?,
                Poll::Pending => {
                    if self.needs_flush {
                        ready!(ends.poll_flush(cx))?;
                        self.needs_flush = false;
                    }
                    return Poll::Pending;
                }
            };
            self.is_at_end = count == 0;
            let mut unsent = &buffer[..count];
            while !unsent.is_empty() {
                self.needs_flush = true;
                match ends.poll_write(cx, unsent) {
                    Poll::Ready(result) => unsent = &unsent[written(result)?..],
                    Poll::Pending => {
                        self.unsent = Bytes::copy_from_slice(unsent);
                        return Poll::Pending;
                    }
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

fn written(result: io::Result<usize>) -> io::Result<usize> {
    match result {
        Ok(0) => Err(ErrorKind::WriteZero.into()),
        result => result,
    }
}

#[cfg(all(test, unix))]
mod tests;
