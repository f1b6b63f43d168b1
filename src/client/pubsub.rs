//! Pubsub requests: topics, publishing and subscribing.

use super::socket::Socket;
use super::{Client, Context, Error};
use bytes::Bytes;
use futures_core::Stream;
use p2pd_protocol::command::pubsub::{
    decode_message, GetTopics, ListTopicPeers, Publish, Subscribe,
};
use p2pd_protocol::{FrameDecoder, PeerId, PubsubMessage};
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{self, ready, Poll};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;

/// The longest time to wait until the daemon has unsubscribed.
const UNSUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(1);

impl Client {
    /// GET_TOPICS: returns the topics that the daemon is subscribed to.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon was started without pubsub.
    pub async fn pubsub_get_topics(&self) -> Result<Vec<String>, Error> {
        let about = Context::new("PUBSUB GET_TOPICS");
        self.request(about, GetTopics).await
    }

    /// LIST_PEERS: returns the peers known to be subscribed to a topic.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon was started without pubsub.
    pub async fn pubsub_list_peers(&self, topic: impl Into<String>) -> Result<Vec<PeerId>, Error> {
        let about = Context::new("PUBSUB LIST_PEERS");
        let topic = topic.into();
        self.request(about, ListTopicPeers { topic }).await
    }

    /// PUBLISH: publishes data on a topic. The Go daemons drop messages that exceed 1 MiB with their
    /// envelope.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon was started without pubsub.
    pub async fn pubsub_publish(
        &self,
        topic: impl Into<String>,
        data: impl Into<Bytes>,
    ) -> Result<(), Error> {
        let about = Context::new("PUBSUB PUBLISH");
        let request = Publish {
            topic: topic.into(),
            data: data.into(),
        };
        self.request(about, request).await
    }

    /// SUBSCRIBE: subscribes to a topic. Returns the messages from now on, including those
    /// published through this daemon.
    ///
    /// # Errors
    /// [`Error::NotSupported`] if the daemon was started without pubsub.
    pub async fn pubsub_subscribe(&self, topic: impl Into<String>) -> Result<Subscription, Error> {
        let request = Subscribe {
            topic: topic.into(),
        };
        let about = Context::new("PUBSUB SUBSCRIBE");
        let limits = self.pool().limits();
        self.within(about.clone(), async {
            let ((), pooled) = self.pool().request(&request).await?;
            let (socket, ahead) = pooled.into_socket();
            let mut decoder = FrameDecoder::new(limits.max_frame);
            decoder.extend(&ahead);
            Ok(Subscription {
                socket: Some(socket),
                decoder,
                about,
            })
        })
        .await
    }
}

/// The messages published on a topic, as a [`Stream`]. It ends only after an error, since a
/// subscription ends with its daemon. Dropping it unsubscribes.
///
/// ```no_run
/// # async fn example(client: p2pd_client::Client) -> Result<(), p2pd_client::Error> {
/// let mut news = client.pubsub_subscribe("news").await?;
/// while let Some(message) = news.next().await {
///     println!("{:?}", message?.data);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "dropping it unsubscribes"]
pub struct Subscription {
    /// `None` after the end.
    socket: Option<Socket>,
    decoder: FrameDecoder,
    about: Context,
}

impl Subscription {
    /// The next message; `None` after an error.
    pub async fn next(&mut self) -> Option<Result<PubsubMessage, Error>> {
        poll_fn(|cx| self.poll_message(cx)).await
    }

    /// Unsubscribes, and waits up to a second until the daemon no longer lists the topic.
    pub async fn close(mut self) {
        let Some(mut socket) = self.socket.take() else {
            return;
        };
        let _ = tokio::time::timeout(UNSUBSCRIBE_TIMEOUT, async {
            // The daemon closes its end once it has unsubscribed.
            if socket.shutdown().await.is_ok() {
                let read = |cx: &mut task::Context<'_>| socket.poll_read_with(cx, <[u8]>::len);
                let mut read = Box::new(read);
                while poll_fn(&mut read).await.is_ok_and(|count| count > 0) {}
            }
        })
        .await;
    }

    fn poll_message(
        &mut self,
        cx: &mut task::Context<'_>,
    ) -> Poll<Option<Result<PubsubMessage, Error>>> {
        let outcome = ready!(self.poll_frame(cx));
        Poll::Ready(outcome.transpose().map(|outcome| {
            let message = outcome.and_then(|frame| Ok(decode_message(&frame)?));
            message.map_err(|error| {
                self.socket = None;
                error.about(&self.about)
            })
        }))
    }

    /// The next message, encoded; `None` after the end.
    fn poll_frame(&mut self, cx: &mut task::Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        let Some(socket) = &mut self.socket else {
            return Poll::Ready(Ok(None));
        };
        let decoder = &mut self.decoder;
        loop {
            if let Some(frame) = decoder.next_frame()? {
                return Poll::Ready(Ok(Some(frame)));
            }
            let read = socket.poll_read_with(cx, |bytes| {
                decoder.extend(bytes);
                bytes.len()
            });
            match ready!(read) {
                Ok(0) => {
                    let lost = Error::lost("the daemon ended the subscription", false);
                    return Poll::Ready(Err(lost));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Err(Error::lost(error, false))),
            }
        }
    }
}

impl Stream for Subscription {
    type Item = Result<PubsubMessage, Error>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_message(cx)
    }
}
