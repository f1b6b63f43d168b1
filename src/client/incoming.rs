//! Handlers of inbound streams: registers them with the daemon, and yields their streams.

use super::handlers::{Entered, Name};
use super::listener::ListenerStats;
use super::stream::Stream;
use super::{Client, Context, Error};
use p2pd_protocol::command::streams::{RemoveStreamHandler, StreamHandler};
use p2pd_protocol::policy::refusal::Refusal;
use p2pd_protocol::policy::registration::{Action, Ending, Former, Record, Registering, Reply};
use p2pd_protocol::Multiaddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, Poll};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// Timeout for a request that continues after its caller has gone.
const DETACHED_TIMEOUT: Duration = Duration::from_secs(30);

impl Client {
    /// STREAM_HANDLER: accepts the inbound streams of a protocol, until the returned value is dropped.
    /// With `balanced`, several clients may serve the protocol in turn (hivemind's daemon; others
    /// ignore it).
    ///
    /// The first handler makes the client listen, in a task on the current tokio runtime.
    ///
    /// # Errors
    /// [`Error::AlreadyRegistered`] if this client serves the protocol, [`Error::Refused`] if another
    /// one does (hivemind's daemon), [`Error::Listen`] if the client cannot listen.
    pub async fn stream_handler(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
    ) -> Result<IncomingStreams, Error> {
        let protocol = protocol.into();
        let about = Context::new("STREAM_HANDLER").protocol(&protocol);
        let work = self.register(protocol, balanced, false);
        self.within(about, work).await
    }

    /// Like [`stream_handler`](Self::stream_handler), but replaces this client's handler for the
    /// protocol if there is one: the [`IncomingStreams`] of the old handler end. If this fails, the
    /// old handler stays.
    ///
    /// hivemind's daemon has no handler for the protocol for a moment.
    ///
    /// # Errors
    /// As for [`stream_handler`](Self::stream_handler), except [`Error::AlreadyRegistered`].
    pub async fn replace_stream_handler(
        &self,
        protocol: impl Into<String>,
        balanced: bool,
    ) -> Result<IncomingStreams, Error> {
        let protocol = protocol.into();
        let about = Context::new("STREAM_HANDLER").protocol(&protocol);
        let work = self.register(protocol, balanced, true);
        self.within(about, work).await
    }

    /// Registers all handlers of this client, of streams and of unary calls, at a daemon that was
    /// restarted. A `P2PDaemon` does this itself when it restarts the daemon.
    ///
    /// # Errors
    /// [`Error::Refused`] if another client has taken a protocol; the other handlers are registered
    /// nevertheless. After any other error, the remaining handlers are not registered.
    pub async fn register_again(&self) -> Result<(), Error> {
        let handlers = self.shared.inbound.handlers.all();
        let addr = self.listen_maddr().filter(|_| !handlers.is_empty());
        let mut refused = None;
        for (protocol, balanced) in handlers {
            let Some(addr) = &addr else { break };
            let about = Context::new("STREAM_HANDLER").protocol(&protocol);
            let work = self.register_one_again(addr, &protocol, balanced);
            match self.within(about, work).await {
                Ok(()) => {}
                Err(error @ Error::Refused { .. }) => {
                    log::error!("lost the handler of {protocol:?}: {error}");
                    refused.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        if !self.unary_handlers().is_empty() {
            self.open_unary().await?;
        }
        refused.map_or(Ok(()), Err)
    }

    /// Registers a handler at a daemon that may already have it, or may have another client's.
    async fn register_one_again(
        &self,
        addr: &Multiaddr,
        protocol: &str,
        balanced: bool,
    ) -> Result<(), Error> {
        let former = Former {
            balanced,
            unchanged: true,
            witnessed: false,
        };
        let mut registering = Registering::new(balanced, Some(former), true);
        self.carry_out(&mut registering, addr, protocol).await
    }

    /// Sends the requests that the policy asks for.
    async fn carry_out(
        &self,
        registering: &mut Registering,
        addr: &Multiaddr,
        protocol: &str,
    ) -> Result<(), Error> {
        let mut action = registering.first();
        let mut first_error = None;
        loop {
            let outcome = match action {
                Action::Register { balanced } => {
                    let request = register_request(addr, protocol, balanced);
                    self.pool().request(&request).await.map(drop)
                }
                Action::Remove { .. } => {
                    let about = Context::new("REMOVE_STREAM_HANDLER").protocol(protocol);
                    let request = remove_request(addr, protocol);
                    let outcome = self.pool().request(&request).await.map(drop);
                    outcome.map_err(|error| error.about(&about))
                }
                // The policy asks for a probe only if there is a witness.
                Action::Probe | Action::End(_) => Ok(()),
            };
            let next = registering.next(reply(&outcome));
            match (next, outcome) {
                (Action::End(Ending::Registered), _) => return Ok(()),
                (Action::End(Ending::LastError), outcome) => return outcome,
                (Action::End(Ending::FirstError), outcome) => {
                    return first_error.map_or(outcome, Err);
                }
                (_, Err(error)) if matches!(action, Action::Register { .. }) => {
                    first_error.get_or_insert(error);
                }
                _ => {}
            }
            action = next;
        }
    }

    /// The numbers of accepted and refused inbound streams since this client was made.
    pub fn listener_stats(&self) -> ListenerStats {
        self.shared.inbound.stats()
    }

    /// The address that the daemon connects to for inbound streams; `None` before the first handler.
    pub fn listen_maddr(&self) -> Option<Multiaddr> {
        self.shared.inbound.addr()
    }

    /// Registers a handler in its own task. If the caller gives up, the task still waits for
    /// the daemon's reply, and then removes the handler. A removal that is sent sooner could
    /// overtake the registration.
    async fn register(
        &self,
        protocol: String,
        balanced: bool,
        replace: bool,
    ) -> Result<IncomingStreams, Error> {
        let (mut sender, outcome) = oneshot::channel();
        let client = self.clone();
        let wanted = Arc::new(());
        let still_wanted = Arc::downgrade(&wanted);
        tokio::spawn(async move {
            let inbound = &client.shared.inbound;
            // Until the request is sent, giving up leaves nothing to undo.
            let ready = tokio::select! {
                biased;
                () = sender.closed() => return,
                ready = async {
                    let addr = inbound.listen(client.pool()).await?;
                    let handlers = &inbound.handlers;
                    let entered = handlers.enter(protocol, balanced, still_wanted, replace);
                    Ok((addr, entered.await?))
                } => ready,
            };
            let registered = match ready {
                Ok((addr, entered)) => client.try_register(addr, entered, balanced).await,
                Err(error) => Err(error),
            };
            // If the caller has given up, this drops the handler, which removes it.
            drop(sender.send(registered));
        });
        let mut incoming = outcome
            .await
            .unwrap_or_else(|_| Err(Error::runtime_ended()))?;
        incoming.wanted = Some(wanted);
        Ok(incoming)
    }

    async fn try_register(
        &self,
        addr: Multiaddr,
        entered: Entered,
        balanced: bool,
    ) -> Result<IncomingStreams, Error> {
        let Entered {
            name,
            streams,
            replaced,
        } = entered;
        let handler = |name, streams| IncomingStreams {
            streams,
            registration: Some(Registration {
                client: self.clone(),
                addr: addr.clone(),
                runtime: Handle::current(),
                name,
            }),
            wanted: None,
        };
        let former = replaced.as_ref().map(|replaced| Former {
            balanced: replaced.balanced(),
            unchanged: replaced.balanced() == balanced,
            witnessed: false,
        });
        let mut registering = Registering::new(balanced, former, true);
        let work = self.carry_out(&mut registering, &addr, name.protocol());
        let outcome = timeout(DETACHED_TIMEOUT, work).await;
        let outcome = outcome.unwrap_or_else(|_| Err(Error::timeout(DETACHED_TIMEOUT)));
        if let Err(error) = outcome {
            let record = registering.record();
            let left = match replaced {
                Some(replaced) => name.restore(replaced),
                None => Some(name).filter(|_| record == Record::Current),
            };
            // Dropping the handler removes the registration that the daemon may have.
            if let Some(name) = left.filter(|_| record != Record::Nothing) {
                drop(handler(name, streams));
            }
            return Err(error);
        }
        Ok(handler(name, streams))
    }
}

fn register_request(addr: &Multiaddr, protocol: &str, balanced: bool) -> StreamHandler {
    StreamHandler {
        addr: addr.clone(),
        protocols: vec![protocol.to_owned()],
        balanced,
    }
}

fn remove_request(addr: &Multiaddr, protocol: &str) -> RemoveStreamHandler {
    RemoveStreamHandler {
        addr: addr.clone(),
        protocols: vec![protocol.to_owned()],
    }
}

/// Classifies the daemon's reply for the policy.
fn reply(outcome: &Result<(), Error>) -> Reply {
    match outcome {
        Ok(()) => Reply::Done,
        Err(Error::Refused { message, .. }) => match Refusal::of(message) {
            Refusal::AlreadyRegistered => Reply::Taken,
            _ => Reply::Refused,
        },
        Err(Error::NotSupported { .. }) => Reply::Refused,
        Err(Error::Unreachable { .. }) => Reply::Unreachable,
        Err(_) => Reply::Lost,
    }
}

/// The inbound streams of a protocol: a futures `Stream` of [`Stream`]s. Dropping it removes the
/// handler.
///
/// Up to 256 streams wait here for [`next`](Self::next); while that many wait, further ones are
/// closed at once. This holds a clone of its client.
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client) -> Result<(), p2pd_client::Error> {
/// let mut incoming = client.stream_handler("/echo/1", false).await?;
/// while let Some(mut stream) = incoming.next().await {
///     tokio::spawn(async move {
///         let (mut reader, mut writer) = tokio::io::split(&mut stream);
///         tokio::io::copy(&mut reader, &mut writer).await
///     });
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "dropping it removes the handler"]
pub struct IncomingStreams {
    streams: mpsc::Receiver<Stream>,
    /// `None` once the removal has begun.
    registration: Option<Registration>,
    /// Marks the handler as in use: another registration of its name then fails instead of waiting.
    wanted: Option<Arc<()>>,
}

/// A handler that the daemon has, or may have.
#[derive(Debug)]
struct Registration {
    client: Client,
    addr: Multiaddr,
    runtime: Handle,
    name: Name,
}

impl IncomingStreams {
    /// The next stream; `None` if the tokio runtime that accepted them has ended.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// REMOVE_STREAM_HANDLER: removes the handler, as dropping this does, and waits for the daemon's
    /// reply.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon is not hivemind's. Such a daemon goes on offering the
    /// protocol to its peers, but this client refuses their streams.
    pub async fn close(mut self) -> Result<(), Error> {
        let Some(registration) = self.registration.take() else {
            return Ok(());
        };
        // First, as in `drop`.
        drop(self.wanted.take());
        // In a task, so that it completes if the caller gives up.
        let removing = tokio::spawn(registration.remove());
        removing
            .await
            .unwrap_or_else(|_| Err(Error::runtime_ended()))
    }
}

impl futures_core::Stream for IncomingStreams {
    type Item = Stream;

    fn poll_next(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Stream>> {
        self.get_mut().streams.poll_recv(cx)
    }
}

impl Drop for IncomingStreams {
    fn drop(&mut self) {
        // First: once the removal has checked the name, `Name::restore` must not give it back.
        drop(self.wanted.take());
        if let Some(registration) = self.registration.take() {
            // The runtime of the registration may have ended.
            let runtime = Handle::try_current().unwrap_or_else(|_| registration.runtime.clone());
            runtime.spawn(async move {
                // No caller waits for the outcome.
                let _ = registration.remove().await;
            });
        }
    }
}

impl Registration {
    async fn remove(self) -> Result<(), Error> {
        let Self {
            client, addr, name, ..
        } = self;
        let about = Context::new("REMOVE_STREAM_HANDLER").protocol(name.protocol());
        if !name.is_taken() {
            return Ok(());
        }
        let request = remove_request(&addr, name.protocol());
        let work = async {
            match client.pool().request(&request).await {
                Ok(_) => Ok(()),
                Err(error) => Err(client.pool().unknown_request(error).await),
            }
        };
        let limit = client.timeout().unwrap_or(DETACHED_TIMEOUT);
        client.with_timeout(limit).within(about, work).await
    }
}
