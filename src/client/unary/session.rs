//! A session: a client's persistent connection and unary handlers, until the client is closed.
//!
//! [`Lifecycle`] makes the decisions. This driver has the sockets, tasks and timers.

use super::connection::{Connection, Token};
use super::handler::Handler;
use super::reader::{Owner, Reader};
use crate::error::Error;
use crate::lock;
use crate::pool::Pool;
use crate::socket::Socket;
use bytes::Bytes;
use p2pd_protocol::policy::persistent::{
    Action, ConnectionId, Failure, Lifecycle, Registration, Timing,
};
use p2pd_protocol::{PersistentClient, UnaryLimits};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{sleep_until, timeout, Instant};

/// How long closing the client waits for the last messages to be sent.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The persistent connection and the handlers of a client.
pub struct Session {
    pool: Arc<Pool>,
    limits: UnaryLimits,
    state: Mutex<State>,
}

struct State {
    lifecycle: Lifecycle<u64, Error>,
    last_token: u64,
    operations: HashMap<u64, Operation>,
    handlers: HashMap<String, Arc<Handler>>,
    connection: Option<Arc<Connection>>,
    /// Whether the connection can be used for calls.
    ready: bool,
    opening: Option<(ConnectionId, AbortHandle)>,
    timer: Option<(Instant, AbortHandle)>,
}

/// A pending `connect`, `add` or `remove`.
struct Operation {
    done: oneshot::Sender<Result<(), Error>>,
    /// The handler to add.
    handler: Option<Arc<Handler>>,
}

/// Work deferred until the state is unlocked, because it can run user code and lock the state.
#[derive(Default)]
struct Deferred {
    open: Option<ConnectionId>,
    abort: Option<AbortHandle>,
    close: Vec<Arc<Connection>>,
    completed: Vec<(Operation, Result<(), Error>)>,
    dropped: Vec<Arc<Handler>>,
}

impl Session {
    pub fn new(pool: Arc<Pool>, limits: UnaryLimits) -> Arc<Self> {
        let state = State {
            lifecycle: Lifecycle::new(Timing::default(), p2pd_sockets::random(0)),
            last_token: 0,
            operations: HashMap::new(),
            handlers: HashMap::new(),
            connection: None,
            ready: false,
            opening: None,
            timer: None,
        };
        Arc::new(Self {
            pool,
            limits,
            state: Mutex::new(state),
        })
    }

    /// Returns the connection if it is open with all handlers registered.
    pub fn connection(&self) -> Option<Arc<Connection>> {
        let state = lock(&self.state);
        state.connection.clone().filter(|_| state.ready)
    }

    /// Waits until the connection is open.
    pub async fn connect(self: &Arc<Self>) -> Result<(), Error> {
        self.operate(None, |lifecycle, token, now| lifecycle.connect(token, now))
            .await
    }

    pub async fn add(self: &Arc<Self>, protocol: &str, handler: Arc<Handler>) -> Result<(), Error> {
        let balanced = handler.balanced;
        self.operate(Some(handler), |lifecycle, token, now| {
            lifecycle.add(token, protocol, balanced, now);
        })
        .await
    }

    pub async fn remove(self: &Arc<Self>, protocol: &str) -> Result<(), Error> {
        self.operate(None, |lifecycle, token, now| {
            lifecycle.remove(token, protocol, now);
        })
        .await
    }

    /// Names of the handlers.
    pub fn handlers(&self) -> Vec<String> {
        lock(&self.state).handlers.keys().cloned().collect()
    }

    /// Closes the connection, once its last messages are sent, and drops the handlers.
    pub async fn close(self: &Arc<Self>) {
        let mut connection = None;
        self.drive(|state, _| {
            connection = state.connection.take();
            state.lifecycle.close();
        });
        if let Some(connection) = connection {
            let guard = CloseGuard(Arc::clone(&connection));
            connection.shut_down();
            let _ = timeout(CLOSE_TIMEOUT, connection.flushed()).await;
            drop(guard);
        }
    }

    /// Begins an operation and waits for it. Dropping the future cancels it.
    async fn operate(
        self: &Arc<Self>,
        handler: Option<Arc<Handler>>,
        begin: impl FnOnce(&mut Lifecycle<u64, Error>, u64, std::time::Instant),
    ) -> Result<(), Error> {
        let (done, mut outcome) = oneshot::channel();
        let mut token = 0;
        self.drive(|state, now| {
            state.last_token += 1;
            token = state.last_token;
            let operation = Operation { done, handler };
            state.operations.insert(token, operation);
            begin(&mut state.lifecycle, token, now);
        });
        let mut guard = CancelGuard {
            session: self,
            token,
            finished: false,
        };
        let outcome = (&mut outcome)
            .await
            .unwrap_or_else(|_| Err(Error::closed()));
        guard.finished = true;
        outcome
    }

    /// Changes the state, and carries out the lifecycle's actions.
    fn drive(self: &Arc<Self>, event: impl FnOnce(&mut State, std::time::Instant)) {
        let mut deferred = Deferred::default();
        {
            let mut state = lock(&self.state);
            event(&mut state, Instant::now().into_std());
            while let Some(action) = state.lifecycle.poll() {
                state.carry_out(action, &mut deferred);
            }
        }
        self.set_timer();
        let Deferred {
            open,
            abort,
            close,
            completed,
            dropped,
        } = deferred;
        if let Some(task) = abort {
            task.abort();
        }
        for connection in close {
            connection.close();
        }
        for (operation, outcome) in completed {
            let _ = operation.done.send(outcome);
        }
        drop(dropped);
        if let Some(id) = open {
            self.open(id);
        }
    }

    /// Opens a connection in its own task, so that no caller can cancel it. hivemind's daemon exits
    /// when its last persistent connection is closed, and this may be the only one.
    fn open(self: &Arc<Self>, id: ConnectionId) {
        let report = OpeningReport {
            session: Arc::downgrade(self),
            id,
            error: Some(Error::runtime_ended()),
        };
        let pool = Arc::clone(&self.pool);
        let opening = async move {
            match pool.upgrade().await {
                Ok((socket, ahead)) => report.succeed(socket, ahead),
                Err(error) => report.fail(error),
            }
        };
        if let Some(task) = spawn(opening) {
            let mut state = lock(&self.state);
            if state.lifecycle.opening() == Some(id) {
                state.opening = Some((id, task));
            } else {
                drop(state);
                task.abort();
            }
        }
    }

    fn begin(
        self: &Arc<Self>,
        id: ConnectionId,
        socket: Socket,
        ahead: Bytes,
    ) -> Result<(), Error> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| Error::lost(error, true))?;
        let core = PersistentClient::new(seed, self.limits);
        let connection = Arc::new(Connection::new(id, socket, core));
        let owner = Arc::downgrade(self) as Weak<dyn Owner>;
        let reader = Reader::new(Arc::clone(&connection), owner);
        let mut is_wanted = false;
        self.drive(|state, now| {
            state.opening = None;
            // Set before `opened`, because the actions that follow use the connection.
            let before = state.connection.replace(Arc::clone(&connection));
            is_wanted = state.lifecycle.opened(id, now);
            if !is_wanted {
                state.connection = before;
            }
        });
        if is_wanted {
            spawn(reader.run(ahead));
        } else {
            connection.lose(&Error::closed());
        }
        Ok(())
    }

    /// Sets the timer for the lifecycle's deadline.
    fn set_timer(self: &Arc<Self>) {
        let mut state = lock(&self.state);
        let deadline = state.lifecycle.deadline().map(Instant::from_std);
        let current = state.timer.as_ref();
        let current = current.filter(|(_, task)| !task.is_finished());
        if current.map(|(at, _)| *at) == deadline {
            return;
        }
        let before = state.timer.take();
        drop(state);
        if let Some((_, task)) = before {
            task.abort();
        }
        let Some(deadline) = deadline else {
            return;
        };
        let session = Arc::downgrade(self);
        let task = spawn(async move {
            sleep_until(deadline).await;
            if let Some(session) = session.upgrade() {
                session.drive(|state, now| {
                    state.timer = None;
                    state.lifecycle.time(now);
                });
            }
        });
        lock(&self.state).timer = task.map(|task| (deadline, task));
    }
}

impl Owner for Session {
    fn handler(&self, protocol: &str) -> Option<Arc<Handler>> {
        lock(&self.state).handlers.get(protocol).cloned()
    }

    fn lost(self: Arc<Self>, connection: &Connection, error: Error) {
        self.drive(|state, now| {
            if matches!(&state.connection, Some(current) if current.id == connection.id) {
                state.connection = None;
                state.ready = false;
            }
            state.lifecycle.lost(connection.id, error, now);
        });
    }

    fn registered(
        self: Arc<Self>,
        connection: &Connection,
        name: &str,
        outcome: Result<(), Error>,
    ) {
        let outcome = match outcome {
            Ok(()) => Registration::Accepted,
            Err(error @ Error::Refused { .. }) => Registration::Refused(error),
            Err(error) => Registration::Failed(error),
        };
        self.drive(|state, now| {
            state
                .lifecycle
                .registered(connection.id, name, outcome, now);
        });
    }

    fn unregistered(self: Arc<Self>, connection: &Connection, name: &str) {
        self.drive(|state, now| state.lifecycle.unregistered(connection.id, name, now));
    }
}

impl State {
    fn carry_out(&mut self, action: Action<u64, Error>, deferred: &mut Deferred) {
        match action {
            Action::Open(id) => deferred.open = Some(id),
            Action::CancelOpen(_) => {
                deferred.open = None;
                deferred.abort = self.opening.take().map(|(_, task)| task);
            }
            Action::Close => {
                self.ready = false;
                deferred.close.extend(self.connection.take());
            }
            Action::Ready => self.ready = true,
            Action::Serve { name, token } => {
                let handler = self
                    .operations
                    .get(&token)
                    .and_then(|it| it.handler.clone());
                let before = handler.and_then(|handler| self.handlers.insert(name, handler));
                deferred.dropped.extend(before);
            }
            Action::Forget(name) => deferred.dropped.extend(self.handlers.remove(&name)),
            Action::Register { name, balanced } => self.register(&name, balanced),
            Action::Unregister(name) => self.unregister(&name),
            Action::Report { name, error } => {
                log::error!("lost the unary handler of {name:?}: {error}");
            }
            Action::Complete { tokens, outcome } => {
                for token in tokens {
                    if let Some(operation) = self.operations.remove(&token) {
                        deferred.completed.push((operation, error_of(&outcome)));
                    }
                }
            }
        }
    }

    fn register(&mut self, name: &str, balanced: bool) {
        let Some(connection) = self.connection.clone() else {
            return;
        };
        let token = Token::Register(name.to_owned());
        let sent = connection.request(token, &Bytes::new(), |core, token, head| {
            core.add_handler(name, balanced, token, head)
        });
        if let Err(error) = sent {
            let outcome = if error.is_unsent() {
                Registration::Unsent(error)
            } else {
                Registration::Failed(error)
            };
            let now = Instant::now().into_std();
            self.lifecycle.registered(connection.id, name, outcome, now);
        }
    }

    fn unregister(&mut self, name: &str) {
        let Some(connection) = self.connection.clone() else {
            return;
        };
        let token = Token::Unregister(name.to_owned());
        let sent = connection.request(token, &Bytes::new(), |core, token, head| {
            core.remove_handler(name, token, head)
        });
        if sent.is_err() {
            let now = Instant::now().into_std();
            self.lifecycle.unregistered(connection.id, name, now);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let (opening, timer) = (state.opening.take(), state.timer.take());
        let connection = state.connection.take();
        drop(state);
        let tasks = [opening.map(|(_, task)| task), timer.map(|(_, task)| task)];
        for task in tasks.into_iter().flatten() {
            task.abort();
        }
        if let Some(connection) = connection {
            connection.close();
        }
    }
}

/// Cancels an operation when dropped, unless its caller has received the outcome.
struct CancelGuard<'a> {
    session: &'a Arc<Session>,
    token: u64,
    finished: bool,
}

impl Drop for CancelGuard<'_> {
    fn drop(&mut self) {
        if !self.finished {
            let mut operation = None;
            self.session.drive(|state, now| {
                operation = state.operations.remove(&self.token);
                state.lifecycle.cancel(self.token, now);
            });
            drop(operation);
        }
    }
}

/// Reports the outcome of an attempt to open a connection. Reports an error if its task is dropped.
struct OpeningReport {
    session: Weak<Session>,
    id: ConnectionId,
    error: Option<Error>,
}

impl OpeningReport {
    fn succeed(mut self, socket: Socket, ahead: Bytes) {
        if let Some(session) = self.session.upgrade() {
            self.error = session.begin(self.id, socket, ahead).err();
        }
    }

    fn fail(mut self, error: Error) {
        self.error = Some(error);
    }
}

impl Drop for OpeningReport {
    fn drop(&mut self) {
        let (session, error) = (self.session.upgrade(), self.error.take());
        if let (Some(session), Some(error)) = (session, error) {
            session.drive(|state, now| {
                if matches!(state.opening, Some((id, _)) if id == self.id) {
                    state.opening = None;
                }
                state.lifecycle.open_failed(self.id, error, now);
            });
        }
    }
}

/// Closes a connection when dropped.
struct CloseGuard(Arc<Connection>);

impl Drop for CloseGuard {
    fn drop(&mut self) {
        self.0.lose(&Error::closed());
    }
}

/// Spawns a task. Drops the future if there is no runtime.
fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Option<AbortHandle> {
    let runtime = Handle::try_current().ok()?;
    Some(runtime.spawn(future).abort_handle())
}

fn error_of(outcome: &Result<(), Failure<Error>>) -> Result<(), Error> {
    Err(match outcome {
        Ok(()) => return Ok(()),
        Err(Failure::Driver(error)) => error.clone(),
        Err(Failure::AlreadyRegistered) => Error::AlreadyRegistered {
            context: Box::default(),
        },
        Err(Failure::NotRegistered) => Error::NotRegistered {
            context: Box::default(),
        },
        Err(Failure::TimedOut(after)) => Error::timeout(*after),
        Err(Failure::Closed) => Error::closed(),
    })
}
