//! The files of a daemon's log.

use p2pd_sockets::{message_of, Failed};
use std::fs::{self, File};
use std::io::{self, ErrorKind, PipeReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The maximum size of each of the two files and of the output in memory, in bytes.
pub(in super::super) const LIMIT: u64 = 1 << 20;
/// The size of one read, in bytes.
pub(super) const READ_SIZE: usize = 16 * 1024;
/// The read budget of one `drain`, in bytes: the daemon may refill the pipe as fast as it is read.
#[cfg(unix)]
const BUDGET: usize = 2 << 20;

/// The path of the older file.
pub(super) fn older(path: &Path) -> PathBuf {
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    older.into()
}

/// The two files. A position counts the bytes of all runs.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    /// The pipe; `None` after its end.
    pub(super) source: Option<Arc<PipeReader>>,
    pub(super) file: Option<File>,
    /// Position of the first byte of `log`.
    pub(super) begin: u64,
    /// Position of the first byte of `log.1`.
    pub(super) oldest: u64,
    pub(super) end: u64,
    /// Output that could not be stored.
    lost: Option<Lost>,
}

#[derive(Debug)]
struct Lost {
    bytes: u64,
    error: io::Error,
}

impl Store {
    /// Creates no file before the first run.
    pub(super) fn new(path: &Path) -> Self {
        Store {
            path: path.into(),
            source: None,
            file: None,
            begin: 0,
            oldest: 0,
            end: 0,
            lost: None,
        }
    }

    pub(super) fn begin_run(&mut self, source: PipeReader) -> Result<u64, Failed> {
        self.drain();
        let create = || -> io::Result<(File, u64)> {
            let file = File::options().create(true).append(true).open(&self.path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        let (file, length) = create().map_err(Failed::at(|| {
            format!("cannot create {}", self.path.display())
        }))?;
        self.begin = self.end.saturating_sub(length);
        self.oldest = self.oldest.min(self.begin);
        self.file = Some(file);
        self.source = Some(Arc::new(source));
        Ok(self.end)
    }

    /// Closes the pipe and the file.
    pub(super) fn close(&mut self) {
        self.source = None;
        self.file = None;
    }

    /// Stores the content of the pipe without blocking. Returns whether the output has ended.
    pub(super) fn drain(&mut self) -> bool {
        #[cfg(unix)]
        if let Some(source) = self.source.clone() {
            let mut buffer = [0; READ_SIZE];
            let mut budget = BUDGET;
            while budget > 0 {
                match (&*source).read(&mut buffer) {
                    Ok(0) => {
                        self.source = None;
                        break;
                    }
                    Ok(length) => {
                        self.append(&buffer[..length]);
                        budget = budget.saturating_sub(length);
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => {
                        self.source = None;
                        break;
                    }
                }
            }
        }
        self.source.is_none()
    }

    /// Appends output. Counts the bytes that cannot be stored instead of failing: if reading
    /// stopped, the full pipe would block the daemon.
    pub(super) fn append(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let count = match self.free_space() {
                Ok(free) => free.min(data.len() as u64) as usize,
                Err(error) => return self.lose(data.len(), error),
            };
            let (now, rest) = data.split_at(count);
            let written = self.file.as_ref().map(|mut file| file.write_all(now));
            match written {
                Some(Ok(())) => self.end += count as u64,
                Some(Err(error)) => {
                    // Part of it may have been written.
                    let length = self.file.as_ref().and_then(|file| file.metadata().ok());
                    self.end = self.begin + length.map_or(0, |file| file.len());
                    return self.lose(data.len(), error);
                }
                None => return self.lose(data.len(), ErrorKind::NotFound.into()),
            }
            data = rest;
        }
    }

    fn lose(&mut self, bytes: usize, error: io::Error) {
        let before = self.lost.as_ref().map_or(0, |lost| lost.bytes);
        let bytes = before + bytes as u64;
        self.lost = Some(Lost { bytes, error });
    }

    /// Returns how many bytes fit into `log`. Begins another `log` if it is full.
    fn free_space(&mut self) -> io::Result<u64> {
        let free = LIMIT.saturating_sub(self.end - self.begin);
        if free > 0 && self.file.is_some() {
            return Ok(free);
        }
        // Closed first: on Windows, an open file cannot be renamed.
        self.file = None;
        match fs::rename(&self.path, older(&self.path)) {
            Ok(()) => (self.oldest, self.begin) = (self.begin, self.end),
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            // An earlier call renamed it, and then could not create another one.
            Err(_) if self.begin == self.end => {}
            // The file was removed, so new output does not continue `log.1`.
            Err(_) => (self.oldest, self.begin) = (self.end, self.end),
        }
        let created = File::options()
            .create(true)
            .append(true)
            .truncate(false)
            .open(&self.path);
        self.file = Some(created?);
        Ok(LIMIT)
    }

    pub(super) fn read(&self, begin: u64, limit: u64) -> (u64, Vec<u8>) {
        let begin = begin.clamp(self.oldest, self.end);
        let mut data = Vec::new();
        let mut position = begin;
        let files = [
            (older(&self.path), self.oldest, self.begin),
            (self.path.clone(), self.begin, self.end),
        ];
        for (path, first, last) in files {
            let length = last
                .saturating_sub(position)
                .min(limit - (position - begin));
            if position >= first && length > 0 {
                // A part that cannot be read is left out.
                let _ = read_at(&path, position - first, length, &mut data);
                position += length;
            }
        }
        (begin, data)
    }

    pub(super) fn note_what_is_lost(&self, data: &mut Vec<u8>) {
        if let Some(Lost { bytes, error }) = &self.lost {
            let error = message_of(error);
            let note = format!("[{bytes} bytes of output could not be stored: {error}]\n");
            if data.last().is_some_and(|last| *last != b'\n') {
                data.push(b'\n');
            }
            data.extend(note.bytes());
        }
    }
}

fn read_at(path: &Path, offset: u64, length: u64, data: &mut Vec<u8>) -> io::Result<()> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    file.take(length).read_to_end(data)?;
    Ok(())
}

/// Reads the last [`LIMIT`] bytes of the output from the files alone, without the lock, which may
/// never be released in a forked child.
pub(super) fn tail_of_files(path: &Path) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..10 {
        data.clear();
        let older_path = older(path);
        let older = File::open(&older_path).ok();
        let Ok(mut newer) = File::open(path) else {
            continue;
        };
        if let Some(mut older) = older.as_ref() {
            let _ = older.read_to_end(&mut data);
        }
        let _ = newer.read_to_end(&mut data);
        // Reads again if the files were renamed meanwhile.
        let same = older.is_none_or(|older| is_still(&older, &older_path));
        if same && is_still(&newer, path) {
            break;
        }
    }
    data.drain(..data.len().saturating_sub(LIMIT as usize));
    data
}

#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let number = |file: io::Result<fs::Metadata>| file.map(|file| file.ino()).ok();
    number(file.metadata()) == number(fs::metadata(path))
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}
