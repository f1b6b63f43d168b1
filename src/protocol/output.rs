//! What waits to be sent on a connection: it says what to write next, and is told how much of that
//! was written.

use bytes::{Buf, BytesMut};
use std::collections::VecDeque;
use std::io::IoSlice;

/// A payload of at least this many bytes is sent from where it is; a smaller one costs less to
/// copy behind what is before it than as a piece of its own.
const SHARE: usize = 16 * 1024;

/// How many pieces are given out for one write. Linux takes 1024, but 64 payloads are more than a
/// socket's buffer has room for.
const PIECES: usize = 64;

/// A queue of bytes. `S` is a payload that can be kept, as `bytes::Bytes`: one that is large is
/// never copied.
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
    /// Room that was written from, for what comes next, and how much of it may be kept.
    spare: BytesMut,
    keeps: usize,
}

#[derive(Debug)]
enum Chunk<S> {
    Copied(BytesMut),
    Shared { data: S, sent: usize },
}

impl<S: AsRef<[u8]>> Chunk<S> {
    /// What of it is still to be sent: never nothing.
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
    /// One that keeps up to `room` bytes of room for what comes next, for what is in use all the
    /// time.
    pub fn keeping(room: usize) -> Self {
        Self {
            keeps: room,
            ..Self::default()
        }
    }

    /// How many bytes wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl<S: AsRef<[u8]>> Output<S> {
    /// Adds bytes that cannot be kept.
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

    /// Adds what `put` appends to the buffer that it is given. It must not remove anything.
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

    /// Adds a payload, of which the first `sent` bytes need not be sent any more. It is kept if
    /// much of it remains.
    pub fn push_shared(&mut self, data: S, sent: usize) {
        let rest = data.as_ref().get(sent..).unwrap_or_default();
        if rest.len() < SHARE {
            return self.push_copied(rest);
        }
        self.len += rest.len();
        self.chunks.push_back(Chunk::Shared { data, sent });
    }

    /// What to write next, in as many pieces as one write is good for; nothing only if nothing
    /// waits.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let chunks = self.chunks.iter().take(PIECES);
        chunks.map(|chunk| IoSlice::new(chunk.rest())).collect()
    }

    /// Lets go of the first `count` bytes, which were written. Gives back the payloads that are done
    /// with, for whoever must not drop them where this is called.
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

    /// What a socket would be given that takes `count` bytes at a time.
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
    fn small_pieces_are_one() {
        let mut output = Output::default();
        output.push_copied(b"head");
        output.push_shared(Bytes::from_static(b"payload"), 0);
        output.push_copied(b"head");
        assert_eq!(output.slices().len(), 1);
        assert_eq!(drain(&mut output, 100), b"headpayloadhead");
    }

    #[test]
    fn appended_bytes_join_the_copied_bytes_before_them() {
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
    fn a_large_payload_is_sent_from_where_it_is() {
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
    fn a_payload_is_let_go_of_once_it_is_sent() {
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
    fn what_is_left_of_a_payload_is_copied_if_it_is_little() {
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
    fn room_is_kept_within_its_bound_and_only_if_asked_for() {
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
    fn one_write_gets_a_bounded_number_of_pieces() {
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
        fn any_pushes_and_writes_give_the_same_bytes(steps in steps(), count in 1..4 * SHARE) {
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
