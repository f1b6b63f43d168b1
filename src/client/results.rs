//! The results of a DHT query: all at once, or one by one as the daemon finds them.

use super::pool::{typed, Pool, PooledConnection};
use super::{Context, Error};
use futures_core::Stream;
use p2pd_protocol::command::Typed;
use p2pd_protocol::{Event, Reply};
use std::fmt;
use std::future::{poll_fn, Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{self, ready, Poll};
use std::time::Duration;

/// The results of a DHT query. The query begins when they are first awaited.
///
/// `.await` returns all of them. As a [`Stream`], and with [`next`](Self::next), it yields each as
/// soon as the daemon has found it; if the query fails, the last item is the error. The
/// [timeout](super::Client::with_timeout) bounds the whole query. Dropping this ends the query.
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client, cid: Vec<u8>) -> Result<(), p2pd_client::Error> {
/// let mut providers = client.dht_find_providers(cid, 10);
/// while let Some(provider) = providers.next().await {
///     println!("{}", provider?.peer_id);
/// }
/// # Ok(()) }
/// ```
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client, cid: Vec<u8>) -> Result<(), p2pd_client::Error> {
/// let providers = client.dht_find_providers(cid, 10).await?;
/// println!("{} providers", providers.len());
/// # Ok(()) }
/// ```
#[must_use = "the query begins when its results are awaited"]
pub struct Results<T> {
    stage: Stage,
    about: Context,
    read: fn(Reply) -> Result<T, Error>,
    timeout: Option<Duration>,
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
}

type Starting = Pin<Box<dyn Future<Output = Result<(PooledConnection, Event), Error>> + Send>>;

enum Stage {
    Starting(Starting),
    Running(Box<PooledConnection>),
    Ended,
}

impl<T> Results<T> {
    pub(super) fn new<Q: Typed<Output = T>>(
        pool: Arc<Pool>,
        about: Context,
        query: Q,
        timeout: Option<Duration>,
    ) -> Self {
        let request = query.encoded();
        let starting = async move { pool.start(&request).await };
        Self {
            stage: Stage::Starting(Box::pin(starting)),
            about,
            read: |reply| typed::<Q>(Some(reply)),
            timeout,
            deadline: None,
        }
    }

    /// The next result; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<T, Error>> {
        poll_fn(|cx| self.poll_result(cx)).await
    }

    /// All results, after the end of the query; the same as `.await`.
    ///
    /// # Errors
    /// The query failed. The results found before are lost.
    pub async fn collect_all(mut self) -> Result<Vec<T>, Error> {
        let mut results = Vec::new();
        while let Some(result) = self.next().await {
            results.push(result?);
        }
        Ok(results)
    }

    fn poll_result(&mut self, cx: &mut task::Context<'_>) -> Poll<Option<Result<T, Error>>> {
        let outcome = match self.poll_event(cx) {
            Poll::Ready(Ok(Event::Value(reply))) => (self.read)(reply),
            Poll::Ready(Ok(Event::Reply(_) | Event::End)) => {
                self.stage = Stage::Ended;
                return Poll::Ready(None);
            }
            Poll::Ready(Ok(Event::Refused(message))) => Err(Error::refused(message)),
            Poll::Ready(Ok(other)) => Err(other.unexpected().into()),
            Poll::Ready(Err(error)) => Err(error),
            Poll::Pending => {
                let Some(limit) = self.timeout else {
                    return Poll::Pending;
                };
                let deadline = self
                    .deadline
                    .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
                ready!(deadline.as_mut().poll(cx));
                Err(Error::timeout(limit))
            }
        };
        if outcome.is_err() {
            self.stage = Stage::Ended;
        }
        Poll::Ready(Some(outcome.map_err(|error| error.about(&self.about))))
    }

    fn poll_event(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<Event, Error>> {
        match &mut self.stage {
            Stage::Starting(starting) => {
                let (mut pooled, event) = ready!(starting.as_mut().poll(cx))?;
                // The caller may make other requests while it reads these results. If the query kept
                // its permit, they could wait for each other.
                pooled.release_permit();
                self.stage = Stage::Running(Box::new(pooled));
                Poll::Ready(Ok(event))
            }
            Stage::Running(pooled) => pooled.poll_event(cx),
            Stage::Ended => Poll::Ready(Ok(Event::End)),
        }
    }
}

impl<T> Stream for Results<T> {
    type Item = Result<T, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_result(cx)
    }
}

impl<T: Send + 'static> IntoFuture for Results<T> {
    type Output = Result<Vec<T>, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.collect_all())
    }
}

impl<T> fmt::Debug for Results<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::Starting(_) => "starting",
            Stage::Running(_) => "running",
            Stage::Ended => "ended",
        };
        f.debug_struct("Results")
            .field("about", &self.about)
            .field("stage", &stage)
            .finish_non_exhaustive()
    }
}
