"""RSA keys, by pycryptodome: DER encoding, and PKCS#1 v1.5 signatures over SHA-256."""

from p2pclient_rs.compat.p2pclient._extra import missing_dependency
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.keys import (
    KeyPair,
    KeyType,
    PrivateKey,
    PublicKey,
)

try:
    from Crypto.Hash import SHA256
    from Crypto.PublicKey import RSA
    from Crypto.PublicKey.RSA import RsaKey
    from Crypto.Signature import pkcs1_15
except ImportError as _error:
    raise missing_dependency(_error) from _error

__all__ = [
    "KeyPair",
    "KeyType",
    "PrivateKey",
    "PublicKey",
    "RSAPrivateKey",
    "RSAPublicKey",
    "create_new_key_pair",
]


class RSAPublicKey(PublicKey):
    """An RSA public key."""

    def __init__(self, impl: RsaKey) -> None:
        self.impl = impl

    @classmethod
    def from_bytes(cls, key_bytes: bytes) -> "RSAPublicKey":
        """Parses a key in DER.

        Raises:
            ValueError: The bytes are no such key.
        """
        return cls(RSA.import_key(key_bytes))

    def to_bytes(self) -> bytes:
        """Returns the key in DER."""
        return self.impl.export_key("DER")

    def get_type(self) -> KeyType:
        """Returns `KeyType.RSA`."""
        return KeyType.RSA

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Returns whether the private key made the signature over the hash of the data."""
        try:
            pkcs1_15.new(self.impl).verify(SHA256.new(data), signature)
        except (ValueError, TypeError):
            return False
        return True


class RSAPrivateKey(PrivateKey):
    """An RSA private key."""

    def __init__(self, impl: RsaKey) -> None:
        self.impl = impl

    @classmethod
    def new(cls, bits: int = 2048, e: int = 65537) -> "RSAPrivateKey":
        """Generates a key.

        Args:
            bits: The size in bits: 1024 or more.
            e: The public exponent.
        """
        return cls(RSA.generate(bits, e=e))

    def to_bytes(self) -> bytes:
        """Returns the key in DER."""
        return self.impl.export_key("DER")

    def get_type(self) -> KeyType:
        """Returns `KeyType.RSA`."""
        return KeyType.RSA

    def sign(self, data: bytes) -> bytes:
        """Signs the hash of the data."""
        return pkcs1_15.new(self.impl).sign(SHA256.new(data))

    def get_public_key(self) -> PublicKey:
        """Returns the public key that belongs to this one."""
        return RSAPublicKey(self.impl.public_key())


def create_new_key_pair(bits: int = 2048, e: int = 65537) -> KeyPair:
    """Generates a key pair.

    Args:
        bits: The size in bits: 1024 or more.
        e: The public exponent.
    """
    private_key = RSAPrivateKey.new(bits, e)
    return KeyPair(private_key, private_key.get_public_key())
