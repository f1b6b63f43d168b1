"""The value types, compared with py-multiaddr, base58, py-multihash and the original packages."""

from __future__ import annotations

import copy
import hashlib
import inspect
import pickle
from typing import Any

import base58
import multiaddr as py_multiaddr
import multihash  # type: ignore[import-untyped]
import pytest

import p2pclient_rs
from p2pclient_rs import (
    ID,
    Identity,
    InvalidMultiaddr,
    InvalidPeerID,
    Multiaddr,
    PeerID,
    PeerInfo,
    Protocol,
    ProtocolLookupError,
    PublicKey,
    PubsubMessage,
    StreamInfo,
)

pytestmark = pytest.mark.independent

RSA = "QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7"
RSA_BYTES = base58.b58decode(RSA)
ED25519 = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"
# The pair of https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
SPEC = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
SPEC_CID = "bafzbeie5745rpv2m6tjyuugywy4d5ewrqgqqhfnf445he3omzpjbx5xqxe"


class HasBytes:
    """A peer id or multiaddr of another library."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def to_bytes(self) -> bytes:
        return self.data


class ForeignID(HasBytes):
    pass


ForeignID.__name__ = "ID"


# --- PeerID ---


@pytest.mark.parametrize(
    "given",
    [RSA, RSA_BYTES, bytearray(RSA_BYTES), memoryview(RSA_BYTES), HasBytes(RSA_BYTES), PeerID(RSA)],
)
def test_peer_id_accepts_every_form_of_its_bytes(given: Any) -> None:
    peer = PeerID(given)
    assert peer.to_bytes() == bytes(peer) == RSA_BYTES
    assert str(peer) == peer.to_base58() == peer.to_string() == peer.pretty() == RSA
    assert repr(peer) == f"<libp2p.peer.id.ID ({RSA})>"
    assert ID is PeerID


def test_peer_id_converts_to_and_from_base58_and_cid() -> None:
    peer = PeerID.from_base58(SPEC)
    assert peer.to_cid() == SPEC_CID
    assert PeerID.from_string(SPEC_CID) == PeerID.from_string(SPEC) == PeerID(SPEC_CID) == peer
    assert PeerID(ED25519).to_bytes() == base58.b58decode(ED25519)


def test_peer_id_accepts_arbitrary_bytes_as_the_originals_do() -> None:
    for data in (b"", b"abc", bytes(40), b"\xff" * 40):
        peer = PeerID(data)
        assert peer == PeerID.from_bytes(data)
        assert peer.to_base58() == base58.b58encode(data).decode()
        assert not peer.is_valid()
    assert PeerID(RSA).is_valid()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("Qm0OIl", "it is not base58"),
        (RSA[:-1], "its multihash declares a digest of"),
        (RSA + "1", "its multihash declares"),
        ("not a peer", "neither base58"),
        ("bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy", "codec 0x55"),
        ("Qm\ud800", "surrogates"),
    ],
)
@pytest.mark.parametrize("make", [PeerID, PeerID.from_base58, PeerID.from_string])
def test_invalid_peer_id_text_is_refused_with_the_reason(make: Any, text: str, reason: str) -> None:
    with pytest.raises(InvalidPeerID, match=reason) as error:
        make(text)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("wrong", [None, 5, 1.5, ["Qm"], object()])
def test_peer_id_of_a_wrong_type_raises_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a peer id, not <class"):
        PeerID(wrong)
    with pytest.raises(TypeError):
        PeerID.from_bytes(wrong)


def test_errors_of_to_bytes_propagate() -> None:
    class Broken:
        def to_bytes(self) -> bytes:
            raise ZeroDivisionError

    for make in (PeerID, Multiaddr):
        with pytest.raises(ZeroDivisionError):
            make(Broken())
        with pytest.raises(TypeError):
            make(HasBytes("text"))  # type: ignore[arg-type]


def test_peer_id_equals_its_texts_its_bytes_and_foreign_peer_ids() -> None:
    peer = PeerID(SPEC)
    data = base58.b58decode(SPEC)
    for same in (SPEC, SPEC_CID, data, ForeignID(data), PeerID(data)):
        assert peer == same
        assert same == peer
        assert not peer != same
    for other in (RSA, "nonsense", RSA_BYTES, ForeignID(RSA_BYTES), PeerID(RSA), None, 1):
        assert peer != other
        assert not peer == other
    # Equal bytes of an unrelated class are not enough.
    assert peer != HasBytes(data)
    assert peer.__eq__(1) is NotImplemented


def test_peer_id_hashes_like_its_bytes() -> None:
    peer = PeerID(RSA)
    assert hash(peer) == hash(RSA_BYTES)
    assert {peer: 1}[RSA_BYTES] == {RSA_BYTES: 1}[peer] == 1  # type: ignore[index]


def test_peer_ids_are_ordered_by_base58_text() -> None:
    # Their lengths differ, so the order of their bytes is the opposite.
    low, high = PeerID(ED25519), PeerID(RSA)
    assert low < high and low <= high and high > low and high >= low and low <= PeerID(low)
    peers = [PeerID(bytes([i, 7 * i % 256, 3]) * (1 + i % 3)) for i in range(60)]
    assert [str(p) for p in sorted(peers)] == sorted(str(p) for p in peers)
    for other in (RSA, RSA_BYTES, 1):
        with pytest.raises(TypeError, match="not supported between"):
            assert low < other  # type: ignore[operator]


def test_xor_id_is_the_sha256_of_the_bytes() -> None:
    assert PeerID(RSA).xor_id == int(hashlib.sha256(RSA_BYTES).hexdigest(), 16)


@pytest.mark.parametrize(("length", "inlined"), [(38, True), (39, False)])
def test_from_pubkey_inlines_short_keys_and_hashes_long_ones(length: int, inlined: bool) -> None:
    key = PublicKey(1, bytes(length))
    serialized = key.serialize()
    assert len(serialized) == length + 4

    class Key:
        def serialize(self) -> bytes:
            return serialized

    sha256 = multihash.encode(hashlib.sha256(serialized).digest(), "sha2-256")
    expected = bytes([0, 42]) + serialized if inlined else sha256
    for given in (key, serialized, Key()):
        assert PeerID.from_pubkey(given).to_bytes() == expected
    assert key.peer_id == expected
    with pytest.raises(InvalidPeerID, match="not a serialised public key"):
        PeerID.from_pubkey(b"\xff\xff")
    with pytest.raises(TypeError):
        PeerID.from_pubkey(7)  # type: ignore[arg-type]


def test_class_methods_of_a_subclass_return_the_subclass() -> None:
    class MyID(PeerID):
        pass

    made = [MyID.from_base58(RSA), MyID.from_string(RSA), MyID.from_bytes(RSA_BYTES), MyID(RSA)]
    assert {type(peer) for peer in made} == {MyID}
    assert type(MyID.from_pubkey(PublicKey(1, b"k"))) is MyID
    assert made[0] == PeerID(RSA)


# --- Multiaddr ---

TEXTS = [
    "/ip4/127.0.0.1/tcp/4001",
    "/ip6/::1/udp/9/quic-v1",
    "/ip6/::ffff:1.2.3.4/tcp/1",
    "/dns/example.com/tcp/443/tls/ws",
    "/dns4/example.com/tcp/443/wss",
    f"/ip4/1.2.3.4/tcp/1/p2p/{RSA}",
    f"/ip4/1.2.3.4/tcp/1/p2p/{RSA}/p2p-circuit/p2p/{ED25519}",
    "/memory/7",
]


@pytest.mark.parametrize("text", TEXTS)
def test_multiaddr_agrees_with_py_multiaddr(text: str) -> None:
    ours, theirs = Multiaddr(text), py_multiaddr.Multiaddr(text)
    assert ours.to_bytes() == bytes(ours) == theirs.to_bytes()
    assert str(ours) == str(theirs) == text
    assert repr(ours) == repr(theirs)
    assert hash(ours) == hash(theirs)
    assert ours == theirs and theirs == ours and not ours != theirs
    assert ours == Multiaddr(theirs) == Multiaddr(theirs.to_bytes()) == Multiaddr(ours)
    assert [(p.name, p.code, p.vcode) for p in ours.protocols()] == [
        (p.name, p.code, p.vcode) for p in theirs.protocols()
    ]
    assert [(p.name, value) for p, value in ours.items()] == [
        (p.name, value) for p, value in theirs.items()
    ]
    for proto in theirs.protocols():
        for key in (proto.name, proto.code, proto):
            assert ours.value_for_protocol(key) == theirs.value_for_protocol(key)
    for maxsplit in (-1, 0, 1, 2, 99):
        split = [str(addr) for addr in theirs.split(maxsplit)]
        assert [str(addr) for addr in ours.split(maxsplit)] == split
    assert Multiaddr.join(*ours.split()) == ours


def test_unix_path_is_encoded_like_go_and_also_decoded_like_py_multiaddr() -> None:
    ours, theirs = Multiaddr("/unix/tmp/p2pd.sock"), py_multiaddr.Multiaddr("/unix/tmp/p2pd.sock")
    assert ours.to_bytes() == b"\x90\x03\x0e/tmp/p2pd.sock"
    assert theirs.to_bytes() == b"\x90\x03\x0dtmp/p2pd.sock"
    assert Multiaddr(theirs).to_bytes() == ours.to_bytes()
    assert Multiaddr(theirs.to_bytes()) == ours == theirs
    assert str(py_multiaddr.Multiaddr(ours.to_bytes())) == str(ours) == str(theirs)
    assert ours.value_for_protocol("unix") == theirs.value_for_protocol("unix") == "/tmp/p2pd.sock"
    assert Multiaddr.from_bytes(theirs.to_bytes()).to_bytes() == theirs.to_bytes()
    after = Multiaddr("/ip4/1.2.3.4/tcp/5/unix/a b/tcp/6")
    assert after["unix"] == "/a b/tcp/6"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "it is empty"),
        ("/", "it is empty"),
        ("ip4/1.2.3.4", "does not begin with a slash"),
        ("/nope/1", 'no protocol named "nope"'),
        ("/ip4", "ip4 has no value after it"),
        ("/ip4/1.2.3", '"1.2.3" is no value for ip4'),
        ("/ip4/1.2.3.4/tcp/65536", '"65536" is no value for tcp: number too large'),
        ("/p2p/Qm123", '"Qm123" is no value for p2p'),
        ("/unix", "unix has no value"),
        ("/unix/\udcff", "surrogates"),
        (b"", "it is empty"),
        (b"\x04\x01\x02", "malformed at byte 0"),
        (b"\x04\x01\x02\x03\x04\x06\x01", "malformed at byte 5"),
        (b"\x90\x03\x05/tmp", "cut short"),
        (b"\x90\x03\x02/a\x06\x00\x01", "/unix is not its last protocol"),
        (HasBytes(b"\x80"), "malformed"),
    ],
)
def test_invalid_multiaddr_is_refused_with_the_reason(given: Any, reason: str) -> None:
    with pytest.raises(InvalidMultiaddr, match=reason) as error:
        Multiaddr(given)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("wrong", [None, 5, 1.5, ["/ip4/1.2.3.4"], object()])
def test_multiaddr_of_a_wrong_type_raises_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a multiaddr, not <class"):
        Multiaddr(wrong)


def test_multiaddr_with_an_unknown_protocol_is_preserved() -> None:
    data = b"\x04\x01\x02\x03\x04\xff\xff\x03abc"
    addr = Multiaddr(data)
    assert addr.to_bytes() == data
    assert str(addr) == "/ip4/1.2.3.4/unknown/ffff03616263"
    assert pickle.loads(pickle.dumps(addr)) == addr
    for call in (addr.protocols, addr.items, addr.split, lambda: addr.value_for_protocol("ip4")):
        with pytest.raises(InvalidMultiaddr, match="protocol 65535 is not known"):
            call()


def test_value_for_protocol_raises_a_lookup_error_when_absent() -> None:
    addr = Multiaddr("/ip4/1.2.3.4/tcp/5/ws")
    assert addr.value_for_protocol("ws") is None
    for absent in ("udp", 273, "nonsense"):
        with pytest.raises(ProtocolLookupError, match=f"{addr} has no protocol {absent}") as error:
            addr.value_for_protocol(absent)
        assert isinstance(error.value, LookupError)
        with pytest.raises(LookupError):
            addr[absent]
    with pytest.raises(TypeError):
        addr.value_for_protocol(1.5)  # type: ignore[arg-type]


def test_encapsulate_and_decapsulate() -> None:
    base, peer = Multiaddr("/ip4/1.2.3.4/tcp/5"), f"/p2p/{RSA}"
    whole = base.encapsulate(peer)
    assert str(whole) == f"/ip4/1.2.3.4/tcp/5/p2p/{RSA}"
    assert (
        whole == base.encapsulate(Multiaddr(peer)) == base.encapsulate(Multiaddr(peer).to_bytes())
    )
    assert whole.decapsulate(peer) == base
    assert whole.decapsulate("/tcp/5") == Multiaddr("/ip4/1.2.3.4")
    # Cuts at the last match, and matches whole components. py-multiaddr matches text.
    assert str(Multiaddr("/tcp/1/tcp/2/tcp/1").decapsulate("/tcp/1")) == "/tcp/1/tcp/2"
    for absent in ("/tcp/6", "/ip4/1.2.3.4/tcp/6", "/ip4/1.2.3.4/tcp/5/ws"):
        with pytest.raises(ValueError, match="is not in"):
            base.decapsulate(absent)
    empty = base.decapsulate(base)
    assert (str(empty), empty.to_bytes(), empty.protocols()) == ("", b"", [])
    with pytest.raises(ValueError, match="is not in"):
        base.decapsulate(empty)
    with pytest.raises(InvalidMultiaddr, match="/unix is not its last"):
        Multiaddr("/unix/a").encapsulate("/tcp/1")


def test_multiaddrs_compare() -> None:
    first, second = Multiaddr("/ip4/1.2.3.4"), Multiaddr("/ip4/1.2.3.5")
    assert first < second and sorted([second, first]) == [first, second]
    assert first != "/ip4/1.2.3.4" and first != first.to_bytes() and first != None  # noqa: E711
    assert {first, Multiaddr("/ip4/1.2.3.4")} == {first}


def test_protocols_compare_and_print() -> None:
    ip4, tcp = Multiaddr("/ip4/1.2.3.4/tcp/5").protocols()
    assert ip4 == Multiaddr("/ip4/0.0.0.0").protocols()[0] and ip4 != tcp
    assert len({ip4, tcp, ip4}) == 2
    assert repr(tcp) == "Protocol(code=6, name='tcp')"
    assert isinstance(tcp, Protocol)


# --- results of requests ---

ADDR = Multiaddr("/ip4/1.2.3.4/tcp/5")


@pytest.mark.parametrize("peer", [RSA, RSA_BYTES, PeerID(RSA), HasBytes(RSA_BYTES)])
@pytest.mark.parametrize(
    "addr", [str(ADDR), ADDR.to_bytes(), ADDR, py_multiaddr.Multiaddr(ADDR.to_bytes())]
)
def test_peer_info_and_stream_info_accept_every_form_of_their_bytes(peer: Any, addr: Any) -> None:
    info = PeerInfo(peer, [addr])
    assert (info.peer_id, info.addrs) == (PeerID(RSA), [ADDR])
    assert info == PeerInfo(RSA, (ADDR,)) and hash(info) == hash(PeerInfo(RSA, (ADDR,)))
    assert info != PeerInfo(RSA, []) and info != PeerInfo(ED25519, [ADDR]) and info != 1
    assert str(info) == f"{RSA} {ADDR}"
    assert (
        repr(info) == f"PeerInfo(peer_id=<libp2p.peer.id.ID ({RSA})>, addrs=[<Multiaddr {ADDR}>])"
    )
    stream = StreamInfo(peer, addr, "/echo/1.0.0")
    assert (stream.peer_id, stream.addr, stream.proto) == (PeerID(RSA), ADDR, "/echo/1.0.0")
    assert stream == StreamInfo(RSA, ADDR, "/echo/1.0.0") != StreamInfo(RSA, ADDR, "/echo/2.0.0")
    assert repr(stream) == f"<StreamInfo peer_id={RSA} addr={ADDR} proto=/echo/1.0.0>"


def test_peer_info_and_stream_info_refuse_invalid_arguments() -> None:
    with pytest.raises(InvalidPeerID):
        PeerInfo("nobody", [])
    with pytest.raises(InvalidMultiaddr):
        PeerInfo(RSA, ["nowhere"])
    with pytest.raises(TypeError, match="expected an iterable of multiaddrs, not <class 'str'>"):
        PeerInfo(RSA, "/ip4/1.2.3.4")
    with pytest.raises(InvalidMultiaddr):
        StreamInfo(RSA, "nowhere", "/echo")
    with pytest.raises(TypeError):
        StreamInfo(RSA, ADDR, 5)  # type: ignore[arg-type]


def test_addrs_of_a_peer_info_is_a_copy() -> None:
    info = PeerInfo(RSA, [ADDR])
    info.addrs.clear()
    assert info.addrs == [ADDR]


def test_identity_is_a_named_pair() -> None:
    identity = Identity(PeerID(RSA), (ADDR,))
    peer_id, addrs = identity
    assert (peer_id, addrs) == (PeerID(RSA), (ADDR,))
    assert identity == Identity(peer_id, addrs) and tuple(identity) == (peer_id, addrs)
    assert identity.__eq__((peer_id, addrs)) is True
    assert identity.peer_id is identity.id is identity[0] and identity.addrs is identity[1]
    assert len(identity) == 2
    assert repr(identity) == (
        f"Identity(peer_id=<libp2p.peer.id.ID ({RSA})>, addrs=(<Multiaddr {ADDR}>,))"
    )


def test_public_key_agrees_with_libp2ps_protobuf() -> None:
    key = PublicKey(1, b"\x05\x06")
    assert key.serialize() == key.SerializeToString() == bytes(key) == b"\x08\x01\x12\x02\x05\x06"
    assert PublicKey.from_bytes(key.serialize()) == key != PublicKey(0, b"\x05\x06")
    assert (key.key_type, key.data) == (1, b"\x05\x06")
    assert repr(key) == f"<PublicKey key_type=1 peer_id={key.peer_id}>"
    for bad, reason in (
        (b"", "no key_type"),
        (b"\x08\x01", "no data"),
        (b"\xff", "protobuf|varint"),
    ):
        with pytest.raises(ValueError, match=reason):
            PublicKey.from_bytes(bad)
    with pytest.raises(TypeError):
        PublicKey(1, "text")  # type: ignore[arg-type]


def test_pubsub_message_has_all_fields() -> None:
    message = PubsubMessage(RSA, b"data", b"\x00\x01", ["a", "b"], b"sig", b"key")
    assert message.peer_id == RSA
    assert getattr(message, "from") == RSA_BYTES
    assert (message.data, message.seqno, message.topic_ids) == (b"data", b"\x00\x01", ("a", "b"))
    assert (message.signature, message.key) == (b"sig", b"key")
    assert message != PubsubMessage(RSA, b"data", b"\x00\x01", ["a", "b"])
    assert repr(message) == f"<PubsubMessage peer_id={RSA} topics=a,b 4 bytes>"
    anonymous = PubsubMessage(None, b"", b"", [])
    assert anonymous.peer_id is None
    assert getattr(anonymous, "from") == anonymous.signature == anonymous.key == b""
    with pytest.raises(AttributeError, match="no attribute 'form'"):
        assert anonymous.form  # type: ignore[attr-defined]


# --- all value types ---

VALUES = [
    PeerID(RSA),
    PeerID(b"no multihash"),
    Multiaddr("/unix/tmp/x"),
    Multiaddr.from_bytes(b"\x04malformed"),
    PublicKey(7, b"data"),
    PeerInfo(RSA, [ADDR]),
    StreamInfo(RSA, ADDR, "/echo"),
    Identity(PeerID(RSA), (ADDR,)),
    PubsubMessage(RSA, b"d", b"s", ["t"], b"sig", b"key"),
    PubsubMessage(None, b"", b"", []),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_survive_pickle_and_copy(value: Any) -> None:
    copies = [pickle.loads(pickle.dumps(value, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for twin in [*copies, copy.copy(value), copy.deepcopy(value)]:
        assert twin == value and type(twin) is type(value) and hash(twin) == hash(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_immutable(value: Any) -> None:
    for name in ("peer_id", "data", "addrs", "anything"):
        with pytest.raises(AttributeError):
            setattr(value, name, 1)


def test_public_types_have_module_and_signature() -> None:
    for cls in (
        PeerID,
        Multiaddr,
        Protocol,
        PublicKey,
        PeerInfo,
        StreamInfo,
        Identity,
        PubsubMessage,
        InvalidPeerID,
        InvalidMultiaddr,
        ProtocolLookupError,
    ):
        assert cls.__module__ == "p2pclient_rs"
        assert getattr(p2pclient_rs, cls.__name__) is cls
        assert cls.__doc__
    assert list(inspect.signature(StreamInfo).parameters) == ["peer_id", "addr", "proto"]
    assert str(inspect.signature(Multiaddr.split)) == "(self, /, maxsplit=-1)"
