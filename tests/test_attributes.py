"""Setting public attributes after creation.

Each attribute that the original packages read on each use either takes effect or cannot be set. The
list is derived from the originals' source.
"""

from __future__ import annotations

import ast
import logging
import socket
import tarfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import get_p2pclient
import hivemind_tree
import pytest
from fake_daemon import STREAM_INFO, frame
from multiaddr import Multiaddr as PyMultiaddr
from support import BACKENDS, DaemonProcess, new_directory

import p2pclient_rs
from p2pclient_rs import DaemonUnreachable, InvalidMultiaddr
from p2pclient_rs.compat.hivemind import control as hm_control, p2pclient as hm_client
from p2pclient_rs.compat.p2pclient import Client as P2PClient, config, control as p2p_control

pytestmark = [pytest.mark.anyio, pytest.mark.needs("unary")]

Proof: TypeAlias = "Callable[[Layer], Awaitable[None]]"


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons that keep running when their clients leave."""
    with DaemonProcess("-dhtServer") as one, DaemonProcess("-dhtServer") as other:
        for daemon in (one, other):
            daemon.keep()
        yield one, other


# --- the attributes of the originals ---


def attributes(*sources: str) -> set[str]:
    """Returns the names of the public attributes that classes assign, as ``Class.attribute``."""
    found = set()
    for source in sources:
        for cls in ast.parse(source).body:
            if isinstance(cls, ast.ClassDef):
                found |= {f"{cls.name}.{name}" for name in assigned(cls)}
    return found


def assigned(cls: ast.ClassDef) -> Iterator[str]:
    for node in ast.walk(cls):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                if target.value.id == "self" and not target.attr.startswith("_"):
                    yield target.attr
            elif isinstance(target, ast.Name) and node in cls.body:
                yield target.id


def of_p2pclient() -> set[str]:
    files = "control", "p2pclient", "dht", "pubsub", "connmgr"
    with tarfile.open(get_p2pclient.fetch()) as archive:

        def read(name: str) -> str:
            file = archive.extractfile(f"p2pclient-0.3.0/p2pclient/{name}.py")
            assert file is not None
            return file.read().decode()

        of_config = {
            f"config.{node.targets[0].id}"
            for node in ast.parse(read("config")).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        return of_config | attributes(*map(read, files))


def to_hivemind() -> set[str]:
    package = hivemind_tree.make(new_directory()) / "hivemind"
    bindings = package / "p2p" / "p2p_daemon_bindings"
    return attributes(*((bindings / f"{name}.py").read_text() for name in ("control", "p2pclient")))


# --- the effect of each attribute ---


class Layer:
    """One of the three APIs, with two daemons."""

    def __init__(self, two: tuple[DaemonProcess, DaemonProcess]) -> None:
        self.one, self.other = two
        self.nowhere = f"/unix{new_directory()}/none.sock"
        self.listen = f"/unix{new_directory()}/listen.sock"

    async def client(self) -> Any:
        """Returns a client of the first daemon."""
        raise NotImplementedError

    def maddr(self, text: str) -> Any:
        raise NotImplementedError

    def connector(self, text: str) -> Any:
        raise NotImplementedError

    async def close(self, client: Any) -> None:
        await client.close()

    async def peer_of(self, client: Any) -> str:
        return str((await client.identify())[0])

    def handler(self, greeting: bytes) -> Any:
        async def handler(_: Any, stream: Any) -> None:
            await stream.send(greeting)
            await stream.aclose()

        return handler


class Own(Layer):
    async def client(self) -> Any:
        return p2pclient_rs.Client(self.one.control_maddr, self.listen)

    def maddr(self, text: str) -> Any:
        return p2pclient_rs.Multiaddr(text)

    def connector(self, text: str) -> Any:
        return p2pclient_rs.connector.DaemonConnector(text)


class P2P(Layer):
    async def client(self) -> Any:
        return P2PClient(PyMultiaddr(self.one.control_maddr), PyMultiaddr(self.listen))

    def maddr(self, text: str) -> Any:
        return PyMultiaddr(text)

    def connector(self, text: str) -> Any:
        return p2p_control.DaemonConnector(PyMultiaddr(text))


class Hivemind(Layer):
    async def client(self) -> Any:
        return await hm_client.Client.create(
            hm_client.Multiaddr(self.one.control_maddr), hm_client.Multiaddr(self.listen)
        )

    def maddr(self, text: str) -> Any:
        return hm_client.Multiaddr(text)

    def connector(self, text: str) -> Any:
        return hm_control.DaemonConnector(hm_client.Multiaddr(text))

    async def close(self, client: Any) -> None:
        client.close()

    def handler(self, greeting: bytes) -> Any:
        async def handler(_: Any, reader: Any, writer: Any) -> None:
            writer.write(greeting)
            await writer.drain()
            writer.close()

        return handler


async def control_maddr(layer: Layer) -> None:
    client = await layer.client()
    connector = client.control.daemon_connector
    assert await layer.peer_of(client) == str(layer.one.peer_id)
    for daemon in (layer.other, layer.one, layer.other):
        maddr = layer.maddr(daemon.control_maddr)
        connector.control_maddr = maddr
        assert connector.control_maddr == maddr and type(connector.control_maddr) is type(maddr)
        for _ in range(3):
            assert await layer.peer_of(client) == str(daemon.peer_id)
        await client.list_peers()
    with pytest.raises(ValueError):
        connector.control_maddr = "no address"
    assert await layer.peer_of(client) == str(layer.other.peer_id)
    connector.control_maddr = layer.maddr(layer.nowhere)
    with pytest.raises(DaemonUnreachable):
        await client.identify()
    await layer.close(client)


async def requests_in_flight(layer: Layer) -> None:
    """Either daemon may answer requests that are in flight when the address is set."""
    client = await layer.client()
    await client.identify()
    peers: list[str] = []

    async def identify() -> None:
        peers.append(await layer.peer_of(client))

    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(identify)
        await anyio.sleep(0)
        client.control.daemon_connector.control_maddr = layer.maddr(layer.other.control_maddr)
    assert set(peers) <= {str(layer.one.peer_id), str(layer.other.peer_id)} and len(peers) == 5
    assert await layer.peer_of(client) == str(layer.other.peer_id)
    await layer.close(client)


async def daemon_connector(layer: Layer) -> None:
    client = await layer.client()
    assert await layer.peer_of(client) == str(layer.one.peer_id)
    connector = client.control.daemon_connector
    client.control.daemon_connector = layer.connector(layer.other.control_maddr)
    assert await layer.peer_of(client) == str(layer.other.peer_id)
    await layer.close(client)
    await connector.aclose()


async def listen_maddr(layer: Layer) -> None:
    client = await layer.client()
    first, second = (f"/unix{new_directory()}/listen.sock" for _ in range(2))
    client.control.listen_maddr = layer.maddr(first)
    assert client.control.listen_maddr == layer.maddr(first)
    async with client.listen():
        dial(first).close()
        await client.stream_handler("attributes", layer.handler(b"hello"))
        # The new value applies to later registrations.
        client.control.listen_maddr = layer.maddr(second)
        assert client.control.listen_maddr == layer.maddr(second)
        dial(first).close()
        await client.remove_stream_handler("attributes") if hasattr(
            client, "remove_stream_handler"
        ) else None
    assert client.control.listen_maddr == layer.maddr(second)
    async with client.listen():
        assert not Path(first.removeprefix("/unix")).exists()
        dial(second).close()
    await layer.close(client)


async def handlers(layer: Layer) -> None:
    client = await layer.client()
    async with client.listen():
        await client.stream_handler("/echo", layer.handler(b"first"))
        assert await greeting(layer) == b"first"
        client.control.handlers["/echo"] = layer.handler(b"second")
        assert await greeting(layer) == b"second"
        client.control.handlers = {"/echo": layer.handler(b"third")}
        assert await greeting(layer) == b"third"
        del client.control.handlers["/echo"]
        assert await greeting(layer) == b""
        client.control.handlers["/echo"] = layer.handler(b"fourth")
        assert await greeting(layer) == b"fourth"
    await layer.close(client)


def dial(listen: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(listen.removeprefix("/unix"))
    return connection


async def greeting(layer: Layer) -> bytes:
    """Returns the data that the handler sends on a new ``/echo`` stream."""
    with dial(layer.listen) as connection:
        connection.sendall(frame(STREAM_INFO))
        connection.setblocking(False)
        await anyio.wait_readable(connection)
        try:
            return connection.recv(100)
        except ConnectionResetError:
            return b""


def part(name: str) -> Proof:
    """Replaces one sub-client of a client."""

    async def proof(layer: Layer) -> None:
        client = await layer.client()
        away = layer.connector(layer.nowhere)
        setattr(client, name, type(getattr(client, name))(away))
        call = {
            "control": client.identify,
            "dht": lambda: client.dht_get_value(b"key"),
            "pubsub": client.pubsub_get_topics,
            "connmgr": client.connmgr_trim,
        }[name]
        with pytest.raises(DaemonUnreachable):
            await call()
        await layer.close(client)

    return proof


def connector_of(name: str, call: str, *arguments: object) -> Proof:
    """Replaces the connector of one sub-client."""

    async def proof(layer: Layer) -> None:
        client = await layer.client()
        setattr(getattr(client, name), "daemon_connector", layer.connector(layer.nowhere))  # noqa: B010
        with pytest.raises(DaemonUnreachable):
            await getattr(getattr(client, name), call)(*arguments)
        await layer.close(client)

    return proof


def refused(*path: str) -> Proof:
    async def proof(layer: Layer) -> None:
        client = await layer.client()
        thing = client
        for name in path[:-1]:
            thing = getattr(thing, name)
        before = getattr(thing, path[-1])
        with pytest.raises(AttributeError):
            setattr(thing, path[-1], object())
        assert getattr(thing, path[-1]) == before
        await layer.close(client)

    return proof


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def recording_logger() -> tuple[logging.Logger, list[str]]:
    lines = Lines()
    logger = logging.Logger("of the program", logging.DEBUG)
    logger.addHandler(lines)
    return logger, lines.lines


async def connectors_logger(layer: Layer) -> None:
    client = await layer.client()
    client.control.daemon_connector.logger, lines = recording_logger()
    await client.identify()
    assert any("opens connection to" in line for line in lines)
    await layer.close(client)


async def controls_logger(layer: Layer) -> None:
    client = await layer.client()
    client.control.logger, lines = recording_logger()
    async with client.listen():
        assert await greeting(layer) == b""
    assert any("no handler for the protocol" in line for line in lines)
    await layer.close(client)


def of_config(name: str, shown: str) -> Proof:
    async def proof(layer: Layer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, name, "/unix/somewhere/else.sock")
            client = P2PClient()
        value: Any = client.control
        for part in shown.split("."):
            value = getattr(value, part)
        assert value == PyMultiaddr("/unix/somewhere/else.sock")

    return proof


def default(cls: type, name: str) -> Proof:
    """Changes a class attribute that holds a default address."""

    async def proof(layer: Layer) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cls, name, layer.nowhere)
            if cls is hm_control.DaemonConnector:
                assert str(hm_control.DaemonConnector().control_maddr) == layer.nowhere
                return
            control = await hm_control.ControlClient.create(
                layer.connector(layer.one.control_maddr), use_persistent_conn=False
            )
            assert str(control.listen_maddr) == layer.nowhere
            control.close()

    return proof


async def proto_code(layer: Layer) -> None:
    connector = layer.connector(layer.one.control_maddr)
    assert connector.proto_code == 400
    connector.control_maddr = layer.maddr("/ip4/127.0.0.1/tcp/4001")
    assert connector.proto_code == 4
    with pytest.raises(ValueError):
        connector.control_maddr = layer.maddr("/tcp/4001")
    assert connector.proto_code == 4
    with pytest.raises(AttributeError):
        connector.proto_code = 400


async def new_persistent_connection(layer: Layer) -> None:
    """An open connection stays; a new one goes to the new daemon."""
    client = await layer.client()
    here = await layer.peer_of(client)

    async def handler(data: bytes, caller: Any) -> bytes:
        return data

    await client.add_unary_handler("attributes", handler)
    client.control.daemon_connector.control_maddr = layer.maddr(layer.other.control_maddr)
    # The handler is still registered with the first daemon.
    assert await layer.peer_of(client) != here
    await client.remove_unary_handler("attributes")
    await layer.close(client)

    client = await layer.client()
    client.close()
    client.control.daemon_connector = layer.connector(layer.other.control_maddr)
    await client.add_unary_handler("attributes", handler)
    client.control.daemon_connector.control_maddr = layer.maddr(layer.one.control_maddr)
    taken = await layer.client()
    await taken.add_unary_handler(
        "attributes", handler
    )  # the name is registered with the other daemon, but free here
    for each in (client, taken):
        await each.remove_unary_handler("attributes")
        await layer.close(each)


async def hiveminds_control(layer: Layer) -> None:
    client, other = await layer.client(), await layer.client()
    control, client.control = client.control, other.control
    other.control.daemon_connector.control_maddr = layer.maddr(layer.other.control_maddr)
    assert await layer.peer_of(client) == str(layer.other.peer_id)
    control.close()
    await layer.close(other)


OF_ALL: dict[str, Proof] = {
    "DaemonConnector.control_maddr": control_maddr,
    "ControlClient.daemon_connector": daemon_connector,
    "ControlClient.listen_maddr": listen_maddr,
    "ControlClient.handlers": handlers,
}
OF_PARTS: dict[str, Proof] = {
    "Client.control": part("control"),
    "Client.dht": part("dht"),
    "Client.pubsub": part("pubsub"),
    "Client.connmgr": part("connmgr"),
    "DHTClient.daemon_connector": connector_of("dht", "get_value", b"key"),
    "PubSubClient.daemon_connector": connector_of("pubsub", "get_topics"),
    "ConnectionManagerClient.daemon_connector": connector_of("connmgr", "trim"),
}
OF_P2PCLIENT: dict[str, Proof] = {
    **OF_ALL,
    **OF_PARTS,
    "DaemonConnector.logger": connectors_logger,
    "ControlClient.logger": controls_logger,
    "ControlClient.listener": refused("control", "listener"),
    "ControlClient.task_group": refused("control", "task_group"),
    "config.control_maddr_str": of_config("control_maddr_str", "daemon_connector.control_maddr"),
    "config.listen_maddr_str": of_config("listen_maddr_str", "listen_maddr"),
}
#: Covered by the tests of unary calls.
UNARY = {"ControlClient.persistent_conn_max_msg_size", "ControlClient.unary_handlers"}
OF_HIVEMIND: dict[str, Proof] = {
    **OF_ALL,
    "Client.control": hiveminds_control,
    "DaemonConnector.proto_code": proto_code,
    "DaemonConnector.DEFAULT_CONTROL_MADDR": default(
        hm_control.DaemonConnector, "DEFAULT_CONTROL_MADDR"
    ),
    "ControlClient.DEFAULT_LISTEN_MADDR": default(hm_control.ControlClient, "DEFAULT_LISTEN_MADDR"),
}
OF_OURS: dict[str, Proof] = {
    **OF_ALL,
    **OF_PARTS,
    "requests in flight": requests_in_flight,
    "PeerstoreClient.daemon_connector": connector_of(
        "peerstore", "get_protocols", b"\x12\x20" + bytes(32)
    ),
    "UnaryClient.daemon_connector": connector_of("unary", "open"),
    "ControlClient.logger": controls_logger,
    "ControlClient.stats": refused("control", "stats"),
}


@pytest.mark.parametrize("name", OF_OURS)
async def test_attribute_of_the_client(name: str, two: tuple[DaemonProcess, DaemonProcess]) -> None:
    await OF_OURS[name](Own(two))


def test_table_has_every_attribute_of_p2pclient() -> None:
    assert set(OF_P2PCLIENT) == of_p2pclient()


@pytest.mark.parametrize("name", OF_P2PCLIENT)
async def test_attribute_of_the_p2pclient_layer(
    name: str, two: tuple[DaemonProcess, DaemonProcess]
) -> None:
    await OF_P2PCLIENT[name](P2P(two))


def test_table_has_every_attribute_of_hivemind() -> None:
    assert set(OF_HIVEMIND) | UNARY == to_hivemind()


@pytest.mark.parametrize("name", [*OF_HIVEMIND, "the next persistent connection"])
@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
async def test_attribute_of_the_hivemind_layer(
    name: str, two: tuple[DaemonProcess, DaemonProcess], anyio_backend: Any
) -> None:
    proof = OF_HIVEMIND.get(name, new_persistent_connection)
    await proof(Hivemind(two))


async def test_invalid_address_is_refused_and_changes_nothing() -> None:
    connector = p2pclient_rs.connector.DaemonConnector("/ip4/127.0.0.1/tcp/4001")
    with pytest.raises(InvalidMultiaddr):
        connector.control_maddr = "/no/such"
    assert str(connector.control_maddr) == "/ip4/127.0.0.1/tcp/4001"
    control = p2pclient_rs.Client(listen_maddr="/ip4/127.0.0.1/tcp/0").control
    with pytest.raises(InvalidMultiaddr):
        control.listen_maddr = "/no/such"
    assert str(control.listen_maddr) == "/ip4/127.0.0.1/tcp/0"
