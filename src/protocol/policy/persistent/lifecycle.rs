//! [`Lifecycle`]: the state machine of a persistent connection.

use super::action::{Action, ConnectionId, Failure, Registration};
use super::handlers::{Addition, Change, Handler, Handlers, Request};
use super::reconnect::{Reconnect, Timing};
use crate::policy::backoff::Backoff;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time in which the daemon notices that the previous connection is lost. Until then it refuses to
/// register that connection's handlers on another one.
const FORGET_TIMEOUT: Duration = Duration::from_secs(1);

/// Pauses between attempts to register a handler that the daemon refuses for that reason.
const REGISTER_BACKOFF: Backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(50));

/// Lifecycle of a persistent connection and of its handlers. See the [module](super).
///
/// `T` identifies an operation; the driver uses each value for one operation only. Each operation is
/// completed exactly once by [`Action::Complete`], unless it is [cancelled](Self::cancel) before.
/// `E` is the driver's error.
///
/// ```
/// use p2pd_protocol::policy::persistent::{Action, Lifecycle, Registration, Timing};
/// use std::time::Instant;
///
/// let (mut lifecycle, now) = (Lifecycle::<u32, String>::new(Timing::default(), 0), Instant::now());
/// lifecycle.add(1, "echo", false, now);
/// let Some(Action::Open(id)) = lifecycle.poll() else { panic!() };
/// assert!(lifecycle.opened(id, now));
/// assert_eq!(lifecycle.poll(), Some(Action::Ready));
/// assert_eq!(lifecycle.poll(), Some(Action::Serve { name: "echo".into(), token: 1 }));
/// assert_eq!(lifecycle.poll(), Some(Action::Register { name: "echo".into(), balanced: false }));
/// lifecycle.registered(id, "echo", Registration::Accepted, now);
/// assert_eq!(lifecycle.poll(), Some(Action::Complete { tokens: vec![1], outcome: Ok(()) }));
/// ```
#[derive(Debug)]
pub struct Lifecycle<T, E> {
    open_timeout: Duration,
    phase: Phase,
    last_id: u64,
    reconnect: Reconnect,
    /// Operations that wait for the connection.
    waiting: Vec<T>,
    handlers: Handlers<T>,
    actions: VecDeque<Action<T, E>>,
}

#[derive(Debug, Clone)]
enum Phase {
    Disconnected,
    Opening {
        id: ConnectionId,
        deadline: Instant,
    },
    /// Open, but handlers of the previous connection are not registered yet.
    Registering {
        id: ConnectionId,
        deadline: Instant,
        /// Until then, the daemon may refuse a handler that the previous connection still has.
        forget_deadline: Instant,
        backoff: Backoff,
        retry_at: Option<Instant>,
    },
    Open {
        id: ConnectionId,
        since: Instant,
    },
    Closed,
}

impl<T: Copy + PartialEq, E> Lifecycle<T, E> {
    /// Starts without a connection. `random` is a random number, used for jitter.
    pub fn new(timing: Timing, random: u64) -> Self {
        Lifecycle {
            open_timeout: timing.open_timeout,
            phase: Phase::Disconnected,
            last_id: 0,
            reconnect: Reconnect::new(timing.backoff, random),
            waiting: Vec::new(),
            handlers: Handlers::new(),
            actions: VecDeque::new(),
        }
    }

    // --- operations ---

    /// Waits for the connection. Opens it if necessary.
    pub fn connect(&mut self, token: T, now: Instant) {
        match self.phase {
            Phase::Closed => self.complete(token, Err(Failure::Closed)),
            Phase::Open { .. } => self.complete(token, Ok(())),
            _ => {
                self.waiting.push(token);
                self.want_connection(now);
            }
        }
    }

    /// Adds a handler, after all earlier changes of its name are done.
    pub fn add(&mut self, token: T, name: &str, balanced: bool, now: Instant) {
        if matches!(self.phase, Phase::Closed) {
            return self.complete(token, Err(Failure::Closed));
        }
        let entry = self.handlers.entry(name);
        entry.queue.push_back(Change::Add(Addition {
            token,
            balanced,
            repeated: false,
        }));
        self.advance(name, now);
    }

    /// Removes a handler, after all earlier changes of its name are done. The handler still serves calls
    /// until the daemon acknowledges the removal.
    pub fn remove(&mut self, token: T, name: &str, now: Instant) {
        let entry = self.handlers.entry(name);
        entry.queue.push_back(Change::Remove(Some(token)));
        self.advance(name, now);
        self.finish_registering(now);
    }

    /// Cancels an operation, which then gets no [`Action::Complete`]. Undoes the addition of a handler,
    /// even if it is complete. A cancelled removal is still carried out, and the handler is dropped at
    /// once.
    pub fn cancel(&mut self, token: T, now: Instant) {
        if let Some(place) = self.waiting.iter().position(|waiting| *waiting == token) {
            self.waiting.remove(place);
            return;
        }
        let Some(name) = self.handlers.find(token) else {
            return;
        };
        if self.handlers.entry(&name).cancel(token) {
            self.drop_handler(&name, now);
        }
        self.advance(&name, now);
    }

    /// Drops a handler at once, and unregisters it in the background. A handler that is still being
    /// added stays.
    pub fn withdraw(&mut self, name: &str, now: Instant) {
        let in_flight = self.handlers.get(name).map(|entry| &entry.in_flight);
        if !matches!(in_flight, Some(Some(Request::Register(_)))) {
            self.drop_handler(name, now);
        }
    }

    /// Closes the connection, fails all operations and drops all handlers. No connection can be opened
    /// afterwards.
    pub fn close(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Closed) {
            Phase::Opening { id, .. } => self.actions.push_back(Action::CancelOpen(id)),
            Phase::Registering { .. } | Phase::Open { .. } => self.actions.push_back(Action::Close),
            Phase::Disconnected | Phase::Closed => {}
        }
        self.reconnect.cancel();
        let mut failed = std::mem::take(&mut self.waiting);
        self.disconnect(&mut failed);
        failed.extend(self.handlers.take_additions());
        for name in self.handlers.names() {
            let entry = self.handlers.entry(&name);
            let removals = std::mem::take(&mut entry.queue);
            self.removed(&name, None);
            for removal in removals {
                if let Change::Remove(Some(token)) = removal {
                    self.complete(token, Ok(()));
                }
            }
            self.handlers.remove_unused(&name);
        }
        self.complete_all(failed, Err(Failure::Closed));
    }

    // --- reports of the driver ---

    /// Reports that the connection is open. Returns whether it is needed; if not, the driver must close
    /// it.
    pub fn opened(&mut self, id: ConnectionId, now: Instant) -> bool {
        let deadline = match self.phase {
            Phase::Opening {
                id: expected,
                deadline,
            } if expected == id => deadline,
            _ => return false,
        };
        self.phase = Phase::Registering {
            id,
            deadline,
            forget_deadline: now + FORGET_TIMEOUT,
            backoff: REGISTER_BACKOFF,
            retry_at: None,
        };
        self.register_again();
        self.finish_registering(now);
        true
    }

    /// Reports that the connection could not be opened.
    pub fn open_failed(&mut self, id: ConnectionId, error: E, now: Instant) {
        if matches!(self.phase, Phase::Opening { id: expected, .. } if expected == id) {
            self.fail_opening(Failure::Driver(error), now);
        }
    }

    /// Reports that the connection is lost. Ignored if that connection was already lost or closed.
    pub fn lost(&mut self, id: ConnectionId, error: E, now: Instant) {
        match self.phase {
            Phase::Opening { id: current, .. } | Phase::Registering { id: current, .. }
                if current == id =>
            {
                self.fail_opening(Failure::Driver(error), now);
            }
            Phase::Open { id: current, since } if current == id => {
                let lasted = now.saturating_duration_since(since);
                self.reconnect.lost_after(lasted);
                self.phase = Phase::Disconnected;
                let mut failed = Vec::new();
                self.disconnect(&mut failed);
                self.complete_all(failed, Err(Failure::Driver(error)));
                self.schedule_reconnect(now);
                self.advance_all(now);
            }
            _ => {}
        }
    }

    /// Reports the outcome of [`Action::Register`].
    pub fn registered(
        &mut self,
        id: ConnectionId,
        name: &str,
        outcome: Registration<E>,
        now: Instant,
    ) {
        if self.connection() != Some(id) {
            return;
        }
        let Some(entry) = self.handlers.get_mut(name) else {
            return;
        };
        match (entry.in_flight.take(), outcome) {
            (request, Registration::Unsent(error)) => {
                match request {
                    Some(Request::Register(addition)) if addition.may_repeat() => {
                        self.add_again(name, addition);
                    }
                    request => entry.in_flight = request,
                }
                // Nothing else can be sent on this connection either.
                self.actions.push_back(Action::Close);
                return self.lost(id, error, now);
            }
            (Some(Request::Register(addition)), outcome) => self.added(name, addition, outcome),
            (Some(Request::RegisterAgain), outcome) => self.registered_again(name, outcome, now),
            (Some(Request::RegisterAbandoned), outcome) => {
                if let Registration::Accepted = outcome {
                    entry.registered = true;
                    self.drop_handler(name, now);
                }
            }
            (request, _) => entry.in_flight = request,
        }
        self.advance(name, now);
        self.finish_registering(now);
    }

    /// Reports that [`Action::Unregister`] was carried out, or that the daemon refused it because it
    /// does not know the handler.
    pub fn unregistered(&mut self, id: ConnectionId, name: &str, now: Instant) {
        if self.connection() != Some(id) {
            return;
        }
        let Some(entry) = self.handlers.get_mut(name) else {
            return;
        };
        let Some(Request::Unregister(token)) = &entry.in_flight else {
            return;
        };
        let token = *token;
        entry.in_flight = None;
        entry.registered = false;
        self.removed(name, token);
        self.advance(name, now);
        self.finish_registering(now);
    }

    /// Reports that the [deadline](Self::deadline) may have passed.
    pub fn time(&mut self, now: Instant) {
        match &mut self.phase {
            Phase::Opening { id, deadline } if *deadline <= now => {
                self.actions.push_back(Action::CancelOpen(*id));
                self.fail_opening(Failure::TimedOut(self.open_timeout), now);
            }
            Phase::Registering { deadline, .. } if *deadline <= now => {
                self.actions.push_back(Action::Close);
                self.fail_opening(Failure::TimedOut(self.open_timeout), now);
            }
            Phase::Registering { retry_at, .. } if retry_at.is_some_and(|at| at <= now) => {
                *retry_at = None;
                self.register_again();
            }
            Phase::Disconnected if self.reconnect.is_due(now) => {
                if self.serves() {
                    self.want_connection(now);
                } else {
                    self.reconnect.cancel();
                }
            }
            _ => {}
        }
    }

    // --- queries of the driver ---

    /// Returns the next action.
    pub fn poll(&mut self) -> Option<Action<T, E>> {
        self.actions.pop_front()
    }

    /// When the driver must call [`time`](Self::time).
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Opening { deadline, .. } => Some(deadline),
            Phase::Registering {
                deadline, retry_at, ..
            } => Some(retry_at.map_or(deadline, |at| at.min(deadline))),
            Phase::Disconnected => self.reconnect.at(),
            Phase::Open { .. } | Phase::Closed => None,
        }
    }

    /// Whether there are handlers.
    pub fn serves(&self) -> bool {
        self.handlers.served().next().is_some()
    }

    /// Names of the handlers.
    pub fn handlers(&self) -> impl Iterator<Item = &str> {
        self.handlers.served()
    }

    /// The connection that the driver is opening.
    pub fn opening(&self) -> Option<ConnectionId> {
        match self.phase {
            Phase::Opening { id, .. } => Some(id),
            _ => None,
        }
    }

    // --- internals ---

    /// The connection on which requests are in flight.
    fn connection(&self) -> Option<ConnectionId> {
        match self.phase {
            Phase::Registering { id, .. } | Phase::Open { id, .. } => Some(id),
            _ => None,
        }
    }

    fn want_connection(&mut self, now: Instant) {
        if let Phase::Disconnected = self.phase {
            self.last_id += 1;
            let id = ConnectionId(self.last_id);
            self.phase = Phase::Opening {
                id,
                deadline: now + self.open_timeout,
            };
            self.actions.push_back(Action::Open(id));
        }
    }

    fn schedule_reconnect(&mut self, now: Instant) {
        if self.serves() {
            self.reconnect.schedule(now);
        } else {
            self.reconnect.cancel();
        }
    }

    fn fail_opening(&mut self, failure: Failure<E>, now: Instant) {
        self.phase = Phase::Disconnected;
        let mut failed = std::mem::take(&mut self.waiting);
        self.disconnect(&mut failed);
        failed.extend(self.handlers.take_additions());
        self.complete_all(failed, Err(failure));
        self.schedule_reconnect(now);
        self.advance_all(now);
    }

    /// Ends the requests in flight on a lost connection. Adds the operations that fail with it to
    /// `failed`.
    fn disconnect(&mut self, failed: &mut Vec<T>) {
        for name in self.handlers.names() {
            let entry = self.handlers.entry(&name);
            entry.registered = false;
            match entry.in_flight.take() {
                Some(Request::Register(addition)) => {
                    failed.push(addition.token);
                    self.forget(&name);
                }
                // The daemon forgets the handlers of a lost connection.
                Some(Request::Unregister(token)) => self.removed(&name, token),
                Some(Request::RegisterAgain | Request::RegisterAbandoned) | None => {}
            }
        }
    }

    /// Drops a handler that the daemon no longer has, and completes its removal.
    fn removed(&mut self, name: &str, token: Option<T>) {
        self.forget(name);
        if let Some(token) = token {
            self.complete(token, Ok(()));
        }
    }

    /// Drops the handler of a name, if there is one.
    fn forget(&mut self, name: &str) {
        let entry = self.handlers.get_mut(name);
        if entry.is_some_and(|entry| entry.handler.take().is_some()) {
            self.actions.push_back(Action::Forget(name.to_owned()));
        }
    }

    fn drop_handler(&mut self, name: &str, now: Instant) {
        self.forget(name);
        let Some(entry) = self.handlers.get_mut(name) else {
            return;
        };
        match &mut entry.in_flight {
            Some(request @ (Request::Register(_) | Request::RegisterAgain)) => {
                *request = Request::RegisterAbandoned;
            }
            Some(Request::Unregister(_) | Request::RegisterAbandoned) => {}
            None if entry.registered => {
                entry.in_flight = Some(Request::Unregister(None));
                self.actions.push_back(Action::Unregister(name.to_owned()));
            }
            None => {}
        }
        self.advance(name, now);
        self.finish_registering(now);
    }

    fn added(&mut self, name: &str, addition: Addition<T>, outcome: Registration<E>) {
        let Some(entry) = self.handlers.get_mut(name) else {
            return;
        };
        let outcome = outcome.into_result().map_err(Failure::Driver);
        if outcome.is_ok() {
            entry.registered = true;
        } else {
            self.forget(name);
        }
        self.complete(addition.token, outcome);
    }

    /// Adds the handler on the next connection.
    fn add_again(&mut self, name: &str, addition: Addition<T>) {
        let entry = self.handlers.entry(name);
        entry.queue.push_front(Change::Add(Addition {
            repeated: true,
            ..addition
        }));
        self.forget(name);
    }

    fn registered_again(&mut self, name: &str, outcome: Registration<E>, now: Instant) {
        let Some(entry) = self.handlers.get_mut(name) else {
            return;
        };
        match outcome {
            Registration::Accepted => entry.registered = true,
            Registration::Refused(error) => {
                if let Phase::Registering {
                    forget_deadline,
                    backoff,
                    retry_at,
                    ..
                } = &mut self.phase
                {
                    if now < *forget_deadline {
                        retry_at.get_or_insert_with(|| now + backoff.next(0));
                        return;
                    }
                }
                // The connection is still useful for the other handlers.
                self.actions.push_back(Action::Report {
                    name: name.to_owned(),
                    error,
                });
                self.forget(name);
            }
            Registration::Unsent(error) | Registration::Failed(error) => {
                self.actions.push_back(Action::Close);
                self.fail_opening(Failure::Driver(error), now);
            }
        }
    }

    /// Registers the handlers that the daemon does not have on this connection.
    fn register_again(&mut self) {
        for (name, entry) in self.handlers.iter_mut() {
            let Some(handler) = &entry.handler else {
                continue;
            };
            if !entry.registered && entry.in_flight.is_none() {
                entry.in_flight = Some(Request::RegisterAgain);
                self.actions.push_back(Action::Register {
                    name: name.clone(),
                    balanced: handler.balanced,
                });
            }
        }
    }

    /// Makes the connection ready if all handlers are registered.
    fn finish_registering(&mut self, now: Instant) {
        let Phase::Registering { id, .. } = self.phase else {
            return;
        };
        if !self.handlers.are_registered() {
            return;
        }
        self.phase = Phase::Open { id, since: now };
        self.reconnect.cancel();
        self.actions.push_back(Action::Ready);
        let waiting = std::mem::take(&mut self.waiting);
        self.complete_all(waiting, Ok(()));
        self.advance_all(now);
    }

    fn advance_all(&mut self, now: Instant) {
        for name in self.handlers.names() {
            self.advance(&name, now);
        }
    }

    /// Carries out the queued changes of a name, up to the first one that must wait.
    fn advance(&mut self, name: &str, now: Instant) {
        loop {
            let Some(entry) = self.handlers.get_mut(name) else {
                return;
            };
            if entry.in_flight.is_some() {
                return;
            }
            match entry.queue.pop_front() {
                Some(Change::Add(addition)) if entry.handler.is_some() => {
                    self.complete(addition.token, Err(Failure::AlreadyRegistered));
                }
                Some(Change::Add(addition)) if matches!(self.phase, Phase::Open { .. }) => {
                    let Addition {
                        token, balanced, ..
                    } = addition;
                    entry.handler = Some(Handler { token, balanced });
                    entry.in_flight = Some(Request::Register(addition));
                    // Before the request: the first call can arrive before its acknowledgement.
                    let name = name.to_owned();
                    self.actions.push_back(Action::Serve {
                        name: name.clone(),
                        token,
                    });
                    self.actions.push_back(Action::Register { name, balanced });
                }
                Some(addition @ Change::Add(_)) => {
                    entry.queue.push_front(addition);
                    return self.want_connection(now);
                }
                Some(Change::Remove(token)) if entry.handler.is_none() => {
                    if let Some(token) = token {
                        self.complete(token, Err(Failure::NotRegistered));
                    }
                }
                Some(Change::Remove(token)) if entry.registered => {
                    entry.in_flight = Some(Request::Unregister(token));
                    self.actions.push_back(Action::Unregister(name.to_owned()));
                }
                Some(Change::Remove(token)) => self.removed(name, token),
                None => return self.handlers.remove_unused(name),
            }
        }
    }

    fn complete(&mut self, token: T, outcome: Result<(), Failure<E>>) {
        self.complete_all(vec![token], outcome);
    }

    fn complete_all(&mut self, tokens: Vec<T>, outcome: Result<(), Failure<E>>) {
        if !tokens.is_empty() {
            self.actions.push_back(Action::Complete { tokens, outcome });
        }
    }
}

#[cfg(test)]
mod tests;
