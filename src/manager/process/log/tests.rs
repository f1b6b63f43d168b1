//! Tests of the daemon's log.

use super::store::older;
use super::*;
use p2pd_sockets::{private_directory, PrivateDirectory};
use std::io::Write as _;
use std::{fs, thread};

fn log() -> (PrivateDirectory, Log) {
    let directory = private_directory(None, "log-", "").unwrap();
    let log = Log::new(&directory.path().join("log"));
    (directory, log)
}

fn size(directory: &PrivateDirectory) -> u64 {
    let files = fs::read_dir(directory.path()).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum()
}

fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(15));
        thread::sleep(Duration::from_millis(1));
    }
}

fn task(log: &Log) -> Option<PathBuf> {
    let draining = log.draining();
    draining.drainer.as_ref().map(|one| one.task.clone())
}

#[test]
fn files_stay_within_the_bound_and_keep_the_newest_output() {
    let (directory, log) = log();
    let (mut pipe, begin) = log.begin_run().unwrap();
    assert_eq!(begin, 0);
    let line: Vec<u8> = (0..=255).cycle().take(100_003).collect();
    for _ in 0..50 {
        pipe.write_all(&line).unwrap();
        assert!(size(&directory) <= 2 * LIMIT);
    }
    drop(pipe);
    let (begin, tail) = log.tail(0);
    let end = 50 * line.len() as u64;
    assert_eq!((begin, tail.len() as u64), (end - LIMIT, LIMIT));
    let expected = line.iter().cycle().skip(begin as usize % line.len());
    assert!(tail.iter().eq(expected.take(tail.len())));
    assert!(tail_of_files(&directory.path().join("log")) == tail);
    assert!(size(&directory) <= 2 * LIMIT);
}

#[test]
fn output_is_complete_once_the_writer_has_closed() {
    let (_directory, log) = log();
    let (mut pipe, _) = log.begin_run().unwrap();
    log.pause();
    pipe.write_all(b"last words").unwrap();
    assert_eq!(log.tail(0), (0, b"last words".to_vec()));
    pipe.write_all(b" indeed").unwrap();
    log.resume();
    drop(pipe);
    until(|| log.store().source.is_none());
    assert_eq!(log.tail(5), (5, b"words indeed".to_vec()));
}

#[test]
fn reads_the_oldest_output_for_an_older_position() {
    let (_directory, log) = log();
    let (mut pipe, _) = log.begin_run().unwrap();
    for number in 0..60_000u64 {
        pipe.write_all(format!("{number:63}\n").as_bytes()).unwrap();
    }
    let (mut position, mut lines) = (0, Vec::new());
    loop {
        let (begin, data) = log.read(position, 10_000);
        if data.is_empty() {
            break;
        }
        assert!(begin == position || lines.is_empty());
        position = begin + data.len() as u64;
        lines.extend(data);
    }
    assert!(lines.len() as u64 > LIMIT && lines.len() as u64 <= 2 * LIMIT);
    let lines = String::from_utf8(lines).unwrap();
    let numbers: Vec<u64> = lines
        .lines()
        .map(|line| line.trim().parse().unwrap())
        .collect();
    assert_eq!(numbers.last(), Some(&59_999));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
}

#[test]
fn positions_continue_across_runs() {
    let (directory, log) = log();
    for run in 0..5u64 {
        let (mut pipe, begin) = log.begin_run().unwrap();
        assert_eq!(begin, run * 700_000);
        pipe.write_all(&vec![b'0' + run as u8; 700_000]).unwrap();
        // A process left behind still holds the pipe.
        let left = pipe.try_clone().unwrap();
        drop(pipe);
        let (first, tail) = log.tail(begin);
        assert_eq!((first, tail.len()), (begin, 700_000));
        assert!(tail.iter().all(|byte| *byte == b'0' + run as u8));
        assert!(size(&directory) <= 2 * LIMIT);
        std::mem::forget(left);
    }
}

#[test]
fn counts_output_that_cannot_be_stored_without_blocking() {
    let (directory, log) = log();
    let (mut pipe, _) = log.begin_run().unwrap();
    // The second file cannot be created, and the first cannot be renamed.
    fs::create_dir_all(directory.path().join("log.1/full")).unwrap();
    for _ in 0..3 * LIMIT / 1000 {
        pipe.write_all(&[b'x'; 1000]).unwrap();
    }
    drop(pipe);
    let (_, tail) = log.tail(0);
    let text = String::from_utf8(tail).unwrap();
    let note = text.lines().last().unwrap();
    assert!(
        note.contains("bytes of output could not be stored: "),
        "{note}"
    );
    assert!(!note.contains("os error"), "{note}");
    assert!(size(&directory) <= 2 * LIMIT);
}

#[test]
fn thread_ends_with_the_output_and_when_stopped() {
    let (_directory, log) = log();
    let (pipe, _) = log.begin_run().unwrap();
    let first = task(&log).unwrap();
    assert!(first.exists());
    log.pause();
    assert!(!first.exists() && task(&log).is_none());
    log.resume();
    let second = task(&log).unwrap();
    assert!(second.exists());
    drop(pipe);
    until(|| !second.exists());
    log.close();
    assert!(task(&log).is_none());
}

#[test]
fn starts_a_missing_thread_again_except_during_a_fork() {
    let (_directory, log) = log();
    let (mut pipe, _) = log.begin_run().unwrap();
    // Two threads fork.
    log.pause();
    log.pause();
    log.retry();
    log.resume();
    log.retry();
    assert!(task(&log).is_none());
    log.resume();
    assert!(task(&log).unwrap().exists());
    // The pause never ends.
    log.pause();
    log.draining().paused = Instant::now().checked_sub(LONGEST_PAUSE);
    log.retry();
    let first = task(&log).unwrap();
    assert!(first.exists());
    log.retry();
    assert_eq!(task(&log), Some(first.clone()));
    // The thread ends by itself before the end of the output.
    let source = log.store().source.take();
    pipe.write_all(b"x").unwrap();
    until(|| !first.exists());
    log.store().source = source;
    log.retry();
    let second = task(&log).unwrap();
    assert!(second.exists());
    pipe.write_all(b"y").unwrap();
    drop(pipe);
    until(|| !second.exists());
    assert_eq!(log.tail(0), (0, b"xy".to_vec()));
    // The output has ended.
    log.retry();
    assert_eq!(task(&log), Some(second));
}

#[test]
fn thread_blocks_all_signals() {
    let (_directory, log) = log();
    let blocked = |task: &Path| {
        let status = fs::read_to_string(task.join("status")).unwrap();
        let mut lines = status.lines();
        let mask = lines.find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    };
    let before = blocked(Path::new("/proc/thread-self"));
    let _pipe = log.begin_run().unwrap();
    assert_eq!(blocked(Path::new("/proc/thread-self")), before);
    // No thread can block SIGKILL and SIGSTOP. glibc reserves real-time signals.
    let standard = (1 << 31) - 1;
    let unblockable = 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
    let mask = blocked(&task(&log).unwrap()) & standard;
    assert_eq!(mask, standard & !unblockable);
}

#[test]
fn keeps_the_older_file_if_a_new_one_cannot_be_created() {
    let (directory, log) = log();
    let _pipe = log.begin_run().unwrap();
    let path = directory.path().join("log");
    let mut store = log.store();
    store.append(&vec![b'a'; LIMIT as usize]);
    // `log` was renamed, and then a new one could not be created.
    store.file = None;
    fs::rename(&path, older(&path)).unwrap();
    (store.oldest, store.begin) = (store.begin, store.end);
    store.append(b"bc");
    let (begin, data) = store.read(LIMIT - 1, 10);
    assert_eq!((begin, &*data), (LIMIT - 1, &b"abc"[..]));
    assert_eq!(store.read(0, 10), (0, vec![b'a'; 10]));
    // A removed file is missing, and no other file is read in its place.
    store.append(&vec![b'd'; LIMIT as usize - 2]);
    fs::remove_file(&path).unwrap();
    store.append(b"ef");
    assert_eq!(store.read(0, 10), (2 * LIMIT, b"ef".to_vec()));
    assert_eq!(fs::read(&path).unwrap(), b"ef");
}
