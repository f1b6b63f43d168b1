//! Unary calls: what a client calls and serves, and the persistent connection that it opens for that.

mod link;

use super::error::{Context, Error};
use super::pool::Pool;
use super::socket::Socket;
use super::{lock, runtime_ended, Client};
use bytes::Bytes;
use link::{Driver, Link};
use p2pd_protocol::{PeerId, PersistentClient, UnaryLimits};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout, Instant};

/// How long the persistent connection may take to open, with all handlers registered.
const OPENING: Duration = Duration::from_secs(30);

/// How long what was sent last may take to leave when the client is closed.
const GOODBYE: Duration = Duration::from_secs(1);

/// How long the daemon may take to forget the handlers of a connection that was lost.
const FORGETTING: Duration = Duration::from_secs(1);

/// The pauses between the attempts to serve again when the connection was lost: the first, …
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// … and the longest, from one to the other doubling.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A call of a peer, given to a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnaryCall {
    /// The caller.
    pub peer: PeerId,
    /// What it is called with.
    pub payload: Bytes,
}

impl Client {
    /// Calls a peer's handler and returns its reply.
    ///
    /// The first call opens the persistent connection; when that is lost, all that waits for it fails
    /// at once, and the next call opens another one. Dropping the future, or running out of time,
    /// cancels the handler. hivemind's daemon ends when its last persistent connection is closed.
    ///
    /// # Errors
    /// [`Error::HandlerFailed`] if the handler failed, or the peer's client has none of that name;
    /// [`Error::Refused`] if the peer cannot be reached or serves no calls of that name;
    /// [`Error::MessageTooLarge`] if the request exceeds
    /// [`UnaryLimits::max_message`](p2pd_protocol::UnaryLimits), or the reply exceeds
    /// [`UnaryLimits::max_incoming`](p2pd_protocol::UnaryLimits);
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn call_unary(
        &self,
        peer: &PeerId,
        protocol: &str,
        payload: impl Into<Bytes>,
    ) -> Result<Bytes, Error> {
        let payload = payload.into();
        let about = Context::new("CALL_UNARY").peer(peer).protocol(protocol);
        self.within(about, self.unary().call(peer, protocol, payload))
            .await
    }

    /// Serves the peers' calls of a name, until [`remove_unary_handler`](Self::remove_unary_handler)
    /// or [`close`](Self::close).
    ///
    /// Each call runs in a task of its own, which is dropped if the caller is gone. An error reaches
    /// the caller as its text. With `balanced`, several clients may serve the name in turn. When the
    /// connection is lost, another one is opened as soon as the daemon is there again, which is looked
    /// for every 5 s at the least, and the handlers are registered there.
    ///
    /// A handler that holds a clone of its own client keeps it open until `close`.
    ///
    /// ```no_run
    /// use p2pd_client::UnaryCall;
    ///
    /// # async fn example(client: p2pd_client::Client) -> Result<(), p2pd_client::Error> {
    /// client
    ///     .add_unary_handler("double", false, |call: UnaryCall| async move {
    ///         let text = std::str::from_utf8(&call.payload).map_err(|e| e.to_string())?;
    ///         let number: u32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    ///         Ok::<_, String>((2 * number).to_string())
    ///     })
    ///     .await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if this client serves the name, [`Error::Refused`] if another one
    /// does, [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn add_unary_handler<H, F, R, E>(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
        handler: H,
    ) -> Result<(), Error>
    where
        H: Fn(UnaryCall) -> F + Send + Sync + 'static,
        F: Future<Output = Result<R, E>> + Send + 'static,
        R: Into<Bytes>,
        E: fmt::Display,
    {
        let protocol = protocol.into();
        let about = Context::new("ADD_UNARY_HANDLER").protocol(&protocol);
        let serve = move |call| -> Work {
            let work = handler(call);
            Box::pin(async move {
                match work.await {
                    Ok(reply) => Ok(reply.into()),
                    Err(error) => Err(error.to_string()),
                }
            })
        };
        let handler = Arc::new(Handler {
            balanced,
            given_up: AtomicBool::new(false),
            serve: Box::new(serve),
        });
        self.within(about, self.unary().add(protocol, handler))
            .await
    }

    /// Takes back [`add_unary_handler`](Self::add_unary_handler). Calls at work are finished.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this client does not serve the name.
    pub async fn remove_unary_handler(&self, protocol: &str) -> Result<(), Error> {
        let about = Context::new("REMOVE_UNARY_HANDLER").protocol(protocol);
        self.within(about, self.unary().remove(protocol)).await
    }

    /// Opens the persistent connection now, if it is not open.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not hivemind's.
    pub async fn open_unary(&self) -> Result<(), Error> {
        let about = Context::new("PERSISTENT_CONN_UPGRADE");
        self.within(about, async { self.unary().opened().await.map(drop) })
            .await
    }

    /// Waits until the persistent connection is lost, and says why; `None`, at once, if it is not
    /// open. A client that only serves handlers learns from this that nobody can call it, until the
    /// daemon is there again.
    pub async fn unary_lost(&self) -> Option<Error> {
        self.unary().lost().await
    }

    /// The names of the unary handlers that this client serves. One that the daemon would not take
    /// again, when the connection was lost, is no longer among them.
    pub fn unary_handlers(&self) -> Vec<String> {
        lock(&self.unary().handlers).keys().cloned().collect()
    }

    /// Closes the idle connections and the persistent one: calls at work, of either side, fail, and
    /// the unary handlers are forgotten. Streams, subscriptions and [`IncomingStreams`] live on, and
    /// a later call opens connections again.
    ///
    /// [`IncomingStreams`]: super::IncomingStreams
    pub async fn close(&self) {
        self.pool().close_idle();
        self.unary().close().await;
    }

    fn unary(&self) -> &Arc<Unary> {
        &self.shared.unary
    }
}

type Work = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>>;

struct Handler {
    balanced: bool,
    /// Nobody came to know of it: it is about to be taken back.
    given_up: AtomicBool,
    serve: Box<dyn Fn(UnaryCall) -> Work + Send + Sync>,
}

/// The persistent connection of a client, if it is open, and what is served on it.
pub struct Unary {
    pool: Arc<Pool>,
    limits: UnaryLimits,
    handlers: Mutex<HashMap<String, Arc<Handler>>>,
    state: Mutex<State>,
    /// Held while what is registered changes: the daemon does not keep the order of what it is told.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    link: Option<Arc<Link>>,
    opening: Option<Opening>,
    /// How often the client was closed.
    closed: u64,
}

/// A connection on its way. It is opened in a task, whoever waits for it or does not any more: given up
/// once it is upgraded, it could be the daemon's last one, with which that ends.
struct Opening {
    task: AbortHandle,
    outcome: Coming,
}

/// What becomes of it, once that is known.
type Coming = watch::Receiver<Option<Result<Arc<Link>, Error>>>;

impl State {
    fn open_link(&self) -> Option<Arc<Link>> {
        self.link.clone().filter(|link| !link.is_lost())
    }

    /// The connection on its way, unless its runtime ended before it came.
    fn opening(&self) -> Option<&Opening> {
        let opening = self.opening.as_ref();
        opening.filter(|opening| !opening.task.is_finished())
    }
}

impl Unary {
    pub fn new(pool: Arc<Pool>, limits: UnaryLimits) -> Self {
        Self {
            pool,
            limits,
            handlers: Mutex::default(),
            state: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    async fn call(
        self: &Arc<Self>,
        peer: &PeerId,
        protocol: &str,
        payload: Bytes,
    ) -> Result<Bytes, Error> {
        let mut retried = false;
        let asked = loop {
            let link = self.opened().await?;
            link.room().await;
            let asked = link.ask(&payload, |core, token, head| {
                core.call(
                    peer.as_bytes(),
                    protocol,
                    payload.len(),
                    token,
                    Instant::now().into_std(),
                    head,
                )
            });
            match asked {
                // The daemon may be there again, and cannot have seen this call.
                Err(error) if error.is_unsent() && !retried => retried = true,
                asked => break asked?,
            }
        };
        drop(payload);
        asked.answer().await
    }

    /// In a task of its own: a caller who gives up must not leave a handler behind that nobody knows
    /// of, nor one be registered while the daemon forgets it.
    async fn add(self: &Arc<Self>, protocol: String, handler: Arc<Handler>) -> Result<(), Error> {
        let this = Arc::clone(self);
        let closed_before = lock(&self.state).closed;
        let (mut waiting, outcome) = oneshot::channel();
        tokio::spawn(async move {
            // Until the daemon is asked, it can be given up.
            let ready = tokio::select! {
                biased;
                () = waiting.closed() => None,
                ready = async { (this.changing.lock().await, this.opened().await) } => Some(ready),
            };
            let Some((_changing, link)) = ready else {
                return;
            };
            let added = match link {
                Ok(link) => this.try_add(link, protocol, handler, closed_before).await,
                Err(error) => Err(error),
            };
            // Dropped, by us or by who waits, it is taken back.
            drop(waiting.send(added));
        });
        match outcome.await {
            Ok(added) => {
                added?.kept = true;
                Ok(())
            }
            Err(_) => Err(runtime_ended()),
        }
    }

    async fn try_add(
        self: &Arc<Self>,
        mut link: Arc<Link>,
        protocol: String,
        handler: Arc<Handler>,
        closed_before: u64,
    ) -> Result<Added, Error> {
        let before = self.handler(&protocol);
        match before.map(|handler| handler.given_up.load(Ordering::Relaxed)) {
            None => {}
            Some(true) => self.try_remove(&protocol).await?,
            Some(false) => {
                let context = Box::default();
                return Err(Error::AlreadyRegistered { context });
            }
        }
        let mut retried = false;
        loop {
            if lock(&self.state).closed != closed_before {
                return Err(closed());
            }
            // In place before the daemon has it: a call can come sooner than its answer.
            lock(&self.handlers).insert(protocol.clone(), Arc::clone(&handler));
            let Err(error) = link.register(&protocol, handler.balanced).await else {
                return Ok(Added {
                    unary: Arc::clone(self),
                    protocol,
                    handler,
                    runtime: Handle::current(),
                    kept: false,
                });
            };
            self.forget_handler(&protocol);
            if retried || !error.is_unsent() {
                return Err(error);
            }
            retried = true;
            link = self.opened().await?;
        }
    }

    async fn remove(self: &Arc<Self>, protocol: &str) -> Result<(), Error> {
        let this = Arc::clone(self);
        let protocol = protocol.to_owned();
        let removing = tokio::spawn(async move {
            let _changing = this.changing.lock().await;
            this.try_remove(&protocol).await
        });
        removing.await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    async fn try_remove(self: &Arc<Self>, protocol: &str) -> Result<(), Error> {
        if !lock(&self.handlers).contains_key(protocol) {
            let context = Box::default();
            return Err(Error::NotRegistered { context });
        }
        // One on its way registers it.
        let link = match self.opening_outcome() {
            Some(opening) => self.outcome(opening).await.ok(),
            None => lock(&self.state).open_link(),
        };
        // It serves the calls that come until the daemon has forgotten it, which it has, too, if the
        // connection is lost.
        if let Some(link) = link {
            let asked = link.ask(&Bytes::new(), |core, token, head| {
                core.remove_handler(protocol, token, head)
            });
            if let Ok(asked) = asked {
                let _ = asked.answer().await;
            }
        }
        self.forget_handler(protocol);
        Ok(())
    }

    fn forget_handler(&self, protocol: &str) {
        // What it drops is not ours, and not to be dropped under the lock.
        let forgotten = lock(&self.handlers).remove(protocol);
        drop(forgotten);
    }

    /// The connection, opened and with all handlers registered.
    async fn opened(self: &Arc<Self>) -> Result<Arc<Link>, Error> {
        match self.open_or_opening() {
            Ok(link) => Ok(link),
            Err(opening) => self.outcome(opening).await,
        }
    }

    fn open_or_opening(self: &Arc<Self>) -> Result<Arc<Link>, Coming> {
        let mut state = lock(&self.state);
        if let Some(link) = state.open_link() {
            return Ok(link);
        }
        if let Some(opening) = state.opening() {
            return Err(opening.outcome.clone());
        }
        let (done, outcome) = watch::channel(None);
        let opening = open(
            Arc::downgrade(self),
            Arc::clone(&self.pool),
            state.closed,
            done,
        );
        state.opening = Some(Opening {
            task: tokio::spawn(opening).abort_handle(),
            outcome: outcome.clone(),
        });
        Err(outcome)
    }

    fn opening_outcome(&self) -> Option<Coming> {
        let state = lock(&self.state);
        state.opening().map(|opening| opening.outcome.clone())
    }

    async fn outcome(&self, mut opening: Coming) -> Result<Arc<Link>, Error> {
        let closed_before = lock(&self.state).closed;
        let outcome = match opening.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone(),
            Err(_) => None,
        };
        outcome.unwrap_or_else(|| {
            Err(if lock(&self.state).closed == closed_before {
                runtime_ended()
            } else {
                closed()
            })
        })
    }

    /// Starts to drive a connection that was just upgraded, and registers the handlers there.
    async fn begin(self: Arc<Self>, socket: Socket, ahead: Bytes) -> Result<Arc<Link>, Error> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| Error::lost(error, true))?;
        let link = Arc::new(Link::new(socket, PersistentClient::new(seed, self.limits)));
        let ending = Ending(Some(Arc::clone(&link)));
        let driver = Driver::new(Arc::clone(&link), Arc::downgrade(&self));
        tokio::spawn(driver.run(ahead));
        let handlers: Vec<_> = {
            let handlers = lock(&self.handlers);
            let entries = handlers.iter();
            entries
                .map(|(name, h)| (name.clone(), h.balanced))
                .collect()
        };
        // The last client may be dropped meanwhile.
        let this = Arc::downgrade(&self);
        drop(self);
        for (protocol, balanced) in handlers {
            match register_again(&link, &protocol, balanced).await {
                // Taken by another client meanwhile: no reason to do without the rest.
                Err(error @ Error::Refused { .. }) => {
                    log::error!("the unary handler of {protocol:?} is lost: {error}");
                    if let Some(this) = this.upgrade() {
                        this.forget_handler(&protocol);
                    }
                }
                outcome => outcome?,
            }
        }
        ending.disarm();
        Ok(link)
    }

    /// A connection that was lost need not be kept, but its handlers are missed.
    fn lost_link(self: &Arc<Self>, lost: &Arc<Link>) {
        let closed_before = {
            let mut state = lock(&self.state);
            if !matches!(&state.link, Some(link) if Arc::ptr_eq(link, lost)) {
                return;
            }
            state.link = None;
            state.closed
        };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(come_back(Arc::downgrade(self), closed_before));
        }
    }

    /// Whether there are handlers that nobody can call.
    fn is_missed(&self, closed_before: u64) -> bool {
        let state = lock(&self.state);
        state.closed == closed_before
            && state.open_link().is_none()
            && !lock(&self.handlers).is_empty()
    }

    /// What a peer's call is given to.
    fn handler(&self, protocol: &str) -> Option<Arc<Handler>> {
        lock(&self.handlers).get(protocol).cloned()
    }

    /// Waits until the connection is lost.
    async fn lost(&self) -> Option<Error> {
        let link = lock(&self.state).open_link()?;
        Some(link.lost().await)
    }

    async fn close(&self) {
        let (link, opening) = {
            let mut state = lock(&self.state);
            state.closed += 1;
            (state.link.take(), state.opening.take())
        };
        if let Some(opening) = opening {
            opening.task.abort();
        }
        let handlers = std::mem::take(&mut *lock(&self.handlers));
        drop(handlers);
        if let Some(link) = link {
            let ending = Ending(Some(Arc::clone(&link)));
            link.leave();
            let _ = timeout(GOODBYE, link.flushed()).await;
            drop(ending);
        }
    }
}

impl Drop for Unary {
    fn drop(&mut self) {
        let state = std::mem::take(&mut *lock(&self.state));
        if let Some(opening) = state.opening {
            opening.task.abort();
        }
        if let Some(link) = state.link {
            link.leave();
            link.lose(&closed());
        }
    }
}

/// Opens a connection, and tells whoever waits for it.
async fn open(
    unary: Weak<Unary>,
    pool: Arc<Pool>,
    closed_before: u64,
    done: watch::Sender<Option<Result<Arc<Link>, Error>>>,
) {
    let opening = async {
        let (socket, ahead) = pool.upgrade().await?;
        match unary.upgrade() {
            Some(unary) => unary.begin(socket, ahead).await,
            None => Err(closed()),
        }
    };
    let mut outcome = timeout(OPENING, opening)
        .await
        .unwrap_or_else(|_| Err(Error::timeout(OPENING)));
    let unary = unary.upgrade();
    let state = unary.as_ref().map(|unary| lock(&unary.state));
    match state.filter(|state| state.closed == closed_before) {
        Some(mut state) => {
            state.opening = None;
            state.link = outcome.as_ref().ok().cloned();
        }
        None => {
            if let Ok(link) = &outcome {
                link.lose(&closed());
                outcome = Err(closed());
            }
        }
    }
    if let (Some(unary), Ok(link)) = (&unary, &outcome) {
        // Lost before it was in its place, whoever would have looked for another did not.
        if link.is_lost() {
            unary.lost_link(link);
        }
    }
    done.send_replace(Some(outcome));
}

/// Looks for the daemon that was lost, for those whose handlers are there. Does not keep the client.
async fn come_back(unary: Weak<Unary>, closed_before: u64) {
    let mut pause = FIRST_PAUSE;
    loop {
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(2 * pause);
        let Some(unary) = unary.upgrade() else { return };
        if !unary.is_missed(closed_before) {
            return;
        }
        let Err(mut opening) = unary.open_or_opening() else {
            return;
        };
        drop(unary);
        let outcome = opening.wait_for(Option::is_some).await;
        // If that one is lost, too, somebody else comes back. What is not supported may be another
        // daemon's doing, on its way up or down.
        if let Ok(Some(Ok(_))) = outcome.as_deref() {
            return;
        }
    }
}

/// A handler that was registered, and is taken back if nobody came to know of that.
struct Added {
    unary: Arc<Unary>,
    protocol: String,
    handler: Arc<Handler>,
    runtime: Handle,
    kept: bool,
}

impl Drop for Added {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        self.handler.given_up.store(true, Ordering::Relaxed);
        let unary = Arc::clone(&self.unary);
        let handler = Arc::clone(&self.handler);
        let protocol = std::mem::take(&mut self.protocol);
        self.runtime.spawn(async move {
            let _changing = unary.changing.lock().await;
            // Whoever takes the name next takes it back, too.
            let present = unary.handler(&protocol);
            if present.is_some_and(|present| Arc::ptr_eq(&present, &handler)) {
                let _ = unary.try_remove(&protocol).await;
            }
        });
    }
}

/// Ends a connection when dropped.
struct Ending(Option<Arc<Link>>);

impl Ending {
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(link) = self.0.take() {
            link.lose(&closed());
        }
    }
}

/// Registers what was registered on another connection, which the daemon may not have noticed the end of.
async fn register_again(link: &Arc<Link>, protocol: &str, balanced: bool) -> Result<(), Error> {
    let give_up = Instant::now() + FORGETTING;
    let mut pause = Duration::from_millis(1);
    loop {
        match link.register(protocol, balanced).await {
            Err(Error::Refused { .. }) if Instant::now() < give_up => sleep(pause).await,
            outcome => return outcome,
        }
        pause = Duration::from_millis(50).min(2 * pause);
    }
}

fn closed() -> Error {
    Error::lost("the client was closed", false)
}
