//! Retries: a request is sent again only if the daemon cannot have carried it out.

use crate::{ClientExchange, Error};
use std::io::ErrorKind;

/// The transport of a control connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A unix socket. It is reset if and only if the peer closes it with unread input.
    Unix,
    /// TCP. It can be reset for many reasons, even after the peer has read everything.
    Tcp,
}

/// How far a request had got when its connection was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The operating system had not accepted all of its bytes.
    Sending,
    /// It was behind other requests on its connection. The daemon serves them in order.
    Queued,
    /// It was sent completely, and was the only unanswered request on its connection.
    Waiting {
        /// Whether a part of the reply had arrived.
        reply_begun: bool,
    },
}

impl Progress {
    /// Returns the progress of the only request on a lost connection, all of which was sent. Puts the
    /// exchange in the failed state.
    pub fn waiting(exchange: &mut ClientExchange) -> Self {
        let end = exchange.end_of_file();
        Self::Waiting {
            reply_begun: !matches!(end, Error::Closed { mid_message: false }),
        }
    }

    /// Whether the daemon cannot have read the whole request, and so cannot have carried it out.
    ///
    /// # Arguments
    /// `error`: how the connection was lost; `None` if the daemon closed it in an orderly way.
    pub fn is_unsent(self, transport: Transport, error: Option<ErrorKind>) -> bool {
        match self {
            Self::Sending | Self::Queued => true,
            Self::Waiting { reply_begun } => {
                !reply_begun && transport == Transport::Unix && error.is_some_and(is_disconnect)
            }
        }
    }
}

/// Whether a socket's error means that the other side has closed the connection.
fn is_disconnect(error: ErrorKind) -> bool {
    matches!(
        error,
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::ConnectionAborted
    )
}

/// One attempt to send a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Whether the connection was idle before. The daemon may have closed it in the meantime, for
    /// example by restarting.
    pub pooled: bool,
    /// Whether there was an earlier attempt, on another connection.
    pub repeated: bool,
}

impl Attempt {
    /// Whether to send the request once more, on a new connection, after this attempt has failed.
    ///
    /// # Arguments
    /// `unsent`: whether the daemon cannot have read the whole request.
    pub fn may_retry(self, unsent: bool) -> bool {
        self.pooled && !self.repeated && unsent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{control::Identify, Typed};
    use crate::Limits;
    use proptest::prelude::*;

    #[test]
    fn partly_written_request_is_unsent() {
        for transport in [Transport::Unix, Transport::Tcp] {
            assert!(Progress::Sending.is_unsent(transport, Some(ErrorKind::BrokenPipe)));
            assert!(Progress::Queued.is_unsent(transport, None));
        }
    }

    #[test]
    fn only_a_reset_unix_socket_without_reply_proves_an_unread_request() {
        let waiting = Progress::Waiting { reply_begun: false };
        let reset = Some(ErrorKind::ConnectionReset);
        assert!(waiting.is_unsent(Transport::Unix, reset));
        assert!(!waiting.is_unsent(Transport::Tcp, reset));
        assert!(!waiting.is_unsent(Transport::Unix, None));
        assert!(!waiting.is_unsent(Transport::Unix, Some(ErrorKind::TimedOut)));
        let answered = Progress::Waiting { reply_begun: true };
        assert!(!answered.is_unsent(Transport::Unix, reset));
    }

    #[test]
    fn sees_in_the_exchange_whether_the_reply_has_begun() {
        let mut exchange = ClientExchange::new(Limits::default());
        exchange.send(&Identify.encoded()).unwrap();
        let begun = |exchange: &mut _| Progress::waiting(exchange);
        assert_eq!(
            begun(&mut exchange),
            Progress::Waiting { reply_begun: false }
        );
        exchange.receive(&[8]);
        assert_eq!(
            begun(&mut exchange),
            Progress::Waiting { reply_begun: true }
        );
    }

    proptest! {
        #[test]
        fn retries_once_and_only_if_unsent(pooled: bool, unsent: bool) {
            let first = Attempt { pooled, repeated: false };
            prop_assert_eq!(first.may_retry(unsent), pooled && unsent);
            let second = Attempt { pooled, repeated: true };
            prop_assert!(!second.may_retry(unsent));
        }
    }
}
