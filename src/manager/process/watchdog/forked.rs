//! The watchdog as a forked child that executes no program, for systems without a shell.
//!
//! The child is a copy of a process whose other threads may have held any lock. So it only makes
//! system calls: it does not allocate, lock or panic, and never touches Python. All signals are
//! blocked.
//!
//! A copy also keeps this process's memory as it was at the fork: each page that this process
//! writes to afterwards would exist twice. So the child first unmaps the large regions of
//! `/proc/self/maps` that have no file or are shared with others. Small regions stay, and so do
//! files that are mapped privately, such as libraries.
//!
//! A library's zero-initialised variables are in a region without a file, right behind the
//! library's file. The kernel may have merged that region with a large one above it, so the
//! beginning of such a region stays. After the unmapping, the child makes system calls through
//! rustix where it can, because libc's functions may access libc's variables.

use super::super::child::Child;
use super::super::signals::with_signals_blocked;
use super::super::spawn::child_made;
use rustix::fd::{AsFd as _, AsRawFd as _, BorrowedFd, IntoRawFd as _, OwnedFd, RawFd};
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

/// The size of the child's stack, in bytes. Removing a directory takes about 3 KiB for each level.
const STACK_SIZE: usize = 256 * 1024;
/// The depth to which nested directories are removed.
const DEPTH: u32 = 16;
/// The smallest region that is unmapped, in bytes. The variables of libraries take less.
const LARGE: usize = 1 << 20;
/// Where `close_range` is missing, only descriptors below this number are closed.
const CLOSED_ONE_BY_ONE: RawFd = 1 << 16;

/// The child's data, in the memory of its stack, which stays mapped.
struct Body {
    reader: RawFd,
    writer: RawFd,
    /// The paths, each terminated by a NUL.
    paths: *const u8,
    paths_length: usize,
    /// An address in the thread-local storage.
    thread: usize,
}

/// Forks a child that waits for the end of `reader`, then ends the last process group it has read
/// and removes these files.
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
    // SAFETY: the memory is page-aligned and large enough for both. The child is a copy of this
    // process, runs on a stack in its copy of that memory, and never frees it.
    let pid = unsafe {
        stack.start.cast::<Body>().write(body);
        let begin = stack.start.cast::<u8>().add(mem::size_of::<Body>());
        ptr::copy_nonoverlapping(paths.as_ptr(), begin, paths.len());
        with_signals_blocked(|| {
            child_made(libc::clone(watch, stack.top(), libc::SIGCHLD, stack.start))
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
        // SAFETY: this creates a mapping at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, access, kind, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Stack { start, size })
    }

    /// The top of the stack, aligned.
    fn top(&mut self) -> *mut c_void {
        let top = self.start.cast::<u8>().wrapping_add(self.size);
        top.wrapping_sub(top as usize % 64).cast()
    }
}

impl Drop for Stack {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: this owns the mapping, and nothing else refers to it.
        unsafe { libc::munmap(self.start, self.size) };
    }
}

#[allow(unsafe_code)]
fn errno_address() -> usize {
    // SAFETY: this returns the address of a thread-local variable.
    #[cfg(not(target_os = "android"))]
    return unsafe { libc::__errno_location() } as usize;
    #[cfg(target_os = "android")]
    // SAFETY: as above.
    return unsafe { libc::__errno() } as usize;
}

#[allow(unsafe_code)]
extern "C" fn watch(body: *mut c_void) -> c_int {
    // SAFETY: `fork` wrote the body there, and only this child has this copy.
    let body = unsafe { &*body.cast::<Body>() };
    let _ = process::setsid();
    let _ = process::chdir(c"/");
    let _ = thread::set_name(c"p2pd-watchdog");
    close_all_but(body.reader, body.writer);
    // SAFETY: from now on this child uses only its stack, its thread-local storage, and the code
    // and variables of the program and its libraries. All of that stays mapped.
    unsafe { unmap_large_regions(&[body as *const Body as usize, body.thread]) };
    // SAFETY: it was open at the fork and stays open.
    let reader = unsafe { BorrowedFd::borrow_raw(body.reader) };
    if let Some(group) = last_number(reader) {
        end_group(group);
    }
    // SAFETY: `fork` wrote the paths there.
    let mut paths = unsafe { std::slice::from_raw_parts(body.paths, body.paths_length) };
    while let Ok(path) = CStr::from_bytes_until_nul(paths) {
        remove(CWD, path, DEPTH);
        paths = paths.get(path.count_bytes() + 1..).unwrap_or_default();
    }
    // SAFETY: a system call that ends this process without running exit handlers.
    unsafe { libc::_exit(0) }
}

/// Closes all descriptors except `kept`. Where `close_range` is missing, a descriptor with a large
/// number may stay open, but not `writer`: the pipe would then never end.
#[allow(unsafe_code)]
fn close_all_but(kept: RawFd, writer: RawFd) {
    let close_range = |first: RawFd, last: libc::c_uint| {
        // SAFETY: this process uses no other descriptor.
        first as libc::c_uint > last
            || unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0
    };
    let below = kept
        .checked_sub(1)
        .is_none_or(|last| close_range(0, last as libc::c_uint));
    if below && close_range(kept + 1, libc::c_uint::MAX) {
        return;
    }
    // The kernel does not know the call.
    for number in (0..CLOSED_ONE_BY_ONE).chain([writer]) {
        if number != kept {
            // SAFETY: as above.
            unsafe { libc::close(number) };
        }
    }
}

/// Unmaps the large regions that have no file or are shared, except those that contain one of these
/// addresses or may contain a library's variables.
///
/// # Safety
/// This process must not use these regions afterwards.
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
            Ok(0) => break,
            Ok(length) => length,
            Err(Errno::INTR) => continue,
            Err(_) => break,
        };
        for byte in buffer.iter().take(length) {
            if !region.take(*byte) {
                continue;
            }
            if let Some((start, end)) = region.unneeded(kept) {
                // SAFETY: the caller guarantees that it is unused.
                let _ = unsafe { rustix::mm::munmap(start as *mut c_void, end - start) };
            }
            region = region.next();
        }
    }
    close(maps);
}

/// Closes the file by the system call alone. The standard library calls libc's `close`, which
/// accesses a variable of libc.
#[allow(unsafe_code)]
fn close(file: OwnedFd) {
    // SAFETY: the descriptor is open, and its owner was consumed.
    unsafe { rustix::io::close(file.into_raw_fd()) };
}

/// A line of `/proc/self/maps`: `start-end perms offset device inode path`.
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    /// The number of separators read.
    field: u32,
    start: usize,
    end: usize,
    shared: bool,
    of_file: bool,
    /// The end of the last region with a file before this one.
    file_end: usize,
}

impl Region {
    /// Takes the next character. Returns whether it was the last one.
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

    /// An empty region, for the next line.
    fn next(&self) -> Self {
        let file_end = if self.of_file {
            self.end
        } else {
            self.file_end
        };
        Region {
            file_end,
            ..Region::default()
        }
    }

    /// The part that can be unmapped if only these addresses are needed.
    fn unneeded(&self, kept: &[usize]) -> Option<(usize, usize)> {
        if self.of_file && !self.shared || self.end.saturating_sub(self.start) < LARGE {
            return None;
        }
        // The variables of a library may follow its file.
        let start = match self.start == self.file_end && !self.shared {
            true => self.start + LARGE,
            false => self.start,
        };
        let needed = |address: &usize| (start..self.end).contains(address);
        (start < self.end && !kept.iter().any(needed)).then_some((start, self.end))
    }
}

/// Reads until the end of file. Returns the number in the last line; `None` if that is 0.
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

/// Sends SIGTERM to a process group, and SIGKILL if it has not ended after 5 seconds.
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

/// Removes a file, or a directory with its content.
fn remove(parent: BorrowedFd<'_>, name: &CStr, depth: u32) {
    let gone = fs::unlinkat(parent, name, AtFlags::empty());
    if gone != Err(Errno::ISDIR) || depth == 0 {
        return;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // A killed process may still create files until it has ended.
    for _ in 0..10 {
        if let Ok(directory) = fs::openat(parent, name, flags, Mode::empty()) {
            remove_entries(directory.as_fd(), depth);
            close(directory);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unmaps_large_regions_except_libraries_and_kept_addresses() {
        const BASE: usize = 0x4000_0000;
        let maps = "\
40000000-40100000 rw-p 00000000 00:00 0
40200000-402ff000 rw-p 00000000 00:00 0 [heap]
40300000-40500000 rw-p 00000000 00:00 0
40600000-40a00000 r-xp 00000000 fe:00 326269                     /usr/lib/libc.so.6
40a00000-40a02000 rw-p 001d3000 fe:00 326269                     /usr/lib/libc.so.6
40a02000-40f02000 rw-p 00000000 00:00 0
41000000-41002000 rw-p 00000000 fe:00 10                         /usr/lib/lib 1.so
41002000-41102000 rw-p 00000000 00:00 0
41200000-41400000 rw-s 00000000 00:01 1030                       /dev/zero (deleted)
41400000-41800000 rw-s 00000000 00:00 0
41800000-41a00000 rw-p 00000000 00:00 0
";
        let unneeded = |kept: &[usize]| {
            let mut region = Region::default();
            let mut unneeded = Vec::new();
            for byte in maps.bytes() {
                if region.take(byte) {
                    let part = region.unneeded(kept);
                    unneeded.extend(part.map(|part| [part.0, part.1].map(|at| at - BASE)));
                    region = region.next();
                }
            }
            unneeded
        };
        let all = [
            [0x0, 0x10_0000],
            [0x30_0000, 0x50_0000],
            // Without libc's variables.
            [0xb0_2000, 0xf0_2000],
            [0x120_0000, 0x140_0000],
            [0x140_0000, 0x180_0000],
            [0x180_0000, 0x1a0_0000],
        ];
        assert_eq!(unneeded(&[]), all);
        // An address among libc's variables stays anyway.
        assert_eq!(unneeded(&[BASE + 0xa0_2010, BASE + 0x10_0000]), all);
        assert_eq!(
            unneeded(&[BASE + 0xb0_2000, BASE + 0x4f_ffff])[1..],
            all[3..]
        );
        assert_eq!(unneeded(&[BASE])[..], all[1..]);
    }
}
