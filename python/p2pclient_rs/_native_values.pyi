# Stubs of the value types in `_native`. No module has this name.

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol as TypingProtocol, TypeAlias, final

from typing_extensions import Self, disjoint_base

class _ToBytes(TypingProtocol):
    def to_bytes(self) -> bytes: ...

class _Serialize(TypingProtocol):
    def serialize(self) -> bytes: ...

class _HasCode(TypingProtocol):
    @property
    def code(self) -> int: ...

BytesLike: TypeAlias = bytes | bytearray | memoryview
PeerIDLike: TypeAlias = PeerID | str | BytesLike | _ToBytes
MultiaddrLike: TypeAlias = Multiaddr | str | BytesLike | _ToBytes

class InvalidPeerID(ValueError):
    """A value is not a peer id; the message says why."""

class InvalidMultiaddr(ValueError):
    """A value is not a multiaddr, or is one that cannot be taken apart; the message says why."""

class ProtocolLookupError(LookupError):
    """A multiaddr does not contain a protocol."""

@disjoint_base
class PeerID:
    """The identity of a libp2p peer.

    It equals its base58 or CID text, its bytes, and the same PeerID or ID of another library. It
    sorts by its base58 text and hashes like its bytes.

    Args:
        peer_id_bytes: The bytes of a multihash, which are not validated; a text, base58 or CID; or
            another peer id.

    Raises:
        InvalidPeerID: The text is not a peer id.

    Example:
        peer = PeerID("QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7")
        assert PeerID(peer.to_bytes()) == peer == peer.to_cid()
    """

    def __new__(cls, peer_id_bytes: PeerIDLike) -> Self: ...
    @classmethod
    def from_base58(cls, b58_encoded_peer_id_str: str) -> Self:
        """Parses a base58 text. Raises InvalidPeerID."""
    @classmethod
    def from_string(cls, text: str) -> Self:
        """Parses a base58 text or a CIDv1 text. Raises InvalidPeerID."""
    @classmethod
    def from_bytes(cls, data: BytesLike) -> Self:
        """Returns the peer id with these bytes, which are not validated."""
    @classmethod
    def from_pubkey(cls, key: PublicKey | BytesLike | _Serialize) -> Self:
        """Returns the id of the peer with a public key: a PublicKey, a serialised one, or an object
        with serialize(). Raises InvalidPeerID if the bytes are not a public key."""
    def to_bytes(self) -> bytes:
        """Returns the bytes of the multihash."""
    def to_base58(self) -> str:
        """Returns the base58 text: Qm… or 12D3Koo…."""
    def to_string(self) -> str:
        """Returns the base58 text."""
    def pretty(self) -> str:
        """Returns the base58 text."""
    def to_cid(self) -> str:
        """Returns the text as a CIDv1 in base32: bafz…."""
    def is_valid(self) -> bool:
        """Returns whether the bytes are a multihash, as those of every real peer id are."""
    @property
    def xor_id(self) -> int:
        """The SHA-256 of the bytes as a number: the position in a Kademlia table."""
    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __lt__(self, other: PeerID, /) -> bool: ...
    def __le__(self, other: PeerID, /) -> bool: ...
    def __gt__(self, other: PeerID, /) -> bool: ...
    def __ge__(self, other: PeerID, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]: ...

@final
class Multiaddr:
    """A network address: a sequence of protocols with their values.

    It equals the same Multiaddr of another library, and sorts by its binary form. A binary form may
    contain a protocol that this version does not know. Such an address prints as "/unknown/" and
    hexadecimal digits from there on, and cannot be taken apart.

    Args:
        addr: A text such as "/ip4/127.0.0.1/tcp/4001" or "/unix/tmp/p2pd.sock", the binary form, or
            an object whose to_bytes() returns that.

    Raises:
        InvalidMultiaddr: It is not a multiaddr.

    Example:
        addr = Multiaddr("/ip4/127.0.0.1/tcp/4001")
        assert addr.value_for_protocol("tcp") == addr["tcp"] == "4001"
        assert str(addr.encapsulate("/ws")) == "/ip4/127.0.0.1/tcp/4001/ws"
    """

    def __new__(cls, addr: MultiaddrLike) -> Self: ...
    @staticmethod
    def from_bytes(data: BytesLike) -> Multiaddr:
        """Returns the address with this binary form, which is not validated."""
    @staticmethod
    def join(*addrs: MultiaddrLike) -> Multiaddr:
        """Returns these addresses, one after the other. Raises InvalidMultiaddr."""
    def to_bytes(self) -> bytes:
        """Returns the binary form. In it the path of /unix has its leading slash, as in Go."""
    def protocols(self) -> list[Protocol]:
        """Returns the protocols, in order. Raises InvalidMultiaddr."""
    def items(self) -> list[tuple[Protocol, str | None]]:
        """Returns the protocols with their values; None for a protocol without a value. Raises
        InvalidMultiaddr."""
    def value_for_protocol(self, proto: str | int | _HasCode) -> str | None:
        """Returns the value of the first protocol with this name or code; None for a protocol
        without a value. The value of "unix" is the path with its leading slash. Raises
        ProtocolLookupError if there is no such protocol, InvalidMultiaddr."""
    def split(self, maxsplit: int = -1) -> list[Multiaddr]:
        """Returns each protocol with its value as an address; after maxsplit of them, if that is
        not negative, the rest as one address. Raises InvalidMultiaddr."""
    def encapsulate(self, other: MultiaddrLike) -> Multiaddr:
        """Returns this address followed by another. Raises InvalidMultiaddr, also if this address
        ends with /unix."""
    def decapsulate(self, addr: MultiaddrLike) -> Multiaddr:
        """Returns this address up to the last occurrence of the other. Raises ValueError if there
        is none, InvalidMultiaddr."""
    def __getitem__(self, proto: str | int | _HasCode, /) -> str | None: ...
    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __lt__(self, other: Multiaddr, /) -> bool: ...
    def __le__(self, other: Multiaddr, /) -> bool: ...
    def __gt__(self, other: Multiaddr, /) -> bool: ...
    def __ge__(self, other: Multiaddr, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[Callable[[bytes], Multiaddr], tuple[bytes]]: ...

@final
class Protocol:
    """A protocol of a multiaddr.

    Example:
        protocol = Multiaddr("/ip4/127.0.0.1").protocols()[0]
        assert (protocol.name, protocol.code) == ("ip4", 4)
    """

    @property
    def code(self) -> int:
        """The number."""
    @property
    def name(self) -> str:
        """The name in the text of a multiaddr."""
    @property
    def vcode(self) -> bytes:
        """The number as a varint, as it is in the binary form."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class PublicKey:
    """A peer's public key, as libp2p serialises it (crypto.pb.PublicKey).

    Args:
        key_type: 0 RSA, 1 Ed25519, 2 secp256k1, 3 ECDSA.
        data: The key, in the usual encoding for its type. It is not validated.

    Example:
        key = await client.dht_get_public_key(peer_id)
        assert key.peer_id == peer_id
        assert PublicKey.from_bytes(key.serialize()) == key
    """

    def __new__(cls, key_type: int, data: BytesLike) -> Self: ...
    @staticmethod
    def from_bytes(data: BytesLike) -> PublicKey:
        """Decodes a serialised crypto.pb.PublicKey. Raises ValueError."""
    @property
    def key_type(self) -> int:
        """0 RSA, 1 Ed25519, 2 secp256k1, 3 ECDSA."""
    @property
    def data(self) -> bytes:
        """The key, in the usual encoding for its type."""
    @property
    def peer_id(self) -> PeerID:
        """The id of the peer with this key."""
    def serialize(self) -> bytes:
        """Returns the key as a serialised crypto.pb.PublicKey."""
    def SerializeToString(self) -> bytes:
        """Same as serialize(), under the name that protobuf messages use."""
    def __bytes__(self) -> bytes: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[int, bytes]]: ...

@disjoint_base
class PeerInfo:
    """A peer and its addresses.

    Example:
        info = PeerInfo(peer_id, ["/ip4/127.0.0.1/tcp/4001"])
        print(info.peer_id, info.addrs)
    """

    def __new__(cls, peer_id: PeerIDLike, addrs: Iterable[MultiaddrLike]) -> Self: ...
    @property
    def peer_id(self) -> PeerID:
        """The peer."""
    @property
    def id(self) -> PeerID:
        """Same as peer_id."""
    @property
    def addrs(self) -> list[Multiaddr]:
        """The addresses, in a new list."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[PeerID, list[Multiaddr]]]: ...

@disjoint_base
class StreamInfo:
    """The remote peer of a stream, its address, and the protocol of the stream.

    Example:
        info, stream = await client.stream_open(peer_id, ["/echo/1"])
        print(info.peer_id, info.addr, info.proto)
    """

    def __new__(cls, peer_id: PeerIDLike, addr: MultiaddrLike, proto: str) -> Self: ...
    @property
    def peer_id(self) -> PeerID:
        """The remote peer."""
    @property
    def addr(self) -> Multiaddr:
        """The address of the remote peer."""
    @property
    def proto(self) -> str:
        """The protocol that was agreed on."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(self) -> tuple[type[Self], tuple[PeerID, Multiaddr, str]]: ...

class Identity(NamedTuple):
    """A daemon's peer id, also named id, and the addresses it listens on.

    Example:
        peer_id, addrs = await client.identify()
    """

    peer_id: PeerID
    addrs: tuple[Multiaddr, ...]
    @property
    def id(self) -> PeerID:
        """Same as peer_id."""

@final
class PubsubMessage:
    """A message received on a pubsub topic.

    The raw bytes of the author are also at `getattr(message, "from")`, their name in the protocol.

    Example:
        async for message in await client.pubsub_subscribe("news"):
            print(message.peer_id, message.topic_ids, message.data)
            break
    """

    def __new__(
        cls,
        peer_id: PeerIDLike | None,
        data: BytesLike,
        seqno: BytesLike,
        topic_ids: Iterable[str],
        signature: BytesLike = b"",
        key: BytesLike = b"",
    ) -> Self: ...
    @property
    def peer_id(self) -> PeerID | None:
        """The author; None if the message is anonymous."""
    @property
    def data(self) -> bytes:
        """The published data."""
    @property
    def seqno(self) -> bytes:
        """The author's number for the message. Together with the author it identifies it."""
    @property
    def topic_ids(self) -> tuple[str, ...]:
        """The topics on which the message was published."""
    @property
    def signature(self) -> bytes:
        """The author's signature; empty if the message is unsigned."""
    @property
    def key(self) -> bytes:
        """The author's serialised public key; empty if the peer id contains it."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce__(
        self,
    ) -> tuple[type[Self], tuple[PeerID | None, bytes, bytes, tuple[str, ...], bytes, bytes]]: ...
