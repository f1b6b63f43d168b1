//! The program p2pd-rs: flags, control socket, signals, and the end of the daemon. Where hivemind's p2pd,
//! named by P2PD_PATH, does the same, both are tested.
#![cfg(unix)]

mod support;

use p2pd_test_support::required;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use support::{dial, read_frame, RawClient, PROGRAM};

const PATIENCE: Duration = Duration::from_secs(20);

/// A private directory for control sockets, removed at the end.
struct Directory(p2pd_sockets::PrivateDirectory);

impl Directory {
    fn new() -> Self {
        Self(p2pd_sockets::private_directory(None, "p2pd-", "control.sock").unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("control.sock")
    }

    fn listen(&self) -> String {
        format!("-listen=/unix{}", self.socket().display())
    }
}

/// A running daemon, killed at the end.
struct Daemon {
    child: Child,
    /// The fields that it printed on stdout.
    control: String,
    peer_id: String,
    addrs: Vec<String>,
}

impl Daemon {
    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new(PROGRAM)
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let mut field = |name: &str| {
            let line = lines.next().expect("it must start").unwrap();
            let value = line
                .strip_prefix(name)
                .unwrap_or_else(|| panic!("{line:?}"));
            value.to_owned()
        };
        let (control, peer_id) = (field("Control socket: "), field("Peer ID: "));
        field("Peer Addrs:");
        // The test knows how many addresses it has given.
        let listens = arguments.iter().any(|text| text.starts_with("-hostAddrs="));
        let addrs = if listens { vec![field("")] } else { Vec::new() };
        Self {
            child,
            control,
            peer_id,
            addrs,
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(sent.success());
    }

    /// Waits until it ends; returns its exit status.
    fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            sleep(Duration::from_millis(5));
        }
        panic!("it does not end");
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn run(program: &Path, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap()
}

/// Returns the first line on stderr without its time, and the exit status.
fn outcome(program: &Path, arguments: &[&str]) -> (String, Option<i32>) {
    let output = run(program, arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    let line = text.lines().next().unwrap_or_default();
    let words = match line.strip_prefix("20") {
        Some(_) => line.splitn(3, ' ').nth(2).unwrap_or_default(),
        None => line,
    };
    (words.to_owned(), output.status.code())
}

#[test]
fn refuses_arguments_as_the_go_daemon_does() {
    let go = required("P2PD_PATH", "a p2pd binary");
    let directory = Directory::new();
    let listen = directory.listen();
    let garbage = directory.0.path().join("garbage");
    fs::write(&garbage, "hello world").unwrap();
    let garbage = format!("-id={}", garbage.display());
    for arguments in [
        &["-x"][..],
        &["-dht=7"],
        &["-connLo", "x"],
        &["-connGrace=5"],
        &["-id"],
        &["-noise=0", "-tls=0"],
        &["-listen=foo"],
        &["-hostAddrs=foo"],
        &["-announceAddrs=x"],
        &["-b", "-bootstrapPeers=/ip4/127.0.0.1/tcp/1"],
        &["-id=/no/such/file"],
        &["-id=/tmp"],
        &[garbage.as_str()],
        &["-listen=/unix/no/such/control.sock"],
        &["-listen=/ip4/192.0.2.1/tcp/5"],
        &["-hostAddrs=/ip4/192.0.2.1/tcp/0"],
        &["-forceReachabilityPublic", "-forceReachabilityPrivate"],
    ] {
        let arguments = [&[listen.as_str()], arguments].concat();
        let expected = outcome(&go, &arguments);
        assert_eq!(outcome(Path::new(PROGRAM), &arguments), expected);
        // Go leaves the socket behind after an error.
        let _ = fs::remove_file(directory.socket());
    }
}

#[test]
fn help_lists_the_flags() {
    let output = run(Path::new(PROGRAM), &["-help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.starts_with("Usage of ") && text.contains("-idleTimeout duration"));
}

#[test]
fn unreachable_bootstrap_peers_are_named() {
    let directory = Directory::new();
    let peer = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5";
    let peers = format!("-bootstrapPeers={peer}");
    let output = run(Path::new(PROGRAM), &[&directory.listen(), "-b", &peers]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&format!("cannot reach {peer}: ")), "{text}");
    assert!(
        text.ends_with("failed to connect to bootstrap peers\n"),
        "{text}"
    );
    assert!(!directory.socket().exists());
}

#[test]
fn joins_through_a_bootstrap_peer() {
    let directories = [Directory::new(), Directory::new()];
    let host = "-hostAddrs=/ip4/127.0.0.1/tcp/0";
    let first = Daemon::start(&[&directories[0].listen(), host]);
    let peers = format!(
        "-bootstrapPeers=/ip4/127.0.0.1/tcp/1/p2p/12D3KooWGC6TvWhfapngX6wvJHMYvKpDMXPb3ZnCZ6dMoaMtimQ5,{}/p2p/{}",
        first.addrs[0], first.peer_id
    );
    let second = Daemon::start(&[&directories[1].listen(), host, "-b", &peers]);
    let mut socket = dial(&second.control.parse().unwrap());
    socket.write_all(&[2, 8, 5]).unwrap(); // Request{LIST_PEERS}
    assert!(read_frame(&socket).unwrap().len() > 40, "one peer");
}

#[test]
fn keeps_the_identity_in_the_file() {
    let directory = Directory::new();
    let (listen, file) = (directory.listen(), directory.0.path().join("id"));
    let keypair = libp2p::identity::Keypair::generate_ed25519();
    fs::write(&file, keypair.to_protobuf_encoding().unwrap()).unwrap();
    let daemon = Daemon::start(&[&listen, &format!("-id={}", file.display())]);
    assert_eq!(daemon.peer_id, keypair.public().to_peer_id().to_string());
}

#[test]
fn quiet_daemon_prints_nothing() {
    let directory = Directory::new();
    let mut child = Command::new(PROGRAM)
        .args([&directory.listen(), "-q"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !directory.socket().exists() {
        assert!(begun.elapsed() < PATIENCE);
        sleep(Duration::from_millis(5));
    }
    sleep(Duration::from_millis(100));
    child.kill().unwrap();
    let mut text = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    child.wait().unwrap();
    assert_eq!(text, "");
}

#[test]
fn replaces_a_stale_socket_and_respects_a_live_one() {
    let directory = Directory::new();
    let listen = directory.listen();
    let mut daemon = Daemon::start(&[&listen]);
    daemon.signal("-KILL");
    daemon.ended();
    assert!(directory.socket().exists());
    let _daemon = Daemon::start(&[&listen]);
    let expected = format!(
        "listen unix {}: bind: address already in use",
        directory.socket().display()
    );
    assert_eq!(outcome(Path::new(PROGRAM), &[&listen]), (expected, Some(1)));
    assert!(directory.socket().exists());
}

#[test]
fn prints_the_assigned_control_port() {
    let daemon = Daemon::start(&["-listen=/ip4/127.0.0.1/tcp/0"]);
    let port = daemon.control.strip_prefix("/ip4/127.0.0.1/tcp/").unwrap();
    let port: u16 = port.parse().unwrap();
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.write_all(&[2, 8, 0]).unwrap(); // Request{IDENTIFY}
    let mut answer = [0; 3];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[1..], [8, 0]);
}

#[test]
fn ends_at_sigterm_and_removes_its_socket_but_ignores_sigint() {
    let directory = Directory::new();
    let mut daemon = Daemon::start(&[&directory.listen()]);
    daemon.signal("-INT");
    sleep(Duration::from_millis(200));
    assert!(daemon.is_running());
    daemon.signal("-TERM");
    assert_eq!(daemon.ended(), Some(143));
    assert!(!directory.socket().exists());
}

#[test]
fn ends_if_idle_only_with_an_idle_timeout() {
    let directory = Directory::new();
    let listen = directory.listen();
    // No client comes.
    let mut daemon = Daemon::start(&[&listen, "-idleTimeout=50ms"]);
    assert_eq!(daemon.ended(), Some(0));
    assert!(!directory.socket().exists());
    // The last persistent connection closes.
    let mut daemon = Daemon::start(&[&listen, "-idleTimeout=1s"]);
    let control = daemon.control.parse().unwrap();
    let clients = [RawClient::connect(&control), RawClient::connect(&control)];
    sleep(Duration::from_millis(1200));
    let [first, second] = clients;
    drop(first);
    sleep(Duration::from_millis(100));
    assert!(daemon.is_running());
    drop(second);
    assert_eq!(daemon.ended(), Some(0));
    // Without the flag it stays.
    let mut daemon = Daemon::start(&[&listen]);
    drop(RawClient::connect(&daemon.control.parse().unwrap()));
    sleep(Duration::from_millis(200));
    assert!(daemon.is_running());
}

#[test]
fn unreadable_request_gets_an_error_and_then_the_end() {
    let directory = Directory::new();
    let daemon = Daemon::start(&[&directory.listen()]);
    let control = daemon.control.parse().unwrap();
    for (bytes, words) in [
        (&[3, 8, 0xd0, 0x0f][..], "not supported"),
        (&[0xff, 0xff, 0xff, 0x7f], "exceeds the limit"),
        (&[1, 0xff], "Malformed request"),
        (&[2, 8, 1], "missing parameters"), // CONNECT
    ] {
        let mut socket = dial(&control);
        socket.write_all(bytes).unwrap();
        let answer = read_frame(&socket).unwrap();
        assert_eq!(answer[..2], [8, 1], "Response{{ERROR}}");
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains(words), "{text}");
        assert_eq!(socket.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn services_that_it_lacks_are_refused() {
    let directory = Directory::new();
    let daemon = Daemon::start(&[&directory.listen(), "-dhtServer", "-pubsub", "-connManager"]);
    let mut socket = dial(&daemon.control.parse().unwrap());
    for (request, words) in [
        // Request{DHT, GET_CLOSEST_PEERS}, {PUBSUB, GET_TOPICS}, {CONNMANAGER, TRIM}
        (
            &[9, 8, 4, 42, 5, 8, 3, 0x22, 1, b'k'][..],
            "DHT not enabled",
        ),
        (&[6, 8, 8, 66, 2, 8, 0], "PubSub not enabled"),
        (&[6, 8, 6, 50, 2, 8, 2], "not supported"),
    ] {
        socket.write_all(request).unwrap();
        let answer = read_frame(&socket).unwrap();
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains(words), "{request:?}: {text}");
    }
}

#[test]
fn serves_requests_while_its_output_is_not_read() {
    let directory = Directory::new();
    let mut daemon = Daemon::start(&[&directory.listen()]);
    for _ in 0..200 {
        daemon.signal("-USR1");
    }
    drop(daemon.child.stdout.take());
    for _ in 0..20 {
        daemon.signal("-USR1");
        sleep(Duration::from_millis(2));
    }
    let mut socket = dial(&daemon.control.parse().unwrap());
    socket.write_all(&[2, 8, 0]).unwrap();
    assert_eq!(read_frame(&socket).unwrap()[..2], [8, 0]);
    assert!(daemon.is_running());
}
