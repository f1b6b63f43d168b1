//! A decorator of stream muxers, which owns the negotiation of application streams.
//!
//! The swarm's own negotiation refuses names without a leading `/`, and knows only the protocols of its
//! behaviours. So each inbound stream is negotiated here, in a task of its own: a [`Service`](super::Service)
//! gets those that it serves, and the swarm those of its behaviours. Outbound streams of the application are
//! opened beside those of the swarm.

use super::host::{Connection, Host, OpenRequest, Substream};
use super::negotiate::{self, Accepted};
use futures::ready;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::{Multiaddr, PeerId};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{mpsc, Semaphore};

/// Number of inbound streams of a connection that have named no protocol yet, or wait for the swarm. More
/// are reset.
const MAX_UNNAMED: usize = 1024;
/// Time that a dialer may take to name a protocol.
const NAMING_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of streams for the swarm that it has not taken. More wait.
const DELEGATED: usize = 64;

/// The muxer of a connection of a [`Host`].
pub struct Muxer<M> {
    inner: Pin<Box<M>>,
    host: Host,
    connection: Connection,
    requests: mpsc::Receiver<OpenRequest>,
    /// The request that the next outbound stream is for.
    request: Option<OpenRequest>,
    delegate: mpsc::Sender<Substream>,
    delegated: mpsc::Receiver<Substream>,
    unnamed: Arc<Semaphore>,
}

impl<M> Muxer<M>
where
    M: StreamMuxer,
    M::Substream: Send + 'static,
    M::Error: Send + Sync + 'static,
{
    /// Adds a connection to the host, until the muxer is dropped.
    pub fn new(
        host: Host,
        peer: PeerId,
        remote_addr: Multiaddr,
        is_dialer: bool,
        inner: M,
    ) -> Self {
        let (connection, requests) = host.add(peer, remote_addr, is_dialer);
        let (delegate, delegated) = mpsc::channel(DELEGATED);
        Self {
            inner: Box::pin(inner),
            host,
            connection,
            requests,
            request: None,
            delegate,
            delegated,
            unnamed: Arc::new(Semaphore::new(MAX_UNNAMED)),
        }
    }

    /// Opens the streams that the application has requested.
    fn poll_requests(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.request.is_none() {
                match self.requests.poll_recv(cx) {
                    Poll::Ready(Some(request)) => self.request = Some(request),
                    Poll::Ready(None) | Poll::Pending => return Poll::Ready(Ok(())),
                }
            }
            if self.request.as_ref().is_some_and(OpenRequest::is_closed) {
                self.request = None;
                continue;
            }
            let stream = ready!(self.inner.as_mut().poll_outbound(cx)).map_err(io::Error::other)?;
            if let Some(request) = self.request.take() {
                let _ = request.send(Substream::new(stream));
            }
        }
    }

    /// Negotiates each inbound stream in a task of its own.
    fn poll_streams(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let stream = ready!(self.inner.as_mut().poll_inbound(cx)).map_err(io::Error::other)?;
            let Ok(permit) = self.unnamed.clone().try_acquire_owned() else {
                log::debug!("reset a stream from {}: too many", self.connection.peer());
                continue;
            };
            let (host, connection) = (self.host.clone(), self.connection.clone());
            let delegate = self.delegate.clone();
            tokio::spawn(async move {
                let accepting = negotiate::accept(
                    Substream::new(stream),
                    |protocol| host.offer(protocol),
                    || host.protocols(),
                );
                match tokio::time::timeout(NAMING_TIMEOUT, accepting).await {
                    Ok(Ok(Accepted::Served(protocol, stream))) => {
                        drop(permit);
                        if let Some(service) = host.service(&protocol) {
                            let stream = Substream::new(stream);
                            service.inbound(protocol, stream, connection).await;
                        }
                    }
                    Ok(Ok(Accepted::Delegated(stream))) => {
                        let _ = delegate.send(Substream::new(stream)).await;
                    }
                    Ok(Err(error)) => log::debug!("a stream from {}: {error}", connection.peer()),
                    Err(_) => log::debug!("a stream from {}: no protocol", connection.peer()),
                }
            });
        }
    }
}

impl<M> StreamMuxer for Muxer<M>
where
    M: StreamMuxer,
    M::Substream: Send + 'static,
    M::Error: Send + Sync + 'static,
{
    type Substream = Substream;
    type Error = io::Error;

    fn poll_inbound(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        match ready!(self.get_mut().delegated.poll_recv(cx)) {
            Some(stream) => Poll::Ready(Ok(stream)),
            None => Poll::Pending,
        }
    }

    fn poll_outbound(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Self::Substream>> {
        let this = self.get_mut();
        ready!(this.poll_requests(cx))?;
        let stream = ready!(this.inner.as_mut().poll_outbound(cx)).map_err(io::Error::other)?;
        Poll::Ready(Ok(Substream::new(stream)))
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = self.get_mut().inner.as_mut();
        inner.poll_close(cx).map_err(io::Error::other)
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        let this = self.get_mut();
        if this.connection.poll_closing(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Poll::Ready(Err(error)) = this.poll_requests(cx) {
            return Poll::Ready(Err(error));
        }
        if let Poll::Ready(Err(error)) = this.poll_streams(cx) {
            return Poll::Ready(Err(error));
        }
        this.inner.as_mut().poll(cx).map_err(io::Error::other)
    }
}

impl<M> Drop for Muxer<M> {
    fn drop(&mut self) {
        self.host.remove(&self.connection);
    }
}
