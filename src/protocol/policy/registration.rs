//! Registration of a stream handler that the daemon may already have: a state machine that decides which
//! request comes next.
//!
//! The daemon's reply alone does not show who has a name:
//! - hivemind's daemon refuses a taken name with the same error, whether this client or another one has
//!   it.
//! - It accepts a second entry for a balanced name from the same client.
//! - A restarted daemon has forgotten the name, and another client may have taken it.
//!
//! ```
//! use p2pd_protocol::policy::registration::{Action, Ending, Registering, Reply};
//!
//! let mut registering = Registering::new(false, None, true);
//! assert_eq!(registering.first(), Action::Register { balanced: false });
//! // The driver sends STREAM_HANDLER, and the daemon accepts it.
//! assert_eq!(registering.next(Reply::Done), Action::End(Ending::Registered));
//! ```

/// The client's last registration of a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Former {
    /// Whether it registered the protocol as balanced.
    pub balanced: bool,
    /// Whether the address and `balanced` are the same as now.
    pub unchanged: bool,
    /// Whether there is a witness; see
    /// [`Pool::choose_witness`](super::pool::Pool::choose_witness).
    pub witnessed: bool,
}

/// What the driver does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Send STREAM_HANDLER with the current address.
    Register {
        /// Whether to register the protocol as balanced.
        balanced: bool,
    },
    /// Send REMOVE_STREAM_HANDLER. The driver must not be cancelled from here on: a removal whose reply
    /// is not awaited could overtake a later registration.
    Remove {
        /// Whether to send the address of the former registration; the current one otherwise.
        former: bool,
    },
    /// Send a request on the witness of the former registration, to find out whether the daemon is still
    /// the same.
    Probe,
    /// The registration has ended.
    End(Ending),
}

/// How a registration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The daemon has the registration.
    Registered,
    /// The last request failed, and its error is the result.
    LastError,
    /// Another client has the name. The error of the first STREAM_HANDLER request is the result.
    FirstError,
}

/// The outcome of an [`Action`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The daemon accepted the request. For a probe: it is the same daemon.
    Done,
    /// The daemon refused because the name is taken.
    Taken,
    /// The daemon refused for another reason. For a probe: it may be another daemon.
    Refused,
    /// Nothing was sent.
    Unreachable,
    /// The daemon may or may not have carried out the request.
    Lost,
}

/// Which registration the daemon has, or may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// The former one, or none if there was none.
    Former,
    /// The one sent last with [`Action::Register`].
    Current,
    /// No registration.
    Nothing,
}

/// A registration of one protocol, in progress.
#[derive(Debug, Clone)]
pub struct Registering {
    balanced: bool,
    former: Option<Former>,
    /// Whether a registration of this client may be replaced.
    replace: bool,
    state: State,
    record: Record,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Removes the former entry first: without a witness, it would be unknown later whether there are
    /// two.
    RemovingFormer,
    Registering,
    /// The name is taken: by this client, if the daemon is still the same.
    ProbingOwner,
    /// The name is taken: the removal succeeds only if this client has it.
    RemovingOwn,
    RegisteringAgain,
    /// Other clients share the name: registers as balanced again, to keep this client's share.
    Sharing,
    /// A second entry was added, if the daemon is still the same.
    ProbingSecond,
    RemovingSecond,
}

impl Registering {
    /// Begins a registration. Carry out [`first`](Self::first).
    ///
    /// # Arguments
    /// - `balanced`: whether several clients may serve the protocol in turn.
    /// - `former`: the registration that the daemon may have.
    /// - `replace`: whether the former registration may be replaced. If not, a name that this client has
    ///   counts as taken.
    pub fn new(balanced: bool, former: Option<Former>, replace: bool) -> Self {
        let blind = former.is_some_and(|former| !former.witnessed);
        Self {
            balanced,
            former,
            replace,
            state: if balanced && blind {
                State::RemovingFormer
            } else {
                State::Registering
            },
            record: Record::Former,
        }
    }

    /// Returns the first action.
    pub fn first(&mut self) -> Action {
        match self.state {
            State::RemovingFormer => Action::Remove { former: true },
            _ => self.register(State::Registering, self.balanced),
        }
    }

    /// Which registration the daemon has, or may have. A driver that stops early must remember it.
    pub fn record(&self) -> Record {
        self.record
    }

    /// Returns the next action, after the last one had this outcome.
    pub fn next(&mut self, reply: Reply) -> Action {
        match self.state {
            State::RemovingFormer => self.register(State::Registering, self.balanced),
            State::Registering => self.registered(reply),
            State::ProbingOwner if reply == Reply::Done => Action::End(Ending::Registered),
            State::ProbingOwner => self.remove(State::RemovingOwn, true),
            State::RemovingOwn => self.removed(reply),
            State::RegisteringAgain => self.registered_again(reply),
            State::Sharing => self.shared(reply),
            State::ProbingSecond if reply == Reply::Done => {
                self.remove(State::RemovingSecond, true)
            }
            // An extra share is better than a failure.
            State::ProbingSecond | State::RemovingSecond => Action::End(Ending::Registered),
        }
    }

    fn registered(&mut self, reply: Reply) -> Action {
        let witnessed = self.former.is_some_and(|former| former.witnessed);
        match reply {
            Reply::Done if self.balanced && witnessed => {
                self.state = State::ProbingSecond;
                Action::Probe
            }
            Reply::Taken => {
                self.record = Record::Former;
                match self.former.filter(|_| self.replace) {
                    None => Action::End(Ending::LastError),
                    Some(former) if former.unchanged && former.witnessed => {
                        self.state = State::ProbingOwner;
                        Action::Probe
                    }
                    Some(_) => self.remove(State::RemovingOwn, true),
                }
            }
            _ => self.end_of(reply, Record::Former),
        }
    }

    fn removed(&mut self, reply: Reply) -> Action {
        match reply {
            Reply::Done => self.register(State::RegisteringAgain, self.balanced),
            Reply::Taken | Reply::Refused => {
                self.record = Record::Nothing;
                let shared = self.former.is_some_and(|former| former.balanced);
                if shared && !self.balanced {
                    return self.register(State::Sharing, true);
                }
                Action::End(Ending::FirstError)
            }
            Reply::Unreachable | Reply::Lost => Action::End(Ending::LastError),
        }
    }

    fn registered_again(&mut self, reply: Reply) -> Action {
        match reply {
            // The daemon may have carried out an abandoned request of this client in between.
            Reply::Taken => self.remove(State::RemovingOwn, false),
            _ => self.end_of(reply, Record::Nothing),
        }
    }

    fn shared(&mut self, reply: Reply) -> Action {
        match reply {
            Reply::Done => Action::End(Ending::FirstError),
            Reply::Taken | Reply::Refused => {
                self.record = Record::Nothing;
                Action::End(Ending::FirstError)
            }
            Reply::Unreachable | Reply::Lost => self.end_of(reply, Record::Nothing),
        }
    }

    /// Ends with the reply to STREAM_HANDLER. `otherwise` is what the daemon has if it does not have
    /// this registration.
    fn end_of(&mut self, reply: Reply, otherwise: Record) -> Action {
        if matches!(reply, Reply::Taken | Reply::Refused | Reply::Unreachable) {
            self.record = otherwise;
        }
        Action::End(match reply {
            Reply::Done => Ending::Registered,
            _ => Ending::LastError,
        })
    }

    fn register(&mut self, state: State, balanced: bool) -> Action {
        self.state = state;
        // Until the daemon replies, it may or may not have the registration.
        self.record = Record::Current;
        Action::Register { balanced }
    }

    fn remove(&mut self, state: State, former: bool) -> Action {
        self.state = state;
        Action::Remove { former }
    }
}

#[cfg(test)]
mod tests;
