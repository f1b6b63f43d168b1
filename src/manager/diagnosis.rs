//! Diagnosis of a daemon's output: whether it has started, or why it has not.
//!
//! Knows the messages of Go's `p2pd` (upstream and hivemind's fork) and of `jsp2pd`.

use std::io::{self, ErrorKind};

/// The prefix of the cause if no bootstrap peer could be reached.
pub(crate) const UNCONNECTED: &str = "no bootstrap peer could be reached: ";

/// The hint for a daemon that was not ready in time.
pub(crate) const TOO_SLOW: &str =
    "allow it more time (start_timeout) if this machine is slow; else see what it printed last";

/// The hints for the causes that [`diagnose`] finds: a part of the cause's text, and its hint.
const HINTS: [(&str, &str); 21] = [
    (UNCONNECTED, "check that a bootstrap peer runs and can be reached from here, or have the \
                   daemon start without them (bootstrap \"background\")"),
    ("it may still be trying to reach its bootstrap peers",
     "check that a bootstrap peer runs and can be reached from here, or have the daemon start \
      without them (bootstrap \"background\")"),
    ("a bootstrap peer must end in", "add /p2p/ and the peer's id to the address"),
    ("is already in use", "choose another address, or port 0 for a free one, or stop what uses it"),
    ("is not an address of this machine",
     "listen at an address of this machine, or at 0.0.0.0 for all, and announce the other one \
      (announce_addrs)"),
    ("no permission to listen",
     "choose a port from 1024 on, or a path in a directory that this user can write to"),
    ("is too long for the path of a socket", "choose a shorter path"),
    ("the directory of ", "create the directory, or choose another path"),
    ("cannot listen on ", "choose another address"),
    ("cannot read the identity file ",
     "check the file's path and permissions, or leave the identity out for a new one"),
    ("the identity file ",
     "give a file with a private key in libp2p's protobuf encoding, or leave the identity out for \
      a new one"),
    ("this daemon has no option ", "leave the option out, or set P2PD_PATH to a newer daemon"),
    ("invalid value ", "correct the value of that option"),
    ("failed to parse multiaddr", "correct that address"),
    ("the binary is not for this machine",
     "set P2PD_PATH to a p2pd that was built for this platform"),
    ("the binary cannot be executed", "check the daemon's binary, and the script around it"),
    ("a command was not found", "check the script that starts the daemon"),
    ("something killed it, maybe for lack of memory",
     "look for the out-of-memory killer in the kernel's log (dmesg), and allow the daemon more \
      memory"),
    ("answers in its place", "stop that daemon, or choose another control address"),
    ("panic: ", "this is a bug in the daemon: try another version, and report it to its authors"),
    ("fatal error: ", "this is a bug in the daemon: try another version, and report it to its authors"),
];

/// How much of the end of the output is searched for the cause, in bytes. It is limited because the
/// search blocks the event loop.
const END: usize = 64 << 10;

/// The longest line that is shown, in characters.
const LINE: usize = 500;

/// Go's last line when it cannot create a thread, and the beginning of the line with the reason.
const NO_THREAD: &str = "fatal error: newosproc";
const NO_THREAD_WHY: &str = "runtime: failed to create new OS thread";

/// Returns the operating-system error that a daemon's message reports, if any.
fn system_error(message: &str) -> Option<io::Error> {
    const EMFILE: i32 = 24;
    let message = message.to_lowercase();
    let has = |part: &str| message.contains(part);
    Some(
        if has("out of memory") || has("cannot allocate memory") || has("errno=12)") {
            ErrorKind::OutOfMemory.into()
        } else if has("newosproc")
            || has("failed to create new os thread")
            || has("pthread_create failed")
            || has("cannot fork")
        {
            ErrorKind::WouldBlock.into()
        } else if has("no space left on device") {
            ErrorKind::StorageFull.into()
        } else if has("too many open files") {
            io::Error::from_raw_os_error(EMFILE)
        } else {
            return None;
        },
    )
}

/// Returns a hint for a cause that [`diagnose`] found, in one line.
#[doc(hidden)]
pub fn hint(cause: &str) -> Option<&'static str> {
    // Operating-system errors come first: neither the daemon nor an address causes them.
    if let Some(hint) = system_error(cause).and_then(|error| hint_of_system(cause, &error)) {
        return Some(hint);
    }
    let known = HINTS.iter().find(|(part, _)| cause.contains(part));
    known.map(|(_, hint)| *hint)
}

/// Returns a hint for an operating-system error; `operation` is what failed.
#[doc(hidden)]
pub fn hint_of_system(operation: &str, error: &io::Error) -> Option<&'static str> {
    // These numbers are the same on all unix systems; `ErrorKind` does not have them.
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    let executing = operation.starts_with("cannot execute");
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free some space, or set TMPDIR to a directory that has some"
        }
        ErrorKind::OutOfMemory => "free some memory, or raise the container's limit on it",
        ErrorKind::WouldBlock => {
            "raise the limit on processes and threads (ulimit -u, or the container's pids limit)"
        }
        ErrorKind::PermissionDenied if executing => {
            "make it executable (chmod +x), in a file system that is not mounted noexec"
        }
        ErrorKind::NotFound if operation.contains("interpreter or loader") => {
            "install what the binary is linked against (on Alpine, apk add gcompat), or set \
             P2PD_PATH to a statically linked p2pd"
        }
        ErrorKind::NotFound if executing => "install the daemon again, or set P2PD_PATH to another",
        ErrorKind::NotFound
        | ErrorKind::NotADirectory
        | ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
            if operation.contains("directory") || operation.contains("file") =>
        {
            "set TMPDIR to a directory that exists and that this user can write to"
        }
        _ if cfg!(unix) && matches!(error.raw_os_error(), Some(ENFILE | EMFILE)) => {
            "raise the limit on open files (ulimit -n), or close some"
        }
        _ => return None,
    };
    Some(hint)
}

/// The messages that a daemon prints once it has started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Startup {
    /// Whether it printed that it has started.
    pub started: bool,
    /// `Control socket:`, a multiaddr.
    pub control_socket: Option<String>,
    /// `Peer ID:`, in base58.
    pub peer_id: Option<String>,
    /// `Peer Addrs:`, the multiaddrs it listens on.
    pub peer_addrs: Vec<String>,
}

impl Startup {
    /// Parses the output so far, except a last line without its newline, which may still grow.
    pub fn read(output: &str) -> Self {
        let mut startup = Startup::default();
        let mut in_addrs = false;
        for line in output
            .split_inclusive('\n')
            .filter_map(|line| line.strip_suffix('\n'))
        {
            let line = line.trim_end();
            if in_addrs && line.starts_with('/') {
                startup.peer_addrs.push(line.into());
                continue;
            }
            in_addrs = line == "Peer Addrs:";
            if let Some(address) = line.strip_prefix("Control socket: ") {
                startup.control_socket = Some(address.into());
            } else if let Some(peer_id) = line.strip_prefix("Peer ID: ") {
                startup.peer_id = Some(peer_id.into());
                startup.started = true;
            } else if line == "daemon has started" {
                startup.started = true;
            }
        }
        startup
    }
}

/// Returns whether the daemon has printed that it has started, and the peer id if it has printed
/// that. It is called repeatedly, so it is faster than [`Startup::read`] on a large output.
#[doc(hidden)]
pub fn reported_start(output: &str) -> (bool, Option<&str>) {
    // Without the last line if it is incomplete.
    let lines = &output[..output.rfind('\n').map_or(0, |end| end + 1)];
    let peer_id = last_line(lines, "Peer ID: ").and_then(|line| line.strip_prefix("Peer ID: "));
    let started = || last_line(lines, "daemon has started") == Some("daemon has started");
    (peer_id.is_some() || started(), peer_id)
}

/// Returns the last part of an output, at most [`END`] bytes.
#[doc(hidden)]
pub fn end_of(output: &str) -> &str {
    let mut begin = output.len().saturating_sub(END);
    while !output.is_char_boundary(begin) {
        begin += 1;
    }
    &output[begin..]
}

/// Cuts a line that is too long to be shown.
#[doc(hidden)]
pub fn shortened(line: &str) -> String {
    match line.char_indices().nth(LINE) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.into(),
    }
}

/// Returns the last `limit` lines of the output. Leaves out the list of flags that Go prints after
/// it has rejected a flag.
pub fn excerpt(output: &str, limit: usize) -> Vec<&str> {
    let lines = output
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty());
    let mut lines: Vec<_> = lines
        .take_while(|line| !line.starts_with("Usage of "))
        .collect();
    lines.drain(..lines.len().saturating_sub(limit));
    lines
}

/// Finds the cause of a failed start, in one line; `None` if it is unknown.
///
/// `status` is the exit status, negative for a signal, and `None` if the daemon is still running;
/// `arguments` are the daemon's.
///
/// ```
/// use p2pd_manager::diagnose;
///
/// let output = "2026/01/02 03:04:05 listen tcp4 127.0.0.1:4001: bind: address already in use\n";
/// let cause = diagnose(output, Some(1), &[]).unwrap();
/// assert_eq!(cause, "127.0.0.1:4001 is already in use");
/// ```
pub fn diagnose(output: &str, status: Option<i32>, arguments: &[String]) -> Option<String> {
    let lines = excerpt(end_of(output), usize::MAX);
    let cause = lines
        .iter()
        .rev()
        .find_map(|line| known(without_time(line), arguments));
    // Searches the whole output, because Go prints a long list of goroutines after these lines.
    let crash = || {
        ["fatal error: ", "panic: "]
            .iter()
            .find_map(|prefix| last_line(output, prefix))
    };
    let cause = cause.or_else(|| crash().map(shortened));
    if cause.as_deref() == Some(NO_THREAD) {
        let why = last_line(output, NO_THREAD_WHY).and_then(|line| line.strip_prefix("runtime: "));
        return Some(why.map_or(NO_THREAD.into(), |why| {
            format!("{NO_THREAD}: {}", shortened(why))
        }));
    }
    cause.or_else(|| match status {
        None => {
            let peers = option(arguments, "bootstrapPeers")?;
            Some(format!(
                "it may still be trying to reach its bootstrap peers: {peers}"
            ))
        }
        Some(0) => None,
        Some(126) => Some("the binary cannot be executed".into()),
        Some(127) => Some("a command was not found".into()),
        Some(-9) => Some("something killed it, maybe for lack of memory".into()),
        Some(_) => {
            // Go's `log.Fatal` has printed the last line.
            let last = lines.last()?;
            let message = without_time(last);
            (message != *last || system_error(message).is_some()).then(|| shortened(message))
        }
    })
}

/// Returns the last line of the output that begins with `prefix`.
fn last_line<'a>(output: &'a str, prefix: &str) -> Option<&'a str> {
    let mut found = output.rmatch_indices(prefix).map(|(begin, _)| begin);
    let begin = found.find(|&begin| begin == 0 || output[..begin].ends_with('\n'))?;
    output[begin..].lines().next().map(str::trim_end)
}

/// Returns the cause if the message is known.
fn known(message: &str, arguments: &[String]) -> Option<String> {
    let lower = message.to_lowercase();
    if let Some(flag) = message.strip_prefix("flag provided but not defined: ") {
        return Some(format!("this daemon has no option {}", shortened(flag)));
    }
    if message.starts_with("invalid value ") && message.contains(" for flag ")
        || message.starts_with("failed to parse multiaddr")
        || message.starts_with("panic: ")
        || lower.starts_with("fatal error: ")
        || message.contains("pthread_create failed")
    {
        return Some(shortened(message));
    }
    if lower.contains("exec format error") || lower.contains("cannot execute binary file") {
        let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
        return Some(format!(
            "the binary is not for this machine ({os} on {arch})"
        ));
    }
    if message == "failed to connect to bootstrap peers" {
        let peers = option(arguments, "bootstrapPeers").unwrap_or("the built-in list of IPFS's");
        return Some(format!("{UNCONNECTED}{peers}"));
    }
    if message == "invalid p2p multiaddr" {
        let peers = option(arguments, "bootstrapPeers")?;
        let wrong = |peer: &&str| !peer.contains("/p2p/") && !peer.contains("/ipfs/");
        let wrong: Vec<_> = peers.split(',').filter(wrong).collect();
        let wrong = if wrong.is_empty() {
            peers.into()
        } else {
            wrong.join(", ")
        };
        return Some(format!(
            "a bootstrap peer must end in /p2p/<peer id>: {wrong}"
        ));
    }
    if let Some(cause) = of_identity(message, arguments) {
        return Some(cause);
    }
    of_listening(message).or_else(|| {
        // Node reports an uncaught error as "TypeError: …", or plainly "Error: …".
        let (kind, rest) = message.split_once(": ")?;
        let is_error = kind.ends_with("Error") && kind.chars().all(|c| c.is_ascii_alphabetic());
        is_error.then(|| shortened(if kind == "Error" { rest } else { message }))
    })
}

/// Returns the cause if the message is about the identity file (`-id`).
fn of_identity(message: &str, arguments: &[String]) -> Option<String> {
    let file = option(arguments, "id")?;
    let of_file = message.strip_prefix(&format!("open {file}: "));
    if let Some(why) = of_file.or_else(|| message.strip_prefix(&format!("read {file}: "))) {
        return Some(format!("cannot read the identity file {file}: {why}"));
    }
    let by_node = message.strip_suffix(&format!(", open '{file}'"));
    if let Some((_, why)) = by_node.and_then(|message| message.rsplit_once(": ")) {
        return Some(format!("cannot read the identity file {file}: {why}"));
    }
    let not_a_key = message.starts_with("proto:")
        || message.contains("unmarshal")
        || message.contains("invalid or unsupported key type")
        || message.contains("expected ed25519 data size")
        || message.contains("asn1:")
        || message.contains("x509:");
    let message = shortened(message);
    not_a_key.then(|| format!("the identity file {file} holds no private key of libp2p: {message}"))
}

/// Returns the cause if the message is about an address to listen on.
fn of_listening(message: &str) -> Option<String> {
    // Go: "listen tcp4 127.0.0.1:4001: bind: address already in use", sometimes in "[…]".
    // Node: "Error: listen EADDRINUSE: address already in use 127.0.0.1:4001".
    let (what, why) = if let Some((before, why)) = message.split_once(": bind: ") {
        let (_, address) = before.rsplit_once("listen ")?;
        let (_network, address) = address.split_once(' ')?;
        (address, why.trim_end_matches(']'))
    } else {
        let (_, listen) = message.split_once("listen E")?;
        let (_code, reason) = listen.split_once(": ")?;
        (reason.rsplit_once(' ')?.1, reason)
    };
    // Node reports a missing directory as a missing permission.
    let by_node = !message.contains(": bind: ") && what.starts_with('/');
    Some(if why.starts_with("address already in use") {
        format!("{what} is already in use")
    } else if why.starts_with("cannot assign requested address") {
        format!("{what} is not an address of this machine")
    } else if why.starts_with("permission denied") && by_node {
        format!("no permission to listen on {what}, or its directory does not exist")
    } else if why.starts_with("permission denied") {
        format!("no permission to listen on {what}")
    } else if why.starts_with("no such file or directory") {
        format!("the directory of {what} does not exist")
    } else if why.starts_with("invalid argument") && what.starts_with('/') {
        format!("{what} is too long for the path of a socket")
    } else {
        shortened(&format!("cannot listen on {what}: {why}"))
    })
}

/// Returns the value of `-name=value` in the arguments.
fn option<'a>(arguments: &'a [String], name: &str) -> Option<&'a str> {
    arguments.iter().rev().find_map(|argument| {
        argument
            .strip_prefix('-')?
            .trim_start_matches('-')
            .strip_prefix(name)?
            .strip_prefix('=')
    })
}

/// Removes the date and time that Go's `log` puts before a line.
fn without_time(line: &str) -> &str {
    let is = |text: &str, separator: char| {
        text.split(separator).count() == 3
            && text
                .chars()
                .all(|c| c == separator || c == '.' || c.is_ascii_digit())
    };
    let mut parts = line.splitn(3, ' ');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(date), Some(time), Some(rest)) if is(date, '/') && is(time, ':') => rest,
        _ => line,
    }
}

#[cfg(test)]
mod tests;
