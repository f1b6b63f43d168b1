//! DHT: peers, providers, records. Queries with any number of results return them as [`Results`].

use super::{Client, Context, Error, Results};
use bytes::Bytes;
use p2pd_protocol::command::dht::{
    FindPeer, FindPeersConnectedToPeer, FindProviders, GetClosestPeers, GetPublicKey, GetValue,
    Provide, PutValue, SearchValue,
};
use p2pd_protocol::command::Typed;
use p2pd_protocol::{PeerId, PeerInfo, PublicKey};

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
        Results::new(self.pool().clone(), about, query, self.timeout)
    }
}
