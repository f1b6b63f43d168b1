"""What the dialect takes and returns: hivemind's classes, or this package's without it."""

import hashlib

try:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import (
        Multiaddr,
        PeerID,
        PeerInfo,
        StreamInfo,
    )
except ImportError:
    from p2pclient_rs._native import Multiaddr, PeerID, PeerInfo, StreamInfo

__all__ = ["Multiaddr", "PeerID", "PeerInfo", "StreamInfo", "sha256_digest"]


def sha256_digest(data: str | bytes) -> bytes:
    """The SHA-256 of some bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()
