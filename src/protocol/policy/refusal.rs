//! Classifies the daemon's error messages for refused requests.

/// Why the daemon refused a request, according to its error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// The daemon lacks this feature, or was started without it.
    NotSupported,
    /// The timeout in the request has expired.
    TimedOut,
    /// A client, possibly the same one, has already registered a handler for this protocol.
    AlreadyRegistered,
    /// The handler to remove is not registered, or belongs to another client.
    NotRegistered,
    /// Anything else.
    Other,
}

impl Refusal {
    /// Classifies an error message.
    ///
    /// ```
    /// use p2pd_protocol::policy::refusal::Refusal;
    ///
    /// assert_eq!(Refusal::of("DHT not enabled"), Refusal::NotSupported);
    /// assert_eq!(Refusal::of("failed to dial"), Refusal::Other);
    /// ```
    pub fn of(message: &str) -> Self {
        match message {
            // The last three are the JavaScript daemon's errors for a message of another flavour.
            "not supported"
            | "DHT not enabled"
            | "PubSub not enabled"
            | "ERR_INVALID_MESSAGE"
            | "ERR_INVALID_REQUEST_TYPE"
            | "ERR_NOT_IMPLEMENTED" => Self::NotSupported,
            _ if message.ends_with("context deadline exceeded") => Self::TimedOut,
            _ if message.ends_with("already set") => Self::AlreadyRegistered,
            _ if message.starts_with("handler for protocol ")
                && message.ends_with("does not exist") =>
            {
                Self::NotRegistered
            }
            _ => Self::Other,
        }
    }

    /// The next step for the user, if the daemon's message does not show it.
    pub fn hint(self) -> Option<&'static str> {
        match self {
            Self::AlreadyRegistered => Some(
                "another client of this daemon serves it: use another name, or register it as \
                 balanced in all of its clients",
            ),
            Self::NotRegistered => Some(
                "this client has nothing to remove there: the daemon was restarted, or another \
                 client serves the protocol",
            ),
            Self::NotSupported | Self::TimedOut | Self::Other => None,
        }
    }
}

/// Error message for a request on which the daemon closed the connection although it still answers
/// others. Daemons do so when they do not know the request.
pub const UNKNOWN_REQUEST: &str =
    "the daemon closed the connection, as it does on a request it does not know";

/// Whether the connection may have been lost because the daemon does not know the request. To find out,
/// send IDENTIFY: if the daemon answers, it does not support the request.
pub fn may_be_unknown_request(reply_begun: bool) -> bool {
    !reply_begun
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classifies_the_messages_of_all_flavours() {
        let cases = [
            ("not supported", Refusal::NotSupported),
            ("PubSub not enabled", Refusal::NotSupported),
            ("ERR_INVALID_REQUEST_TYPE", Refusal::NotSupported),
            ("routing: context deadline exceeded", Refusal::TimedOut),
            (
                "handler for protocol /echo already set",
                Refusal::AlreadyRegistered,
            ),
            (
                "handler for protocol /echo does not exist",
                Refusal::NotRegistered,
            ),
            (
                "handler for protocol /echo with maddr /unix/tmp/a.sock does not exist",
                Refusal::NotRegistered,
            ),
            ("the key does not exist", Refusal::Other),
            ("failed to dial: no addresses", Refusal::Other),
            // Only the whole message counts.
            ("the peer says: not supported", Refusal::Other),
            ("", Refusal::Other),
        ];
        for (message, refusal) in cases {
            assert_eq!(Refusal::of(message), refusal, "{message:?}");
        }
    }
}
