//! Opens streams to peers.

use super::stream::Stream;
use super::{Client, Context, Error};
use p2pd_protocol::command::streams::StreamOpen;
use p2pd_protocol::PeerId;

impl Client {
    /// STREAM_OPEN: opens a stream to a peer for the first of `protocols` that it speaks.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer cannot be reached or speaks none of the protocols.
    pub async fn stream_open<S: Into<String>>(
        &self,
        peer: &PeerId,
        protocols: impl IntoIterator<Item = S>,
    ) -> Result<Stream, Error> {
        let protocols: Vec<String> = protocols.into_iter().map(Into::into).collect();
        let about = Context::new("STREAM_OPEN").peer(peer);
        let about = about.protocol(protocols.join(", "));
        let request = StreamOpen {
            peer: peer.clone(),
            protocols,
            timeout: self.timeout,
        };
        self.within(about, async {
            let (info, pooled) = self.pool().request(&request).await?;
            let (socket, ahead) = pooled.into_socket();
            Ok(Stream::new(socket, ahead, info))
        })
        .await
    }
}
