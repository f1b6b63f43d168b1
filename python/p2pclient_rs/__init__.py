from p2pclient_rs._native import (
    Identity,
    InvalidMultiaddr,
    InvalidPeerID,
    Multiaddr,
    PeerID,
    PeerInfo,
    Protocol,
    ProtocolLookupError,
    PublicKey,
    PubsubMessage,
    StreamInfo,
    __version__,
)

ID = PeerID

__all__ = [
    "ID",
    "Identity",
    "InvalidMultiaddr",
    "InvalidPeerID",
    "Multiaddr",
    "PeerID",
    "PeerInfo",
    "Protocol",
    "ProtocolLookupError",
    "PublicKey",
    "PubsubMessage",
    "StreamInfo",
    "__version__",
]
