//! The errors of the client. Most of them name the request that failed.

use p2pd_protocol::endpoint::EndpointError;
use p2pd_protocol::policy::refusal::Refusal;
use p2pd_protocol::{self as protocol, Multiaddr, PeerId};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A failed request. [`Error::context`] returns the request, its peer and its protocol, except for
/// [`Error::Listen`] and [`Error::Address`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon answered with an error.
    #[error("the daemon refused: {message}{hint}{context}", hint = hint(.message))]
    Refused {
        /// The daemon's error message.
        message: String,
        /// The request that failed.
        context: Box<Context>,
    },
    /// This daemon lacks the feature, or was started without it.
    #[error("the daemon does not support this: {message}{context}")]
    NotSupported {
        /// The daemon's error message, or how the client found out.
        message: String,
        /// The request that failed.
        context: Box<Context>,
    },
    /// The client could not connect to the control socket. Nothing was sent.
    #[error("no connection to the daemon's control socket at {addr}: {source}{context}")]
    Unreachable {
        /// The control address.
        addr: Multiaddr,
        /// The operating system's error.
        source: Arc<io::Error>,
        /// The request that failed.
        context: Box<Context>,
    },
    /// The control connection ended before the reply. Unless `unexecuted`, the daemon may have carried
    /// out the request.
    #[error("the connection to the daemon was lost: {reason}{context}")]
    ConnectionLost {
        /// How it ended.
        reason: String,
        /// The operating system's error, if there was one; `UnexpectedEof` if the daemon closed the
        /// connection.
        source: Option<Arc<io::Error>>,
        /// Whether it is certain that the daemon has not read the whole request.
        unexecuted: bool,
        /// Whether a part of the reply had arrived.
        mid_answer: bool,
        /// The request that failed.
        context: Box<Context>,
    },
    /// No reply in time. The daemon may have carried out the request.
    #[error("{}{context}", timed_out(*.after, .message.as_deref()))]
    Timeout {
        /// The client's timeout, if it has expired.
        after: Option<Duration>,
        /// The daemon's error message, if the timeout in the request has expired.
        message: Option<String>,
        /// The request that failed.
        context: Box<Context>,
    },
    /// The daemon, or a peer through it, violated the protocol.
    #[error("{source}{context}")]
    Protocol {
        /// The violation.
        source: protocol::Error,
        /// The request that failed.
        context: Box<Context>,
    },
    /// A message exceeds a limit of [`UnaryLimits`](protocol::UnaryLimits). Only this call fails: the
    /// connection stays usable. A large request is not sent. A large reply is discarded, after the
    /// handler has run.
    #[error("{} of {size} bytes; the limit is {limit}{context}", if *.received { "a reply" } else { "a message" })]
    MessageTooLarge {
        /// The size of the message, in bytes.
        size: usize,
        /// The limit, in bytes.
        limit: usize,
        /// Whether it is a reply. If not, nothing was sent.
        received: bool,
        /// The request that failed.
        context: Box<Context>,
    },
    /// The peer's unary handler failed. The daemons worked correctly.
    #[error("the handler failed: {message}{context}")]
    HandlerFailed {
        /// The handler's error message.
        message: String,
        /// The request that failed.
        context: Box<Context>,
    },
    /// This client serves the protocol already.
    #[error(
        "there is a handler for this protocol already; drop or remove it first, or use another \
             name{context}"
    )]
    AlreadyRegistered {
        /// The request that failed.
        context: Box<Context>,
    },
    /// This client does not serve the protocol.
    #[error(
        "there is no handler for this protocol; a client can remove only the handlers that it has \
             added{context}"
    )]
    NotRegistered {
        /// The request that failed.
        context: Box<Context>,
    },
    /// The client cannot listen for inbound streams.
    #[error("cannot listen at {addr}: {source}")]
    Listen {
        /// The address.
        addr: Multiaddr,
        /// The operating system's error.
        source: Arc<io::Error>,
    },
    /// An address that is not that of a unix or TCP socket.
    #[error(transparent)]
    Address(#[from] EndpointError),
}

/// The request that failed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// The request's name in the protocol, such as `CONNECT` or `DHT GET_VALUE`.
    pub request: &'static str,
    /// The peer that the request is about, if any.
    pub peer: Option<PeerId>,
    /// The protocol, if any; several are separated by commas.
    pub protocol: Option<String>,
}

impl Context {
    pub(super) fn new(request: &'static str) -> Self {
        Self {
            request,
            ..Self::default()
        }
    }

    pub(super) fn peer(mut self, peer: &PeerId) -> Self {
        self.peer = Some(peer.clone());
        self
    }

    pub(super) fn protocol(mut self, protocol: impl Into<String>) -> Self {
        self.protocol = Some(protocol.into());
        self
    }
}

/// The next step after a refusal with this message, as an addition to the error's text.
fn hint(message: &str) -> String {
    match Refusal::of(message).hint() {
        Some(hint) => format!("; {hint}"),
        None => String::new(),
    }
}

impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.request.is_empty() {
            return Ok(());
        }
        write!(f, " (request {}", self.request)?;
        if let Some(peer) = &self.peer {
            write!(f, ", peer {peer}")?;
        }
        if let Some(protocol) = &self.protocol {
            write!(f, ", protocol {protocol}")?;
        }
        f.write_str(")")
    }
}

impl Error {
    /// The request that failed; `None` if there was no request.
    pub fn context(&self) -> Option<&Context> {
        match self {
            Self::Listen { .. } | Self::Address(_) => None,
            Self::Refused { context, .. }
            | Self::NotSupported { context, .. }
            | Self::Unreachable { context, .. }
            | Self::ConnectionLost { context, .. }
            | Self::Timeout { context, .. }
            | Self::Protocol { context, .. }
            | Self::MessageTooLarge { context, .. }
            | Self::HandlerFailed { context, .. }
            | Self::AlreadyRegistered { context }
            | Self::NotRegistered { context } => Some(context),
        }
    }

    /// The daemon's error message, if it sent one.
    pub fn daemon_message(&self) -> Option<&str> {
        match self {
            Self::Refused { message, .. } | Self::NotSupported { message, .. } => Some(message),
            Self::Timeout { message, .. } => message.as_deref(),
            _ => None,
        }
    }

    /// The I/O error behind it, if there is one.
    pub fn io_error(&self) -> Option<&io::Error> {
        match self {
            Self::Unreachable { source, .. } | Self::Listen { source, .. } => Some(source),
            Self::ConnectionLost { source, .. } => source.as_deref(),
            _ => None,
        }
    }

    /// The kind of the I/O error: `NotFound` or `ConnectionRefused` if there is no daemon,
    /// `ConnectionReset`, `BrokenPipe` or `UnexpectedEof` if the connection was lost, `TimedOut`.
    ///
    /// ```
    /// # use std::io::ErrorKind;
    /// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    /// # rt.block_on(async {
    /// let client = p2pd_client::Client::new("/unix/tmp/no-such.sock".parse().unwrap()).unwrap();
    /// let error = client.identify().await.unwrap_err();
    /// assert_eq!(error.io_kind(), Some(ErrorKind::NotFound));
    /// # });
    /// ```
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Timeout { .. } => Some(io::ErrorKind::TimedOut),
            _ => self.io_error().map(io::Error::kind),
        }
    }

    /// Adds the request that failed.
    pub(super) fn about(mut self, about: &Context) -> Self {
        match &mut self {
            Self::Listen { .. } | Self::Address(_) => {}
            Self::Refused { context, .. }
            | Self::NotSupported { context, .. }
            | Self::Unreachable { context, .. }
            | Self::ConnectionLost { context, .. }
            | Self::Timeout { context, .. }
            | Self::Protocol { context, .. }
            | Self::MessageTooLarge { context, .. }
            | Self::HandlerFailed { context, .. }
            | Self::AlreadyRegistered { context }
            | Self::NotRegistered { context } => {
                // If another request had to come first and failed, the error keeps its name.
                if context.request.is_empty() {
                    **context = about.clone();
                } else {
                    context.peer = about.peer.clone();
                    context.protocol.clone_from(&about.protocol);
                }
            }
        }
        self
    }

    /// The error for a refusal with this message.
    pub(super) fn refused(message: String) -> Self {
        let context = Box::default();
        match Refusal::of(&message) {
            Refusal::NotSupported => Self::NotSupported { message, context },
            Refusal::TimedOut => Self::Timeout {
                after: None,
                message: Some(message),
                context,
            },
            _ => Self::Refused { message, context },
        }
    }

    pub(super) fn not_supported(message: &str) -> Self {
        Self::NotSupported {
            message: message.to_owned(),
            context: Box::default(),
        }
    }

    pub(super) fn lost(reason: impl Reason, unexecuted: bool) -> Self {
        Self::ConnectionLost {
            reason: reason.to_string(),
            source: reason.io_error().map(Arc::new),
            unexecuted,
            mid_answer: false,
            context: Box::default(),
        }
    }

    pub(super) fn runtime_ended() -> Self {
        Self::lost("its tokio runtime has ended", false)
    }

    /// The client was closed while the operation was under way.
    pub(super) fn closed() -> Self {
        Self::lost("the client was closed", false)
    }

    pub(super) fn timeout(after: Duration) -> Self {
        Self::Timeout {
            after: Some(after),
            message: None,
            context: Box::default(),
        }
    }

    pub(super) fn is_unsent(&self) -> bool {
        matches!(
            self,
            Self::ConnectionLost {
                unexecuted: true,
                ..
            }
        )
    }
}

/// Why a connection was lost.
pub(super) trait Reason: fmt::Display {
    fn io_error(&self) -> Option<io::Error> {
        None
    }
}

impl Reason for &str {}
impl Reason for protocol::Error {}
impl Reason for getrandom::Error {}

impl Reason for io::Error {
    fn io_error(&self) -> Option<io::Error> {
        Some(match self.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::new(self.kind(), self.to_string()),
        })
    }
}

impl Reason for &io::Error {
    fn io_error(&self) -> Option<io::Error> {
        (*self).io_error()
    }
}

/// Keeps the kind, for programs whose functions return `io::Result`.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = error.io_kind().unwrap_or(io::ErrorKind::Other);
        io::Error::new(kind, error)
    }
}

impl From<protocol::Error> for Error {
    fn from(error: protocol::Error) -> Self {
        let context = Box::default();
        match error {
            protocol::Error::Closed { mid_message } => Self::ConnectionLost {
                reason: error.to_string(),
                source: Some(Arc::new(io::ErrorKind::UnexpectedEof.into())),
                unexecuted: false,
                mid_answer: mid_message,
                context,
            },
            protocol::Error::NoMemory { .. } => Self::lost(error, false),
            protocol::Error::RequestTooLarge { size, limit } => Self::MessageTooLarge {
                size,
                limit,
                received: false,
                context,
            },
            protocol::Error::ReplyTooLarge { size, limit } => Self::MessageTooLarge {
                size,
                limit,
                received: true,
                context,
            },
            source => Self::Protocol { source, context },
        }
    }
}

fn timed_out(after: Option<Duration>, message: Option<&str>) -> String {
    match (after, message) {
        (_, Some(message)) => format!("the daemon gave up: {message}"),
        (Some(after), None) => format!("no answer within {after:?}"),
        (None, None) => "no answer in time".to_owned(),
    }
}
