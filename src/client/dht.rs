//! DHT requests: peers, providers and records. Queries with any number of results return
//! [`Results`].

use super::{Client, Context, Error, Results};
use bytes::Bytes;
use p2pd_protocol::command::dht::{
    FindPeer, FindPeersConnectedToPeer, FindProviders, GetClosestPeers, GetPublicKey, GetValue,
    Provide, PutValue, SearchValue,
};
use p2pd_protocol::command::Typed;
use p2pd_protocol::{PeerId, PeerInfo, PublicKey};

impl Client {
    /// FIND_PEER: finds the addresses of a peer.
    ///
    /// # Errors
    /// [`Error::Refused`] if the peer was not found.
    pub async fn dht_find_peer(&self, peer: &PeerId) -> Result<PeerInfo, Error> {
        let about = Context::new("DHT FIND_PEER").peer(peer);
        let request = FindPeer {
            peer: peer.clone(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// FIND_PEERS_CONNECTED_TO_PEER: finds the peers connected to a peer. Current Go daemons do not
    /// support it: [`Error::NotSupported`].
    pub fn dht_find_peers_connected_to_peer(&self, peer: &PeerId) -> Results<PeerInfo> {
        let about = Context::new("DHT FIND_PEERS_CONNECTED_TO_PEER").peer(peer);
        let request = FindPeersConnectedToPeer {
            peer: peer.clone(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// FIND_PROVIDERS: finds at most `count` peers that provide the content with the binary CID
    /// `cid`; 0 means the daemon's default of 20.
    pub fn dht_find_providers(&self, cid: impl Into<Bytes>, count: u32) -> Results<PeerInfo> {
        let about = Context::new("DHT FIND_PROVIDERS");
        let request = FindProviders {
            cid: cid.into(),
            count: i32::try_from(count).unwrap_or(i32::MAX),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// GET_CLOSEST_PEERS: finds the peers closest to a key.
    pub fn dht_get_closest_peers(&self, key: impl Into<Bytes>) -> Results<PeerId> {
        let about = Context::new("DHT GET_CLOSEST_PEERS");
        let request = GetClosestPeers {
            key: key.into(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// GET_PUBLIC_KEY: finds the public key of a peer.
    ///
    /// # Errors
    /// [`Error::Refused`] if the key was not found; [`Error::Protocol`] if the daemon returned an
    /// invalid key.
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

    /// GET_VALUE: finds the best value for a key.
    ///
    /// # Errors
    /// [`Error::Refused`] if no value was found.
    pub async fn dht_get_value(&self, key: impl Into<Bytes>) -> Result<Bytes, Error> {
        let about = Context::new("DHT GET_VALUE");
        let request = GetValue {
            key: key.into(),
            timeout: self.timeout,
        };
        self.request(about, request).await
    }

    /// SEARCH_VALUE: finds values for a key, each better than the one before.
    pub fn dht_search_value(&self, key: impl Into<Bytes>) -> Results<Bytes> {
        let about = Context::new("DHT SEARCH_VALUE");
        let request = SearchValue {
            key: key.into(),
            timeout: self.timeout,
        };
        self.query(about, request)
    }

    /// PUT_VALUE: stores a record. The key must begin with `/pk/` or `/ipns/`, and the value must be
    /// valid for it; the daemons accept no others.
    ///
    /// # Errors
    /// [`Error::Refused`] if the record is invalid, or no peer has stored it.
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

    /// PROVIDE: announces that the daemon's peer provides the content with the binary CID `cid`.
    ///
    /// # Errors
    /// [`Error::Refused`] if `cid` is not a CID, or there was no peer to announce it to.
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
