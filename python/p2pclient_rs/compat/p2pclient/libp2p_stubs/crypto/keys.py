"""The interfaces of keys. The only implementation here is in `rsa`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, unique

from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as protobuf

__all__ = ["Key", "KeyPair", "KeyType", "PrivateKey", "PublicKey", "protobuf"]


@unique
class KeyType(Enum):
    """Kinds of keys, with their numbers in libp2p. The last never occurs in a serialised key."""

    RSA = 0
    Ed25519 = 1
    Secp256k1 = 2
    ECDSA = 3
    ECC_P256 = 4


class Key(ABC):
    """A cryptographic key. Two keys are equal if their bytes are."""

    @abstractmethod
    def to_bytes(self) -> bytes:
        """Returns the key's bytes, in libp2p's encoding for its kind."""

    @abstractmethod
    def get_type(self) -> KeyType:
        """Returns the key's kind."""

    @abstractmethod
    def _serialize_to_protobuf(self) -> protobuf.PublicKey | protobuf.PrivateKey:
        """Returns the key as a protobuf message."""

    def serialize(self) -> bytes:
        """Returns the key as libp2p serialises it: its kind and its bytes."""
        return self._serialize_to_protobuf().SerializeToString()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self.to_bytes() == other.to_bytes()


class PublicKey(Key):
    """A public key."""

    @abstractmethod
    def verify(self, data: bytes, signature: bytes) -> bool:
        """Returns whether the private key made the signature over the hash of the data."""

    def _serialize_to_protobuf(self) -> protobuf.PublicKey:
        return protobuf.PublicKey(key_type=self.get_type().value, data=self.to_bytes())

    @classmethod
    def deserialize_from_protobuf(cls, protobuf_data: bytes) -> protobuf.PublicKey:
        """Parses a serialised key into a protobuf message.

        Raises:
            google.protobuf.message.DecodeError: The bytes are no such key.
        """
        return protobuf.PublicKey.FromString(protobuf_data)


class PrivateKey(Key):
    """A private key."""

    @abstractmethod
    def sign(self, data: bytes) -> bytes:
        """Signs the hash of the data."""

    @abstractmethod
    def get_public_key(self) -> PublicKey:
        """Returns the public key that belongs to this one."""

    def _serialize_to_protobuf(self) -> protobuf.PrivateKey:
        return protobuf.PrivateKey(key_type=self.get_type().value, data=self.to_bytes())

    @classmethod
    def deserialize_from_protobuf(cls, protobuf_data: bytes) -> protobuf.PrivateKey:
        """Parses a serialised key into a protobuf message.

        Raises:
            google.protobuf.message.DecodeError: The bytes are no such key.
        """
        return protobuf.PrivateKey.FromString(protobuf_data)


@dataclass(frozen=True)
class KeyPair:
    """A private key and its public key."""

    private_key: PrivateKey
    public_key: PublicKey
