//! The output queue of a connection: bytes to send, as slices for vectored writes.

use bytes::{Buf, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Smallest payload that is not copied, in bytes. Appending a smaller one to the previous buffer costs
/// less than another slice.
const SHARE: usize = 16 * 1024;

/// Largest number of slices for one write. Linux accepts 1024, but 64 payloads are more than a socket's
/// buffer can hold.
const PIECES: usize = 64;

/// A queue of bytes to send. `S` is the type of a payload that the queue can own, such as
/// `bytes::Bytes`. Large payloads are never copied.
///
/// ```
/// use p2pd_protocol::Output;
/// use std::io::Write;
///
/// let mut output = Output::<Vec<u8>>::default();
/// output.push_copied(b"head");
/// output.push_shared(vec![7; 1 << 20], 0);
///
/// let mut socket = Vec::new();
/// while !output.is_empty() {
///     let sent = socket.write_vectored(&output.slices())?;
///     output.sent(sent);
/// }
/// assert_eq!(socket.len(), 4 + (1 << 20));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Output<S> {
    chunks: VecDeque<Chunk<S>>,
    len: usize,
    /// An empty buffer for reuse.
    spare: BytesMut,
    /// Largest capacity of `spare`, in bytes.
    keeps: usize,
}

#[derive(Debug)]
enum Chunk<S> {
    Copied(BytesMut),
    Shared { data: S, sent: usize },
}

impl<S: AsRef<[u8]>> Chunk<S> {
    /// The unsent bytes; never empty.
    fn rest(&self) -> &[u8] {
        match self {
            Chunk::Copied(bytes) => bytes,
            Chunk::Shared { data, sent } => &data.as_ref()[*sent..],
        }
    }
}

impl<S> Default for Output<S> {
    fn default() -> Self {
        Self {
            chunks: VecDeque::new(),
            len: 0,
            spare: BytesMut::new(),
            keeps: 0,
        }
    }
}

impl<S> Output<S> {
    /// A queue that keeps a buffer of up to `capacity` bytes for reuse.
    pub fn keeping(capacity: usize) -> Self {
        Self {
            keeps: capacity,
            ..Self::default()
        }
    }

    /// Number of bytes to send.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes to send.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<S: AsRef<[u8]>> Output<S> {
    /// Appends a copy of `bytes`.
    pub fn push_copied(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.len += bytes.len();
        match self.chunks.back_mut() {
            Some(Chunk::Copied(chunk)) => chunk.extend_from_slice(bytes),
            _ => {
                let mut chunk = std::mem::take(&mut self.spare);
                chunk.extend_from_slice(bytes);
                self.chunks.push_back(Chunk::Copied(chunk));
            }
        }
    }

    /// Lets `put` append to the queue's last buffer. `put` must not remove anything from it.
    pub fn append<R>(&mut self, put: impl FnOnce(&mut BytesMut) -> R) -> R {
        let mut chunk = match self.chunks.pop_back() {
            Some(Chunk::Copied(chunk)) => chunk,
            other => {
                self.chunks.extend(other);
                std::mem::take(&mut self.spare)
            }
        };
        let before = chunk.len();
        let result = put(&mut chunk);
        self.len += chunk.len() - before;
        if chunk.is_empty() {
            self.spare = chunk;
        } else {
            self.chunks.push_back(Chunk::Copied(chunk));
        }
        result
    }

    /// Appends a payload without its first `sent` bytes. Copies the rest if it is small; otherwise keeps
    /// the payload itself.
    pub fn push_shared(&mut self, data: S, sent: usize) {
        let rest = data.as_ref().get(sent..).unwrap_or_default();
        if rest.len() < SHARE {
            return self.push_copied(rest);
        }
        self.len += rest.len();
        self.chunks.push_back(Chunk::Shared { data, sent });
    }

    /// Returns the slices to write next. There are none only if the queue is empty.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let chunks = self.chunks.iter().take(PIECES);
        chunks.map(|chunk| IoSlice::new(chunk.rest())).collect()
    }

    /// Removes the first `count` bytes, which were written. Returns the payloads that were sent
    /// completely, so that the driver can choose where to drop them.
    pub fn sent(&mut self, count: usize) -> Vec<S> {
        let mut count = count.min(self.len);
        let mut done = Vec::new();
        self.len -= count;
        while let Some(chunk) = self.chunks.front_mut() {
            let rest = chunk.rest().len();
            if count < rest {
                match chunk {
                    Chunk::Copied(bytes) => bytes.advance(count),
                    Chunk::Shared { sent, .. } => *sent += count,
                }
                break;
            }
            count -= rest;
            match self.chunks.pop_front() {
                Some(Chunk::Shared { data, .. }) => done.push(data),
                Some(Chunk::Copied(mut bytes)) if bytes.capacity() <= self.keeps => {
                    bytes.clear();
                    self.spare = bytes;
                }
                _ => {}
            }
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;

    /// Writes everything to a socket that accepts `count` bytes at a time.
    fn drain(output: &mut Output<Bytes>, count: usize) -> Vec<u8> {
        let mut written = Vec::new();
        while !output.is_empty() {
            written.extend(write(output, count));
        }
        written
    }

    fn write(output: &mut Output<Bytes>, count: usize) -> Vec<u8> {
        let slices = output.slices();
        let mut written = slices
            .iter()
            .map(|slice| &slice[..])
            .collect::<Vec<_>>()
            .concat();
        written.truncate(count);
        output.sent(written.len());
        written
    }

    #[test]
    fn joins_small_pieces() {
        let mut output = Output::default();
        output.push_copied(b"head");
        output.push_shared(Bytes::from_static(b"payload"), 0);
        output.push_copied(b"head");
        assert_eq!(output.slices().len(), 1);
        assert_eq!(drain(&mut output, 100), b"headpayloadhead");
    }

    #[test]
    fn joins_appended_and_copied_bytes() {
        let mut output = Output::<Bytes>::default();
        output.append(|_| ());
        assert!(output.is_empty() && output.slices().is_empty());
        output.append(|out| out.extend_from_slice(b"head"));
        assert_eq!(output.append(|out| out.len()), 4);
        output.append(|out| out.extend_from_slice(b"payload"));
        assert_eq!((output.len(), output.slices().len()), (11, 1));
        output.push_shared(Bytes::from(vec![7; SHARE]), 0);
        output.append(|out| out.extend_from_slice(b"next"));
        assert_eq!(output.slices().len(), 3);
        assert_eq!(output.len(), 11 + SHARE + 4);
    }

    #[test]
    fn does_not_copy_a_large_payload() {
        let payload = Bytes::from(vec![7; SHARE]);
        let mut output = Output::default();
        output.push_copied(b"head");
        output.push_shared(payload.clone(), 0);
        output.push_copied(b"next");
        let slices = output.slices();
        assert_eq!(slices.len(), 3);
        assert_eq!(slices[1].as_ptr(), payload.as_ptr());
        assert_eq!(slices[1].len(), SHARE);
    }

    #[test]
    fn returns_a_payload_once_it_is_sent() {
        let payload = Bytes::from(vec![7; SHARE]);
        let mut output = Output::default();
        output.push_shared(payload.clone(), 0);
        output.sent(SHARE - 1);
        assert!(!payload.is_unique());
        output.sent(1);
        assert!(payload.is_unique());
        assert!(output.is_empty());
    }

    #[test]
    fn copies_a_small_rest_of_a_payload() {
        let payload = Bytes::from(vec![7; SHARE]);
        let mut output = Output::default();
        output.push_shared(payload.clone(), 1);
        assert!(payload.is_unique());
        assert_eq!(output.len(), SHARE - 1);
        output.push_shared(payload.clone(), SHARE);
        output.push_shared(payload, SHARE + 1);
        assert_eq!(output.len(), SHARE - 1);
    }

    #[test]
    fn keeps_a_buffer_within_its_bound_and_only_if_requested() {
        for (mut output, len, kept) in [
            (Output::<Bytes>::keeping(1000), 700, 700),
            (Output::keeping(1000), 1001, 0),
            (Output::default(), 700, 0),
        ] {
            output.push_copied(&vec![7; len]);
            output.sent(len);
            assert_eq!(output.spare.capacity(), kept);
            output.push_copied(b"next");
            assert_eq!(drain(&mut output, 100), b"next");
        }
    }

    #[test]
    fn bounds_the_number_of_slices() {
        let payload = Bytes::from(vec![7; SHARE]);
        let mut output = Output::default();
        for _ in 0..PIECES + 1 {
            output.push_shared(payload.clone(), 0);
        }
        assert_eq!(output.slices().len(), PIECES);
        assert_eq!(
            drain(&mut output, usize::MAX),
            [7; SHARE].repeat(PIECES + 1)
        );
    }

    #[derive(Debug, Clone)]
    enum Step {
        Copied(usize),
        Shared(usize, usize),
        Write(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let size = prop_oneof![0..40usize, SHARE - 2..SHARE + 2, 0..3 * SHARE];
        let step = prop_oneof![
            size.clone().prop_map(Step::Copied),
            (size.clone(), size.clone()).prop_map(|(len, sent)| Step::Shared(len, sent)),
            size.prop_map(Step::Write),
        ];
        prop::collection::vec(step, 0..40)
    }

    proptest! {
        #[test]
        fn sends_all_bytes_in_order_whatever_the_writes(steps in steps(), count in 1..4 * SHARE) {
            let mut next = 0u8;
            let mut fresh = |len| {
                next = next.wrapping_add(1);
                vec![next; len]
            };
            let (mut output, mut pushed, mut written) = (Output::keeping(64), vec![], vec![]);
            for step in steps {
                match step {
                    Step::Copied(len) => {
                        let bytes = fresh(len);
                        output.push_copied(&bytes);
                        pushed.extend(bytes);
                    }
                    Step::Shared(len, sent) => {
                        let bytes = fresh(len);
                        pushed.extend(&bytes[sent.min(len)..]);
                        output.push_shared(Bytes::from(bytes), sent);
                    }
                    Step::Write(count) => written.extend(write(&mut output, count)),
                }
                prop_assert_eq!(output.len(), pushed.len() - written.len());
                prop_assert_eq!(output.is_empty(), output.slices().is_empty());
                prop_assert!(output.slices().iter().all(|slice| !slice.is_empty()));
            }
            written.extend(drain(&mut output, count));
            prop_assert!(written == pushed);
        }
    }
}
