//! DHT queries; those that can have many results give them as they come.

use super::pool::{typed, PooledConnection};
use super::{Client, Context, Error};
use bytes::Bytes;
use futures_core::Stream;
use p2pd_protocol::command::dht::{
    FindPeer, FindPeersConnectedToPeer, FindProviders, GetClosestPeers, GetPublicKey, GetValue,
    Provide, PutValue, SearchValue,
};
use p2pd_protocol::command::Typed;
use p2pd_protocol::{Event, PeerId, PeerInfo, PublicKey, Reply};
use std::fmt;
use std::future::{poll_fn, Future};
use std::pin::Pin;
use std::task::{self, ready, Poll};
use std::time::Duration;

impl Client {
    /// FIND_PEER: the addresses of a peer.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be found.
    pub async fn dht_find_peer(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("DHT FIND_PEER").peer(peer);
        let request = FindPeer {
            peer: peer.clone(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// FIND_PEERS_CONNECTED_TO_PEER: the peers connected to a peer. Today's Go daemons refuse it:
    /// [`Error::NotSupported`].
    pub fn dht_find_peers_connected_to_peer(&self, peer: &PeerId) -> Results<PeerInfo> {
        let about = Context::new("DHT FIND_PEERS_CONNECTED_TO_PEER").peer(peer);
        let request = FindPeersConnectedToPeer {
            peer: peer.clone(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// FIND_PROVIDERS: at most `count` providers of the content with the binary CID `cid`; with 0,
    /// as many as the daemon thinks fit, which is 20.
    pub fn dht_find_providers(&self, cid: impl Into<Bytes>, count: u32) -> Results<PeerInfo> {
        let about = Context::new("DHT FIND_PROVIDERS");
        let request = FindProviders {
            cid: cid.into(),
            count: i32::try_from(count).unwrap_or(i32::MAX),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// GET_CLOSEST_PEERS: the peers closest to a key.
    pub fn dht_get_closest_peers(&self, key: impl Into<Bytes>) -> Results<PeerId> {
        let about = Context::new("DHT GET_CLOSEST_PEERS");
        let request = GetClosestPeers {
            key: key.into(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// GET_PUBLIC_KEY: the public key of a peer.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be found; [`Error::Protocol`] if what was found is no key.
    pub async fn dht_get_public_key(&self, peer: &PeerId) -> Result<PublicKey, Error> {
        let about = Context::new("DHT GET_PUBLIC_KEY").peer(peer);
        let request = GetPublicKey {
            peer: peer.clone(),
            timeout: self.timeout,
        };
        let key = self.request(about.clone(), request).await?;
        PublicKey::decode(&key).map_err(|error| {
            let malformed = p2pd_protocol::Error::Malformed {
                message: "PublicKey",
                reason: error.to_string(),
            };
            Error::from(malformed).about(&about)
        })
    }

    /// GET_VALUE: the best value found for a key.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is none.
    pub async fn dht_get_value(&self, key: impl Into<Bytes>) -> Result<Bytes, Error> {
        let about = Context::new("DHT GET_VALUE");
        let request = GetValue {
            key: key.into(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// SEARCH_VALUE: the values found for a key, each better than the one before.
    pub fn dht_search_value(&self, key: impl Into<Bytes>) -> Results<Bytes> {
        let about = Context::new("DHT SEARCH_VALUE");
        let request = SearchValue {
            key: key.into(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// PUT_VALUE: stores a record, which the daemons validate: only `/pk/…` and `/ipns/…` keys with
    /// valid values will do.
    ///
    /// # Errors
    /// [`Error::Refused`] if the record is not valid, or nobody took it.
    pub async fn dht_put_value(
        &self,
        key: impl Into<Bytes>,
        value: impl Into<Bytes>,
    ) -> Result<(), Error> {
        let about = Context::new("DHT PUT_VALUE");
        let request = PutValue {
            key: key.into(),
            value: value.into(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// PROVIDE: announces that this peer has the content with the binary CID `cid`.
    ///
    /// # Errors
    /// [`Error::Refused`] if it is no CID, or nobody could be told.
    pub async fn dht_provide(&self, cid: impl Into<Bytes>) -> Result<(), Error> {
        let about = Context::new("DHT PROVIDE");
        let request = Provide {
            cid: cid.into(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    fn query<Q: Typed>(&self, about: Context, query: Q) -> Results<Q::Output> {
        let pool = self.pool().clone();
        let request = query.encoded();
        let starting = async move { pool.start(&request).await };
        Results {
            stage: Stage::Starting(Box::pin(starting)),
            about,
            read: |reply| typed::<Q>(Some(reply)),
            timeout: self.timeout,
            deadline: None,
        }
    }
}

/// The results of a DHT query, as they come: a [`Stream`] of them, whose last is an error if the
/// query failed.
///
/// The query begins when the first result is asked for, and so does its timeout. Dropping this ends
/// it.
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client, cid: Vec<u8>) -> Result<(), p2pd_client::Error> {
/// let mut providers = client.dht_find_providers(cid, 10);
/// while let Some(provider) = providers.next().await {
///     println!("{}", provider?.peer_id);
/// }
/// # Ok(()) }
/// ```
#[must_use = "the query begins when its results are asked for"]
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
    /// The next result; `None` after the last.
    pub async fn next(&mut self) -> Option<Result<T, Error>> {
        poll_fn(|cx| self.poll_result(cx)).await
    }

    /// All results, once the query has ended.
    ///
    /// # Errors
    /// The query failed; what it had found is lost.
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
            Poll::Ready(Ok(Event::Refused(words))) => Err(Error::refused(words)),
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
                // The next query may depend on what is done with these results.
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
