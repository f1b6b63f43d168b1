//! Tests of spawning a program.

use super::*;
use std::fs::File;
use std::io::Read as _;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

fn wait_a_little(ended: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ended() && begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn program(command: &[&str], output: &dyn AsFd) -> Program {
    let null = File::open("/dev/null").unwrap();
    let arguments = command[1..].iter().map(|part| part.as_bytes());
    Program::new(Path::new(command[0]), arguments, [&null, output, output]).unwrap()
}

/// Returns a program's output, once it has ended.
fn printed(program: impl FnOnce(&dyn AsFd) -> Program) -> String {
    let (mut reader, writer) = io::pipe().unwrap();
    let program = program(&writer);
    let child = program.spawn().unwrap();
    drop((program, writer));
    let mut printed = String::new();
    reader.read_to_string(&mut printed).unwrap();
    wait_a_little(|| child.has_ended().unwrap());
    assert_eq!(child.reap(), Some(ExitStatus::default()));
    assert!(child.has_ended().is_err());
    printed
}

#[test]
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn runs_no_atfork_handlers() {
    use std::cell::Cell;
    thread_local!(static FORKED: Cell<bool> = const { Cell::new(false) });
    extern "C" fn forking() {
        FORKED.set(true);
    }
    // SAFETY: the handler is a static function, and runs in the thread that forks.
    assert_eq!(
        unsafe { libc::pthread_atfork(Some(forking), None, None) },
        0
    );
    printed(|output| program(&["/bin/sh", "-c", ":"], output));
    assert!(!FORKED.get());
}

#[test]
#[cfg(target_os = "linux")]
fn inherits_no_descriptor_with_or_without_close_range() {
    let inheritable = rustix::io::dup(File::open("/dev/null").unwrap()).unwrap();
    assert!(inheritable.as_raw_fd() > 2);
    for by_range in [true, false] {
        let listed = printed(|output| {
            // Descriptor 3 is the directory that `ls` reads.
            let program = program(&["/bin/ls", "/proc/self/fd"], output);
            Program {
                by_range,
                ..program
            }
        });
        assert_eq!(listed, "0\n1\n2\n3\n");
    }
}

#[test]
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn resets_handlers_and_mask_but_keeps_ignored_signals() {
    extern "C" fn handler(_: c_int) {}
    let handler: extern "C" fn(c_int) = handler;
    let bit = |signal: c_int| 1u64 << (signal - 1);
    // SAFETY: the handler does nothing, and no other test uses these signals. The mask belongs to
    // this thread, and the set is initialised before it is read.
    unsafe {
        libc::signal(libc::SIGUSR1, handler as libc::sighandler_t);
        libc::signal(libc::SIGUSR2, libc::SIG_IGN);
        let mut mask = mem::zeroed();
        libc::sigemptyset(&mut mask);
        libc::sigaddset(&mut mask, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &mask, ptr::null_mut());
    }
    let status = printed(|output| program(&["/bin/cat", "/proc/self/status"], output));
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
    };
    assert_eq!(set("SigBlk:"), 0);
    assert_eq!(set("SigCgt:"), 0);
    assert_eq!(set("SigIgn:") & bit(libc::SIGUSR2), bit(libc::SIGUSR2));
    // Rust's runtime ignores it in the test's own process.
    assert_eq!(set("SigIgn:") & bit(libc::SIGPIPE), 0);
    let mut mask: libc::sigset_t;
    // SAFETY: as above. Restores the mask, since another test may run on this thread next.
    unsafe {
        mask = mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, ptr::null(), &mut mask);
        assert_eq!(libc::sigismember(&mask, libc::SIGTERM), 1);
        assert_eq!(libc::sigismember(&mask, libc::SIGHUP), 0);
        libc::sigemptyset(&mut mask);
        libc::pthread_sigmask(libc::SIG_SETMASK, &mask, ptr::null_mut());
    }
}

#[test]
fn announces_its_process_id_before_the_program_runs() {
    let (mut reader, writer) = io::pipe().unwrap();
    let output = File::open("/dev/null").unwrap();
    let program = program(&["/bin/sh", "-c", "exit"], &output);
    let program = program.announced_to(&writer).unwrap();
    let child = program.spawn().unwrap();
    drop((program, writer));
    let mut line = String::new();
    reader.read_to_string(&mut line).unwrap();
    assert!(line.ends_with('\n'), "{line:?}");
    assert_eq!(line.trim().parse(), Ok(child.id()));
    wait_a_little(|| child.kill());
}

#[test]
fn runs_though_the_announcement_has_no_reader() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let text = printed(|output| {
        let program = program(&["/bin/sh", "-c", "echo here"], output);
        program.announced_to(&writer).unwrap()
    });
    assert_eq!(text, "here\n");
}

#[test]
fn inherits_the_environment_unless_one_is_given() {
    let text = printed(|output| program(&["/usr/bin/env"], output));
    for (name, value) in std::env::vars() {
        assert!(text.contains(&format!("{name}={value}\n")), "{name}");
    }
    let text = printed(|output| {
        let program = program(&["/usr/bin/env"], output);
        program.environment([("A".into(), "b".into())])
    });
    assert_eq!(text, "A=b\n");
}

#[test]
fn a_failed_spawn_leaves_no_child() {
    let output = File::open("/dev/null").unwrap();
    let failed = program(&["/no/such/program"], &output).spawn().unwrap_err();
    assert_eq!(failed.error.raw_os_error(), Some(libc::ENOENT));
    assert_eq!(failed.operation, "cannot execute /no/such/program");
}
