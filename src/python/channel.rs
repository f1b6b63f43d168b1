//! A connection's socket with its unsent output: reads within a budget, writes as much as the socket
//! accepts, and sends nothing while it is corked.

use super::errors::Loss;
use super::socket::{with_scratch, Socket};
use p2pd_protocol::policy::retry::Progress;
use p2pd_protocol::{ClientExchange, Error, Output};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;
use std::io::{self, IoSlice};

/// The read budget of control connections and streams: how many bytes are read before other callbacks of
/// the event loop may run.
pub const READ_BUDGET: usize = 2 * 1024 * 1024;

/// Decodes the input of a channel.
pub trait Decoder {
    type Event;

    /// Largest number of bytes that one system call reads.
    const READ: usize;
    /// Largest number of bytes that it reads past the end of a payload.
    const READ_BEHIND: usize;
    /// The read budget, in bytes.
    const BUDGET: usize;

    /// The unfilled part of the payload that is being received, if it has a buffer of its own.
    fn payload_buffer(&mut self) -> Option<&mut [u8]> {
        None
    }

    fn payload_filled(&mut self, _count: usize) {}

    fn receive(&mut self, bytes: &[u8], events: &mut Vec<Self::Event>) -> Result<(), Error>;

    /// Returns the error for the end of the input.
    fn end_of_file(&mut self) -> Error;

    /// Whether to read more, with `unsent` bytes of output.
    fn wants_input(&self, _unsent: usize) -> bool {
        true
    }
}

/// Why a read failed. Ends the connection.
pub enum ReadError {
    Socket(io::Error),
    Protocol(Error),
}

impl From<ReadError> for Loss {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Socket(error) => error.into(),
            ReadError::Protocol(error) => Loss::Protocol(error),
        }
    }
}

pub struct Channel {
    /// `None` once the connection is lost or closed.
    socket: Option<Socket>,
    /// Holds bytes objects, but none of a subclass: dropping one of those could run Python.
    output: Output<PyBackedBytes>,
    /// Whether a flush is scheduled, before which nothing is sent.
    corked: bool,
}

impl Channel {
    /// A channel that keeps up to `kept` bytes of its output buffer for reuse.
    pub fn new(socket: Socket, kept: usize) -> Self {
        Self {
            socket: Some(socket),
            output: Output::keeping(kept),
            corked: false,
        }
    }

    pub fn socket(&self) -> Option<&Socket> {
        self.socket.as_ref()
    }

    pub fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// Takes the socket out, and drops the unsent output.
    pub fn close(&mut self) -> Option<Socket> {
        self.output = Output::default();
        self.socket.take()
    }

    /// Number of unsent bytes.
    pub fn unsent(&self) -> usize {
        self.output.len()
    }

    pub fn is_corked(&self) -> bool {
        self.corked
    }

    pub fn cork(&mut self) {
        self.corked = true;
    }

    pub fn uncork(&mut self) {
        self.corked = false;
    }

    /// Whether the event loop must report when the socket is writable.
    pub fn is_blocked(&self) -> bool {
        !self.output.is_empty() && !self.corked
    }

    /// Sends `head` and `tail`, and keeps the bytes that the socket does not accept. Returns how many it
    /// accepted.
    pub fn send(&mut self, head: &[u8], tail: Tail<'_, '_>) -> io::Result<usize> {
        let mut sent = 0;
        if let (Some(socket), false, true) = (&self.socket, self.corked, self.output.is_empty()) {
            sent = match tail.as_bytes() {
                [] => socket.write(head)?,
                payload => socket.write_vectored(&[IoSlice::new(head), IoSlice::new(payload)])?,
            };
        }
        self.output.push_copied(&head[sent.min(head.len())..]);
        let of_tail = sent.saturating_sub(head.len());
        match tail {
            Tail::None => {}
            Tail::Shared(data) => self.output.push_shared(data.clone().into(), of_tail),
            Tail::Borrowed(bytes) => self.output.push_copied(&bytes[of_tail..]),
        }
        Ok(sent)
    }

    /// Sends the unsent output, unless it is corked. Returns how many bytes the socket accepted.
    pub fn flush(&mut self) -> io::Result<usize> {
        let mut total = 0;
        let Some(socket) = self.socket.as_ref().filter(|_| !self.corked) else {
            return Ok(total);
        };
        while !self.output.is_empty() {
            let sent = socket.write_vectored(&self.output.slices())?;
            if sent == 0 {
                break;
            }
            self.output.sent(sent);
            total += sent;
        }
        Ok(total)
    }

    /// Reads and decodes input, within the budget.
    pub fn read<D: Decoder>(
        &self,
        decoder: &mut D,
        events: &mut Vec<D::Event>,
    ) -> Result<(), ReadError> {
        let Some(socket) = &self.socket else {
            return Ok(());
        };
        let mut budget = D::BUDGET;
        with_scratch(|scratch| loop {
            let (payload, wanted, read) = match decoder.payload_buffer() {
                Some(buffer) => {
                    let (len, behind) = (buffer.len(), &mut scratch[..D::READ_BEHIND]);
                    let read = socket.read_both(buffer, behind);
                    (len, len + D::READ_BEHIND, read)
                }
                None => (0, D::READ, socket.read(&mut scratch[..D::READ])),
            };
            let Some(count) = read.map_err(ReadError::Socket)? else {
                return Ok(());
            };
            if count == 0 {
                return Err(ReadError::Protocol(decoder.end_of_file()));
            }
            if payload > 0 {
                decoder.payload_filled(count.min(payload));
            }
            let received = decoder.receive(&scratch[..count.saturating_sub(payload)], events);
            received.map_err(ReadError::Protocol)?;
            budget = budget.saturating_sub(count);
            if count < wanted || budget == 0 || !decoder.wants_input(self.output.len()) {
                return Ok(());
            }
        })
    }
}

/// The part of a message after its head.
pub enum Tail<'a, 'py> {
    None,
    /// A bytes object, which is immutable and can be kept.
    Shared(&'a Bound<'py, PyBytes>),
    /// Borrowed from a buffer that may change afterwards.
    Borrowed(&'a [u8]),
}

impl<'a, 'py> Tail<'a, 'py> {
    pub fn of(data: &'a Bound<'py, PyAny>, bytes: &'a [u8]) -> Self {
        match data.cast_exact::<PyBytes>() {
            // Not of a subclass: dropping one of those could run Python.
            Ok(data) => Tail::Shared(data),
            Err(_) => Tail::Borrowed(bytes),
        }
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            Tail::None => &[],
            Tail::Shared(data) => data.as_bytes(),
            Tail::Borrowed(bytes) => bytes,
        }
    }
}

/// Whether a connection with one request in flight was lost before the daemon read the request.
pub fn is_unread(socket: &Socket, exchange: &mut ClientExchange, error: &io::Error) -> bool {
    Progress::waiting(exchange).is_unsent(socket.transport(), Some(error.kind()))
}
