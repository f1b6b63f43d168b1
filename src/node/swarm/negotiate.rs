//! Negotiation of a stream's protocol: multistream-select 1.0.0.
//!
//! Each side sends the line `/multistream/1.0.0`. The dialer proposes a name, and the listener repeats it,
//! or answers `na`. A line has its length in front and a newline at its end. See
//! <https://github.com/multiformats/multistream-select>.
//!
//! The negotiation costs no round trip of its own: a dialer that knows the peer's protocols sends header and
//! name with its first bytes, and a listener confirms them with its own.

use bytes::{Buf, BufMut, BytesMut};
use futures::{ready, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use std::io::{self, ErrorKind};
use std::pin::Pin;
use std::task::{Context, Poll};

const VERSION: &str = "/multistream/1.0.0";
const NOT_AVAILABLE: &str = "na";
const LIST: &str = "ls";
/// The longest line, with its newline, in bytes.
const MAX_LINE: usize = 4096;
/// Number of bytes that a read of the negotiation takes at most.
const READ: usize = 1024;
/// Number of names that a dialer may propose.
const MAX_PROPOSALS: usize = 256;
/// Number of bytes of the application that are sent together with the negotiation.
const TOGETHER: usize = 8 * 1024;

/// Reason why a stream was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The peer supports none of these protocols.
    #[error("protocols not supported: [{}]", .0.join(" "))]
    Unsupported(Vec<String>),
    /// The connection is closed.
    #[error("connection closed")]
    Closed,
    /// The stream failed during the negotiation.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The part of a node that serves a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// A service of this node.
    Served,
    /// A behaviour of the swarm.
    Delegated,
    /// None: the protocol is not supported.
    Unknown,
}

/// An inbound stream, after the dialer has proposed a supported protocol.
#[derive(Debug)]
pub enum Accepted<S> {
    /// A stream of a service, which confirms the protocol with its first bytes.
    Served(String, Negotiated<S>),
    /// A stream whose negotiation the swarm repeats and concludes.
    Delegated(Replayed<S>),
}

/// A stream whose protocol is known, but may not have been sent or confirmed yet.
#[derive(Debug)]
pub struct Negotiated<S> {
    stream: S,
    /// Bytes that were read from the stream behind the negotiation.
    unread: BytesMut,
    /// Bytes to send before any other.
    unsent: BytesMut,
    /// Whether `unsent` ends with bytes of the application.
    has_payload: bool,
    awaiting: Awaiting,
}

/// What the peer has still to send.
#[derive(Debug)]
enum Awaiting {
    Header(String),
    Confirmation(String),
    Nothing,
    /// The peer has refused the protocol.
    Refused(String),
}

impl<S> Negotiated<S> {
    /// A stream on which the dialer has sent nothing yet. The peer is expected to support `protocol`.
    pub fn lazy(stream: S, protocol: &str) -> Self {
        let mut unsent = BytesMut::new();
        put_line(&mut unsent, VERSION);
        put_line(&mut unsent, protocol);
        Self {
            awaiting: Awaiting::Header(protocol.to_owned()),
            ..Self::new(stream, BytesMut::new(), unsent)
        }
    }

    fn new(stream: S, unread: BytesMut, unsent: BytesMut) -> Self {
        Self {
            stream,
            unread,
            unsent,
            has_payload: false,
            awaiting: Awaiting::Nothing,
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Negotiated<S> {
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))?;
            if sent == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            self.unsent.advance(sent);
        }
        if self.has_payload || self.unsent.capacity() > 0 {
            self.has_payload = false;
            self.unsent = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Proposes the protocol, and reads until the peer has confirmed it.
    fn poll_negotiated(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.unsent.is_empty() {
            ready!(self.poll_send(cx))?;
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        }
        loop {
            match &self.awaiting {
                Awaiting::Nothing => return Poll::Ready(Ok(())),
                Awaiting::Refused(protocol) => return Poll::Ready(Err(unsupported(protocol))),
                Awaiting::Header(_) | Awaiting::Confirmation(_) => {}
            }
            let Some(line) = take_line(&mut self.unread)? else {
                let mut chunk = [0; READ];
                let count = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut chunk))?;
                if count == 0 {
                    return Poll::Ready(Err(ErrorKind::UnexpectedEof.into()));
                }
                self.unread.extend_from_slice(&chunk[..count]);
                continue;
            };
            self.awaiting = match std::mem::replace(&mut self.awaiting, Awaiting::Nothing) {
                Awaiting::Header(protocol) if line == VERSION => Awaiting::Confirmation(protocol),
                Awaiting::Confirmation(protocol) if line == protocol => Awaiting::Nothing,
                Awaiting::Confirmation(protocol) if line == NOT_AVAILABLE => {
                    Awaiting::Refused(protocol)
                }
                awaiting => {
                    self.awaiting = awaiting;
                    return Poll::Ready(Err(unexpected(&line)));
                }
            };
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Negotiated<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if !matches!(this.awaiting, Awaiting::Nothing) {
            ready!(this.poll_negotiated(cx))?;
        }
        if !this.unread.is_empty() {
            return Poll::Ready(Ok(take(&mut this.unread, buffer)));
        }
        let read = Pin::new(&mut this.stream).poll_read(cx, buffer);
        if read.is_pending() && !this.unsent.is_empty() {
            // The peer may send nothing before it has received these bytes.
            ready!(this.poll_send(cx))?;
            ready!(Pin::new(&mut this.stream).poll_flush(cx))?;
        }
        read
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Negotiated<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.unsent.is_empty() {
            return Pin::new(&mut this.stream).poll_write(cx, bytes);
        }
        if this.has_payload {
            ready!(this.poll_send(cx))?;
            return Pin::new(&mut this.stream).poll_write(cx, bytes);
        }
        let count = bytes.len().min(TOGETHER);
        this.unsent.extend_from_slice(&bytes[..count]);
        this.has_payload = true;
        // What the stream does not take now is sent before the next bytes, or when it is flushed or read.
        if let Poll::Ready(Err(error)) = this.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.stream).poll_close(cx)
    }
}

/// An inbound stream that returns the bytes of the negotiation again, and does not send the header twice.
#[derive(Debug)]
pub struct Replayed<S> {
    stream: S,
    unread: BytesMut,
    /// Number of bytes that were sent on behalf of the swarm.
    already_sent: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Replayed<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.unread.is_empty() {
            return Pin::new(&mut this.stream).poll_read(cx, buffer);
        }
        Poll::Ready(Ok(take(&mut this.unread, buffer)))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Replayed<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.already_sent > 0 {
            let count = bytes.len().min(this.already_sent);
            this.already_sent -= count;
            return Poll::Ready(Ok(count));
        }
        Pin::new(&mut this.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_close(cx)
    }
}

/// Proposes names one after another until the peer accepts one. Returns it.
///
/// # Errors
/// The peer accepts none of them, or the stream fails.
pub async fn select<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    protocols: &[String],
) -> Result<(String, Negotiated<S>), OpenError> {
    let (mut unread, mut unsent) = (BytesMut::new(), BytesMut::new());
    put_line(&mut unsent, VERSION);
    let mut has_header = false;
    for protocol in protocols {
        put_line(&mut unsent, protocol);
        stream.write_all(&unsent).await?;
        stream.flush().await?;
        unsent.clear();
        loop {
            let line = read_line(&mut stream, &mut unread).await?;
            if !has_header && line == VERSION {
                has_header = true;
            } else if has_header && line == *protocol {
                let stream = Negotiated::new(stream, unread, BytesMut::new());
                return Ok((protocol.clone(), stream));
            } else if has_header && line == NOT_AVAILABLE {
                break;
            } else {
                return Err(unexpected(&line).into());
            }
        }
    }
    Err(OpenError::Unsupported(protocols.to_vec()))
}

/// Reads the dialer's proposals until one is supported. `served` returns the names of all protocols.
///
/// # Errors
/// The dialer has left, or does not keep to the protocol.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    offer: impl Fn(&str) -> Offer,
    served: impl Fn() -> Vec<String>,
) -> io::Result<Accepted<S>> {
    let mut unread = BytesMut::new();
    let line = read_line(&mut stream, &mut unread).await?;
    if line != VERSION {
        return Err(unexpected(&line));
    }
    let mut answer = BytesMut::new();
    put_line(&mut answer, VERSION);
    for _ in 0..MAX_PROPOSALS {
        let line = match take_line(&mut unread) {
            Ok(Some(line)) => line,
            next => {
                // Some dialers propose nothing before they have received the header. Others have sent
                // their payload already, which is no proposal: they must learn of the refusal.
                stream.write_all(&answer).await?;
                stream.flush().await?;
                answer.clear();
                next?;
                read_line(&mut stream, &mut unread).await?
            }
        };
        match offer(&line) {
            Offer::Served => {
                put_line(&mut answer, &line);
                let stream = Negotiated::new(stream, unread, answer);
                return Ok(Accepted::Served(line, stream));
            }
            Offer::Delegated => {
                let mut header = BytesMut::new();
                put_line(&mut header, VERSION);
                // The swarm sends a header of its own.
                let already_sent = match answer.strip_prefix(&header[..]) {
                    Some([]) => 0,
                    _ => header.len(),
                };
                if already_sent > 0 {
                    stream.write_all(&answer).await?;
                }
                let mut replayed = header;
                put_line(&mut replayed, &line);
                replayed.unsplit(unread);
                return Ok(Accepted::Delegated(Replayed {
                    stream,
                    unread: replayed,
                    already_sent,
                }));
            }
            Offer::Unknown if line == LIST => put_list(&mut answer, &served()),
            Offer::Unknown => put_line(&mut answer, NOT_AVAILABLE),
        }
    }
    stream.write_all(&answer).await?;
    Err(io::Error::other("the peer proposes too many protocols"))
}

async fn read_line<S: AsyncRead + Unpin>(
    stream: &mut S,
    unread: &mut BytesMut,
) -> io::Result<String> {
    loop {
        if let Some(line) = take_line(unread)? {
            return Ok(line);
        }
        let mut chunk = [0; READ];
        match stream.read(&mut chunk).await? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => unread.extend_from_slice(&chunk[..count]),
        }
    }
}

/// Moves bytes off the front of `unread` into `buffer`, and frees `unread` when it is empty.
fn take(unread: &mut BytesMut, buffer: &mut [u8]) -> usize {
    let count = unread.len().min(buffer.len());
    unread.copy_to_slice(&mut buffer[..count]);
    if unread.is_empty() {
        *unread = BytesMut::new();
    }
    count
}

/// Takes a line off the front of `bytes`, if they contain one.
fn take_line(bytes: &mut BytesMut) -> io::Result<Option<String>> {
    use unsigned_varint::decode::{self, Error};
    let (length, rest) = match decode::usize(bytes) {
        Ok(decoded) => decoded,
        Err(Error::Insufficient) => return Ok(None),
        Err(error) => return Err(io::Error::new(ErrorKind::InvalidData, error)),
    };
    if length == 0 || length > MAX_LINE {
        let message = format!("a line of {length} bytes in the negotiation of a protocol");
        return Err(io::Error::new(ErrorKind::InvalidData, message));
    }
    if rest.len() < length {
        return Ok(None);
    }
    bytes.advance(bytes.len() - rest.len());
    let line = bytes.split_to(length);
    let text = line
        .strip_suffix(b"\n")
        .and_then(|line| std::str::from_utf8(line).ok());
    match text {
        Some(text) => Ok(Some(text.to_owned())),
        None => Err(io::Error::new(
            ErrorKind::InvalidData,
            "a line without an end, or not in UTF-8, in the negotiation of a protocol",
        )),
    }
}

fn put_line(out: &mut BytesMut, line: &str) {
    put_length(out, line.len() + 1);
    out.put_slice(line.as_bytes());
    out.put_u8(b'\n');
}

/// Appends the answer to `ls`: a line that contains a line for each name.
fn put_list(out: &mut BytesMut, names: &[String]) {
    let mut list = BytesMut::new();
    for name in names {
        put_line(&mut list, name);
    }
    put_length(out, list.len() + 1);
    out.put_slice(&list);
    out.put_u8(b'\n');
}

fn put_length(out: &mut BytesMut, length: usize) {
    out.put_slice(unsigned_varint::encode::usize(
        length,
        &mut unsigned_varint::encode::usize_buffer(),
    ));
}

fn unsupported(protocol: &str) -> io::Error {
    io::Error::other(OpenError::Unsupported(vec![protocol.to_owned()]))
}

fn unexpected(line: &str) -> io::Error {
    let line: String = line.chars().take(64).collect();
    io::Error::new(
        ErrorKind::InvalidData,
        format!("unexpected {line:?} in the negotiation of a protocol"),
    )
}

#[cfg(test)]
mod tests;
