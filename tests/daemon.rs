//! The daemon manager for tokio, against the real p2pd and against scripts that misbehave.
//!
//! The environment variable P2PD_PATH must name the binary.
#![cfg(unix)]

use futures_util::StreamExt as _;
use p2pclient_rs::Client;
use p2pd_client::{Error, UnaryCall};
use p2pd_manager::{
    Bootstrap, ConnectionManager, DaemonError, Dht, P2PDaemon, P2PDaemonBuilder, Pubsub, StartError,
};
use p2pd_protocol::Multiaddr;
use p2pd_test_support::{eventually, must, soon};
use rustix::process::{kill_process, test_kill_process, Pid, Signal};
use std::fs;
use std::future::Future;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::signal::unix::{signal, SignalKind};

const UNREACHABLE: &str = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";

fn p2pd() -> PathBuf {
    let path = std::env::var_os("P2PD_PATH").expect(
        "P2PD_PATH must name a p2pd binary: P2PD_PATH=$(python3 tests/get_p2pd.py) cargo test",
    );
    fs::canonicalize(&path).unwrap_or_else(|error| panic!("P2PD_PATH is {path:?}: {error}"))
}

fn daemon() -> P2PDaemonBuilder {
    P2PDaemon::builder().binary(p2pd())
}

/// A daemon with enough time to exit by itself.
fn patient() -> P2PDaemonBuilder {
    daemon().stop_timeout(Duration::from_secs(60))
}

/// Writes an executable script. Another process writes it: a file open for writing here could be
/// inherited by a concurrent fork, and then could not be executed.
fn script(directory: &TempDir, body: &str) -> PathBuf {
    let path = directory.path().join("p2pd");
    let write = Command::new("/bin/sh")
        .args([
            "-c",
            r#"printf '#!/bin/sh\n%s\n' "$1" > "$2" && chmod 700 "$2""#,
        ])
        .args(["sh", body])
        .arg(&path)
        .status();
    assert!(write.unwrap().success());
    path
}

// The first key pair of RFC 8032.
const PRIVATE: &str = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
const PUBLIC: &str = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";

fn bytes(hex: &str) -> Vec<u8> {
    let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digits).collect()
}

/// Writes an identity file.
fn write_key(directory: &TempDir) -> PathBuf {
    let file = directory.path().join("key");
    let key = [b"\x08\x01\x12\x40".to_vec(), bytes(PRIVATE), bytes(PUBLIC)];
    fs::write(&file, key.concat()).unwrap();
    file
}

fn addr(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

/// Returns the daemon's private directory, taken from its command line.
fn directory_of(command: &[String]) -> PathBuf {
    let control = command[1].strip_prefix("-listen=/unix").unwrap();
    Path::new(control).parent().unwrap().into()
}

/// Asserts that no process, including the watchdog, and no file of a private directory is left.
fn assert_nothing_left_of(directory: &Path) {
    let processes = Command::new("ps").args(["-ax", "-o", "command="]).output();
    let processes = String::from_utf8_lossy(&processes.unwrap().stdout).into_owned();
    let directory = directory.to_str().unwrap();
    let left: Vec<_> = processes
        .lines()
        .filter(|line| line.contains(directory))
        .collect();
    assert_eq!(left, [""; 0]);
    assert!(!Path::new(directory).exists());
}

fn pid_of(daemon: &P2PDaemon) -> Pid {
    Pid::from_raw(daemon.pid().unwrap() as i32).unwrap()
}

async fn suspend(pid: Pid) {
    kill_process(pid, Signal::STOP).unwrap();
    let mut state = Command::new("ps");
    let state = state.args(["-o", "stat=", "-p", &pid.as_raw_nonzero().to_string()]);
    let state = std::cell::RefCell::new(state);
    until(|| {
        state
            .borrow_mut()
            .output()
            .unwrap()
            .stdout
            .starts_with(b"T")
    })
    .await;
}

async fn until(condition: impl Fn() -> bool) {
    eventually(async || must(condition(), "it did not come true")).await;
}

/// Returns the error of a start that must fail, and checks that nothing is left.
async fn failed(builder: P2PDaemonBuilder) -> StartError {
    match builder.spawn().await {
        Err(DaemonError::Start(error)) => {
            if error.command[1].starts_with("-listen=/unix") {
                assert_nothing_left_of(&directory_of(&error.command));
            }
            error
        }
        other => panic!("{other:?}"),
    }
}

// --- starting ---

#[tokio::test]
async fn daemon_starts_answers_and_leaves_nothing_behind() {
    let daemon = patient().spawn().await.unwrap();
    let command = daemon.command();
    assert!(daemon.pid().is_some());
    assert_eq!(command[0], p2pd().to_str().unwrap());
    assert_eq!(
        command[1..],
        [
            format!("-listen={}", daemon.control_maddr()),
            "-hostAddrs=/ip4/127.0.0.1/tcp/0".into()
        ]
    );
    let directory = directory_of(&command);
    assert!(directory.is_dir());
    assert!(daemon
        .output()
        .contains(&format!("Peer ID: {}", daemon.peer_id())));
    let [listening] = daemon.addrs() else {
        panic!("{:?}", daemon.addrs())
    };
    assert!(listening.to_string().starts_with("/ip4/127.0.0.1/tcp/"));
    let whole = format!("{listening}/p2p/{}", daemon.peer_id());
    assert_eq!(daemon.peer_addrs(), [addr(&whole)]);

    let client = daemon.client().await.unwrap();
    let identity = client.identify().await.unwrap();
    assert_eq!(&identity.peer_id, daemon.peer_id());
    assert_eq!(identity.addrs, daemon.addrs());

    let status = daemon.shutdown().await;
    assert_nothing_left_of(&directory);
    assert_eq!(daemon.pid(), None);
    // It exits by itself, with status 0 or 143.
    assert_eq!(status.signal(), None);
    assert_eq!(soon(daemon.wait()).await, status);
    assert!(daemon.output().contains("Peer ID: "));
    assert!(daemon.client().await.is_err());
    assert_eq!(daemon.shutdown().await, status);
}

#[tokio::test]
async fn options_reach_the_daemon() {
    let daemon = daemon()
        .dht(Dht::Client)
        .relay(false)
        .pubsub(Pubsub::Floodsub)
        .connection_manager(ConnectionManager::Limits {
            low: 1,
            high: 2,
            grace: Duration::from_millis(1500),
        })
        // 127.0.0.2 is a local address on Linux without configuration.
        .host_addrs([addr("/ip4/127.0.0.1/tcp/0"), addr("/ip4/127.0.0.2/tcp/0")])
        .announce_addrs([addr("/ip4/192.0.2.1/tcp/4001")])
        .extra_args(["-muxer=yamux"])
        .spawn()
        .await
        .unwrap();
    assert_eq!(daemon.addrs(), [addr("/ip4/192.0.2.1/tcp/4001")]);
    assert_eq!(
        daemon.command()[2..],
        [
            "-hostAddrs=/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.2/tcp/0",
            "-announceAddrs=/ip4/192.0.2.1/tcp/4001",
            "-dhtClient",
            "-relay=false",
            "-pubsub",
            "-pubsubRouter=floodsub",
            "-connManager",
            "-connLo=1",
            "-connHi=2",
            "-connGrace=1.5s",
            "-muxer=yamux",
        ]
    );
}

#[tokio::test]
async fn boolean_options_switch_services_on_and_off() {
    let on = daemon().dht(true).relay(true).pubsub(true);
    let on = on.connection_manager(true).spawn().await.unwrap();
    let flags = ["-dht", "-relay=true", "-pubsub", "-connManager"];
    assert_eq!(on.command()[3..], flags);
    let off = daemon().dht(false).pubsub(false);
    let off = off.connection_manager(false).spawn().await.unwrap();
    assert_eq!(off.command().len(), 3);
}

#[tokio::test]
async fn identity_file_determines_the_peer_id() {
    let directory = TempDir::new().unwrap();
    let file = write_key(&directory);
    let daemon = daemon().identity(file).spawn().await.unwrap();
    let expected = [b"\x00\x24\x08\x01\x12\x20".to_vec(), bytes(PUBLIC)].concat();
    assert_eq!(daemon.peer_id().as_bytes(), expected);
}

#[tokio::test]
async fn control_over_tcp() {
    let wanted = addr("/ip4/127.0.0.1/tcp/0");
    let daemon = daemon().control_maddr(wanted).spawn().await.unwrap();
    assert_ne!(daemon.control_maddr().to_string(), "/ip4/127.0.0.1/tcp/0");
    let client = daemon.client().await.unwrap();
    assert_eq!(&client.identify().await.unwrap().peer_id, daemon.peer_id());
}

#[tokio::test]
async fn control_socket_at_a_given_path_is_private_and_removed() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    let wanted = addr(&format!("/unix{}", path.display()));
    let daemon = daemon().control_maddr(wanted).spawn().await.unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o077, 0);
    // Killed, the daemon cannot remove the socket itself.
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    daemon.shutdown().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn bootstrap_peers_are_connected() {
    let first = daemon().dht(Dht::Server).spawn().await.unwrap();
    let mut peers = first.peer_addrs();
    peers.push(addr(UNREACHABLE)); // unreachable, which does no harm
    let second = daemon().dht(Dht::Server).bootstrap_peers(peers);
    let second = second.spawn().await.unwrap();
    let connected = second.client().await.unwrap().list_peers().await.unwrap();
    let connected: Vec<_> = connected.iter().map(|peer| &peer.peer_id).collect();
    assert!(connected.contains(&first.peer_id()), "{connected:?}");
}

#[tokio::test]
async fn start_and_daemon_can_move_between_tasks() {
    let daemon = tokio::spawn(daemon().spawn()).await.unwrap().unwrap();
    let directory = directory_of(&daemon.command());
    let waiting = tokio::spawn(async move { daemon.wait().await });
    tokio::task::yield_now().await;
    assert!(directory.exists());
    waiting.abort();
    assert!(soon(waiting).await.unwrap_err().is_cancelled());
    assert_nothing_left_of(&directory);
}

// --- failed starts ---

#[tokio::test]
async fn missing_binary_is_named() {
    let error = P2PDaemon::builder().binary("/no/such/p2pd").spawn().await;
    match error {
        Err(DaemonError::NotFound(error)) => {
            assert_eq!(error.looked_at, ["argument: /no/such/p2pd does not exist"]);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn binary_that_is_not_executable_is_named() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("p2pd");
    fs::write(&path, "").unwrap();
    let error = P2PDaemon::builder()
        .binary(&path)
        .spawn()
        .await
        .unwrap_err();
    let reason = format!("argument: {} is not executable", path.display());
    assert!(error.to_string().contains(&reason), "{error}");
}

#[tokio::test]
async fn invalid_options_are_refused() {
    let limits = ConnectionManager::Limits {
        low: 3,
        high: 2,
        grace: Duration::ZERO,
    };
    for (builder, message) in [
        (daemon().connection_manager(limits), "low water mark"),
        (
            daemon().extra_args(["-listen=/unix/tmp/x"]),
            "control address",
        ),
        (daemon().control_maddr(addr("/ip4/127.0.0.1/udp/1")), "udp"),
        (
            daemon().control_maddr(addr(&format!("/unix/tmp/{}", "x".repeat(103)))),
            "its path is 108 bytes long",
        ),
        (
            daemon().bootstrap_peers([addr(UNREACHABLE), addr("/ip4/127.0.0.1/tcp/1")]),
            "invalid bootstrap peer \"/ip4/127.0.0.1/tcp/1\": it does not end in /p2p/",
        ),
    ] {
        match builder.spawn().await {
            Err(DaemonError::Options(error)) => assert!(error.to_string().contains(message)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn unknown_flag_is_named() {
    let error = failed(daemon().extra_args(["-nonsense"])).await;
    assert_eq!(error.status, Some(2));
    assert_eq!(error.cause.unwrap(), "this daemon has no option -nonsense");
    assert_eq!(error.logs, ["flag provided but not defined: -nonsense"]);
}

#[tokio::test]
async fn port_in_use_is_named() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = server.local_addr().unwrap();
    let maddr = addr(&format!("/ip4/{}/tcp/{}", taken.ip(), taken.port()));
    for builder in [
        daemon().control_maddr(maddr.clone()),
        daemon().host_addrs([maddr]),
    ] {
        let error = failed(builder).await;
        assert_eq!(error.cause.unwrap(), format!("{taken} is already in use"));
    }
}

#[tokio::test]
async fn another_daemon_at_the_control_address_is_detected() {
    let first = daemon().spawn().await.unwrap();
    let second = daemon().control_maddr(first.control_maddr().clone());
    let Err(error) = second.spawn().await else {
        panic!("it answered in its place")
    };
    assert!(error.to_string().contains("is already in use"), "{error}");
    assert!(first.client().await.is_ok());
}

#[tokio::test]
async fn unreachable_bootstrap_peers_are_named() {
    let error = failed(daemon().bootstrap_peers([addr(UNREACHABLE)])).await;
    let cause = error.cause.unwrap();
    let expected = format!("no bootstrap peer could be reached: {UNREACHABLE} (");
    assert!(cause.starts_with(&expected), "{cause}");
    assert!(cause.contains("connection refused"), "{cause}");
}

#[tokio::test]
async fn bootstrap_peer_with_another_id_is_named() {
    let other = daemon().spawn().await.unwrap();
    let (_, peer_id) = UNREACHABLE.rsplit_once('/').unwrap();
    let peer = addr(&format!("{}/p2p/{peer_id}", other.addrs()[0]));
    let error = failed(daemon().bootstrap_peers([peer.clone()])).await;
    let cause = error.cause.unwrap();
    let message = format!("remote key matches {}", other.peer_id());
    assert!(
        cause.contains(&peer.to_string()) && cause.contains(&message),
        "{cause}"
    );
}

#[tokio::test]
async fn binary_for_another_platform_is_named() {
    let directory = TempDir::new().unwrap();
    let binary = script(&directory, "");
    fs::write(&binary, b"\x7fELF of another machine").unwrap();
    // A concurrent test between fork and exec holds the file open for writing.
    let error = loop {
        let error = failed(P2PDaemon::builder().binary(&binary)).await;
        if !error.to_string().contains("Text file busy") {
            break error;
        }
    };
    let cause = error.cause.unwrap();
    assert!(
        cause.starts_with("the binary is not for this machine"),
        "{cause}"
    );
}

#[tokio::test]
async fn option_unknown_to_an_older_daemon_is_named() {
    let directory = TempDir::new().unwrap();
    let body = "echo 'flag provided but not defined: -dhtServer' >&2
        printf 'Usage of p2pd:\\n  -b\\n' >&2; exit 2";
    let old = P2PDaemon::builder().binary(script(&directory, body));
    let error = failed(old.dht(Dht::Server)).await;
    assert_eq!(error.cause.unwrap(), "this daemon has no option -dhtServer");
}

#[tokio::test]
async fn options_that_jsp2pd_would_ignore_are_refused() {
    let directory = TempDir::new().unwrap();
    let binary = directory.path().join("jsp2pd");
    fs::rename(script(&directory, "exit 1"), &binary).unwrap();
    let js = || P2PDaemon::builder().binary(&binary);
    for (builder, message) in [
        (
            js().extra_args(["--nonsense=1"]),
            "jsp2pd has no option --nonsense",
        ),
        (
            js().dht(Dht::Client),
            "jsp2pd has no option for a DHT client",
        ),
    ] {
        let error = builder.spawn().await.unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[tokio::test]
async fn socket_path_in_use_is_named() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    fs::write(&path, "").unwrap();
    let control = addr(&format!("/unix{}", path.display()));
    let error = daemon().control_maddr(control).spawn().await.unwrap_err();
    let message = format!("{} is already in use", path.display());
    assert!(error.to_string().contains(&message), "{error}");
    assert!(path.is_file());
}

#[tokio::test]
async fn stale_control_socket_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let control = addr(&format!("/unix{}", path.display()));
    let daemon = daemon().control_maddr(control).spawn().await.unwrap();
    assert!(daemon.client().await.is_ok());
}

#[tokio::test]
async fn read_only_identity_file_is_accepted() {
    let directory = TempDir::new().unwrap();
    let file = write_key(&directory);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o400)).unwrap();
    let before = fs::read(&file).unwrap();
    let daemon = daemon().identity(&file).spawn().await.unwrap();
    assert!(daemon.peer_id().as_bytes().ends_with(&bytes(PUBLIC)));
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[tokio::test]
async fn daemon_that_accepts_but_never_answers_times_out() {
    let directory = TempDir::new().unwrap();
    // The socket of a real daemon, stopped before it was moved into place.
    let body = format!(
        "path=${{1#-listen=/unix}}; shift\n{} -listen=/unix$path.new \"$@\" > /dev/null &\n\
         until [ -S \"$path.new\" ]; do sleep 0.01; done\n\
         kill -STOP $!; mv \"$path.new\" \"$path\"; wait",
        p2pd().display()
    );
    let hung = P2PDaemon::builder().binary(script(&directory, &body));
    let hung = hung
        .extra_args(["-q"])
        .control_maddr(addr(&format!("/unix{}/c.sock", directory.path().display())));
    let error = hung.start_timeout(Duration::from_secs(3)).spawn().await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("was not ready in 3 seconds"), "{error}");
    assert!(!directory.path().join("c.sock").exists());
}

#[tokio::test]
async fn invalid_identity_is_named() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("key");
    let error = failed(daemon().identity(&file)).await;
    let cause = format!("cannot read the identity file {}", file.display());
    assert!(error.to_string().contains(&cause), "{error}");
    fs::write(&file, "secret").unwrap();
    let error = failed(daemon().identity(&file)).await;
    let cause = format!("{} holds no private key of libp2p", file.display());
    assert!(error.to_string().contains(&cause), "{error}");
}

#[tokio::test]
async fn exit_is_reported_at_once_with_status_and_last_lines() {
    let directory = TempDir::new().unwrap();
    let body = "for i in $(seq 30); do echo line $i; done; echo worst >&2; exit 3";
    let begun = Instant::now();
    let error = failed(P2PDaemon::builder().binary(script(&directory, body))).await;
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(error.status, Some(3));
    assert_eq!((error.logs.len(), &*error.logs[19]), (20, "worst"));
    let expected = "the daemon exited with status 3 before it was ready";
    assert_eq!(error.message, expected);
    let shown = error.to_string();
    assert!(
        shown.contains("worst") && shown.contains("-listen=/unix/"),
        "{shown}"
    );
}

#[tokio::test]
async fn silent_daemon_times_out() {
    let directory = TempDir::new().unwrap();
    let silent = P2PDaemon::builder().binary(script(&directory, "exec sleep 1000"));
    let error = failed(silent.start_timeout(Duration::from_millis(200))).await;
    let expected = "the daemon was not ready in 0.2 seconds and printed nothing";
    assert_eq!(error.message, expected);
    assert_eq!(error.status, None);
    assert!(error.cause.unwrap().contains("no connection"));
}

#[tokio::test]
async fn reply_of_another_peer_is_detected() {
    let directory = TempDir::new().unwrap();
    let p2pd = p2pd();
    let body = format!(
        "echo 'Peer ID: 12D3KooWother'\nexec {} -q \"$@\"",
        p2pd.display()
    );
    let other = P2PDaemon::builder().binary(script(&directory, &body));
    let error = failed(other.start_timeout(Duration::from_secs(5))).await;
    let cause = error.cause.unwrap();
    assert!(cause.starts_with("another daemon, "), "{cause}");
}

#[tokio::test]
async fn dropped_start_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let arguments_file = directory.path().join("arguments");
    let body = format!(
        "echo \"$@\" > {0}.new; mv {0}.new {0}; exec sleep 1000",
        arguments_file.display()
    );
    let start = P2PDaemon::builder().binary(script(&directory, &body));
    tokio::select! {
        started = start.spawn() => panic!("{started:?}"),
        () = until(|| arguments_file.exists()) => {}
    }
    let arguments = fs::read_to_string(&arguments_file).unwrap();
    let arguments = arguments.split(' ').map(str::to_owned);
    let command: Vec<_> = ["p2pd".to_owned()].into_iter().chain(arguments).collect();
    assert_nothing_left_of(&directory_of(&command));
}

// --- stopping ---

#[tokio::test]
async fn drop_keeps_the_control_socket_of_a_successor() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    let wanted = addr(&format!("/unix{}", path.display()));
    let start = || daemon().control_maddr(wanted.clone()).spawn();
    let mut daemon = start().await.unwrap();
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    soon(daemon.wait()).await;
    daemon = start().await.unwrap(); // drops the first, after the second has started
    daemon.client().await.unwrap();
}

/// Runs in its own process: the test starts itself.
#[tokio::test]
#[allow(unsafe_code)]
async fn exit_is_noticed_even_if_tokios_signal_handler_was_replaced() {
    const IN_CHILD: &str = "P2PCLIENT_RS_TEST_SIGCHLD";
    let name = "exit_is_noticed_even_if_tokios_signal_handler_was_replaced";
    if std::env::var_os(IN_CHILD).is_none() {
        let test = std::env::current_exe().unwrap();
        let mut test = Command::new(test);
        let test = test.args([name, "--nocapture"]).env(IN_CHILD, "1");
        assert!(test.status().unwrap().success());
        return;
    }
    let daemon = daemon().spawn().await.unwrap();
    // SAFETY: the default action runs no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let waiting = async { soon(daemon.wait()).await };
    let (status, ()) = tokio::join!(waiting, async {
        kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    });
    assert_eq!(status.signal(), Some(9));
}

#[tokio::test]
async fn every_waiting_task_gets_the_exit_status() {
    let daemon = Arc::new(daemon().spawn().await.unwrap());
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let daemon = Arc::clone(&daemon);
            tokio::spawn(async move { daemon.wait().await })
        })
        .collect();
    tokio::task::yield_now().await;
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    for task in waiting {
        assert_eq!(soon(task).await.unwrap().signal(), Some(9));
    }
    assert_eq!(daemon.pid(), None);
}

#[tokio::test]
async fn death_of_the_daemon_fails_calls_in_flight() {
    let daemon = daemon().spawn().await.unwrap();
    let client = daemon.client().await.unwrap();
    let pid = pid_of(&daemon);
    suspend(pid).await; // keeps it from answering
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { client.identify().await })
        })
        .collect();
    // Time for the requests to be sent.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(calls.iter().all(|call| !call.is_finished()));
    kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(soon(daemon.wait()).await.signal(), Some(9));
    for call in calls {
        // Requests that the daemon had not read are retried, and find no daemon.
        let error = soon(call).await.unwrap().unwrap_err();
        let failed = matches!(
            error,
            Error::ConnectionLost { .. } | Error::Unreachable { .. }
        );
        assert!(failed, "{error:?}");
    }
}

#[tokio::test]
async fn suspended_daemon_is_killed() {
    let daemon = daemon().stop_timeout(Duration::from_millis(200));
    let daemon = daemon.spawn().await.unwrap();
    let private = directory_of(&daemon.command());
    suspend(pid_of(&daemon)).await;
    assert_eq!(daemon.shutdown().await.signal(), Some(9));
    assert_nothing_left_of(&private);
}

/// The test starts itself as the process to be killed, by SIGKILL and by SIGINT, as Ctrl-C does.
#[tokio::test]
async fn killed_parent_leaves_no_orphan() {
    const IN_CHILD: &str = "P2PCLIENT_RS_TEST_ORPHAN";
    let name = "killed_parent_leaves_no_orphan";
    if std::env::var_os(IN_CHILD).is_some() {
        let daemon = daemon().restart(5).spawn().await.unwrap();
        let first = wait_for_restart(&daemon, None).await;
        kill_process(first, Signal::KILL).unwrap();
        let second = wait_for_restart(&daemon, Some(first)).await;
        let second = second.as_raw_nonzero();
        // Not the default action: background jobs of a shell ignore this signal.
        let mut interrupt = signal(SignalKind::interrupt()).unwrap();
        println!("\n{second} {}", directory_of(&daemon.command()).display());
        interrupt.recv().await;
        std::process::exit(130);
    }
    for signal in [Signal::KILL, Signal::INT] {
        let mut program = Command::new(std::env::current_exe().unwrap());
        let program = program.args([name, "--nocapture", "--test-threads=1"]);
        let program = program.env(IN_CHILD, "1").stdout(Stdio::piped());
        let mut program = program.spawn().unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap);
        let line = lines.find(|line| line.contains("/p2pd-"));
        let line = line.expect("no line was printed");
        let (pid, directory) = line.split_once(' ').unwrap();
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        kill_process(Pid::from_child(&program), signal).unwrap();
        assert!(!program.wait().unwrap().success());
        let begun = Instant::now();
        let gone = || test_kill_process(pid).is_err() && !Path::new(directory).exists();
        until(gone).await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        assert_nothing_left_of(Path::new(directory));
    }
}

#[tokio::test]
async fn daemon_that_ignores_sigterm_is_killed() {
    let directory = TempDir::new().unwrap();
    let p2pd = p2pd();
    let body = format!(
        "trap : TERM\n{} \"$@\" &\nwhile :; do sleep 1; done",
        p2pd.display()
    );
    let stubborn = P2PDaemon::builder().binary(script(&directory, &body));
    let stubborn = stubborn.stop_timeout(Duration::from_millis(200));
    let daemon = stubborn.spawn().await.unwrap();
    let private = directory_of(&daemon.command());
    assert_eq!(daemon.shutdown().await.signal(), Some(9));
    assert_nothing_left_of(&private);
}

#[tokio::test]
async fn several_tasks_may_stop_the_daemon() {
    let daemon = patient().spawn().await.unwrap();
    let (one, other) = tokio::join!(daemon.shutdown(), daemon.shutdown());
    // p2pd answers before it handles SIGTERM, so it may also be killed by that signal.
    assert_ne!(one.signal(), Some(libc::SIGKILL));
    assert_eq!(one, other);
}

#[tokio::test]
async fn dropped_daemon_is_killed() {
    let daemon = daemon().spawn().await.unwrap();
    let private = directory_of(&daemon.command());
    let mut logs = daemon.logs();
    assert!(logs.next().await.is_some());
    drop(daemon); // though its logs are still in use
    assert_nothing_left_of(&private);
    soon(async { while logs.next().await.is_some() {} }).await;
}

#[test]
fn daemon_dropped_after_its_runtime_is_killed() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let daemon = runtime.block_on(daemon().spawn()).unwrap();
    let private = directory_of(&daemon.command());
    drop(runtime);
    assert!(daemon.pid().is_some());
    drop(daemon);
    assert_nothing_left_of(&private);
}

/// A daemon that ignores SIGTERM, and answers requests if `answers`. It leaves behind a process
/// that serves its control socket, and one in its process group that is never reaped.
fn leaving(directory: &TempDir, answers: bool) -> PathBuf {
    let python = std::env::var("P2PCLIENT_PYTHON").unwrap_or_else(|_| "python3".into());
    let program = format!(
        r#"
import contextlib, os, signal, socket, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = next(a for a in sys.argv if a.startswith("-listen=")).partition("/unix")[2]
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(60)
    os.setsid()
    os.close(1)
    os.close(2)
    signal.alarm(10)
    kept = []
    while True:
        connection, _ = server.accept()
        kept.append(connection)
        connection.recv(100)
        identify = b"\x0a\x22\x12\x20" + bytes(32)
        answer = b"\x08\x00\x22" + bytes([len(identify)]) + identify
        if {answers}:
            with contextlib.suppress(OSError):
                connection.send(bytes([len(answer)]) + answer)
print("daemon has started", flush=True)
time.sleep(60)
"#,
        answers = if answers { "True" } else { "False" }
    );
    let file = directory.path().join("daemon.py");
    fs::write(&file, program).unwrap();
    let body = format!("exec {python} {} \"$@\"", file.display());
    script(directory, &body)
}

/// Awaits a future; returns its result and the longest time for which the event loop was blocked.
async fn longest_stall<T>(work: impl Future<Output = T>) -> (T, Duration) {
    let longest = Arc::new(Mutex::new(Duration::ZERO));
    let watching = tokio::spawn({
        let longest = Arc::clone(&longest);
        async move {
            loop {
                let before = Instant::now();
                tokio::time::sleep(Duration::from_millis(1)).await;
                let mut longest = longest.lock().unwrap();
                *longest = longest.max(before.elapsed());
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(5)).await;
    let outcome = work.await;
    tokio::time::sleep(Duration::from_millis(5)).await;
    watching.abort();
    let longest = *longest.lock().unwrap();
    (outcome, longest)
}

const STALL: Duration = Duration::from_millis(300);

#[tokio::test]
async fn shutdown_does_not_block_the_runtime() {
    let directory = TempDir::new().unwrap();
    let control = addr(&format!("/unix{}/c.sock", directory.path().display()));
    let daemon = P2PDaemon::builder()
        .binary(leaving(&directory, true))
        .control_maddr(control)
        .stop_timeout(Duration::from_millis(100))
        .spawn()
        .await
        .unwrap();
    let begun = Instant::now();
    let (status, stall) = longest_stall(daemon.shutdown()).await;
    assert_eq!(status.signal(), Some(9));
    assert!(begun.elapsed() > Duration::from_millis(500)); // shutdown waited for the process left behind
    assert!(stall < STALL, "{stall:?}");
}

#[tokio::test]
async fn failed_start_does_not_block_the_runtime() {
    let directory = TempDir::new().unwrap();
    let control = addr(&format!("/unix{}/c.sock", directory.path().display()));
    let start = P2PDaemon::builder()
        .binary(leaving(&directory, false))
        .control_maddr(control)
        .start_timeout(Duration::from_millis(700))
        .spawn();
    let begun = Instant::now();
    let (outcome, stall) = longest_stall(start).await;
    assert!(outcome.is_err());
    assert!(begun.elapsed() > Duration::from_millis(1100));
    assert!(stall < STALL, "{stall:?}");
}

#[tokio::test]
async fn drop_does_not_block_the_runtime_for_long() {
    let directory = TempDir::new().unwrap();
    let control = addr(&format!("/unix{}/c.sock", directory.path().display()));
    let daemon = P2PDaemon::builder()
        .binary(leaving(&directory, true))
        .control_maddr(control)
        .spawn()
        .await
        .unwrap();
    // The watchdog's command line contains the socket.
    let socket = format!("{}/c.sock", directory.path().display());
    let watchdogs = || {
        let listed = Command::new("ps").args(["-ax", "-o", "command="]).output();
        let listed = String::from_utf8_lossy(&listed.unwrap().stdout).into_owned();
        let ours = |line: &&str| line.contains("p2pd-watchdog") && line.contains(&socket);
        // Counts one line of its multi-line script.
        listed.lines().filter(ours).count()
    };
    assert_eq!(watchdogs(), 1);
    let ((), stall) = longest_stall(async { drop(daemon) }).await;
    assert!(stall < STALL, "{stall:?}");
    until(|| watchdogs() == 0).await;
}

#[tokio::test]
async fn long_log_is_bounded_and_its_end_is_kept() {
    let directory = TempDir::new().unwrap();
    let noise = "yes 'a short line' | head -c 20000000; echo; echo the last line";
    let body = format!("{noise}\nexec {} \"$@\"", p2pd().display());
    let chatty = P2PDaemon::builder().binary(script(&directory, &body));
    let daemon = chatty.spawn().await.unwrap();
    let private = directory_of(&daemon.command());
    let files = fs::read_dir(private).unwrap();
    let size: u64 = files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size <= (2 << 20) + 4096, "{size}");
    assert!(daemon.output().contains("the last line\n"));
    let mut logs = daemon.logs();
    while soon(logs.next()).await.unwrap() != "the last line" {}
}

// --- restarting ---

/// Waits until a process other than `before` answers; returns its number.
async fn wait_for_restart(daemon: &P2PDaemon, before: Option<Pid>) -> Pid {
    soon(async {
        loop {
            let pid = daemon.pid().and_then(|pid| Pid::from_raw(pid as i32));
            let control = daemon.control_maddr().clone();
            match pid.filter(|pid| Some(*pid) != before) {
                Some(pid) if Client::new(control).unwrap().identify().await.is_ok() => return pid,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await
}

#[tokio::test]
async fn daemon_is_not_restarted_by_default() {
    let daemon = daemon().spawn().await.unwrap();
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    soon(daemon.wait()).await;
    assert!(daemon.pid().is_none() && daemon.failure().is_none());
}

#[tokio::test]
async fn daemon_is_restarted_as_the_same_peer() {
    let directory = TempDir::new().unwrap();
    for builder in [
        patient().restart(5),
        patient().restart(5).identity(write_key(&directory)),
    ] {
        let daemon = Arc::new(builder.spawn().await.unwrap());
        let client = daemon.client().await.unwrap();
        let before = client.identify().await.unwrap();
        let (pid, command) = (pid_of(&daemon), daemon.command());
        let waiting = tokio::spawn({
            let daemon = Arc::clone(&daemon);
            async move { daemon.wait().await }
        });
        let mut logs = daemon.logs();
        kill_process(pid, Signal::KILL).unwrap();
        wait_for_restart(&daemon, Some(pid)).await;
        // The same client reaches the same peer at the same addresses.
        assert_eq!(client.identify().await.unwrap(), before);
        assert_eq!(daemon.command(), command);
        assert!(!waiting.is_finished());
        let status = daemon.shutdown().await;
        assert_eq!(soon(waiting).await.unwrap(), status);
        assert!(daemon.failure().is_none());
        assert_nothing_left_of(&directory_of(&command));
        // The logs span both processes.
        let mut started = 0;
        while let Some(line) = soon(logs.next()).await {
            started += usize::from(line.starts_with("Peer ID: "));
        }
        assert_eq!(started, 2);
    }
}

#[tokio::test]
async fn handlers_are_registered_again_after_a_restart() {
    let daemon_again = daemon().restart(5).spawn().await.unwrap();
    let other = daemon().spawn().await.unwrap();
    let server = daemon_again.client().await.unwrap();
    let caller = other.client().await.unwrap();
    for (protocol, balanced) in [("/greet", false), ("/balanced", true)] {
        let mut incoming = server.stream_handler(protocol, balanced).await.unwrap();
        tokio::spawn(async move {
            while let Some(mut stream) = incoming.next().await {
                let _ = stream.write_all(b"hello").await;
            }
        });
    }
    let echo = |call: UnaryCall| async move { Ok::<_, String>(call.payload) };
    server.add_unary_handler("echo", false, echo).await.unwrap();
    let pid = pid_of(&daemon_again);
    kill_process(pid, Signal::KILL).unwrap();
    wait_for_restart(&daemon_again, Some(pid)).await;
    let (peer, addrs) = (daemon_again.peer_id(), daemon_again.addrs());
    caller.connect(peer, addrs).await.unwrap();

    // The server makes no call that would reconnect.
    let greeted = |protocol: &'static str| {
        let caller = &caller;
        async move {
            let mut greeting = [0; 5];
            match caller.stream_open(peer, [protocol]).await {
                Ok(mut stream) => stream.read_exact(&mut greeting).await.is_ok(),
                Err(_) => false,
            }
        }
    };
    soon(async {
        while !greeted("/greet").await || !greeted("/balanced").await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        while caller.call_unary(peer, "echo", "data").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// A p2pd that fails to start once the file `broken` exists, and records its starts.
fn mortal(directory: &TempDir) -> PathBuf {
    let home = directory.path().display();
    let p2pd = p2pd();
    let body = format!(
        "echo run >> {home}/runs\n\
         if [ -e {home}/broken ]; then echo too bad; exit 3; fi\nexec {} \"$@\"",
        p2pd.display()
    );
    script(directory, &body)
}

fn runs(directory: &TempDir) -> usize {
    let runs = fs::read_to_string(directory.path().join("runs")).unwrap();
    runs.lines().count()
}

#[tokio::test]
async fn supervisor_gives_up_after_repeated_quick_deaths() {
    let directory = TempDir::new().unwrap();
    let daemon = P2PDaemon::builder().binary(mortal(&directory)).restart(3);
    let daemon = daemon.spawn().await.unwrap();
    fs::write(directory.path().join("broken"), "").unwrap();
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    assert_eq!(soon(daemon.wait()).await.code(), Some(3));
    let failure = daemon.failure().unwrap();
    assert_eq!(
        (failure.status, failure.logs),
        (Some(3), vec!["too bad".into()])
    );
    assert_eq!(runs(&directory), 3);
    assert_eq!(daemon.pid(), None);
}

#[tokio::test]
async fn failed_first_start_is_not_retried() {
    let directory = TempDir::new().unwrap();
    fs::write(directory.path().join("broken"), "").unwrap();
    let daemon = P2PDaemon::builder().binary(mortal(&directory)).restart(3);
    let error = failed(daemon).await;
    assert_eq!((error.status, runs(&directory)), (Some(3), 1));
}

#[tokio::test]
async fn daemon_can_be_stopped_or_dropped_during_restarts() {
    for drop_it in [false, true] {
        let directory = TempDir::new().unwrap();
        let daemon = P2PDaemon::builder().binary(mortal(&directory));
        let daemon = daemon.restart(100).spawn().await.unwrap();
        let private = directory_of(&daemon.command());
        fs::write(directory.path().join("broken"), "").unwrap();
        kill_process(pid_of(&daemon), Signal::KILL).unwrap();
        until(|| runs(&directory) >= 3).await;
        if drop_it {
            drop(daemon);
        } else {
            soon(daemon.shutdown()).await;
            assert!(daemon.failure().is_none());
        }
        assert_nothing_left_of(&private);
        let count = runs(&directory);
        // Long enough for another restart.
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(runs(&directory), count);
    }
}

// --- bootstrap peers in the background ---

#[tokio::test]
async fn background_bootstrap_connects_late_and_lost_peers() {
    let directory = TempDir::new().unwrap();
    let key = write_key(&directory);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let listening = addr(&format!("/ip4/127.0.0.1/tcp/{}", port.unwrap().port()));
    let other = || daemon().identity(&key).host_addrs([listening.clone()]);
    let first = other().spawn().await.unwrap();
    let (peer, peers) = (first.peer_id().clone(), first.peer_addrs());
    first.shutdown().await;

    let background = daemon().bootstrap(Bootstrap::Background).restart(5);
    let background = background.bootstrap_peers(peers.into_iter().chain([addr(UNREACHABLE)]));
    let background = background.spawn().await.unwrap();
    assert!(!background.command().contains(&"-b".to_owned()));
    let client = background.client().await.unwrap();
    assert_eq!(client.list_peers().await.unwrap(), []);

    let _second = other().spawn().await.unwrap();
    let connected = async || {
        let connected = async || {
            let peers = client.list_peers().await.unwrap();
            peers.iter().any(|info| info.peer_id == peer)
        };
        while !connected().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(connected()).await;
    // After a restart of the daemon as well.
    let pid = pid_of(&background);
    kill_process(pid, Signal::KILL).unwrap();
    wait_for_restart(&background, Some(pid)).await;
    soon(connected()).await;
    let private = directory_of(&background.command());
    background.shutdown().await;
    assert_nothing_left_of(&private);
}

// --- output ---

#[tokio::test]
async fn logs_yield_every_line_and_end_with_the_daemon() {
    let directory = TempDir::new().unwrap();
    let p2pd = p2pd();
    let body = format!(
        "seq 3000\nhead -c 70000 /dev/zero | tr '\\0' x; echo; printf 'a\\r\\n\\n'\n\
         trap 'wait; echo bye; printf end; exit' TERM\n{} \"$@\" &\nwhile :; do sleep 0.02; done",
        p2pd.display()
    );
    let chatty = P2PDaemon::builder().binary(script(&directory, &body));
    let daemon = chatty.spawn().await.unwrap();
    let following = tokio::spawn(daemon.logs().collect::<Vec<_>>());
    let mut logs = daemon.logs();
    for number in 1..=3000 {
        assert_eq!(logs.next().await.unwrap(), number.to_string());
    }
    let long = [logs.next().await.unwrap(), logs.next().await.unwrap()];
    assert_eq!(long.map(|line| line.len()), [65536, 70000 - 65536]);
    assert_eq!(logs.next().await.unwrap(), "a");
    assert_eq!(logs.next().await.unwrap(), "");
    daemon.shutdown().await;

    let followed = soon(following).await.unwrap();
    assert_eq!(followed[followed.len() - 2..], ["bye", "end"]);
    assert!(followed.contains(&format!("Peer ID: {}", daemon.peer_id())));
    // Logs start from the first line, even after the files were removed.
    let again: Vec<_> = soon(daemon.logs().collect()).await;
    assert_eq!(again, followed);
    let rest: Vec<_> = soon(logs.collect()).await;
    assert_eq!(rest, followed[3004..]);
}

#[tokio::test]
async fn long_lines_are_split_between_characters() {
    let directory = TempDir::new().unwrap();
    let p2pd = p2pd();
    let many = "head -c 65535 /dev/zero | tr '\\0' x";
    let body = format!(
        "{many}; printf 'é!\\n'; {many}; printf '\\ry\\n'\nexec {} \"$@\"",
        p2pd.display()
    );
    let chatty = P2PDaemon::builder().binary(script(&directory, &body));
    let daemon = chatty.spawn().await.unwrap();
    let mut logs = daemon.logs();
    let many = "x".repeat(65535);
    for expected in [many.clone(), "é!".into(), many + "\r", "y".into()] {
        assert!(soon(logs.next()).await.unwrap() == expected);
    }
}

#[tokio::test]
async fn long_log_does_not_starve_other_tasks() {
    let directory = TempDir::new().unwrap();
    let body = format!("seq 3000\nexec {} \"$@\"", p2pd().display());
    let chatty = P2PDaemon::builder().binary(script(&directory, &body));
    let daemon = chatty.spawn().await.unwrap();
    let other = tokio::spawn(async {});
    let mut logs = daemon.logs();
    for _ in 0..3000 {
        soon(logs.next()).await.unwrap();
    }
    assert!(other.is_finished());
}
