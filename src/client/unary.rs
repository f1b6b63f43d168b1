//! Unary calls: what a client calls and serves, and the persistent connection that it opens for that.

mod link;

use super::connector::Connector;
use super::error::{Context, Error};
use super::{lock, Client};
use crate::core::{PeerId, Persistent, UnaryLimits};
use bytes::Bytes;
use link::{Driver, Link};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{sleep, Instant};

/// How long what was sent last may take to leave when the client is closed.
const GOODBYE: Duration = Duration::from_secs(1);

/// How long the daemon may take to forget the handlers of a connection that was lost.
const FORGETTING: Duration = Duration::from_secs(1);

/// A call of a peer, given to a handler.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// [`UnaryLimits::max_message`](crate::core::UnaryLimits);
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
    /// connection was lost, the next call or registration opens another one, and registers the
    /// handlers there.
    ///
    /// A handler that holds a clone of its own client keeps it open until `close`.
    ///
    /// ```no_run
    /// use p2pclient_rs::client::UnaryCall;
    ///
    /// # async fn example(client: p2pclient_rs::Client) -> Result<(), p2pclient_rs::client::Error> {
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
        self.connector().close_idle();
        self.unary().close().await;
    }

    fn unary(&self) -> &Arc<Unary> {
        &self.shared.unary
    }
}

type Work = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>>;
struct Handler {
    balanced: bool,
    serve: Box<dyn Fn(UnaryCall) -> Work + Send + Sync>,
}

type Handlers = Mutex<HashMap<String, Arc<Handler>>>;

/// The persistent connection of a client, if it is open, and what is served on it.
pub struct Unary {
    connector: Arc<Connector>,
    limits: UnaryLimits,
    handlers: Arc<Handlers>,
    link: Mutex<Option<Arc<Link>>>,
    /// Held while the connection is opened, or what is registered changes: the daemon does not keep
    /// the order of what it is told.
    changing: tokio::sync::Mutex<()>,
}

impl Unary {
    pub fn new(connector: Arc<Connector>, limits: UnaryLimits) -> Self {
        Self {
            connector,
            limits,
            handlers: Arc::default(),
            link: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    async fn call(&self, peer: &PeerId, protocol: &str, payload: Bytes) -> Result<Bytes, Error> {
        let mut retried = false;
        loop {
            let link = match self.open_link() {
                Some(link) => link,
                None => {
                    let _changing = self.changing.lock().await;
                    self.opened().await?
                }
            };
            link.room().await;
            let len = payload.len();
            let asked = link.ask(payload.clone(), |core, token, head| {
                core.call(peer.as_bytes(), protocol, len, token, head)
            });
            match asked {
                // The daemon may be there again, and cannot have seen this call.
                Err(error) if error.is_unexecuted() && !retried => retried = true,
                Err(error) => return Err(error),
                Ok(asked) => return asked.answer().await,
            }
        }
    }

    /// In a task of its own: a caller who gives up must not leave a handler behind that nobody knows
    /// of, nor one be registered while the daemon forgets it.
    async fn add(self: &Arc<Self>, protocol: String, handler: Arc<Handler>) -> Result<(), Error> {
        let this = Arc::clone(self);
        let (waiting, outcome) = oneshot::channel();
        tokio::spawn(async move {
            let _changing = this.changing.lock().await;
            if waiting.is_closed() {
                return;
            }
            let added = this.try_add(&protocol, handler).await;
            let registered = added.is_ok();
            if waiting.send(added).is_err() && registered {
                let _ = this.try_remove(&protocol).await;
            }
        });
        outcome.await.unwrap_or_else(|_| Err(runtime_ended()))
    }

    async fn try_add(&self, protocol: &str, handler: Arc<Handler>) -> Result<(), Error> {
        if lock(&self.handlers).contains_key(protocol) {
            let context = Box::default();
            return Err(Error::AlreadyRegistered { context });
        }
        let mut retried = false;
        loop {
            let link = self.opened().await?;
            // In place before the daemon has it: a call can come sooner than its answer.
            lock(&self.handlers).insert(protocol.to_owned(), Arc::clone(&handler));
            let Err(error) = link.register(protocol, handler.balanced).await else {
                return Ok(());
            };
            lock(&self.handlers).remove(protocol);
            if retried || !error.is_unexecuted() {
                return Err(error);
            }
            retried = true;
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

    async fn try_remove(&self, protocol: &str) -> Result<(), Error> {
        if !lock(&self.handlers).contains_key(protocol) {
            let context = Box::default();
            return Err(Error::NotRegistered { context });
        }
        // It serves the calls that come until the daemon has forgotten it, which it has, too, if the
        // connection is lost.
        if let Some(link) = self.open_link() {
            let asked = link.ask(Bytes::new(), |core, token, head| {
                core.remove_handler(protocol, token, head)
            });
            if let Ok(asked) = asked {
                let _ = asked.answer().await;
            }
        }
        lock(&self.handlers).remove(protocol);
        Ok(())
    }

    fn open_link(&self) -> Option<Arc<Link>> {
        let mut link = lock(&self.link);
        if link.as_ref().is_some_and(|link| link.is_lost()) {
            *link = None;
        }
        link.clone()
    }

    /// The connection, opened and with all handlers registered. `changing` is held.
    async fn opened(&self) -> Result<Arc<Link>, Error> {
        if let Some(link) = self.open_link() {
            return Ok(link);
        }
        let (socket, ahead) = self.connector.upgrade().await?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| Error::lost(error, true))?;
        let link = Arc::new(Link::new(socket, Persistent::new(seed, self.limits)));
        // Closed again, unless all goes well.
        let opening = Opening(Some(Arc::clone(&link)));
        let driver = Driver::new(Arc::clone(&link), Arc::downgrade(&self.handlers));
        tokio::spawn(driver.run(ahead));
        let handlers: Vec<_> = {
            let handlers = lock(&self.handlers);
            let entries = handlers.iter();
            entries
                .map(|(name, h)| (name.clone(), h.balanced))
                .collect()
        };
        for (protocol, balanced) in handlers {
            match register_again(&link, &protocol, balanced).await {
                // Taken by another client meanwhile: no reason to do without the rest.
                Err(Error::Refused { .. }) => drop(lock(&self.handlers).remove(&protocol)),
                outcome => outcome?,
            }
        }
        opening.done();
        *lock(&self.link) = Some(Arc::clone(&link));
        Ok(link)
    }

    async fn close(&self) {
        lock(&self.handlers).clear();
        let link = lock(&self.link).take();
        if let Some(link) = link {
            link.leave();
            let _ = tokio::time::timeout(GOODBYE, link.flushed()).await;
            link.lose(&closed());
        }
    }
}

impl Drop for Unary {
    fn drop(&mut self) {
        if let Some(link) = lock(&self.link).take() {
            link.leave();
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

fn runtime_ended() -> Error {
    Error::lost("its tokio runtime has ended", false)
}

/// A connection on its way.
struct Opening(Option<Arc<Link>>);

impl Opening {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(link) = self.0.take() {
            link.lose(&closed());
        }
    }
}
