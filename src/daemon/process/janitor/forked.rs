//! The watchdog as a forked child that executes no program, for where there is no shell.
//!
//! The child is a copy of a process whose other threads may have held any lock, so it only makes
//! system calls: no allocation, no lock, no panic, nothing of Python's. All signals are blocked.
//!
//! A copy also keeps this process's memory as it was at the fork: each page that this process then
//! writes to would be there twice. So the child first unmaps all large private and shared regions,
//! but its own stack; it finds them in `/proc/self/maps`.

use super::super::launch::{self, Child};
use rustix::fd::{AsFd as _, AsRawFd as _, BorrowedFd, RawFd};
use rustix::fs::{self, AtFlags, Mode, OFlags, RawDir, CWD};
use rustix::io::Errno;
use rustix::process::{self, Pid, Signal};
use rustix::thread::{self, Timespec};
use std::ffi::{c_int, c_void, CStr, CString};
use std::io::{self, PipeReader, PipeWriter};
use std::mem::{self, MaybeUninit};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr;

/// In bytes. Each directory level that is removed takes about 3 KiB.
const STACK_SIZE: usize = 256 * 1024;
/// The directories within directories that are removed.
const DEPTH: u32 = 16;
/// Regions of this size on are unmapped, in bytes. Libraries' own data is smaller.
const LARGE: usize = 1 << 20;
/// The descriptors that are closed where they cannot be closed all at once.
const CLOSED_ONE_BY_ONE: RawFd = 1 << 16;

/// What the child needs to know. It lies in the memory of its stack, which is not unmapped.
struct Body {
    reader: RawFd,
    writer: RawFd,
    /// The paths, one after another, each with a NUL at its end.
    paths: *const u8,
    paths_length: usize,
    /// An address in the memory that holds the thread's own variables.
    thread: usize,
}

/// Forks a child that waits for the end of `reader`, and then ends the process group it was last
/// told and removes these files.
#[allow(unsafe_code)]
pub(super) fn fork(reader: &PipeReader, writer: &PipeWriter, files: &[&Path]) -> io::Result<Child> {
    let files = files
        .iter()
        .map(|file| CString::new(file.as_os_str().as_bytes()));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let paths: Vec<u8> = files
        .iter()
        .flat_map(|file| file.to_bytes_with_nul())
        .copied()
        .collect();
    let mut stack = Stack::new(STACK_SIZE + paths.len())?;
    let body = Body {
        reader: reader.as_raw_fd(),
        writer: writer.as_raw_fd(),
        paths: stack
            .start
            .cast::<u8>()
            .wrapping_add(mem::size_of::<Body>()),
        paths_length: paths.len(),
        thread: errno_address(),
    };
    // SAFETY: the memory is large enough for both and aligned to a page. The child is a copy of
    // this process with a stack of its own in that memory, the copy of which is not freed there.
    let pid = unsafe {
        stack.start.cast::<Body>().write(body);
        let begin = stack.start.cast::<u8>().add(mem::size_of::<Body>());
        ptr::copy_nonoverlapping(paths.as_ptr(), begin, paths.len());
        launch::with_signals_blocked(|| {
            launch::child_made(libc::clone(watch, stack.top(), libc::SIGCHLD, stack.start))
        })
    }?;
    Child::new(pid)
}

/// Memory for the child's stack.
struct Stack {
    start: *mut c_void,
    size: usize,
}

impl Stack {
    #[allow(unsafe_code)]
    fn new(size: usize) -> io::Result<Self> {
        let (access, kind) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        );
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Stack { start, size })
    }

    /// The end of it, aligned as a stack must be.
    fn top(&mut self) -> *mut c_void {
        let top = self.start.cast::<u8>().wrapping_add(self.size);
        top.wrapping_sub(top as usize % 64).cast()
    }
}

impl Drop for Stack {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: it is this one's, and nothing else refers to it.
        unsafe { libc::munmap(self.start, self.size) };
    }
}

#[allow(unsafe_code)]
fn errno_address() -> usize {
    // SAFETY: it gives the address of a variable of this thread.
    #[cfg(not(target_os = "android"))]
    return unsafe { libc::__errno_location() } as usize;
    #[cfg(target_os = "android")]
    // SAFETY: as above.
    return unsafe { libc::__errno() } as usize;
}

#[allow(unsafe_code)]
extern "C" fn watch(body: *mut c_void) -> c_int {
    // SAFETY: `fork` has written it there. Only this child has this copy of it.
    let body = unsafe { &*body.cast::<Body>() };
    let _ = process::setsid();
    let _ = process::chdir(c"/");
    let _ = thread::set_name(c"p2pd-janitor");
    close_all_but(body.reader, body.writer);
    // SAFETY: what this child needs from now on is in small regions, in those of its stack and its
    // thread's variables, and in files.
    unsafe { unmap_large_regions(&[body as *const Body as usize, body.thread]) };
    // SAFETY: it was open at the fork, and is left open.
    let reader = unsafe { BorrowedFd::borrow_raw(body.reader) };
    if let Some(group) = last_number(reader) {
        end_group(group);
    }
    // SAFETY: `fork` has written them there.
    let mut paths = unsafe { std::slice::from_raw_parts(body.paths, body.paths_length) };
    while let Ok(path) = CStr::from_bytes_until_nul(paths) {
        remove(CWD, path, DEPTH);
        paths = paths.get(path.count_bytes() + 1..).unwrap_or_default();
    }
    // SAFETY: it ends this process, with nothing of its parent's done.
    unsafe { libc::_exit(0) }
}

/// Closes all descriptors but one. `writer` is the end that this process would wait for.
#[allow(unsafe_code)]
fn close_all_but(kept: RawFd, writer: RawFd) {
    let close_range = |first: RawFd, last: libc::c_uint| {
        // SAFETY: nothing in this process uses the other descriptors.
        first as libc::c_uint > last
            || unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0
    };
    let below = kept
        .checked_sub(1)
        .is_none_or(|last| close_range(0, last as libc::c_uint));
    if below && close_range(kept + 1, libc::c_uint::MAX) {
        return;
    }
    // The kernel is older than that call.
    for number in (0..CLOSED_ONE_BY_ONE).chain([writer]) {
        if number != kept {
            // SAFETY: as above.
            unsafe { libc::close(number) };
        }
    }
}

/// Unmaps the large regions without a file or shared with others, but those with these addresses.
///
/// # Safety
/// Nothing in this process may use these regions afterwards.
#[allow(unsafe_code)]
unsafe fn unmap_large_regions(kept: &[usize]) {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(maps) = fs::open(c"/proc/self/maps", flags, Mode::empty()) else {
        return;
    };
    let mut buffer = [0; 4096];
    let mut region = Region::default();
    loop {
        let length = match rustix::io::read(&maps, &mut buffer) {
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return,
        };
        if length == 0 {
            return;
        }
        for byte in buffer.iter().take(length) {
            if !region.take(*byte) {
                continue;
            }
            let Region { start, end, .. } = region;
            let free = kept
                .iter()
                .all(|address| *address < start || end <= *address);
            if free && region.is_large() {
                // SAFETY: the caller does not use it.
                unsafe { libc::munmap(start as *mut c_void, end - start) };
            }
            region = Region::default();
        }
    }
}

/// A line of `/proc/self/maps`: `start-end perms offset device inode path`.
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    /// How many separators have come.
    field: u32,
    start: usize,
    end: usize,
    shared: bool,
    of_file: bool,
}

impl Region {
    /// Takes one more character; whether that was the last one.
    fn take(&mut self, byte: u8) -> bool {
        let digit = (byte as char).to_digit(16).unwrap_or(0) as usize;
        match (self.field, byte) {
            (_, b'\n') => return true,
            (0, b'-') | (1..=4, b' ') => self.field += 1,
            (5, b' ') => self.field += 1,
            (0, _) => self.start = self.start.wrapping_mul(16).wrapping_add(digit),
            (1, _) => self.end = self.end.wrapping_mul(16).wrapping_add(digit),
            (2, b's') => self.shared = true,
            (5, b'1'..=b'9') => self.of_file = true,
            _ => {}
        }
        false
    }

    fn is_large(&self) -> bool {
        self.end.saturating_sub(self.start) >= LARGE && (self.shared || !self.of_file)
    }
}

/// The number in the last line that comes until the end; none if that is 0.
fn last_number(reader: BorrowedFd<'_>) -> Option<Pid> {
    let mut buffer = [0; 256];
    let (mut last, mut number) = (0i32, 0i32);
    loop {
        let length = match rustix::io::read(reader, &mut buffer) {
            Ok(0) => return Pid::from_raw(last),
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(_) => return Pid::from_raw(last),
        };
        for byte in buffer.iter().take(length) {
            match byte {
                b'0'..=b'9' => {
                    number = number
                        .wrapping_mul(10)
                        .wrapping_add(i32::from(*byte - b'0'));
                }
                b'\n' => (last, number) = (number, 0),
                _ => {}
            }
        }
    }
}

/// Asks a process group to end, and kills it if it has not after five seconds.
fn end_group(group: Pid) {
    let _ = process::kill_process_group(group, Signal::TERM);
    for _ in 0..50 {
        if process::test_kill_process_group(group) == Err(Errno::SRCH) {
            return;
        }
        pause(100);
    }
    let _ = process::kill_process_group(group, Signal::KILL);
}

fn pause(milliseconds: i64) {
    let _ = thread::nanosleep(&Timespec {
        tv_sec: 0,
        tv_nsec: milliseconds * 1_000_000,
    });
}

/// Removes a file, or a directory with all that is in it.
fn remove(parent: BorrowedFd<'_>, name: &CStr, depth: u32) {
    let gone = fs::unlinkat(parent, name, AtFlags::empty());
    if gone != Err(Errno::ISDIR) || depth == 0 {
        return;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // A killed process may add a file until it has ended.
    for _ in 0..10 {
        if let Ok(directory) = fs::openat(parent, name, flags, Mode::empty()) {
            remove_entries(directory.as_fd(), depth);
        }
        match fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
            Err(Errno::NOTEMPTY | Errno::EXIST) => pause(20),
            _ => return,
        }
    }
}

fn remove_entries(directory: BorrowedFd<'_>, depth: u32) {
    let mut buffer = [MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(Ok(entry)) = entries.next() {
        let name = entry.file_name();
        if name != c"." && name != c".." {
            remove(directory, name, depth - 1);
        }
    }
}
