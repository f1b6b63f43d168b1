"""The types that arguments of requests may have, and how results are converted."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from p2pclient_rs._native import Identity, Multiaddr, PeerID, PeerInfo, PublicKey, StreamInfo

__all__ = ["MultiaddrLike", "PeerIDLike", "SupportsToBytes", "Types"]


class SupportsToBytes(Protocol):
    """A peer id or multiaddr of another library, such as py-multiaddr."""

    def to_bytes(self) -> bytes: ...


#: A peer id: a PeerID, its text (base58 or CID), its bytes, or another library's.
PeerIDLike: TypeAlias = PeerID | str | bytes | bytearray | memoryview | SupportsToBytes
#: A multiaddr: a Multiaddr, its text, its bytes, or another library's.
MultiaddrLike: TypeAlias = Multiaddr | str | bytes | bytearray | memoryview | SupportsToBytes


class Types:
    """Converts the results of requests. The default returns them unchanged.

    An API compatibility layer overrides these methods to return the types of the package that it
    replaces, and annotates the methods of its clients accordingly.
    """

    def multiaddr(self, addr: Multiaddr) -> Multiaddr:
        """Converts a multiaddr that is not part of another result."""
        return addr

    def peer_info(self, info: PeerInfo) -> PeerInfo:
        """Converts an entry of ``list_peers`` or a result of a DHT query."""
        return info

    def stream_info(self, info: StreamInfo) -> StreamInfo:
        """Converts the description of an opened or inbound stream."""
        return info

    def public_key(self, key: PublicKey) -> PublicKey:
        """Converts the result of ``dht_get_public_key``."""
        return key

    def identity(self, identity: Identity) -> Identity:
        """Converts the result of ``identify``."""
        return identity

    def peer_id(self, peer_id: PeerID) -> PeerID:
        """Converts the caller's id for a unary handler. The result is cached."""
        return peer_id

    def error(self, error: Exception) -> Exception:
        """Converts a ``ControlFailure`` or a ``P2PHandlerError`` that is about to be raised."""
        return error
