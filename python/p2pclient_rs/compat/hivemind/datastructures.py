"""What the dialect takes and returns: hivemind's classes, or this package's without it."""

import hashlib
import importlib
from typing import TYPE_CHECKING

from . import PACKAGE

if TYPE_CHECKING:
    from hivemind.p2p.p2p_daemon_bindings.datastructures import (
        Multiaddr,
        PeerID,
        PeerInfo,
        StreamInfo,
    )
else:
    try:
        _types = importlib.import_module(f"{PACKAGE}.p2p.p2p_daemon_bindings.datastructures")
    except ImportError:
        from p2pclient_rs import _native as _types
    Multiaddr, PeerID = _types.Multiaddr, _types.PeerID
    PeerInfo, StreamInfo = _types.PeerInfo, _types.StreamInfo

__all__ = ["Multiaddr", "PeerID", "PeerInfo", "StreamInfo", "sha256_digest"]


def sha256_digest(data: str | bytes) -> bytes:
    """The SHA-256 of some bytes, or of a text in UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()
