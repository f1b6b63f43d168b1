//! The daemon manager for tokio: against a real p2pd, and against scripts that misbehave.
//!
//! The binary comes from the variable P2PD_PATH, which must be set.
#![cfg(all(feature = "tokio", unix))]

use futures_util::StreamExt as _;
use p2pclient_rs::core::Multiaddr;
use p2pclient_rs::daemon::{
    ConnectionManager, DaemonError, Dht, P2PDaemon, P2PDaemonBuilder, Pubsub, StartError,
};
use rustix::process::{kill_process, Pid, Signal};
use std::fs;
use std::future::Future;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::time::timeout;

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

/// One that has the time it needs to end itself.
fn patient() -> P2PDaemonBuilder {
    daemon().stop_timeout(Duration::from_secs(60))
}

/// An executable script. Another process writes it: while this one had it open for writing, a fork
/// elsewhere would have it open too, and it could not be executed.
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

fn addr(text: &str) -> Multiaddr {
    text.parse().unwrap()
}

/// The daemon's private directory, out of its command line.
fn directory_of(command: &[String]) -> PathBuf {
    let control = command[1].strip_prefix("-listen=/unix").unwrap();
    Path::new(control).parent().unwrap().into()
}

/// Asserts that no process, the janitor included, and no file is left of a private directory.
fn nothing_is_left_of(directory: &Path) {
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

/// Has what should be quick fail rather than hang.
async fn soon<T>(future: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(60);
    timeout(limit, future).await.expect("it takes too long")
}

async fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < Duration::from_secs(15),
            "it did not come true"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The error of a start that must fail, after which nothing is left.
async fn failed(builder: P2PDaemonBuilder) -> StartError {
    match builder.spawn().await {
        Err(DaemonError::Start(error)) => {
            if error.command[1].starts_with("-listen=/unix") {
                nothing_is_left_of(&directory_of(&error.command));
            }
            error
        }
        other => panic!("{other:?}"),
    }
}

// --- a daemon that starts ---

#[tokio::test]
async fn it_starts_answers_and_leaves_nothing() {
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
    nothing_is_left_of(&directory);
    assert_eq!(daemon.pid(), None);
    // It ends itself, with status 0 or 143, as it happens.
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
        // The second is an address of this machine on Linux only, unless it was given it.
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
async fn what_is_true_is_switched_on_and_what_is_false_is_not() {
    let on = daemon().dht(true).relay(true).pubsub(true);
    let on = on.connection_manager(true).spawn().await.unwrap();
    let flags = ["-dht", "-relay=true", "-pubsub", "-connManager"];
    assert_eq!(on.command()[3..], flags);
    let off = daemon().dht(false).pubsub(false);
    let off = off.connection_manager(false).spawn().await.unwrap();
    assert_eq!(off.command().len(), 3);
}

#[tokio::test]
async fn the_identity_file_is_the_peer_id() {
    // The first key pair of RFC 8032, in libp2p's encoding.
    let private = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60";
    let public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a";
    let bytes = |hex: &str| -> Vec<u8> {
        let digits = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digits).collect()
    };
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("key");
    let key = [b"\x08\x01\x12\x40".to_vec(), bytes(private), bytes(public)].concat();
    fs::write(&file, key).unwrap();
    let daemon = daemon().identity(file).spawn().await.unwrap();
    let expected = [b"\x00\x24\x08\x01\x12\x20".to_vec(), bytes(public)].concat();
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
async fn a_control_socket_of_ones_own_is_for_ones_own_and_removed_too() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    let wanted = addr(&format!("/unix{}", path.display()));
    let daemon = daemon().control_maddr(wanted).spawn().await.unwrap();
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o077, 0);
    // It cannot remove it itself then.
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    daemon.shutdown().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn bootstrap_peers_are_connected() {
    let first = daemon().dht(Dht::Server).spawn().await.unwrap();
    let mut peers = first.peer_addrs();
    peers.push(addr(UNREACHABLE)); // which does no harm
    let second = daemon().dht(Dht::Server).bootstrap_peers(peers);
    let second = second.spawn().await.unwrap();
    let connected = second.client().await.unwrap().list_peers().await.unwrap();
    let connected: Vec<_> = connected.iter().map(|peer| &peer.peer_id).collect();
    assert!(connected.contains(&first.peer_id()), "{connected:?}");
}

#[tokio::test]
async fn a_start_and_a_daemon_can_be_given_to_other_tasks() {
    let daemon = tokio::spawn(daemon().spawn()).await.unwrap().unwrap();
    let directory = directory_of(&daemon.command());
    let waiting = tokio::spawn(async move { daemon.wait().await });
    tokio::task::yield_now().await;
    assert!(directory.exists());
    waiting.abort();
    assert!(soon(waiting).await.unwrap_err().is_cancelled());
    nothing_is_left_of(&directory);
}

// --- a daemon that does not ---

#[tokio::test]
async fn a_missing_binary_is_named() {
    let error = P2PDaemon::builder().binary("/no/such/p2pd").spawn().await;
    match error {
        Err(DaemonError::NotFound(error)) => {
            assert_eq!(error.looked_at, ["argument: /no/such/p2pd does not exist"]);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_binary_that_is_not_executable_is_named() {
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
async fn wrong_options_are_refused() {
    let limits = ConnectionManager::Limits {
        low: 3,
        high: 2,
        grace: Duration::ZERO,
    };
    for (builder, words) in [
        (daemon().connection_manager(limits), "low water mark"),
        (
            daemon().extra_args(["-listen=/unix/tmp/x"]),
            "control address",
        ),
        (daemon().control_maddr(addr("/ip4/127.0.0.1/udp/1")), "udp"),
    ] {
        match builder.spawn().await {
            Err(DaemonError::Options(error)) => assert!(error.to_string().contains(words)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_wrong_flag_is_named() {
    let error = failed(daemon().extra_args(["-nonsense"])).await;
    assert_eq!(error.status, Some(2));
    assert_eq!(error.cause.unwrap(), "this daemon has no option -nonsense");
    assert_eq!(error.logs, ["flag provided but not defined: -nonsense"]);
}

#[tokio::test]
async fn a_port_taken_is_named() {
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
async fn another_daemon_at_the_address_is_not_taken_for_it() {
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
    let cause = format!("no bootstrap peer could be reached: {UNREACHABLE}");
    assert_eq!(error.cause.unwrap(), cause);
}

#[tokio::test]
async fn a_bad_identity_is_named() {
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
async fn an_exit_is_told_at_once_with_status_and_last_lines() {
    let directory = TempDir::new().unwrap();
    let body = "for i in $(seq 30); do echo line $i; done; echo worst >&2; exit 3";
    let begun = Instant::now();
    let error = failed(P2PDaemon::builder().binary(script(&directory, body))).await;
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(error.status, Some(3));
    assert_eq!((error.logs.len(), &*error.logs[19]), (20, "worst"));
    let told = "the daemon exited with status 3 before it was ready";
    assert_eq!(error.message, told);
    let shown = error.to_string();
    assert!(
        shown.contains("worst") && shown.contains("-listen=/unix/"),
        "{shown}"
    );
}

#[tokio::test]
async fn silence_ends_in_a_timeout() {
    let directory = TempDir::new().unwrap();
    let silent = P2PDaemon::builder().binary(script(&directory, "exec sleep 1000"));
    let error = failed(silent.start_timeout(Duration::from_millis(200))).await;
    let told = "the daemon was not ready in 0.2 seconds and printed nothing";
    assert_eq!(error.message, told);
    assert_eq!(error.status, None);
    assert!(error.cause.unwrap().contains("no connection"));
}

#[tokio::test]
async fn the_answer_of_another_peer_is_not_believed() {
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
async fn dropping_the_start_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    let told = directory.path().join("told");
    let body = format!(
        "echo \"$@\" > {0}.new; mv {0}.new {0}; exec sleep 1000",
        told.display()
    );
    let start = P2PDaemon::builder().binary(script(&directory, &body));
    tokio::select! {
        started = start.spawn() => panic!("{started:?}"),
        () = until(|| told.exists()) => {}
    }
    let arguments = fs::read_to_string(&told).unwrap();
    let arguments = arguments.split(' ').map(str::to_owned);
    let command: Vec<_> = ["p2pd".to_owned()].into_iter().chain(arguments).collect();
    nothing_is_left_of(&directory_of(&command));
}

// --- the end of it ---

#[tokio::test]
async fn its_end_leaves_the_socket_of_its_successor() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("c.sock");
    let wanted = addr(&format!("/unix{}", path.display()));
    let start = || daemon().control_maddr(wanted.clone()).spawn();
    let mut daemon = start().await.unwrap();
    kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    soon(daemon.wait()).await;
    daemon = start().await.unwrap(); // the first is dropped after this one has started
    daemon.client().await.unwrap();
}

/// In a process of its own: the test starts itself.
#[tokio::test]
#[allow(unsafe_code)]
async fn its_end_is_seen_though_somebody_took_the_place_of_tokios_handler() {
    const IN_CHILD: &str = "P2PCLIENT_RS_TEST_SIGCHLD";
    let name = "its_end_is_seen_though_somebody_took_the_place_of_tokios_handler";
    if std::env::var_os(IN_CHILD).is_none() {
        let test = std::env::current_exe().unwrap();
        let mut test = Command::new(test);
        let test = test.args([name, "--nocapture"]).env(IN_CHILD, "1");
        assert!(test.status().unwrap().success());
        return;
    }
    let daemon = daemon().spawn().await.unwrap();
    // SAFETY: no handler is run any more.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let waiting = async { soon(daemon.wait()).await };
    let (status, ()) = tokio::join!(waiting, async {
        kill_process(pid_of(&daemon), Signal::KILL).unwrap();
    });
    assert_eq!(status.signal(), Some(9));
}

#[tokio::test]
async fn every_task_that_waits_is_told_of_its_end() {
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
async fn what_does_not_end_is_killed() {
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
    nothing_is_left_of(&private);
}

#[tokio::test]
async fn several_tasks_may_stop_it() {
    let daemon = patient().spawn().await.unwrap();
    let (one, other) = tokio::join!(daemon.shutdown(), daemon.shutdown());
    assert_eq!((one.signal(), other), (None, one));
}

#[tokio::test]
async fn dropping_it_kills_it() {
    let daemon = daemon().spawn().await.unwrap();
    let private = directory_of(&daemon.command());
    let mut logs = daemon.logs();
    assert!(logs.next().await.is_some());
    drop(daemon); // though the logs live on
    nothing_is_left_of(&private);
    soon(async { while logs.next().await.is_some() {} }).await;
}

#[test]
fn dropping_it_kills_it_when_the_runtime_is_gone() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let daemon = runtime.block_on(daemon().spawn()).unwrap();
    let private = directory_of(&daemon.command());
    drop(runtime);
    assert!(daemon.pid().is_some());
    drop(daemon);
    nothing_is_left_of(&private);
}

// --- its output ---

#[tokio::test]
async fn logs_have_every_line_from_the_beginning_and_end_with_the_daemon() {
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
    // From the beginning, also of what is left when its files are gone.
    let again: Vec<_> = soon(daemon.logs().collect()).await;
    assert_eq!(again, followed);
    let rest: Vec<_> = soon(logs.collect()).await;
    assert_eq!(rest, followed[3004..]);
}

#[tokio::test]
async fn a_piece_of_a_line_ends_between_characters_and_loses_none() {
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
async fn a_long_log_lets_other_tasks_run() {
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
