"""Conversion of this package's value types into those of a replaced package."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import p2pclient_rs
from p2pclient_rs import connector

__all__ = [
    "CONNECTION_PROTOCOLS",
    "ConvertedTypes",
    "connection_protocol",
    "sha256_digest",
]

#: The multiaddr codes of the protocols that a control or listen address can start with.
CONNECTION_PROTOCOLS = (4, 41, 53, 54, 55, 400)


class ConvertedTypes(connector.Types):
    """Converts the results of requests.

    Args:
        multiaddr: Makes a multiaddr from its bytes.
        peer_info: Makes a ``PeerInfo`` from a peer's id and the list of its addresses.
        stream_info: Makes a ``StreamInfo`` from a peer's id, its address and the protocol.
    """

    def __init__(
        self,
        multiaddr: Callable[[bytes], Any],
        peer_info: Callable[[Any, list[Any]], Any],
        stream_info: Callable[[Any, Any, str], Any],
    ) -> None:
        self._multiaddr = multiaddr
        self._peer_info = peer_info
        self._stream_info = stream_info

    def multiaddr(self, addr: p2pclient_rs.Multiaddr) -> Any:
        return self._multiaddr(addr.to_bytes())

    def peer_info(self, info: p2pclient_rs.PeerInfo) -> Any:
        return self._peer_info(self.peer_id(info.peer_id), [*map(self.multiaddr, info.addrs)])

    def stream_info(self, info: p2pclient_rs.StreamInfo) -> Any:
        return self._stream_info(self.peer_id(info.peer_id), self.multiaddr(info.addr), info.proto)

    def identity(self, identity: p2pclient_rs.Identity) -> Any:
        return self.peer_id(identity.peer_id), tuple(map(self.multiaddr, identity.addrs))


def connection_protocol(maddr: Any) -> int | None:
    """Returns the code of the protocol for connecting to a control or listen address.

    Args:
        maddr: A multiaddr of any package.

    Returns:
        The code of the only protocol in the address that is in ``CONNECTION_PROTOCOLS``; None if it
        has none of them, or several.
    """
    found = {protocol.code for protocol in maddr.protocols()}.intersection(CONNECTION_PROTOCOLS)
    return int(found.pop()) if len(found) == 1 else None


def sha256_digest(data: str | bytes) -> bytes:
    """Returns the SHA-256 digest of bytes, or of a string encoded as UTF-8."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).digest()
