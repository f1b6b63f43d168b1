"""The value types of this layer: hivemind's classes, or this package's without hivemind."""

from typing import TYPE_CHECKING

from p2pclient_rs import _native
from p2pclient_rs.compat.values import sha256_digest

from .original import import_bindings

if TYPE_CHECKING:
    # hivemind's classes have no annotations for a type checker.
    from p2pclient_rs._native import Multiaddr, PeerID, PeerInfo, StreamInfo
else:
    _types = import_bindings("datastructures") or _native
    Multiaddr, PeerID = _types.Multiaddr, _types.PeerID
    PeerInfo, StreamInfo = _types.PeerInfo, _types.StreamInfo

__all__ = ["Multiaddr", "PeerID", "PeerInfo", "StreamInfo", "sha256_digest"]
