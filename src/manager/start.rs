//! Decides whether a spawned daemon is ready, and describes failed starts as errors.
//!
//! Without I/O: the caller passes the daemon's output and replies.

use super::diagnosis::{
    diagnose, end_of, excerpt, hint, hint_of_system, reported_start, shortened, TOO_SLOW,
    UNCONNECTED,
};
use super::discovery::NotFound;
use super::options::{DaemonOptions, OptionsError};
use p2pd_protocol::PeerId;
use p2pd_sockets::{message_of, Failed};
use std::fmt;
use std::io;
use std::sync::Arc;

/// The number of output lines that the error of a failed start shows.
const LOG_LINES: usize = 20;

/// Part of the message for a daemon that was not ready in time.
const NOT_READY: &str = "was not ready";

/// A daemon could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The options are invalid, or this daemon does not support one of them.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// No binary was found.
    #[error(transparent)]
    NotFound(#[from] NotFound),
    /// The daemon could not be prepared or spawned, ended, or was not ready in time.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A daemon could not be prepared or spawned, ended before it was ready, or was not ready in time.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct StartError {
    /// What failed.
    pub message: String,
    /// The binary and its arguments; empty if it was not spawned.
    pub command: Vec<String>,
    /// The exit status, negative for a signal; `None` if it never ran or is still running.
    pub status: Option<i32>,
    /// The last lines of its output.
    pub logs: Vec<String>,
    /// The cause in one line, if it is known.
    pub cause: Option<String>,
    /// The operating system's error, if the daemon could not be prepared or spawned.
    pub source: Option<Arc<io::Error>>,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.brief())?;
        if !self.command.is_empty() {
            let quoted: Vec<_> = self.command.iter().map(|part| quoted(part)).collect();
            write!(f, "\n  command: {}", quoted.join(" "))?;
        }
        if !self.logs.is_empty() {
            write!(f, "\n  last output:\n    {}", self.logs.join("\n    "))?;
        }
        if let Some(hint) = self.hint() {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for StartError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|error| error as _)
    }
}

impl StartError {
    /// Returns the error for a binary that the operating system refused to run.
    pub fn not_run(command: Vec<String>, error: io::Error) -> Self {
        // The diagnosis knows the operating system's messages, as shells print them.
        let reason = message_of(&error);
        let cause = diagnose(&reason, None, &[]).unwrap_or(reason);
        StartError {
            message: "the daemon could not be run".into(),
            command,
            status: None,
            logs: Vec::new(),
            cause: Some(cause),
            source: Some(Arc::new(error)),
        }
    }

    /// Returns the error for a system call that failed while the daemon was spawned.
    #[doc(hidden)]
    pub fn failed(command: Vec<String>, failed: Failed) -> Self {
        let cause = failed.to_string();
        let known = diagnose(&cause, None, &[]);
        StartError {
            cause: Some(known.map_or(cause, |known| format!("{known}: {}", failed.operation))),
            ..Self::not_run(command, failed.error)
        }
    }

    /// Returns the error for a system call that failed before the daemon was spawned.
    #[doc(hidden)]
    pub fn not_prepared(failed: Failed) -> Self {
        StartError {
            message: "the daemon's start could not be prepared".into(),
            ..Self::failed(Vec::new(), failed)
        }
    }

    /// Returns the error for a daemon that ended with `status` before it was ready. Without a
    /// status, the daemon is running but was not ready in `timeout` seconds, and `reason` says
    /// why the last probe failed. `output` is the daemon's output.
    pub fn not_ready(
        command: Vec<String>,
        output: &str,
        status: Option<i32>,
        timeout: f64,
        reason: Option<String>,
    ) -> Self {
        let arguments = command.get(1..).unwrap_or_default();
        let mut cause = diagnose(output, status, arguments);
        let mut message = match status {
            Some(status) => format!("the daemon {} before it was ready", describe(status)),
            None => {
                cause = cause.or(reason);
                format!("the daemon {NOT_READY} in {timeout} seconds")
            }
        };
        let logs = last_lines(output);
        if logs.is_empty() {
            message += " and printed nothing";
        }
        StartError {
            message,
            command,
            status,
            logs,
            cause,
            source: None,
        }
    }

    /// Returns the error for a daemon that was ready and then ended with `status`.
    pub fn died(command: Vec<String>, output: &str, status: Option<i32>) -> Self {
        let arguments = command.get(1..).unwrap_or_default();
        let cause = status.and_then(|status| diagnose(output, Some(status), arguments));
        StartError {
            message: match status {
                Some(status) => format!("the daemon {}", describe(status)),
                None => "the daemon is running".into(),
            },
            cause,
            command,
            status,
            logs: last_lines(output),
            source: None,
        }
    }

    /// Returns a hint for the user in one line, if there is one.
    pub fn hint(&self) -> Option<&'static str> {
        let of_cause = || hint(self.cause.as_deref()?);
        if let Some(source) = &self.source {
            let operation = self.cause.as_deref().unwrap_or_default();
            return hint_of_system(operation, source).or_else(of_cause);
        }
        of_cause().or_else(|| self.message.contains(NOT_READY).then_some(TOO_SLOW))
    }

    /// The message and the cause, without the command line and the output.
    #[doc(hidden)]
    pub fn brief(&self) -> String {
        let cause = self.cause.as_ref().map(|cause| format!(": {cause}"));
        format!("{}{}", self.message, cause.unwrap_or_default())
    }

    /// Whether the daemon ended because it could not reach any bootstrap peer.
    #[doc(hidden)]
    pub fn is_unconnected(&self) -> bool {
        let cause = self.cause.as_deref();
        self.status.is_some() && cause.is_some_and(|cause| cause.starts_with(UNCONNECTED))
    }

    /// Sets the cause to the reason why each bootstrap peer could not be reached.
    #[doc(hidden)]
    pub fn with_reasons(mut self, reasons: &[(String, String)]) -> Self {
        if !reasons.is_empty() {
            let of_each = reasons
                .iter()
                .map(|(peer, reason)| format!("{peer} ({})", one_line(reason)));
            let of_each: Vec<_> = of_each.collect();
            self.cause = Some(format!("{UNCONNECTED}{}", of_each.join(", ")));
        }
        self
    }
}

fn last_lines(output: &str) -> Vec<String> {
    let lines = excerpt(end_of(output), LOG_LINES);
    lines.into_iter().map(shortened).collect()
}

/// Joins the lines of a daemon's message.
#[doc(hidden)]
pub fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a daemon with these options counts as ready only once it has printed that it has
/// started. Otherwise a reply is enough.
///
/// A reply on a private socket can only come from this daemon. But at an address that the caller
/// chose, or at a TCP port, another daemon may reply. And upstream's daemons reply before they have
/// connected to their bootstrap peers.
#[doc(hidden)]
pub fn must_report_start(options: &DaemonOptions) -> bool {
    let quiet = |arg: &String| arg == "-q" || arg == "--quiet";
    (options.control.is_some() || cfg!(not(unix)) || !options.required_peers().is_empty())
        && !options.extra_args.iter().any(quiet)
}

/// Returns why a reply to IDENTIFY with this peer id does not prove that the daemon is ready;
/// `None` if it does.
#[doc(hidden)]
pub fn why_not_ready(output: &str, peer_id: &PeerId, must_report_start: bool) -> Option<String> {
    let (started, own) = reported_start(output);
    let answering = peer_id.to_string();
    if own.is_some_and(|own| own != answering) {
        return Some(format!("another daemon, {answering}, answers in its place"));
    }
    (must_report_start && !started)
        .then(|| "it answers, but has not printed that it has started".into())
}

/// Describes an exit status, negative for a signal.
fn describe(status: i32) -> String {
    if status >= 0 {
        return format!("exited with status {status}");
    }
    let linux = cfg!(target_os = "linux");
    let name = match -status {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        5 => "SIGTRAP",
        6 => "SIGABRT",
        7 if linux => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        10 if !linux => "SIGBUS",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        25 => "SIGXFSZ",
        31 if linux => "SIGSYS",
        other => return format!("was killed by signal {other}"),
    };
    format!("was killed by {name}")
}

/// Quotes a word like Python's `shlex.join`, which shows the same command in Python's exception.
/// (The crate `shlex` also quotes `=` and `,`, which most arguments contain.)
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "@%+=:,./-_".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', r#"'"'"'"#))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: &str = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N";

    fn reason(output: &str, must_report_start: bool) -> Option<String> {
        why_not_ready(output, &PEER.parse().unwrap(), must_report_start)
    }

    fn command(parts: &[&str]) -> Vec<String> {
        parts.iter().map(|part| part.to_string()).collect()
    }

    #[test]
    fn accepts_identify_unless_the_log_contradicts_it() {
        assert_eq!(reason("", false), None);
        assert_eq!(reason(&format!("Peer ID: {PEER}\n"), true), None);
        assert_eq!(reason("daemon has started\n", true), None);
        let noisy = format!(
            "Peer ID: QmOther\nPeer ID: {PEER}\n{}",
            "no\n".repeat(300_000)
        );
        assert_eq!(reason(&noisy, true), None);
        assert_eq!(reason("Peer ID: half", false), None);
    }

    #[test]
    fn rejects_an_answer_of_another_daemon_or_before_the_start() {
        let other = reason("Peer ID: QmOther\n", false).unwrap();
        assert_eq!(
            other,
            format!("another daemon, {PEER}, answers in its place")
        );
        let early = reason(&format!("Peer ID: {PEER}"), true).unwrap();
        assert!(early.contains("has not printed"), "{early}");
        assert!(reason("daemon has started", true).is_some());
        assert!(reason("the daemon has started\n", true).is_some());
    }

    #[test]
    fn requires_the_start_message_where_others_may_answer() {
        let private = DaemonOptions::default();
        assert_eq!(must_report_start(&private), cfg!(not(unix)));
        let bootstrapping = DaemonOptions {
            bootstrap_peers: vec!["/ip4/127.0.0.1/tcp/1".into()],
            ..private.clone()
        };
        let chosen = DaemonOptions {
            control: Some("/unix/tmp/c.sock".parse().unwrap()),
            ..private
        };
        for options in [bootstrapping, chosen] {
            assert!(must_report_start(&options));
            for quiet in ["-q", "--quiet"] {
                let extra_args = vec![quiet.into()];
                assert!(!must_report_start(&DaemonOptions {
                    extra_args,
                    ..options.clone()
                }));
            }
        }
    }

    #[test]
    fn error_shows_cause_command_and_last_lines() {
        let output =
            "before\n2026/01/02 03:04:05 listen tcp4 127.0.0.1:1: bind: permission denied\n";
        let command = command(&["/a b/p2pd", "-id=it's", ""]);
        let error = StartError::not_ready(command, output, Some(1), 30.0, Some("no".into()));
        assert_eq!(
            error.to_string(),
            "the daemon exited with status 1 before it was ready: \
             no permission to listen on 127.0.0.1:1\n  \
             command: '/a b/p2pd' '-id=it'\"'\"'s' ''\n  \
             last output:\n    before\n    \
             2026/01/02 03:04:05 listen tcp4 127.0.0.1:1: bind: permission denied\n  \
             hint: choose a port from 1024 on, or a path in a directory that this user can write to"
        );
    }

    #[test]
    fn cuts_a_long_line() {
        // Each character has three bytes.
        let output = format!("{}\n{}\n", "…".repeat(500), "€".repeat(300_000));
        for error in [
            StartError::not_ready(command(&["p2pd"]), &output, Some(1), 30.0, None),
            StartError::died(command(&["p2pd"]), &output, Some(1)),
        ] {
            assert_eq!(error.logs, [format!("{}…", "€".repeat(500))]);
        }
        let output = format!("short\n{}\npanic: {}\n", "…".repeat(500), "€".repeat(9000));
        let error = StartError::not_ready(command(&["p2pd"]), &output, Some(2), 30.0, None);
        assert_eq!(error.logs[..2], ["short".into(), "…".repeat(500)]);
        assert_eq!(error.cause.unwrap(), format!("panic: {}…", "€".repeat(493)));
    }

    #[test]
    fn names_a_signal_and_reports_missing_output() {
        let killed = StartError::not_ready(command(&["p2pd"]), "", Some(-11), 30.0, None);
        assert_eq!(
            killed.message,
            "the daemon was killed by SIGSEGV before it was ready and printed nothing"
        );
        assert_eq!(describe(-99), "was killed by signal 99");
        let silent = StartError::not_ready(command(&["p2pd"]), "", None, 0.2, Some("why".into()));
        assert_eq!(
            silent.message,
            "the daemon was not ready in 0.2 seconds and printed nothing"
        );
        assert_eq!(silent.cause.as_deref(), Some("why"));
    }

    #[test]
    fn gives_the_reason_for_each_bootstrap_peer() {
        let output = "2026/01/02 03:04:05 failed to connect to bootstrap peers\n";
        let command = command(&["p2pd", "-bootstrapPeers=/a,/b", "-b"]);
        let error = StartError::not_ready(command.clone(), output, Some(1), 30.0, None);
        assert!(error.is_unconnected());
        let unexplained = error.clone().with_reasons(&[]);
        assert_eq!(unexplained.cause, error.cause);
        let reasons = [("/a", "all dials failed\n  * refused"), ("/b", "no")];
        let reasons = reasons.map(|(peer, reason)| (peer.into(), reason.into()));
        assert_eq!(
            error.with_reasons(&reasons).cause.unwrap(),
            "no bootstrap peer could be reached: /a (all dials failed * refused), /b (no)"
        );
        let other = StartError::not_ready(command, "", Some(1), 30.0, None);
        assert!(!other.is_unconnected());
    }

    #[test]
    fn death_shows_cause_and_last_lines() {
        let killed = StartError::died(command(&["p2pd"]), "before\nlast\n", Some(-9));
        assert_eq!(
            killed.to_string(),
            "the daemon was killed by SIGKILL: something killed it, maybe for lack of memory\n  \
             command: p2pd\n  last output:\n    before\n    last\n  \
             hint: look for the out-of-memory killer in the kernel's log (dmesg), and allow the \
             daemon more memory"
        );
    }

    #[test]
    fn failed_operation_shows_the_systems_message_and_a_hint() {
        let failed = |operation: &str, number| Failed {
            operation: operation.into(),
            error: io::Error::from_raw_os_error(number),
        };
        for (operation, number, cause, hint) in [
            (
                "cannot create the directory /no/d",
                2,
                "No such file",
                "set TMPDIR",
            ),
            (
                "cannot create the directory /d",
                28,
                "No space left",
                "free some space",
            ),
            (
                "cannot create a pipe",
                24,
                "Too many open files",
                "ulimit -n",
            ),
            ("cannot start another process", 11, "Resource", "ulimit -u"),
        ] {
            let error = StartError::not_prepared(failed(operation, number));
            let text = error.to_string();
            let begin = format!("the daemon's start could not be prepared: {operation}: {cause}");
            assert!(text.starts_with(&begin), "{text}");
            assert!(text.lines().count() == 2 && text.contains(hint), "{text}");
            assert_eq!(error.source.unwrap().raw_os_error(), Some(number));
        }
        let foreign = StartError::failed(command(&["p2pd"]), failed("cannot execute p2pd", 8));
        assert!(foreign.hint().unwrap().contains("P2PD_PATH"));
        let cause = foreign.cause.unwrap();
        assert!(cause.starts_with("the binary is not for this"), "{cause}");
        assert!(cause.ends_with(": cannot execute p2pd"), "{cause}");
    }

    #[test]
    fn gives_a_hint_for_a_slow_daemon() {
        let silent = StartError::not_ready(command(&["p2pd"]), "", None, 0.2, None);
        assert!(silent.to_string().ends_with(TOO_SLOW));
    }

    #[test]
    fn failed_spawn_shows_the_systems_message() {
        let missing = io::Error::from_raw_os_error(2);
        let error = StartError::not_run(command(&["p2pd"]), missing);
        let text = error.to_string();
        assert!(
            text.starts_with("the daemon could not be run: No such file"),
            "{text}"
        );
        assert!(!text.contains("os error"), "{text}");
        assert!(std::error::Error::source(&error).is_some());
    }
}
