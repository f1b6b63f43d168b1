"""The types that arguments of requests may have, and how results are converted."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from p2pclient_rs._native import Identity, Multiaddr, PeerID, PeerInfo, PublicKey, StreamInfo

__all__ = ["MultiaddrLike", "PeerIDLike", "SupportsToBytes", "Types"]


class SupportsToBytes(Protocol):
    """A peer id or multiaddr of another library, as py-multiaddr's."""

    def to_bytes(self) -> bytes: ...


#: A peer id: a PeerID, its text (base58 or CID), its bytes, or another library's.
PeerIDLike: TypeAlias = PeerID | str | bytes | bytearray | memoryview | SupportsToBytes
#: A multiaddr: a Multiaddr, its text, its bytes, or another library's.
MultiaddrLike: TypeAlias = Multiaddr | str | bytes | bytearray | memoryview | SupportsToBytes


class Types:
    """What requests return. An API compatibility layer overrides these to return the types of its
    ecosystem, and declares the methods of its clients accordingly."""

    def multiaddr(self, addr: Multiaddr) -> Multiaddr:
        """A multiaddr, wherever one is returned by itself."""
        return addr

    def peer_info(self, info: PeerInfo) -> PeerInfo:
        """An entry of ``list_peers`` and of the DHT's answers."""
        return info

    def stream_info(self, info: StreamInfo) -> StreamInfo:
        """What is said of a stream, opened or inbound."""
        return info

    def public_key(self, key: PublicKey) -> PublicKey:
        """The answer to ``dht_get_public_key``."""
        return key

    def identity(self, identity: Identity) -> Identity:
        """The answer to ``identify``."""
        return identity

    def peer_id(self, peer_id: PeerID) -> PeerID:
        """The caller that a unary handler is told. What is returned is kept for the next call."""
        return peer_id

    def error(self, error: Exception) -> Exception:
        """What is raised in the place of a ``ControlFailure`` or a ``P2PHandlerError``."""
        return error
