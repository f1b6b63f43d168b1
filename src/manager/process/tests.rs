//! Tests of a daemon's process, with shell scripts in place of a daemon.

use super::preparation::PORTS;
use super::*;
use rustix::process::{kill_process, Pid, Signal};
use socket2::{Domain, SockAddr, Socket, Type};
use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::time::Instant;

/// Runs a script, and waits until it has printed "ready", when its traps are set.
fn running(body: &str) -> Process {
    let process = scripted(&format!("{body}\nwhile :; do sleep 0.02; done"));
    process.spawn().unwrap();
    until(|| process.output().contains("ready"));
    process
}

fn scripted(body: &str) -> Process {
    let options = DaemonOptions::default();
    let mut process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
    process.arguments = vec!["-c".into(), body.into()];
    process
}

fn ended(body: &str) -> Process {
    let process = scripted(body);
    process.spawn().unwrap();
    until(|| process.poll().is_some());
    process
}

fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(
            begun.elapsed() < Duration::from_secs(15),
            "the condition stayed false"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process runs. A zombie does not.
fn runs(pid: u32) -> bool {
    let state = Command::new("ps")
        .args(["-o", "stat=", "-p", &pid.to_string()])
        .output()
        .unwrap();
    let state = String::from_utf8(state.stdout).unwrap();
    !state.trim().is_empty() && !state.starts_with('Z')
}

#[cfg(target_os = "linux")]
const KINDS: &[Option<WatchdogKind>] =
    &[None, Some(WatchdogKind::Shell), Some(WatchdogKind::Forked)];
#[cfg(not(target_os = "linux"))]
const KINDS: &[Option<WatchdogKind>] = &[None, Some(WatchdogKind::Shell)];

/// The numbers that the script printed, one on each line.
fn printed(process: &Process) -> Vec<u32> {
    let output = process.output();
    output
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect()
}

#[test]
fn keeps_status_and_output_after_destroy() {
    let process = ended("echo out; echo err >&2; exit 3");
    assert_eq!(process.poll().map(exit_code), Some(3));
    assert!(!process.alive() && !process.ended());
    process.destroy();
    process.destroy();
    assert!(process.ended() && !process.directory.exists());
    assert!(!runs(process.watchdog_pid()));
    assert_eq!(process.output(), "out\nerr\n");
    assert_eq!(process.poll().map(exit_code), Some(3));
}

#[test]
fn keeps_only_the_end_of_a_long_output() {
    let process = ended("head -c 2000000 /dev/zero | tr '\\0' x; echo end");
    assert_eq!(process.output().len() as u64, log::LIMIT);
    assert!(process.output().ends_with("xend\n"));
}

#[test]
fn daemon_has_its_own_session_and_umask_077() {
    let process = ended("umask; ps -o sid= -p $$; echo $$; cat");
    let pid = process.pid().unwrap();
    let mode = process.directory.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    assert_eq!(process.output().lines().next(), Some("0077"));
    let output = process.output();
    let numbers: Vec<_> = output.split_whitespace().skip(1).collect();
    assert_eq!(numbers, [pid.to_string(), pid.to_string()]);
}

#[test]
#[cfg(target_os = "linux")]
fn daemon_inherits_no_descriptor() {
    use std::os::fd::AsRawFd as _;
    let file = File::open("/dev/null").unwrap();
    let inheritable = rustix::io::dup(&file).unwrap();
    let process = running("echo ready");
    for pid in [process.pid().unwrap(), process.watchdog_pid()] {
        let fd = format!("/proc/{pid}/fd/{}", inheritable.as_raw_fd());
        assert!(fs::read_link(&fd).is_err());
    }
}

#[test]
fn terminate_ends_the_daemon_and_its_children() {
    let process = running("trap 'exit 7' TERM; sleep 1000 & echo $!; echo ready");
    let child = printed(&process)[0];
    assert!(process.alive() && runs(child));
    process.terminate();
    until(|| process.poll().is_some());
    assert_eq!(process.poll().map(exit_code), Some(7));
    until(|| !runs(child));
}

#[test]
fn destroy_kills_a_daemon_that_ignores_sigterm() {
    let process = running("trap '' TERM; echo ready");
    let pid = process.pid().unwrap();
    process.terminate();
    assert!(process.alive());
    process.destroy();
    assert_eq!(process.poll().map(exit_code), Some(-9));
    assert!(!runs(pid));
}

#[test]
fn poll_works_while_another_thread_destroys() {
    let process = running("trap '' TERM; echo ready");
    let shutdown = process.shutdown.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| process.destroy());
        assert_eq!(process.poll(), None);
        process.terminate();
        assert!(process.alive() && !process.ended());
        drop(shutdown);
    });
    assert!(process.ended());
}

#[test]
fn spawns_though_the_watchdog_was_killed() {
    let process = scripted("echo ready; sleep 1000");
    let watchdog = Pid::from_raw(process.watchdog_pid() as i32).unwrap();
    kill_process(watchdog, Signal::KILL).unwrap();
    until(|| !runs(process.watchdog_pid()));
    process.spawn().unwrap();
    until(|| process.output().contains("ready"));
}

#[test]
fn kills_what_a_wrapper_left_behind() {
    let process = ended("sleep 1000 & echo $!");
    until(|| !runs(printed(&process)[0]));
}

#[test]
fn drop_ends_the_daemon_and_removes_its_files() {
    let process = running("echo ready");
    let (pid, watchdog) = (process.pid().unwrap(), process.watchdog_pid());
    let directory = process.directory.clone();
    drop(process);
    assert!(!runs(pid) && !runs(watchdog) && !directory.exists());
}

#[test]
fn a_daemon_reaped_elsewhere_has_ended() {
    let process = scripted("sleep 1000 & echo $!; exit 5");
    process.spawn().unwrap();
    let pid = Pid::from_raw(process.pid().unwrap() as i32);
    let options = rustix::process::WaitOptions::empty();
    rustix::process::waitpid(pid, options).unwrap().unwrap();
    assert_eq!(process.poll().map(exit_code), Some(0));
    assert!(!process.alive());
    // The kernel may have reused the id of its process group.
    process.terminate();
    process.destroy();
    let left = Pid::from_raw(printed(&process)[0] as i32).unwrap();
    kill_process(left, Signal::KILL).unwrap();
}

#[test]
fn does_not_pass_a_bad_binary_to_a_shell() {
    let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
    let binary = directory.path().join("p2pd");
    fs::write(&binary, "echo this is no binary").unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o700)).unwrap();
    let process = Process::prepare(binary, &DaemonOptions::default(), None).unwrap();
    // A concurrent test between fork and exec holds the file open for writing.
    let busy = |error: &StartError| error.to_string().contains("Text file busy");
    let error = loop {
        match process.spawn().unwrap_err() {
            error if busy(&error) => fs::remove_file(process.log()).unwrap(),
            error => break error,
        }
    };
    let cause = error.cause.unwrap();
    assert!(
        cause.starts_with("the binary is not for this machine"),
        "{cause}"
    );
    assert_eq!((process.pid(), process.output()), (None, String::new()));
}

#[test]
fn refuses_a_nul_in_an_argument() {
    let mut process = scripted("");
    process.arguments.push("a\0b".into());
    assert!(process
        .spawn()
        .unwrap_err()
        .to_string()
        .contains("nul byte"));
}

#[test]
fn control_socket_is_private_unless_an_address_is_given() {
    let process = scripted("");
    let directory = process.directory.display();
    assert_eq!(
        process.control().to_string(),
        format!("/unix{directory}/control.sock")
    );
    let names = [process.listen_maddr(), process.listen_maddr()].map(|addr| addr.to_string());
    assert!(names[0].starts_with(&format!("/unix{directory}/client-")));
    assert_ne!(names[0], names[1]);

    let options = DaemonOptions {
        control: Some("/ip4/127.0.0.1/tcp/0".parse().unwrap()),
        ..Default::default()
    };
    let process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
    let control = process.control().to_string();
    let port: u16 = control.rsplit('/').next().unwrap().parse().unwrap();
    assert!(PORTS.contains(&port));
    assert_eq!(process.arguments, [format!("-listen={control}")]);
}

#[test]
fn removes_a_stale_socket_but_not_one_in_use() {
    let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
    let path = directory.path().join("c.sock");
    let options = DaemonOptions {
        control: Some(unix_maddr(&path)),
        ..Default::default()
    };
    let listener = UnixListener::bind(&path).unwrap();
    drop(Process::prepare("/bin/sh".into(), &options, None).unwrap());
    assert!(path.exists());
    drop(listener);
    // A concurrent test between fork and exec holds the listener open.
    let process = RefCell::new(None);
    until(|| {
        process.replace(Some(
            Process::prepare("/bin/sh".into(), &options, None).unwrap(),
        ));
        !path.exists()
    });
    // The socket that the daemon leaves is removed, but not one that another process serves.
    let listener = UnixListener::bind(&path).unwrap();
    drop(process.take());
    assert!(path.exists());
    drop(listener);
    fs::remove_file(&path).unwrap();
    let process = Process::prepare("/bin/sh".into(), &options, None).unwrap();
    let left = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
    left.bind(&SockAddr::unix(&path).unwrap()).unwrap();
    drop(process);
    assert!(!path.exists());
}

#[test]
fn avoids_a_long_temporary_directory() {
    let long = std::env::temp_dir().join("x".repeat(100));
    let options = DaemonOptions::default();
    let process = Process::prepare("/bin/sh".into(), &options, Some(&long)).unwrap();
    assert_eq!(process.directory.parent(), Some(Path::new("/tmp")));
}

#[test]
fn unused_port_is_below_the_ephemeral_range() {
    let ports: std::collections::HashSet<_> = (0..50)
        .map(|_| unused_tcp_port("127.0.0.1").unwrap())
        .collect();
    assert!(ports.len() > 45);
    assert!(ports.iter().all(|port| PORTS.contains(port)));
    assert!(unused_tcp_port("192.0.2.1").is_err()); // not of this machine
}

#[test]
fn watchdog_ends_the_group_unless_it_has_ended() {
    for (kind, has_ended) in KINDS
        .iter()
        .flat_map(|kind| [(*kind, false), (*kind, true)])
    {
        let mut other = Command::new("sleep");
        let mut other = std::os::unix::process::CommandExt::process_group(&mut other, 0)
            .arg("1000")
            .spawn()
            .unwrap();
        let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
        let files = directory.path().join("d i r");
        fs::create_dir_all(files.join("within")).unwrap();
        fs::write(files.join("within/file"), "").unwrap();
        std::os::unix::fs::symlink("/tmp", files.join("link")).unwrap();
        let watchdog = Watchdog::start([Some(files.as_path())], kind).unwrap();
        watchdog.send(other.id());
        if has_ended {
            watchdog.send(0);
        }
        watchdog.cut_lifeline();
        if has_ended {
            until(|| !files.exists());
            assert_eq!(other.try_wait().unwrap(), None);
            other.kill().unwrap();
            other.wait().unwrap();
        } else {
            assert_eq!(exit_code(other.wait().unwrap()), -15);
            until(|| !files.exists());
        }
        until(|| watchdog.dismiss());
    }
}

#[test]
fn failed_preparation_names_the_file() {
    let prepare = |parent: &Path, options: &DaemonOptions| match Process::prepare(
        "/bin/sh".into(),
        options,
        Some(parent),
    ) {
        Err(DaemonError::Start(error)) => error,
        other => panic!("{other:?}"),
    };
    let options = DaemonOptions::default();
    for (parent, number) in [("/no/such", 2), ("/dev/null", 20)] {
        let error = prepare(Path::new(parent), &options);
        let cause = error.cause.clone().unwrap();
        let begin = format!("cannot create the directory {parent}/p2pd-");
        assert!(cause.starts_with(&begin), "{cause}");
        assert_eq!(error.source.as_ref().unwrap().raw_os_error(), Some(number));
        assert!(error.to_string().contains("hint: set TMPDIR"), "{error}");
    }
    let elsewhere = DaemonOptions {
        control: Some("/ip4/192.0.2.1/tcp/0".parse().unwrap()),
        ..options
    };
    let cause = prepare(&std::env::temp_dir(), &elsewhere).cause.unwrap();
    assert!(
        cause.starts_with("cannot find a free TCP port of 192.0.2.1: "),
        "{cause}"
    );
}

#[test]
fn names_a_binary_that_vanished() {
    let binary = PathBuf::from("/no/such/p2pd");
    let process = Process::prepare(binary, &DaemonOptions::default(), None).unwrap();
    let error = process.spawn().unwrap_err();
    let cause = error.cause.unwrap();
    assert!(
        cause.starts_with("cannot execute /no/such/p2pd: "),
        "{cause}"
    );
    assert_eq!(error.source.unwrap().raw_os_error(), Some(2));
    // Another attempt is possible.
    assert!(process.spawn().is_err());
}

#[test]
fn try_destroy_does_not_block() {
    let process = running("trap '' TERM; echo ready");
    let pid = process.pid().unwrap();
    let begun = Instant::now();
    let mut longest = Duration::ZERO;
    loop {
        let before = Instant::now();
        let done = process.try_destroy();
        longest = longest.max(before.elapsed());
        if done {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(15));
        thread::sleep(Duration::from_millis(1));
    }
    assert!(longest < Duration::from_millis(250), "{longest:?}");
    assert!(process.destroyed() && process.try_destroy());
    assert!(!runs(pid) && !process.directory.exists());
    assert!(!runs(process.watchdog_pid()));
    let error = process.spawn().unwrap_err();
    assert_eq!(error.cause.as_deref(), Some("it was stopped"));
}

#[test]
fn refuses_to_spawn_once_the_shutdown_has_begun() {
    let process = ended("exit 0");
    // The state after the first step of a shutdown.
    process.shutdown.lock().unwrap().waiting_for();
    let error = process.spawn().unwrap_err();
    assert_eq!(error.cause.as_deref(), Some("it was stopped"));
}

/// The test starts itself as the process that has no free descriptor.
#[test]
#[cfg(target_os = "linux")]
fn removes_all_files_without_a_free_descriptor() {
    use rustix::process::{getrlimit, setrlimit, Resource, Rlimit};
    const IN_CHILD: &str = "P2PCLIENT_RS_TEST_DESCRIPTORS";
    if std::env::var_os(IN_CHILD).is_some() {
        let before = getrlimit(Resource::Nofile);
        let limit = |current| {
            let limit = Rlimit { current, ..before };
            setrlimit(Resource::Nofile, limit).unwrap();
        };
        for kind in KINDS.iter().copied() {
            limit(before.current);
            let options = DaemonOptions::default();
            let process = Process::prepare_with("/bin/sh".into(), &options, None, kind).unwrap();
            fs::create_dir(process.directory.join("more")).unwrap();
            fs::write(process.directory.join("more/file"), "").unwrap();
            limit(Some(0));
            assert!(fs::remove_dir_all(&process.directory).is_err());
            process.destroy();
            assert!(!process.directory.exists());
            assert!(!exists(process.watchdog_pid()));
        }
        let directory = p2pd_sockets::private_directory(None, "p2pd-", LONGEST_SOCKET).unwrap();
        let path = directory.path().to_owned();
        assert!(path.exists());
        drop(directory);
        assert!(!path.exists());
        limit(before.current);
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "removes_all_files_without_a_free_descriptor",
            "--test-threads=1",
        ])
        .env(IN_CHILD, "")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// The test starts itself as the process to be killed.
#[test]
fn killing_this_process_ends_the_daemon_and_removes_its_files() {
    const IN_CHILD: &str = "P2PCLIENT_RS_TEST_PARENT";
    if let Some(kind) = std::env::var_os(IN_CHILD) {
        let kind = KINDS[kind.to_str().unwrap().parse::<usize>().unwrap()];
        let mut process =
            Process::prepare_with("/bin/sh".into(), &DaemonOptions::default(), None, kind).unwrap();
        let body = "echo ready; while :; do sleep 0.02; done";
        process.arguments = vec!["-c".into(), body.into()];
        process.spawn().unwrap();
        until(|| process.output().contains("ready"));
        let (pid, watchdog) = (process.pid().unwrap(), process.watchdog_pid());
        println!("\n{pid} {watchdog} {}", process.directory.display());
        kill_process(rustix::process::getpid(), Signal::KILL).unwrap();
    }
    let name = "killing_this_process_ends_the_daemon_and_removes_its_files";
    for kind in 0..KINDS.len() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([name, "--nocapture", "--test-threads=1"])
            .env(IN_CHILD, kind.to_string())
            .output()
            .unwrap();
        assert_eq!(exit_code(output.status), -9);
        let output = String::from_utf8(output.stdout).unwrap();
        let line = output.lines().find(|line| line.contains("/p2pd-")).unwrap();
        let parts: Vec<_> = line.split(' ').collect();
        let [pid, watchdog] = [parts[0], parts[1]].map(|number| number.parse::<u32>().unwrap());
        until(|| !runs(pid) && !runs(watchdog) && !Path::new(parts[2]).exists());
    }
}
