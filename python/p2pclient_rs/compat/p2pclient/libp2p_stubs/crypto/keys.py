"""Keys: what every kind of key can do. `rsa` is the one kind implemented here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, unique

from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as protobuf

__all__ = ["Key", "KeyPair", "KeyType", "PrivateKey", "PublicKey", "protobuf"]


@unique
class KeyType(Enum):
    """Kinds of keys, by their number in libp2p. The last is in no serialised key."""

    RSA = 0
    Ed25519 = 1
    Secp256k1 = 2
    ECDSA = 3
    ECC_P256 = 4


class Key(ABC):
    """A cryptographic key. Keys with the same bytes are equal."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The key's bytes, in the form that libp2p has for its kind."""

    @abstractmethod
    def get_type(self) -> KeyType:
        """The key's kind."""

    @abstractmethod
    def _serialize_to_protobuf(self) -> protobuf.PublicKey | protobuf.PrivateKey:
        """The key as a message."""

    def serialize(self) -> bytes:
        """The key as libp2p serialises it, kind and bytes."""
        return self._serialize_to_protobuf().SerializeToString()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()


class PublicKey(Key):
    """A public key."""

    @abstractmethod
    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether the signature was made with the private key, over the hash of the data."""

    def _serialize_to_protobuf(self) -> protobuf.PublicKey:
        return protobuf.PublicKey(key_type=self.get_type().value, data=self.to_bytes())

    @classmethod
    def deserialize_from_protobuf(cls, protobuf_data: bytes) -> protobuf.PublicKey:
        """Reads a serialised key into a message.

        Raises:
            google.protobuf.message.DecodeError: It is not one.
        """
        return protobuf.PublicKey.FromString(protobuf_data)


class PrivateKey(Key):
    """A private key."""

    @abstractmethod
    def sign(self, data: bytes) -> bytes:
        """A signature over the hash of the data."""

    @abstractmethod
    def get_public_key(self) -> PublicKey:
        """The public key that belongs to it."""

    def _serialize_to_protobuf(self) -> protobuf.PrivateKey:
        return protobuf.PrivateKey(key_type=self.get_type().value, data=self.to_bytes())

    @classmethod
    def deserialize_from_protobuf(cls, protobuf_data: bytes) -> protobuf.PrivateKey:
        """Reads a serialised key into a message.

        Raises:
            google.protobuf.message.DecodeError: It is not one.
        """
        return protobuf.PrivateKey.FromString(protobuf_data)


@dataclass(frozen=True)
class KeyPair:
    """A private key and its public key."""

    private_key: PrivateKey
    public_key: PublicKey
