//! Listening sockets and private directories, without an event loop.

use socket2::{Domain, SockAddr, Socket, Type};
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::{fs, mem};

#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt, MetadataExt, PermissionsExt};

const BACKLOG: i32 = 1024;

/// Returns a listening, non-blocking socket, and the file of a unix socket.
///
/// A stale socket file is replaced.
///
/// # Errors
/// Another process listens at the address, or the operating system refuses it.
pub fn listen(target: &SockAddr) -> io::Result<(Socket, Option<SocketFile>)> {
    let socket = new(target)?;
    #[cfg(unix)]
    if let Some(path) = target.as_pathname() {
        remove_stale(path)?;
        socket.bind(target)?;
        let file = SocketFile::new(path);
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        socket.listen(BACKLOG)?;
        return Ok((socket, Some(file)));
    }
    // Only on unix: on Windows, this option lets other processes take the port over.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(target)?;
    socket.listen(BACKLOG)?;
    Ok((socket, None))
}

/// Returns a non-blocking stream socket for an address.
pub fn new(address: &SockAddr) -> io::Result<Socket> {
    // Linux takes the flag with the type, which saves two system calls.
    #[cfg(target_os = "linux")]
    let socket = Socket::new(address.domain(), Type::STREAM.nonblocking(), None)?;
    #[cfg(not(target_os = "linux"))]
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    #[cfg(not(target_os = "linux"))]
    socket.set_nonblocking(true)?;
    if address.domain() != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
    }
    Ok(socket)
}

/// The file of a unix socket, removed on drop, unless another file has replaced it.
#[derive(Debug)]
pub struct SocketFile {
    #[cfg(unix)]
    path: PathBuf,
    #[cfg(unix)]
    inode: Option<u64>,
}

#[cfg(unix)]
impl SocketFile {
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            inode: fs::metadata(path).map(|file| file.ino()).ok(),
        }
    }
}

#[cfg(unix)]
impl Drop for SocketFile {
    fn drop(&mut self) {
        let now = fs::metadata(&self.path).map(|file| file.ino()).ok();
        if now.is_some() && now == self.inode {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file that refuses connections, since its listener has ended.
#[cfg(unix)]
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(()); // there is no file, or one that `bind` will refuse
    }
    let address = SockAddr::unix(path)?;
    match new(&address)?.connect(&address) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}

/// An operating-system error, and the operation that failed with it.
#[derive(Debug)]
pub struct Failed {
    /// What failed, with the file's name, such as "cannot create /tmp/file".
    pub operation: String,
    /// The error; keeps the operating system's error number.
    pub error: io::Error,
}

impl Failed {
    /// Adds the operation to an error: `.map_err(Failed::at(|| format!("cannot open {path}")))`.
    pub fn at<O: Into<String>>(operation: impl FnOnce() -> O) -> impl FnOnce(io::Error) -> Self {
        |error| Failed {
            operation: operation().into(),
            error,
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.operation, message_of(&self.error))
    }
}

/// Returns the operating system's message, without Rust's "(os error 2)".
pub fn message_of(error: &io::Error) -> String {
    let message = error.to_string();
    let message = message.split(" (os error ").next().unwrap_or(&message);
    message.into()
}

impl From<Failed> for io::Error {
    fn from(failed: Failed) -> Self {
        failed.error
    }
}

/// A directory that only this user can access, removed with its content on drop.
///
/// Not `tempfile::TempDir`: its error hides the operating system's number, and its removal fails
/// when no descriptor is free.
#[derive(Debug)]
pub struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the path, and leaves the removal to the caller.
    pub fn keep(mut self) -> PathBuf {
        mem::take(&mut self.0)
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        if self.0 != Path::new("") {
            let _ = remove_directory(&self.0);
        }
    }
}

/// Removes a directory with its content. Removes an empty one even if no descriptor is free.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    fs::remove_dir(path).or_else(|_| fs::remove_dir_all(path))
}

/// Creates a private directory in `parent`, by default in the system's directory for temporary
/// files.
///
/// If the path of a socket called `name` in the directory would be too long, the directory is
/// created in `/tmp` instead.
pub fn private_directory(
    parent: Option<&Path>,
    prefix: &str,
    name: &str,
) -> io::Result<PrivateDirectory> {
    make_private_directory(parent, prefix, name).map_err(io::Error::from)
}

/// Like [`private_directory`]; the error names the directory.
pub fn make_private_directory(
    parent: Option<&Path>,
    prefix: &str,
    name: &str,
) -> Result<PrivateDirectory, Failed> {
    let mut parent = std::path::absolute(parent.unwrap_or(&std::env::temp_dir()))
        .map_err(Failed::at(|| "cannot find the current directory"))?;
    let longest = parent.as_os_str().len() + 1 + prefix.len() + RANDOM + 1 + name.len();
    if cfg!(unix) && (longest > SOCKET_PATH_LIMIT || parent.to_str().is_none()) {
        parent = "/tmp".into();
    }
    for attempt in 0..100 {
        let number = random(attempt) % 36u64.pow(RANDOM as u32);
        let path = parent.join(format!("{prefix}{}", base36(number)));
        #[cfg_attr(not(unix), allow(unused_mut))]
        let mut builder = fs::DirBuilder::new();
        #[cfg(unix)]
        // With the usual umask, other users could read it.
        builder.mode(0o700);
        match builder.create(&path) {
            Ok(()) => return Ok(PrivateDirectory(path)),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                let operation = format!("cannot create the directory {}", path.display());
                return Err(Failed { operation, error });
            }
        }
    }
    Err(Failed {
        operation: format!("cannot create a directory in {}", parent.display()),
        error: ErrorKind::AlreadyExists.into(),
    })
}

/// Returns a random number, a different one for each `attempt` and in a forked child.
pub fn random(attempt: u32) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_u32(attempt);
    hasher.finish()
}

fn base36(mut number: u64) -> String {
    let mut digit = || {
        let digit = (number % 36) as u32;
        number /= 36;
        char::from_digit(digit, 36).unwrap_or('0')
    };
    (0..RANDOM).map(|_| digit()).collect()
}

/// The number of random characters after the prefix.
const RANDOM: usize = 8;

/// The longest path of a unix socket on any system, in bytes (macOS: 104 with the NUL).
const SOCKET_PATH_LIMIT: usize = 103;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_a_private_directory_unless_kept() {
        let one = private_directory(None, "p2pd-", "c.sock").unwrap();
        let other = private_directory(None, "p2pd-", "c.sock").unwrap();
        assert_ne!(one.path(), other.path());
        let name = one.path().file_name().unwrap().len();
        assert_eq!(name, "p2pd-".len() + RANDOM);
        fs::write(one.path().join("file"), "").unwrap();
        let path = one.path().to_owned();
        drop(one);
        assert!(!path.exists());
        let kept = other.keep();
        assert!(kept.exists());
        fs::remove_dir(kept).unwrap();
    }

    #[test]
    fn keeps_the_error_number_of_a_failed_mkdir() {
        let missing = std::env::temp_dir().join("no-such");
        let error = private_directory(Some(&missing), "p2pd-", "c.sock").unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error:?}");
    }

    #[test]
    fn names_the_directory_that_cannot_be_created() {
        let missing = std::env::temp_dir().join("no-such");
        let failed = make_private_directory(Some(&missing), "p2pd-", "c.sock").unwrap_err();
        let expected = format!("cannot create the directory {}/p2pd-", missing.display());
        let message = failed.to_string();
        assert!(message.starts_with(&expected), "{message}");
        assert!(!message.contains("os error"), "{message}");
    }
}
