//! Cost of the tokio client with the mock daemon, which runs in threads of this process.
//!
//! The floor beside it is `p2pd_test_support::blocking_client`. All times are per operation, also with many
//! operations at once.

use bytes::Bytes;
use criterion::measurement::WallTime;
use criterion::{
    criterion_group, criterion_main, Bencher, BenchmarkGroup, BenchmarkId, Criterion, SamplingMode,
    Throughput,
};
use p2pd_client::{Client, UnaryCall};
use p2pd_protocol::command::{control::Identify, streams::StreamOpen, Typed as _};
use p2pd_protocol::{Endpoint, Multiaddr, PeerId};
use p2pd_test_support::blocking_client::{per_call, serve, BlockingClient, Calls, CHUNK};
use p2pd_test_support::mock_daemon::{
    MockDaemon, STREAM_ECHO, STREAM_SINK, STREAM_SOURCE, UNARY_ECHO,
};
use std::future::Future;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

/// Number of bytes sent over a stream in one iteration, and in one write.
const BULK: usize = 64 << 20;

const PING: usize = 100;
const SIZES: [(&str, usize); 3] = [("1 KiB", 1 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)];
const PARALLEL: [usize; 2] = [1, 64];

/// A mock daemon that runs until the process ends.
struct Daemon {
    control: Multiaddr,
    peer_id: PeerId,
    _directory: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory for the socket");
        let control = if cfg!(unix) {
            let path = directory.path().join("control.sock");
            let path = path.to_str().expect("a path of characters");
            Multiaddr::from(&Endpoint::Unix(path.to_owned()))
        } else {
            "/ip4/127.0.0.1/tcp/0".parse().expect("it is good")
        };
        let mock = MockDaemon::bind(&control).expect("somewhere to listen");
        let daemon = Self {
            control: mock.control_maddr().clone(),
            peer_id: mock.peer_id().clone(),
            _directory: directory,
        };
        mock.spawn().expect("a thread");
        daemon
    }

    fn client(&self) -> Client {
        Client::new(self.control.clone()).expect("a control address")
    }

    fn floor(&self) -> BlockingClient {
        BlockingClient::connect(&self.control)
    }
}

fn runtimes() -> [(&'static str, Runtime); 2] {
    let multi = Builder::new_multi_thread().enable_all().build();
    [
        ("current_thread", current_thread()),
        ("multi_thread", multi.expect("a runtime")),
    ]
}

fn current_thread() -> Runtime {
    let built = Builder::new_current_thread().enable_all().build();
    built.expect("a runtime")
}

/// Measures `operation`, run by this many tasks at once.
fn measure<F, T>(b: &mut Bencher<'_>, runtime: &Runtime, parallel: usize, operation: F)
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = ()> + Send,
{
    b.iter_custom(|iterations| {
        let each = iterations.div_ceil(parallel as u64);
        let operation = operation.clone();
        // In its own task, since on the multi-threaded runtime the future of `block_on` does not run on a
        // worker.
        let elapsed = runtime.block_on(runtime.spawn(async move {
            let start = Instant::now();
            if parallel == 1 {
                for _ in 0..each {
                    operation().await;
                }
                return start.elapsed();
            }
            let tasks: Vec<_> = (0..parallel)
                .map(|_| {
                    let operation = operation.clone();
                    tokio::spawn(async move {
                        for _ in 0..each {
                            operation().await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.expect("the operation succeeds");
            }
            start.elapsed()
        }));
        let elapsed = elapsed.expect("the operation succeeds");
        per_call(elapsed, iterations, each * parallel as u64)
    });
}

fn bench_requests(c: &mut Criterion) {
    let daemon = Daemon::start();
    let runtime = current_thread();
    let mut group = c.benchmark_group("identify");
    group.bench_function("floor", |b| {
        let mut floor = daemon.floor();
        let request = Identify.encoded();
        let answer = floor.first(&request);
        b.iter(|| {
            floor.write(request.frame());
            floor.read(answer);
        });
    });
    for parallel in PARALLEL {
        group.bench_function(format!("x{parallel}"), |b| {
            let client = daemon.client();
            measure(b, &runtime, parallel, move || {
                let client = client.clone();
                async move {
                    client.identify().await.expect("the mock daemon answers");
                }
            });
        });
    }
    group.finish();

    let mut group = c.benchmark_group("stream_open");
    group.bench_function("floor", |b| {
        let request = StreamOpen {
            peer: daemon.peer_id.clone(),
            protocols: vec![STREAM_ECHO.to_owned()],
            timeout: None,
        };
        let request = request.encoded();
        b.iter(|| daemon.floor().first(&request));
    });
    group.bench_function("x1", |b| {
        let (client, peer) = (daemon.client(), daemon.peer_id.clone());
        measure(b, &runtime, 1, move || {
            let (client, peer) = (client.clone(), peer.clone());
            async move {
                let stream = client.stream_open(&peer, [STREAM_ECHO]).await;
                drop(stream.expect("the mock daemon opens it"));
            }
        });
    });
    group.finish();
}

fn bench_streams(c: &mut Criterion) {
    let daemon = Daemon::start();
    let runtime = current_thread();
    let client = daemon.client();
    let open = |protocol: &'static str| {
        let stream = runtime.block_on(client.stream_open(&daemon.peer_id, [protocol]));
        stream.expect("the mock daemon opens it")
    };
    let open_floor =
        |protocol: &str| BlockingClient::open(&daemon.control, &daemon.peer_id, protocol);

    let mut group = c.benchmark_group("ping-pong of 100 B");
    group.bench_function("floor", |b| {
        let mut floor = open_floor(STREAM_ECHO);
        b.iter(|| {
            floor.write(&[7; PING]);
            floor.read(PING);
        });
    });
    group.bench_function("client", |b| {
        let mut stream = open(STREAM_ECHO);
        b.iter_custom(|iterations| {
            runtime.block_on(async {
                let mut buffer = [0; PING];
                let start = Instant::now();
                for _ in 0..iterations {
                    stream.write_all(&[7; PING]).await.expect("it is open");
                    stream.read_exact(&mut buffer).await.expect("it comes back");
                }
                assert_eq!(buffer, [7; PING]);
                start.elapsed()
            })
        });
    });
    group.finish();

    let mut group = c.benchmark_group("64 MiB");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Bytes(BULK as u64));
    group.bench_function("read, floor", |b| {
        let mut floor = open_floor(STREAM_SOURCE);
        b.iter(|| floor.read(BULK));
    });
    group.bench_function("read", |b| {
        let mut stream = open(STREAM_SOURCE);
        let mut buffer = vec![0; CHUNK];
        b.iter(|| {
            runtime.block_on(async {
                let mut left = BULK;
                while left > 0 {
                    let read = stream.read(&mut buffer[..CHUNK.min(left)]).await;
                    left -= read.expect("there is no end to it");
                }
            });
        });
    });
    let zeros = vec![0; CHUNK];
    group.bench_function("write, floor", |b| {
        let floor = open_floor(STREAM_SINK);
        b.iter(|| (0..BULK / CHUNK).for_each(|_| floor.write(&zeros)));
    });
    group.bench_function("write", |b| {
        let mut stream = open(STREAM_SINK);
        b.iter(|| {
            runtime.block_on(async {
                for _ in 0..BULK / CHUNK {
                    stream.write_all(&zeros).await.expect("it takes everything");
                }
                stream.flush().await.expect("it takes everything");
            });
        });
    });
    group.finish();
}

fn bench_unary(c: &mut Criterion) {
    let daemon = Daemon::start();
    let mut group = c.benchmark_group("unary");
    each_load(&mut group, "caller, floor", |b, size, parallel| {
        let mut calls = Calls::new(&daemon.control, &daemon.peer_id, UNARY_ECHO, size, parallel);
        b.iter_custom(|iterations| calls.run(iterations));
    });
    for (name, runtime) in runtimes() {
        each_load(
            &mut group,
            &format!("caller, {name}"),
            |b, size, parallel| {
                let (client, peer) = (daemon.client(), daemon.peer_id.clone());
                let data = Bytes::from(vec![7; size]);
                measure(b, &runtime, parallel, move || {
                    let (client, peer, data) = (client.clone(), peer.clone(), data.clone());
                    async move {
                        let reply = client.call_unary(&peer, UNARY_ECHO, data).await;
                        assert_eq!(reply.expect("it is an echo").len(), size);
                    }
                });
            },
        );
    }

    // The blocking client calls the handlers, at almost no cost.
    let (serving, is_serving) = mpsc::channel();
    let floor = daemon.floor();
    thread::spawn(move || serve(floor, "floor", &serving));
    is_serving.recv().expect("it serves");
    each_load(&mut group, "handler, floor", |b, size, parallel| {
        let mut calls = Calls::new(&daemon.control, &daemon.peer_id, "floor", size, parallel);
        b.iter_custom(|iterations| calls.run(iterations));
    });
    for (name, runtime) in runtimes() {
        thread::scope(|scope| {
            let (serving, is_serving) = mpsc::channel();
            let (stop, stopped) = oneshot::channel::<()>();
            let client = daemon.client();
            scope.spawn(|| {
                runtime.block_on(async move {
                    let echo = |call: UnaryCall| async move { Ok::<_, String>(call.payload) };
                    let added = client.add_unary_handler(name, false, echo).await;
                    added.expect("nobody else serves it");
                    serving.send(()).expect("it is waited for");
                    let _ = stopped.await;
                });
            });
            is_serving.recv().expect("it serves");
            each_load(
                &mut group,
                &format!("handler, {name}"),
                |b, size, parallel| {
                    let mut calls =
                        Calls::new(&daemon.control, &daemon.peer_id, name, size, parallel);
                    b.iter_custom(|iterations| calls.run(iterations));
                },
            );
            drop(stop);
        });
    }
    group.finish();
}

/// Measures calls of every size, sequential and concurrent.
fn each_load(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut run: impl FnMut(&mut Bencher<'_>, usize, usize),
) {
    for (size_name, size) in SIZES {
        group.throughput(Throughput::Bytes(size as u64));
        for parallel in PARALLEL {
            let id = BenchmarkId::new(name, format!("{size_name} x{parallel}"));
            group.bench_function(id, |b| run(b, size, parallel));
        }
    }
}

criterion_group!(benches, bench_requests, bench_streams, bench_unary);
criterion_main!(benches);
