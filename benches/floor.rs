//! The blocking client as a contender of `run.py` with the mock daemon: the floor, which no client on that
//! socket can beat.
//!
//! Usage: `floor CONTROL_MADDR PEER_ID`. It reads and answers the lines that `contender.py` describes.

use p2pd_protocol::command::{control::Identify, streams::StreamOpen, unary::Upgrade, Typed as _};
use p2pd_protocol::{Multiaddr, PeerId, PersistentClient, UnaryEvent, UnaryLimits};
use p2pd_test_support::blocking_client::{serve, BlockingClient, Calls, CHUNK};
use p2pd_test_support::mock_daemon::{
    frame_head, FRAMED_SINK, FRAMED_SOURCE, FRAME_BODY, FRAME_HEAD, STREAM_ECHO, STREAM_SOURCE,
    UNARY_ECHO, UNARY_LOAD,
};
use std::io::{self, BufRead, Write};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{error, fs, thread};

/// Name of this process's handler.
const HANDLER: &str = "floor";
const PING: [u8; 100] = [b'p'; 100];
/// Size of hivemind's writes, in bytes.
const HIVEMIND_CHUNK: usize = 64 << 10;

/// A contender, and its mock daemon.
struct Contender {
    control: Multiaddr,
    peer_id: PeerId,
    calls: Option<(String, Calls)>,
    is_serving: bool,
}

/// Wall and CPU time.
type Times = (Duration, Duration);

fn main() -> Result<(), Box<dyn error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, control, peer_id] = &arguments[..] else {
        return Err("usage: floor CONTROL_MADDR PEER_ID".into());
    };
    let mut contender = Contender {
        control: control.parse()?,
        peer_id: peer_id.parse()?,
        calls: None,
        is_serving: false,
    };
    println!("ready");
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split(' ').collect();
        let numbers: Vec<usize> = words[1..].iter().flat_map(|word| word.parse()).collect();
        // Resets the peak memory.
        fs::write("/proc/self/clear_refs", "5")?;
        let (wall, cpu) = contender.round(words[0], &numbers)?;
        println!(
            r#"{{"wall": {}, "cpu": {}, "peak": {}}}"#,
            wall.as_secs_f64(),
            cpu.as_secs_f64(),
            peak()?,
        );
        io::stdout().flush()?;
    }
    Ok(())
}

impl Contender {
    fn round(&mut self, scenario: &str, numbers: &[usize]) -> Result<Times, String> {
        Ok(match (scenario, numbers) {
            ("identify", &[count, 1]) => {
                let mut floor = BlockingClient::connect(&self.control);
                let request = Identify.encoded();
                let answer = floor.first(&request);
                timed(|| {
                    for _ in 0..count {
                        floor.write(request.frame());
                        floor.read(answer);
                    }
                })
            }
            ("unary", &[count, size, parallel]) => {
                let name = format!("{size} x{parallel}");
                if self.calls.as_ref().is_none_or(|(of, _)| *of != name) {
                    let (control, peer_id) = (&self.control, &self.peer_id);
                    let calls = Calls::new(control, peer_id, UNARY_ECHO, size, parallel);
                    self.calls = Some((name, calls));
                }
                let (_, calls) = self.calls.as_mut().expect("it was made");
                let mut wall = Duration::ZERO;
                let (_, cpu) = timed(|| wall = calls.run(count as u64));
                (wall, cpu)
            }
            ("handler", &[count, size, parallel]) => {
                self.serve();
                let load = format!("{HANDLER} {size} {parallel} {count}");
                let mut wall = Duration::ZERO;
                let (_, cpu) = timed(|| wall = self.load(&load));
                (wall, cpu)
            }
            ("stream-open", &[count]) => {
                let request = StreamOpen {
                    peer: self.peer_id.clone(),
                    protocols: vec![STREAM_ECHO.to_owned()],
                    timeout: None,
                };
                let request = request.encoded();
                timed(|| {
                    for _ in 0..count {
                        BlockingClient::connect(&self.control).first(&request);
                    }
                })
            }
            ("ping-pong", &[count]) => {
                let mut floor = self.open(STREAM_ECHO);
                let times = timed(|| {
                    for _ in 0..count {
                        floor.write(&PING);
                        floor.read(PING.len());
                    }
                });
                assert_eq!(floor.last()[..PING.len()], PING, "the echo is wrong");
                times
            }
            ("readexactly", &[count, size]) => {
                let mut floor = self.open(STREAM_SOURCE);
                timed(|| (0..count).for_each(|_| floor.read(size)))
            }
            ("bulk-read", &[size]) => {
                let mut floor = self.open(STREAM_SOURCE);
                timed(|| floor.read(size))
            }
            ("bulk-write", &[size]) => {
                let mut floor = self.open(FRAMED_SINK);
                let chunk = vec![FRAME_BODY; CHUNK.min(size)];
                let times = timed(|| {
                    floor.write(&frame_head(true, size as u64));
                    for _ in 0..size / chunk.len() {
                        floor.write(&chunk);
                    }
                    floor.read(8);
                });
                assert_eq!(floor.last()[..8], size.to_be_bytes(), "that is not all");
                times
            }
            ("framed-read", &[count, size]) => {
                let mut floor = self.open(&format!("{FRAMED_SOURCE}{size}"));
                timed(|| {
                    for _ in 0..count {
                        floor.read(FRAME_HEAD);
                        assert_eq!(floor.last()[1..FRAME_HEAD], size.to_be_bytes());
                        floor.read(size);
                    }
                })
            }
            ("framed-write", &[count, size]) => {
                let mut floor = self.open(FRAMED_SINK);
                let chunk = vec![FRAME_BODY; HIVEMIND_CHUNK.min(size)];
                let times = timed(|| {
                    for left in (0..count).rev() {
                        floor.write(&frame_head(left == 0, size as u64));
                        let mut body = size;
                        while body > 0 {
                            let len = body.min(chunk.len());
                            floor.write(&chunk[..len]);
                            body -= len;
                        }
                    }
                    floor.read(8);
                });
                let bodies = (count * size).to_be_bytes();
                assert_eq!(floor.last()[..8], bodies, "that is not all");
                times
            }
            _ => return Err(format!("the blocking client has no {scenario} {numbers:?}")),
        })
    }

    fn open(&self, protocol: &str) -> BlockingClient {
        BlockingClient::open(&self.control, &self.peer_id, protocol)
    }

    /// Starts to serve calls in a thread.
    fn serve(&mut self) {
        if !self.is_serving {
            let (serving, is_serving) = mpsc::channel();
            let floor = BlockingClient::connect(&self.control);
            thread::spawn(move || serve(floor, HANDLER, &serving));
            is_serving.recv().expect("it serves");
            self.is_serving = true;
        }
    }

    /// Lets the mock daemon call the handler; returns the time that it took.
    fn load(&self, load: &str) -> Duration {
        let mut floor = BlockingClient::connect(&self.control);
        floor.first(&Upgrade.encoded());
        let mut client = PersistentClient::<(), Vec<u8>>::new([8; 32], UnaryLimits::default());
        let mut out = bytes::BytesMut::new();
        let peer = self.peer_id.as_bytes();
        client
            .call(peer, UNARY_LOAD, load.len(), (), Instant::now(), &mut out)
            .expect("it is small enough");
        out.extend_from_slice(load.as_bytes());
        floor.write(&out);
        loop {
            floor.read(1);
            let byte = floor.last()[0];
            match client
                .poll(&mut &[byte][..])
                .expect("the mock daemon is good")
            {
                None => {}
                Some(UnaryEvent::Reply { payload, .. }) => {
                    let seconds = String::from_utf8_lossy(&payload).parse();
                    return Duration::from_secs_f64(seconds.expect("a number of seconds"));
                }
                Some(other) => panic!("the load came to {other:?}"),
            }
        }
    }
}

/// Returns the wall time and the CPU time of `work`.
fn timed(work: impl FnOnce()) -> Times {
    let (wall, cpu) = (Instant::now(), cpu_time());
    work();
    (wall.elapsed(), cpu_time() - cpu)
}

/// CPU time of this process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).expect("it is not negative")
}

/// Peak resident memory, in bytes.
fn peak() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    number
        .map(|number| number << 10)
        .ok_or(io::ErrorKind::NotFound.into())
}
