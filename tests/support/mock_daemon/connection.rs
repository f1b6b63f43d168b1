//! A persistent connection, to whose output any thread may append.

use super::buffer::Buffer;
use super::limits::MAX_FRAME;
use crate::lock::lock;
use crate::socket::Socket;
use p2pd_protocol::unary::server::{PersistentServer, ServerLimits};
use p2pd_protocol::unary::CallId;
use p2pd_protocol::Output;
use std::collections::HashMap;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Size of the output at which it is written, in bytes.
const BATCH: usize = 256 << 10;
/// Payloads of at least this many bytes are not copied.
const SHARED: usize = 128 << 10;
/// Size of the output at which other threads wait for the one that writes, in bytes.
const MAX_QUEUED: usize = 64 << 20;
/// Time after which a write that makes no progress returns.
const STALL: Duration = Duration::from_millis(20);

/// A persistent connection. Any thread may append to its output; one at a time writes it. `T` is the token of
/// a call that the client handles, and `F` tells where a call of the client was forwarded.
pub(super) struct Connection<T, F> {
    pub(super) socket: Socket,
    pub(super) state: Mutex<State<T, F>>,
    /// Notified when a part of the output was written.
    written: Condvar,
}

/// The protocol state and the output of a connection.
pub(super) struct State<T, F> {
    pub(super) server: PersistentServer<T, Buffer>,
    pub(super) output: Output<Buffer>,
    /// The output that was written last, for reuse.
    spare: Output<Buffer>,
    is_writing: bool,
    /// Number of threads that wait for the one that writes.
    waiting: usize,
    pub(super) is_closed: bool,
    /// The client's calls that were forwarded to a handler.
    pub(super) forwarded: HashMap<CallId, F>,
}

impl<T, F> State<T, F> {
    /// Replies to a call, unless it was cancelled.
    pub(super) fn reply(&mut self, id: &CallId, payload: Buffer) {
        self.forwarded.remove(id);
        let server = &mut self.server;
        if self
            .output
            .append(|out| server.reply(id, payload.0.len(), out))
        {
            push(&mut self.output, payload);
        }
    }

    /// Replies to a call with a handler's error, unless it was cancelled.
    pub(super) fn reply_error(&mut self, id: &CallId, error: &str) {
        self.forwarded.remove(id);
        let server = &mut self.server;
        self.output.append(|out| server.reply_error(id, error, out));
    }

    /// Refuses a call, unless it was cancelled.
    pub(super) fn refuse(&mut self, id: &CallId, message: &str) {
        if self.server.is_unanswered(id) {
            self.forwarded.remove(id);
            self.refuse_request(id, message);
        }
    }

    pub(super) fn refuse_request(&mut self, id: &CallId, message: &str) {
        let server = &mut self.server;
        self.output.append(|out| server.refuse(id, message, out));
    }

    pub(super) fn acknowledge(&mut self, id: &CallId) {
        self.output.append(|out| self.server.acknowledge(id, out));
    }

    /// Gives the client a call with a payload of `len` bytes, which `push` adds to the output.
    pub(super) fn handle(
        &mut self,
        (peer, protocol, len): (&[u8], &str, usize),
        token: T,
        push: impl FnOnce(&mut Output<Buffer>),
    ) -> Result<CallId, String> {
        if self.is_closed {
            return Err(LEFT.to_owned());
        }
        let server = &mut self.server;
        let handled = self
            .output
            .append(|out| server.handle(peer, protocol, len, token, out));
        let id = handled.map_err(|error| error.to_string())?;
        push(&mut self.output);
        Ok(id)
    }
}

/// Queues a payload. Copying one of 64 KiB costs less than a slice of its own.
pub(super) fn push(output: &mut Output<Buffer>, payload: Buffer) {
    if payload.0.len() < SHARED {
        output.push_copied(payload.as_ref());
    } else {
        output.push_shared(payload, 0);
    }
}

/// Error of a call whose handler has disconnected.
pub(super) const LEFT: &str = "the handler's client left";

impl<T, F> Connection<T, F> {
    pub(super) fn new(socket: Socket, seed: [u8; 32]) -> Self {
        let limits = ServerLimits::default().with_max_message(MAX_FRAME);
        socket.limit_writes(STALL);
        Self {
            socket,
            state: Mutex::new(State {
                server: PersistentServer::new(seed, limits),
                output: Output::keeping(MAX_FRAME),
                spare: Output::keeping(MAX_FRAME),
                is_writing: false,
                waiting: 0,
                is_closed: false,
                forwarded: HashMap::new(),
            }),
            written: Condvar::new(),
        }
    }

    /// Writes the output, unless another thread is writing it. Waits for that thread only if too much is queued.
    pub(super) fn flush(&self) -> io::Result<()> {
        while let Some(mut output) = self.begin_writing() {
            while !self.write(&mut output)? {}
            self.end_writing(output);
        }
        Ok(())
    }

    /// Like `flush`, for the thread that reads this connection. If the client does not read for a while, another
    /// thread writes the rest: the client may be writing, and so wait until this thread reads.
    fn flush_own(self: &Arc<Self>) -> io::Result<()>
    where
        T: Send + 'static,
        F: Send + 'static,
    {
        while let Some(mut output) = self.begin_writing() {
            if !self.write(&mut output)? {
                let this = self.clone();
                thread::spawn(move || {
                    while !this.write(&mut output)? {}
                    this.end_writing(output);
                    this.flush()
                });
                return Ok(());
            }
            self.end_writing(output);
        }
        Ok(())
    }

    /// Takes the output to write. `None` without output, or while another thread writes. `end_writing` must follow,
    /// unless writing fails.
    fn begin_writing(&self) -> Option<Output<Buffer>> {
        let mut state = lock(&self.state);
        while state.is_writing && state.output.len() > MAX_QUEUED {
            state.waiting += 1;
            let waited = self.written.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        if state.is_closed {
            state.output = Output::default();
        }
        if state.is_writing || state.output.is_empty() {
            return None;
        }
        let spare = std::mem::take(&mut state.spare);
        state.is_writing = true;
        Some(std::mem::replace(&mut state.output, spare))
    }

    fn end_writing(&self, mut output: Output<Buffer>) {
        let mut state = lock(&self.state);
        state.is_writing = false;
        if state.output.is_empty() {
            // Reuses the buffer that is in the CPU's cache.
            std::mem::swap(&mut state.output, &mut output);
        }
        state.spare = output;
        if state.waiting > 0 {
            self.written.notify_all(); // a system call
        }
    }

    /// Writes output. Returns whether all of it was written: not if the client did not read for `STALL`. An error
    /// closes the connection.
    fn write(&self, output: &mut Output<Buffer>) -> io::Result<bool> {
        let written = self.write_until_stall(output);
        if written.is_err() {
            let mut state = lock(&self.state);
            // The reading thread sees the end, and fails the calls that wait for this client.
            state.is_closed = true;
            self.socket.shutdown(Shutdown::Both);
            drop(state);
            self.end_writing(Output::default());
        }
        written
    }

    fn write_until_stall(&self, output: &mut Output<Buffer>) -> io::Result<bool> {
        while !output.is_empty() {
            let written = match &output.slices()[..] {
                [all] => (&self.socket).write(all), // cheaper than a vectored write
                slices => (&self.socket).write_vectored(slices),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => drop(output.sent(count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// The connections that one thread appends to between two flushes.
pub(super) struct Outbox<T, F> {
    /// The connection that the thread serves.
    pub(super) own: Arc<Connection<T, F>>,
    /// The other connections for which there is output since the last flush.
    others: Vec<Arc<Connection<T, F>>>,
    /// Whether one of the outputs holds a batch.
    pub(super) is_full: bool,
}

impl<T, F> Outbox<T, F> {
    pub(super) fn new(own: Arc<Connection<T, F>>) -> Self {
        Self {
            own,
            others: Vec::new(),
            is_full: false,
        }
    }

    pub(super) fn update_own<R>(&mut self, update: impl FnOnce(&mut State<T, F>) -> R) -> R {
        let mut state = lock(&self.own.state);
        let result = update(&mut state);
        self.is_full |= state.output.len() >= BATCH;
        result
    }

    /// Changes the state of a connection and remembers to flush it.
    pub(super) fn update<R>(
        &mut self,
        target: &Arc<Connection<T, F>>,
        update: impl FnOnce(&mut State<T, F>) -> R,
    ) -> R {
        let mut state = lock(&target.state);
        let result = update(&mut state);
        self.is_full |= state.output.len() >= BATCH;
        drop(state);
        let is_known = |known: &Arc<Connection<T, F>>| Arc::ptr_eq(known, target);
        if !is_known(&self.own) && !self.others.iter().any(is_known) {
            self.others.push(target.clone());
        }
        result
    }

    pub(super) fn flush(&mut self) -> io::Result<()>
    where
        T: Send + 'static,
        F: Send + 'static,
    {
        self.is_full = false;
        for other in self.others.drain(..) {
            // After an error, the thread of that connection sees the end.
            let _ = other.flush();
        }
        self.own.flush_own()
    }
}
