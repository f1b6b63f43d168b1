//! Memory that received bytes can make the library allocate, counted by the allocator.

use bytes::BytesMut;
use p2pd_protocol::command::{control, dht, pubsub, Typed};
use p2pd_protocol::{ClientExchange, EncodedRequest, FrameDecoder, Limits};
use p2pd_protocol::{PersistentClient, UnaryLimits};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Instant;

thread_local! {
    static USED: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counting the memory of each thread.
struct Counting;

fn count(size: isize) {
    USED.set(USED.get() + size);
    PEAK.set(PEAK.get().max(USED.get()));
}

#[allow(unsafe_code)]
// SAFETY: calls are passed on unchanged; counting neither allocates nor panics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Returns the peak memory of `work`, in bytes.
fn peak(work: impl FnOnce()) -> usize {
    let before = USED.get();
    PEAK.set(before);
    work();
    usize::try_from(PEAK.get() - before).unwrap()
}

fn varint(mut number: usize, out: &mut Vec<u8>) {
    while number > 0x7f {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    varint(content.len(), &mut out);
    out.extend_from_slice(content);
    out
}

fn frame(message: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(message.len(), &mut out);
    out.extend_from_slice(message);
    out
}

/// Encodes Response{OK} with this content.
fn ok(content: &[u8]) -> Vec<u8> {
    [&[8, 0], content].concat()
}

const DECLARED: [usize; 5] = [1 << 10, 20_000, 1 << 20, 4 << 20, (4 << 20) + (63 << 10)];
const SENT: [usize; 6] = [0, 1, 100, 5_000, 64 << 10, 1 << 20];

#[test]
fn declared_length_alone_allocates_no_memory() {
    for declared in DECLARED {
        for sent in SENT.into_iter().filter(|sent| *sent < declared) {
            let mut bytes = Vec::new();
            varint(declared, &mut bytes);
            bytes.resize(bytes.len() + sent, 0);
            let used = peak(|| {
                let mut exchange = ClientExchange::new(Limits::default());
                exchange.send(&control::Identify.encoded()).unwrap();
                exchange.receive(&bytes);
                assert_eq!(exchange.poll(), Ok(None));
            });
            assert!(used <= 3 * sent + 1024, "{used} for {sent} of {declared}");
            let used = peak(|| {
                let mut decoder = FrameDecoder::new(8 << 20);
                decoder.extend(&bytes);
                assert_eq!(decoder.next_frame(), Ok(None));
            });
            assert!(used <= 3 * sent + 1024, "{used} for {sent} of {declared}");
        }
    }
}

#[test]
fn payload_takes_memory_only_as_it_arrives() {
    for declared in DECLARED {
        for sent in SENT.into_iter().filter(|sent| *sent < declared) {
            let mut connection =
                PersistentClient::<(), Vec<u8>>::new([7; 32], UnaryLimits::default());
            let mut out = BytesMut::new();
            let now = Instant::now();
            let id = connection.call(b"", "", 0, (), now, &mut out).unwrap();
            // A reply whose last field, the payload, has the declared length.
            let mut payload = vec![10];
            varint(declared, &mut payload);
            let mut reply = [&[10, 16], &id[..], &[18]].concat();
            varint(payload.len() + declared, &mut reply);
            reply.extend_from_slice(&payload);
            let mut bytes = Vec::new();
            varint(reply.len() + declared, &mut bytes);
            bytes.extend_from_slice(&reply);
            bytes.resize(bytes.len() + sent, 0);
            for piece in [1000, usize::MAX] {
                let used = peak(|| {
                    let mut connection = connection_like(&id);
                    for part in bytes.chunks(piece) {
                        assert_eq!(connection.poll(&mut &part[..]), Ok(None));
                    }
                });
                assert!(used <= 20 * sent + 8192, "{used} for {sent} of {declared}");
            }
        }
    }
}

/// Returns a connection that waits for the reply to its first call, whose id is always the same.
fn connection_like(id: &[u8; 16]) -> PersistentClient<(), Vec<u8>> {
    let mut connection = PersistentClient::new([7; 32], UnaryLimits::default());
    let mut out = BytesMut::new();
    let same = connection.call(b"", "", 0, (), Instant::now(), &mut out);
    assert_eq!(same.as_ref(), Ok(id));
    connection
}

/// Returns how many times its size a Response of empty fields takes in memory.
fn multiple(request: EncodedRequest, message: Vec<u8>) -> usize {
    let bytes = frame(&message);
    let used = peak(|| {
        let mut exchange = ClientExchange::new(Limits::default());
        exchange.send(&request).unwrap();
        exchange.receive(&bytes);
        // The exchange has ended, whatever the result.
        assert_ne!(exchange.poll(), Ok(None));
    });
    used / bytes.len()
}

#[test]
fn received_messages_take_a_bounded_multiple_of_their_size() {
    let many = |element: &[u8]| element.repeat(100_000 / element.len());
    let empty = |number: u8| many(&[number << 3 | 2, 0]);
    // The smallest valid PeerInfo.
    let peer = [10, 0];
    let answers = [
        (control::ListPeers.encoded(), ok(&empty(6))),
        (control::ListPeers.encoded(), ok(&many(&field(6, &peer)))),
        (
            control::Identify.encoded(),
            ok(&field(4, &[&peer[..], &empty(2)].concat())),
        ),
        (pubsub::GetTopics.encoded(), ok(&field(7, &empty(1)))),
        (
            pubsub::ListTopicPeers {
                topic: String::new(),
            }
            .encoded(),
            ok(&field(7, &empty(2))),
        ),
        (
            dht::FindPeer {
                peer: "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
                    .parse()
                    .unwrap(),
                timeout: None,
            }
            .encoded(),
            ok(&field(
                5,
                &[&[8, 1][..], &field(2, &[&peer[..], &empty(2)].concat())].concat(),
            )),
        ),
    ];
    for (number, (request, message)) in answers.into_iter().enumerate() {
        let multiple = multiple(request, message);
        assert!(multiple <= 128, "{multiple} times, answer {number}");
    }
}
