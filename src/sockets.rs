//! Listening sockets, as every driver wants them: with no event loop.

use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::path::Path;

#[cfg(unix)]
use std::{
    fs,
    io::ErrorKind,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::PathBuf,
};

const BACKLOG: i32 = 1024;

/// A listening, non-blocking socket. A socket file that nobody listens at any more is replaced; one
/// that somebody does is an error.
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
    // Elsewhere it would let others take the port over.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(target)?;
    socket.listen(BACKLOG)?;
    Ok((socket, None))
}

/// A non-blocking socket for that address.
pub fn new(address: &SockAddr) -> io::Result<Socket> {
    let socket = Socket::new(address.domain(), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    if address.domain() != Domain::UNIX {
        socket.set_tcp_nodelay(true)?;
    }
    Ok(socket)
}

/// The file of a unix socket, removed when dropped; another's file at that path is left alone.
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

/// Removes a socket file that refuses connections: its listener is gone.
#[cfg(unix)]
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
    if !is_socket {
        return Ok(()); // nothing there, or something that `bind` will refuse
    }
    let address = SockAddr::unix(path)?;
    match new(&address)?.connect(&address) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Ok(()),
    }
}

/// A directory only this user can look into, in `parent` or where temporary files go, in which a
/// socket of that name fits.
pub fn private_directory(
    parent: Option<&Path>,
    prefix: &str,
    name: &str,
) -> io::Result<tempfile::TempDir> {
    let mut parent = std::path::absolute(parent.unwrap_or(&std::env::temp_dir()))?;
    let longest = parent.as_os_str().len() + 1 + prefix.len() + RANDOM + 1 + name.len();
    if cfg!(unix) && (longest > SOCKET_PATH_LIMIT || parent.to_str().is_none()) {
        parent = "/tmp".into();
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).rand_bytes(RANDOM);
    #[cfg(unix)]
    // By default others can, as the umask has it.
    builder.permissions(fs::Permissions::from_mode(0o700));
    builder.tempdir_in(parent)
}

/// How many letters tempfile adds to the prefix.
const RANDOM: usize = 8;

/// The kernel's limit on the path of a unix socket, where it is lowest (macOS: 104 with the NUL).
const SOCKET_PATH_LIMIT: usize = 103;
