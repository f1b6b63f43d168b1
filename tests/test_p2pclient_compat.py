"""The p2pclient compatibility layer: its surface against the original's, and its types."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import get_p2pclient
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.message import EncodeError, Message
from multiaddr import Multiaddr, protocols

import p2pclient_rs
from p2pclient_rs import Stream
from p2pclient_rs.compat.p2pclient import Client, ControlFailure, config, serialization, utils
from p2pclient_rs.compat.p2pclient.control import (
    ControlClient,
    DaemonConnector,
    parse_conn_protocol,
)
from p2pclient_rs.compat.p2pclient.daemon import (
    GoDaemon,
    JsDaemon,
    make_p2pd_pair_ip4,
    make_p2pd_pair_unix,
    try_until_success,
)
from p2pclient_rs.compat.p2pclient.datastructures import PeerInfo, StreamInfo
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.keys import KeyType, PrivateKey, PublicKey
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.rsa import RSAPublicKey, create_new_key_pair
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.peerinfo import (
    InvalidAddrError,
    PeerInfo as PeerInfoLibP2P,
    info_from_p2p_addr,
)
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2
from p2pclient_rs.exceptions import ConnectionLost, DaemonStartError

# Only on p2pd: p2pclient's own suite tests the JavaScript daemon.
pytestmark = pytest.mark.daemons("hivemind", "go")

REQUIRED = FieldDescriptorProto.LABEL_REQUIRED
PEER_ID = ID.from_base58("QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory to import the original p2pclient from."""
    directory = tmp_path_factory.mktemp("original")
    with tarfile.open(get_p2pclient.fetch()) as archive:
        archive.extractall(directory, filter="data")
    return directory / "p2pclient-0.3.0"


# --- the surface ---

# Prints the names that each module of the original defines or imports from another one, and the
# parameters of functions, classes and methods.
SURFACE = """
import importlib, inspect, json, pkgutil, types, p2pclient

def parameters(thing):
    try:
        return [p for p in inspect.signature(thing).parameters if p != "self"]
    except (TypeError, ValueError):
        return None

def described(thing):
    if inspect.isclass(thing) and not hasattr(thing, "DESCRIPTOR"):
        own = {n: m for n, m in vars(thing).items() if not n.startswith("_")}
        return {"methods": {n: parameters(getattr(thing, n)) for n in own},
                "parameters": parameters(thing)}
    return {"parameters": parameters(thing) if callable(thing) else None}

def is_own(thing):
    home = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", "p2pclient")
    return home.startswith("p2pclient")

surface = {}
for info in pkgutil.walk_packages(p2pclient.__path__, "p2pclient."):
    module = importlib.import_module(info.name)
    surface[info.name] = {
        name: described(thing) for name, thing in vars(module).items()
        if is_own(thing) and not name.startswith("_") and name != "annotations"
    }
print(json.dumps(surface))
"""

# Intentionally absent: the open file of the daemon's log, and the pattern with which p2pclient
# guesses whether a daemon is ready.
LEFT_OUT = {"f_log", "LINES_HEAD_PATTERN"}


def test_every_public_name_of_the_original_exists_with_its_parameters(original: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(original)}
    output = subprocess.check_output([sys.executable, "-c", SURFACE], env=environment)
    surface = json.loads(output)
    assert len(surface) > 15
    missing = []
    for module_name, names in surface.items():
        module = importlib.import_module(f"p2pclient_rs.compat.{module_name}")
        for name, description in names.items():
            if not hasattr(module, name):
                missing.append(f"{module_name}.{name}")
                continue
            ours = getattr(module, name)
            missing += differences(f"{module_name}.{name}", ours, description["parameters"])
            for method, parameters in description.get("methods", {}).items():
                if method in LEFT_OUT:
                    continue
                where = f"{module_name}.{name}.{method}"
                if not hasattr(ours, method):
                    missing.append(where)
                else:
                    missing += differences(where, getattr(ours, method), parameters)
    assert missing == []


def differences(where: str, ours: Any, parameters: list[str] | None) -> list[str]:
    if parameters is None or not callable(ours):
        return []
    mine = [name for name in inspect.signature(ours).parameters if name != "self"]
    return [] if mine[: len(parameters)] == parameters else [f"{where}{parameters}: {mine}"]


# --- messages ---


@pytest.fixture(scope="session")
def original_pb(original: Path) -> list[tuple[ModuleType, ModuleType]]:
    """Returns pairs of the original's generated modules and ours."""

    def load(path: str) -> ModuleType:
        file = original / "p2pclient" / path
        spec = importlib.util.spec_from_file_location(f"original_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return [
        (load("pb/p2pd_pb2.py"), p2pd_pb2),
        (load("libp2p_stubs/crypto/pb/crypto_pb2.py"), crypto_pb2),
    ]


def test_messages_have_all_fields_and_values_of_the_originals(
    original_pb: list[tuple[ModuleType, ModuleType]],
) -> None:
    for theirs, ours in original_pb:
        assert theirs.DESCRIPTOR is not ours.DESCRIPTOR
        own_fields = fields_of(ours)
        for name, fields in fields_of(theirs).items():
            for field_name, field in fields.items():
                assert own_fields[name].pop(field_name) == field
            # Programs written for the original do not set fields that it lacks.
            assert REQUIRED not in [label for _, _, label, _ in own_fields[name].values()]
            for enum in theirs.DESCRIPTOR.message_types_by_name[name].enum_types:
                for value in enum.values:
                    assert getattr(getattr(ours, name), value.name) == value.number
                    assert getattr(getattr(ours, name), enum.name).Name(value.number) == value.name
        for enum in theirs.DESCRIPTOR.enum_types_by_name.values():
            assert getattr(ours, enum.name).items() == getattr(theirs, enum.name).items()
            for value in enum.values:
                assert getattr(ours, value.name) == value.number


def fields_of(module: ModuleType) -> dict[str, dict[str, tuple[int, int, int, str]]]:
    """Returns the number, type, label and type name of each field of each message."""
    return {
        message.name: {
            field.name: (field.number, field.type, field.label, field.type_name.rpartition(".")[2])
            for field in message.field
        }
        for message in FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb).message_type
    }


def test_messages_have_the_originals_encoding(
    original_pb: list[tuple[ModuleType, ModuleType]],
) -> None:
    for theirs, ours in original_pb:
        for name in theirs.DESCRIPTOR.message_types_by_name:
            filled = fill(getattr(theirs, name)()).SerializeToString()
            own = getattr(ours, name).FromString(filled)
            assert own.SerializeToString() == filled
            assert own == fill(getattr(ours, name)(), only=getattr(theirs, name).DESCRIPTOR)


def fill(message: Message, only: Any = None) -> Message:
    """Sets every field to some value, or only the fields that another descriptor has."""
    samples: dict[int, Any] = {
        FieldDescriptor.TYPE_STRING: "text",
        FieldDescriptor.TYPE_BYTES: b"\x00\xff",
        FieldDescriptor.TYPE_INT64: -(2**40),
        FieldDescriptor.TYPE_INT32: 7,
    }
    for field in message.DESCRIPTOR.fields:
        counterpart = only.fields_by_name.get(field.name) if only else field
        if counterpart is None:
            continue
        value = getattr(message, field.name)
        repeated = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        if field.message_type:
            fill(value.add() if repeated else value, counterpart.message_type)
            continue
        enum = counterpart.enum_type
        sample = enum.values[-1].number if enum else samples[field.type]
        if repeated:
            value.extend([sample, sample])
        else:
            setattr(message, field.name, sample)
    return message


@pytest.mark.parametrize("module", [p2pd_pb2, crypto_pb2])
def test_stubs_match_the_modules(module: ModuleType) -> None:
    def names(body: list[ast.stmt]) -> set[str]:
        classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
        targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
        return classes | {target.id for target in targets if isinstance(target, ast.Name)}

    stub = ast.parse(Path(str(module.__file__)).with_suffix(".pyi").read_text()).body
    public = {name for name in vars(module) if name[0] != "_"}
    assert names(stub) - {"_Message"} == public
    for node in stub:
        if isinstance(node, ast.ClassDef) and node.name in public:
            message = getattr(module, node.name)
            values = {v.name for enum in message.DESCRIPTOR.enum_types for v in enum.values}
            assert values <= names(node.body), node.name


def test_missing_required_field_is_an_error() -> None:
    with pytest.raises(EncodeError):
        p2pd_pb2.StreamInfo(peer=b"1").SerializeToString()


def test_field_9_of_a_request_is_the_peerstore() -> None:
    request = p2pd_pb2.Request(
        type=p2pd_pb2.Request.PEERSTORE,
        peerStore=p2pd_pb2.PeerstoreRequest(type=p2pd_pb2.PeerstoreRequest.GET_PROTOCOLS, id=b"1"),
    )
    assert request.SerializeToString() == b"\x08\x09\x4a\x05\x08\x01\x12\x011"


def test_messages_can_be_pickled() -> None:
    key = crypto_pb2.PublicKey(key_type=crypto_pb2.Ed25519, data=b"k")
    assert pickle.loads(pickle.dumps(type(key))) is type(key)


# --- data structures ---


def test_peer_info_is_a_mutable_value_with_a_list() -> None:
    addr = Multiaddr("/ip4/127.0.0.1/tcp/1")
    message = p2pd_pb2.PeerInfo(id=PEER_ID.to_bytes(), addrs=[addr.to_bytes()])
    info = PeerInfo.from_pb(message)
    assert type(info) is PeerInfoLibP2P
    assert info == PeerInfo(PEER_ID, (addr,)) != PeerInfo(PEER_ID, [])
    info.addrs.append(addr)
    assert info.addrs == [addr, addr]


def test_stream_info_converts_to_and_from_its_message() -> None:
    info = StreamInfo(PEER_ID, Multiaddr("/unix/a/b"), "p")
    assert (
        info.to_pb().SerializeToString()
        == StreamInfo.from_pb(info.to_pb()).to_pb().SerializeToString()
    )
    assert repr(info) == f"<StreamInfo peer_id={PEER_ID} addr=/unix/a/b proto=p>"


@pytest.mark.parametrize(
    ("addr", "addrs"),
    [
        (f"/ip4/1.2.3.4/tcp/5/p2p/{PEER_ID}", ["/ip4/1.2.3.4/tcp/5"]),
        (f"/p2p/{PEER_ID}", [f"/p2p/{PEER_ID}"]),
    ],
)
def test_p2p_address_splits_into_peer_and_address(addr: str, addrs: list[str]) -> None:
    info = info_from_p2p_addr(Multiaddr(addr))
    assert (info.peer_id, [str(a) for a in info.addrs]) == (PEER_ID, addrs)


@pytest.mark.parametrize("addr", [None, Multiaddr("/ip4/1.2.3.4/tcp/5")])
def test_address_without_a_peer_is_an_error(addr: Multiaddr | None) -> None:
    with pytest.raises(InvalidAddrError, match="/p2p/"):
        info_from_p2p_addr(addr)  # type: ignore[arg-type]


def test_rsa_keys_sign_serialise_and_give_ids() -> None:
    pair = create_new_key_pair(1024)
    signature = pair.private_key.sign(b"data")
    assert pair.public_key.verify(b"data", signature)
    assert not pair.public_key.verify(b"other", signature)

    serialized = pair.public_key.serialize()
    message = PublicKey.deserialize_from_protobuf(serialized)
    assert message.key_type == KeyType.RSA.value == crypto_pb2.RSA
    assert RSAPublicKey.from_bytes(message.data) == pair.public_key
    assert PrivateKey.deserialize_from_protobuf(pair.private_key.serialize()).data == (
        pair.private_key.to_bytes()
    )
    assert ID.from_pubkey(pair.public_key).to_bytes() == (
        b"\x12\x20" + hashlib.sha256(serialized).digest()
    )


# --- addresses ---


def test_connector_and_client_have_the_ecosystems_addresses() -> None:
    connector = DaemonConnector(Multiaddr("/ip4/127.0.0.1/tcp/1"))
    assert isinstance(connector.control_maddr, Multiaddr)
    assert connector.control_maddr == Multiaddr("/ip4/127.0.0.1/tcp/1")
    control = ControlClient(connector, Multiaddr("/unix/a"))
    assert isinstance(control.listen_maddr, Multiaddr)
    assert control.listen_maddr == Multiaddr("/unix/a")


def test_default_addresses_are_read_from_config_at_each_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config, "control_maddr_str", "/unix/c")
    monkeypatch.setattr(config, "listen_maddr_str", "/unix/l")
    control = ControlClient(DaemonConnector())
    assert str(control.daemon_connector.control_maddr) == "/unix/c"
    assert str(control.listen_maddr) == "/unix/l"


def test_address_without_exactly_one_transport_is_refused() -> None:
    assert parse_conn_protocol(Multiaddr("/ip6/::1/tcp/1")) == protocols.P_IP6
    for addr in (f"/p2p/{PEER_ID}", "/ip4/1.2.3.4/tcp/1/p2p-circuit/ip6/::1/tcp/2"):
        with pytest.raises(ValueError, match="neither"):
            parse_conn_protocol(Multiaddr(addr))


# --- messages on streams ---


class Pipe(io.BytesIO):
    """The methods of a stream that reading and writing messages needs."""

    sent = 0

    async def receive(self, max_bytes: int) -> bytes:
        if not (data := self.read(min(max_bytes, 1000))):
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        self.sent += 1
        self.write(item)


@pytest.mark.anyio
async def test_message_is_sent_in_one_piece_and_read_back() -> None:
    pipe = Pipe()
    message = p2pd_pb2.PSMessage(data=b"x" * 5000)
    await utils.write_pbmsg(pipe, message)
    assert pipe.sent == 1
    pipe.write(b"rest")
    pipe.seek(0)
    received = p2pd_pb2.PSMessage()
    await utils.read_pbmsg_safe(pipe, received)
    assert received == message
    assert pipe.read() == b"rest"


@pytest.mark.anyio
async def test_message_over_the_limit_is_refused_unread() -> None:
    pipe = Pipe(b"\xff\xff\xff\xff\x0f" + b"x" * 10)
    with pytest.raises(ValueError, match="4294967295 bytes"):
        await utils.read_pbmsg_safe(pipe, p2pd_pb2.Response())
    assert pipe.tell() == 5


@pytest.mark.anyio
async def test_end_within_a_message_is_an_incomplete_read() -> None:
    for data in (b"", b"\x80", b"\x05abc"):
        with pytest.raises(anyio.IncompleteRead):
            await utils.read_pbmsg_safe(Pipe(data), p2pd_pb2.Response())


@pytest.mark.anyio
async def test_endless_varint_is_refused() -> None:
    pipe = Pipe(b"\x80" * 100)
    with pytest.raises(ValueError, match="64 bits"):
        await serialization.read_unsigned_varint(pipe)
    assert pipe.tell() <= 10


def test_error_response_raises_with_the_daemons_message() -> None:
    response = p2pd_pb2.Response(
        type=p2pd_pb2.Response.ERROR, error=p2pd_pb2.ErrorResponse(msg="no such peer")
    )
    with pytest.raises(ControlFailure, match="no such peer") as raised:
        utils.raise_if_failed(response)
    assert isinstance(raised.value, p2pclient_rs.exceptions.DaemonRefused)
    response.type = p2pd_pb2.Response.OK
    utils.raise_if_failed(response)


# --- on a real daemon ---


@asynccontextmanager
async def two_clients() -> AsyncIterator[tuple[Client, Client]]:
    """Makes two listening clients of two connected daemons with all features enabled."""
    async with (
        make_p2pd_pair_unix("p2pd", True, False, True, True) as alice,
        make_p2pd_pair_ip4("p2pd", True, False, True, True) as bob,
    ):
        await alice.client.connect(*await bob.client.identify())
        yield alice.client, bob.client


@pytest.mark.anyio
async def test_results_have_the_types_of_the_original() -> None:
    async with two_clients() as (alice, bob):
        identity = await bob.identify()
        assert type(identity) is tuple
        bob_id, addrs = identity
        assert type(addrs) is tuple
        assert {type(addr) for addr in addrs} == {Multiaddr}

        (peer,) = await alice.list_peers()
        assert type(peer) is PeerInfoLibP2P
        assert peer.peer_id == bob_id
        assert set(peer.addrs) <= set(addrs)

        async def handler(info: StreamInfo, stream: Stream) -> None:
            await stream.send(repr((type(info), type(info.addr), info.peer_id)).encode())
            await stream.aclose()

        await bob.stream_handler("p", handler)
        assert bob.control.handlers == {"p": handler}
        info, stream = await alice.stream_open(bob_id, ("p",))
        assert type(info) is StreamInfo
        assert (info.peer_id, info.proto) == (bob_id, "p")
        assert info.addr in addrs
        alice_id, _ = await alice.identify()
        assert (await stream.read()).decode() == repr((StreamInfo, Multiaddr, alice_id))
        await stream.aclose()

        key = await alice.dht_get_public_key(bob_id)
        assert isinstance(key, crypto_pb2.PublicKey)
        assert ID.from_pubkey(key.SerializeToString()) == bob_id

        async def is_found() -> bool:
            try:
                found = await alice.dht_find_peer(bob_id)
            except ControlFailure:
                return False
            return type(found) is PeerInfoLibP2P and found.peer_id == bob_id

        await try_until_success(is_found)


@pytest.mark.anyio
async def test_program_can_implement_the_protocol_itself() -> None:
    async with make_p2pd_pair_ip4("p2pd", True, False, False, True) as (_, client):
        stream = await client.control.daemon_connector.open_connection()
        await utils.write_pbmsg(stream, p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        response = p2pd_pb2.Response()
        await utils.read_pbmsg_safe(stream, response)
        peer_id, _ = await client.identify()
        assert response.identify.id == peer_id.to_bytes()
        await stream.aclose()

        subscription = await client.pubsub_subscribe("topic")
        await client.pubsub_publish("topic", b"data")
        message = p2pd_pb2.PSMessage()
        await utils.read_pbmsg_safe(subscription, message)
        assert (message.data, getattr(message, "from")) == (b"data", peer_id.to_bytes())
        await subscription.aclose()
        assert await client.pubsub_get_topics() == ()


@pytest.mark.anyio
async def test_client_can_be_used_and_listen_again_after_close() -> None:
    async with make_p2pd_pair_unix("p2pd", True, False, False, False) as (_, client):
        identity = await client.identify()
        await client.close()
        assert await client.identify() == identity
        other = Client(client.control_maddr, Multiaddr("/ip4/127.0.0.1/tcp/0"))
        for _ in range(2):
            async with other.listen() as listening:
                assert listening is other
                with pytest.raises(ControlFailure, match="already"):
                    async with other.control.listen():
                        pass
        assert await other.identify() == identity
        await other.close()


def test_client_can_be_used_in_successive_event_loops() -> None:
    async def identify_and_close() -> object:
        try:
            return await client.identify()
        finally:
            await client.close()

    with tempfile.TemporaryDirectory() as directory:
        p2pd = GoDaemon("p2pd", Multiaddr(f"/unix{directory}/p2pd"), True, False, False, False)
        try:
            anyio.run(p2pd.wait_until_ready)
            client = Client(p2pd.control_maddr)
            first = anyio.run(identify_and_close)
            assert anyio.run(identify_and_close, backend="trio") == first
            assert anyio.run(client.identify) == first
            assert anyio.run(identify_and_close) == first
        finally:
            p2pd.close()


@pytest.mark.anyio
async def test_handlers_that_the_daemon_cannot_remove_serve_the_next_listen() -> None:
    class Upstream(DaemonConnector):
        async def request(self, name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "REMOVE_STREAM_HANDLER":
                raise ConnectionLost("as the Go daemon answers a request it does not know")

    async def handler(info: StreamInfo, stream: Stream) -> None:
        raise AssertionError("not called")

    control = ControlClient(Upstream(), Multiaddr("/ip4/127.0.0.1/tcp/0"))
    async with control.listen():
        await control.stream_handler("p", handler)
    assert control.handlers == {"p": handler}


@pytest.mark.anyio
async def test_daemon_runs_from_its_constructor_until_close(tmp_path: Path) -> None:
    p2pd = GoDaemon("p2pd", Multiaddr(f"/unix{tmp_path}/p2pd"), True, True, False, False)
    try:
        assert p2pd.control_maddr == Multiaddr(f"/unix{tmp_path}/p2pd")
        assert p2pd.proc_daemon.poll() is None
        await p2pd.wait_until_ready()
        assert "Peer ID:" in Path(p2pd.log_filename).read_text()
        assert not p2pd.is_closed
    finally:
        p2pd.close()
    assert p2pd.is_closed
    assert p2pd.proc_daemon.returncode is not None
    p2pd.close()


@pytest.mark.anyio
async def test_waiting_for_a_daemon_that_ended_fails_at_once() -> None:
    addr = Multiaddr("/ip4/127.0.0.1/tcp/1")
    p2pd = GoDaemon(shutil.which("false") or "", addr, True, False, False, False)
    with pytest.raises(DaemonStartError, match="exited with status 1"):
        await p2pd.wait_until_ready()
    p2pd.close()
    with pytest.raises(FileNotFoundError):
        JsDaemon("/nowhere/jsp2pd", addr, True, False, False, False)


@pytest.mark.anyio
async def test_try_until_success_ends_at_success_or_timeout() -> None:
    answers = iter([False, False, True])

    async def answer() -> bool:
        return next(answers)

    async def never() -> bool:
        return False

    await try_until_success(answer)
    assert list(answers) == []
    with pytest.raises(AssertionError, match=r"still failed after 0\.05 seconds"):
        await try_until_success(never, timeout=0.05)
