"""Peer ids. `ID` is this package's `PeerID`."""

from p2pclient_rs import PeerID as ID
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.keys import PublicKey
from p2pclient_rs.compat.values import sha256_digest

__all__ = [
    "ENABLE_INLINING",
    "ID",
    "IDENTITY_MULTIHASH_CODE",
    "MAX_INLINE_KEY_LENGTH",
    "IdentityHash",
    "PublicKey",
    "sha256_digest",
]

# A peer id contains keys up to this length whole; of longer keys, it contains the hash.
ENABLE_INLINING = True
MAX_INLINE_KEY_LENGTH = 42
IDENTITY_MULTIHASH_CODE = 0x00


class IdentityHash:
    """The identity function with hashlib's interface, for multihash's registry."""

    def __init__(self) -> None:
        self._digest = bytearray()

    def update(self, input: bytes) -> None:
        """Adds data."""
        self._digest += input

    def digest(self) -> bytes:
        """Returns all data so far."""
        return bytes(self._digest)
