//! What a request can fail with: who failed, at what, and in whose words.

use p2pd_protocol::endpoint::EndpointError;
use p2pd_protocol::policy::refusal::Refusal;
use p2pd_protocol::{self as protocol, Multiaddr, PeerId};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// A failed request. All but [`Error::Listen`] and [`Error::Address`] carry the request, and the peer
/// and protocol it was about: [`Error::context`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The daemon answered with an error.
    #[error("the daemon refused: {message}{context}")]
    Refused {
        /// The daemon's words.
        message: String,
        /// What it was about.
        context: Box<Context>,
    },
    /// This daemon cannot do what was asked: another kind, an older version, or not switched on.
    #[error("the daemon does not support this: {message}{context}")]
    NotSupported {
        /// The daemon's words, or how it came to light where it had none.
        message: String,
        /// What it was about.
        context: Box<Context>,
    },
    /// No connection to the control socket could be made: nothing was sent.
    #[error("no connection to the daemon's control socket at {addr}: {source}{context}")]
    Unreachable {
        /// The control address.
        addr: Multiaddr,
        /// The operating system's reason.
        source: Arc<io::Error>,
        /// What it was about.
        context: Box<Context>,
    },
    /// The control connection ended before the answer: unless `unexecuted`, the request may have
    /// been carried out.
    #[error("the connection to the daemon was lost: {reason}{context}")]
    ConnectionLost {
        /// How it ended.
        reason: String,
        /// The operating system's reason, if it gave one; `UnexpectedEof` if the daemon ended it.
        source: Option<Arc<io::Error>>,
        /// The daemon did not read the whole request.
        unexecuted: bool,
        /// The answer had begun to come.
        mid_answer: bool,
        /// What it was about.
        context: Box<Context>,
    },
    /// No answer in time: the request may have been carried out.
    #[error("{}{context}", timed_out(*.after, .message.as_deref()))]
    Timeout {
        /// The client's own limit, if it was that.
        after: Option<Duration>,
        /// The daemon's words, if it was the daemon that gave up.
        message: Option<String>,
        /// What it was about.
        context: Box<Context>,
    },
    /// The daemon, or a peer through it, sent what the protocol does not allow.
    #[error("{source}{context}")]
    Protocol {
        /// What it was.
        source: protocol::Error,
        /// What it was about.
        context: Box<Context>,
    },
    /// A message exceeds a limit of [`UnaryLimits`](protocol::UnaryLimits). Only this call fails: the
    /// connection stays usable. A request was not sent; a reply was skipped, and the handler ran.
    #[error("{} of {size} bytes; the limit is {limit}{context}", if *.received { "a reply" } else { "a message" })]
    MessageTooLarge {
        /// The size of the message, in bytes.
        size: usize,
        /// The limit, in bytes.
        limit: usize,
        /// Whether it is a reply. If not, nothing was sent.
        received: bool,
        /// What it was about.
        context: Box<Context>,
    },
    /// The peer's unary handler failed: no fault of a daemon.
    #[error("the handler failed: {message}{context}")]
    HandlerFailed {
        /// What the peer says of it.
        message: String,
        /// What it was about.
        context: Box<Context>,
    },
    /// This client serves the protocol already.
    #[error("there is a handler for this protocol already{context}")]
    AlreadyRegistered {
        /// What it was about.
        context: Box<Context>,
    },
    /// This client does not serve the protocol.
    #[error("there is no handler for this protocol{context}")]
    NotRegistered {
        /// What it was about.
        context: Box<Context>,
    },
    /// The client cannot listen for inbound streams.
    #[error("cannot listen at {addr}: {source}")]
    Listen {
        /// The address.
        addr: Multiaddr,
        /// The operating system's reason.
        source: Arc<io::Error>,
    },
    /// An address that is none of a socket.
    #[error(transparent)]
    Address(#[from] EndpointError),
}

/// What a failed request was about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Context {
    /// The request's name in the protocol, as `CONNECT` or `DHT GET_VALUE`.
    pub request: &'static str,
    /// The peer it was about.
    pub peer: Option<PeerId>,
    /// The protocol, several separated by commas.
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
    /// What the request was about; `None` where there was none.
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

    /// The daemon's own words, if it said something.
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

    /// What kind of I/O error it is: `NotFound` or `ConnectionRefused` if there is no daemon,
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

    /// The same error, of a request about `about`.
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
                // What another request was needed for first keeps its own name.
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

    /// What a refusal in these words is.
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

/// Keeps the kind, so that a program whose functions return `io::Result` can tell.
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
