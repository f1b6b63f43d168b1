"""RSA keys, by pycryptodome: DER bytes, and PKCS#1 v1.5 signatures over SHA-256."""

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
except ImportError as error:
    raise missing_dependency(error) from error

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
        """Reads a key in DER.

        Raises:
            ValueError: It is not one.
        """
        return cls(RSA.import_key(key_bytes))

    def to_bytes(self) -> bytes:
        """The key in DER."""
        return self.impl.export_key("DER")

    def get_type(self) -> KeyType:
        """`KeyType.RSA`."""
        return KeyType.RSA

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether the signature was made with the private key, over the hash of the data."""
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
        """Makes a key.

        Args:
            bits: Its size, at least 1024.
            e: The public exponent.
        """
        return cls(RSA.generate(bits, e=e))

    def to_bytes(self) -> bytes:
        """The key in DER."""
        return self.impl.export_key("DER")

    def get_type(self) -> KeyType:
        """`KeyType.RSA`."""
        return KeyType.RSA

    def sign(self, data: bytes) -> bytes:
        """A signature over the hash of the data."""
        return pkcs1_15.new(self.impl).sign(SHA256.new(data))

    def get_public_key(self) -> PublicKey:
        """The public key that belongs to it."""
        return RSAPublicKey(self.impl.public_key())


def create_new_key_pair(bits: int = 2048, e: int = 65537) -> KeyPair:
    """Makes a key pair.

    Args:
        bits: The size, at least 1024.
        e: The public exponent.
    """
    private_key = RSAPrivateKey.new(bits, e)
    return KeyPair(private_key, private_key.get_public_key())
