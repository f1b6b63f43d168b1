"""The hivemind compatibility layer, side by side with the original.

The same tests run on hivemind's own bindings, on ours with hivemind's types, and on ours without
hivemind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import logging
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import hivemind_tree
import pytest
from fake_daemon import OK, PEER, STREAM_OPENED, UPGRADE, Connection, FakeDaemon, decode, frame
from forking import fork
from google.protobuf import descriptor_pool
from support import BACKENDS, DaemonProcess, new_directory, open_descriptors, until

import p2pclient_rs
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2

# The original leaves sockets to the garbage collector. conftest checks that ours closes them.
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.needs("unary"),
]

MIB = 1 << 20
MODULES = ("control", "p2pclient", "utils", "datastructures")


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Bindings:
    """One of the three bindings; their public names are its attributes."""

    def __init__(self, kind: str, package: str) -> None:
        self.is_original = kind == "original"
        self.has_hivemind = kind != "ours alone"
        self.modules = {name: importlib.import_module(f"{package}.{name}") for name in MODULES}
        self.Multiaddr = self.modules["datastructures"].Multiaddr

    def __getattr__(self, name: str) -> Any:
        for module in self.modules.values():
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(name)


def forget(*packages: str) -> dict[str, types.ModuleType]:
    """Removes packages from ``sys.modules``, and returns the removed modules."""
    return {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if any(name == package or name.startswith(f"{package}.") for package in packages)
    }


@pytest.fixture(scope="module")
def all_bindings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bindings]]:
    """Loads all three bindings side by side, and removes them afterwards."""
    before = forget("hivemind", "p2pclient_rs.compat.hivemind")
    alone = Bindings("ours alone", "p2pclient_rs.compat.hivemind")
    forget("p2pclient_rs.compat.hivemind")
    path = str(hivemind_tree.make(tmp_path_factory.mktemp("hivemind")))
    sys.path.insert(0, path)
    # A separate descriptor pool, as the default one may have p2pclient's files of the same names.
    pool = descriptor_pool.DescriptorPool()
    # With another start method, which is CPython 3.14's default, the original's locks would start a
    # process that stays alive.
    start_method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("fork", force=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(descriptor_pool, "Default", lambda: pool)
            original = Bindings("original", "hivemind.p2p.p2p_daemon_bindings")
        yield {
            "original": original,
            "ours": Bindings("ours", "p2pclient_rs.compat.hivemind"),
            "ours alone": alone,
        }
    finally:
        multiprocessing.set_start_method(start_method, force=True)
        sys.path.remove(path)
        forget("hivemind", "p2pclient_rs.compat.hivemind")
        sys.modules.update(before)


@pytest.fixture(params=["original", "ours", "ours alone"])
def b(all_bindings: dict[str, Bindings], request: pytest.FixtureRequest) -> Bindings:
    return all_bindings[request.param]


@pytest.fixture
def ours(all_bindings: dict[str, Bindings]) -> Bindings:
    return all_bindings["ours"]


@pytest.fixture(scope="module")
def two_daemons() -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Runs two daemons, each with a persistent connection, as a daemon exits with its last one."""
    with DaemonProcess("-dhtServer") as first, DaemonProcess("-dhtServer") as second:
        holders = []
        for daemon in (first, second):
            holder = socket.socket(socket.AF_UNIX)
            holder.connect(daemon.control_maddr.removeprefix("/unix"))
            holder.sendall(b"\x02\x08\x09")
            assert holder.recv(10) == b"\x02\x08\x00"
            holders.append(holder)
        yield first, second
        for holder in holders:
            holder.close()


class Clients:
    """Makes clients of one kind of bindings, and closes them."""

    def __init__(self, b: Bindings) -> None:
        self.b = b
        self.made: list[Any] = []

    async def make(self, daemon: DaemonProcess, **options: Any) -> Any:
        maddr = self.b.Multiaddr
        client = await self.b.Client.create(
            maddr(daemon.control_maddr), maddr(daemon.listen_maddr()), **options
        )
        self.made.append(client)
        return client

    async def close(self) -> None:
        while self.made:
            client = self.made.pop()
            client.close()
            if self.b.is_original:
                Path(client.control.listen_maddr["unix"]).unlink(missing_ok=True)
        # The original's tasks end shortly after that.
        others = asyncio.all_tasks() - {asyncio.current_task()}
        names = ("_read_from_persistent", "_write_to_persistent", "_handle_persistent")
        await until(lambda: not any(n in repr(t) for n in names for t in others if not t.done()))


@pytest.fixture
async def clients(b: Bindings, anyio_backend: Any) -> AsyncIterator[Clients]:
    clients = Clients(b)
    yield clients
    await clients.close()


class Pair:
    """Makes two clients of two connected daemons."""

    def __init__(self, b: Bindings, near: Any, far: Any, far_id: Any, near_id: Any) -> None:
        self.b, self.near, self.far, self.far_id, self.near_id = b, near, far, far_id, near_id


@pytest.fixture
async def two(
    b: Bindings, clients: Clients, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> Pair:
    near, far = [await clients.make(daemon) for daemon in two_daemons]
    (near_id, _), (far_id, maddrs) = await near.identify(), await far.identify()
    await near.connect(far_id, maddrs)
    return Pair(b, near, far, far_id, near_id)


# --- the surface ---


def test_every_public_name_of_the_original_exists_with_its_parameters(
    all_bindings: dict[str, Bindings],
) -> None:
    original, ours = all_bindings["original"], all_bindings["ours"]
    missing = []
    for module_name, module in original.modules.items():
        for name, thing in vars(module).items():
            home = getattr(thing, "__module__", "")
            if name.startswith("_") or isinstance(thing, types.ModuleType):
                continue
            if not home.startswith("hivemind.p2p") and not name.isupper():
                continue
            stand_in = getattr(ours.modules[module_name], name, None)
            if stand_in is None:
                missing.append(f"{module_name}.{name}")
            elif inspect.isclass(thing):
                for method, function in vars(thing).items():
                    if not method.startswith("_") and not accepts(stand_in, method, function):
                        missing.append(f"{module_name}.{name}.{method}")
            elif callable(thing) and not accepts(ours.modules[module_name], name, thing):
                missing.append(f"{module_name}.{name}()")
    assert missing == []


def accepts(owner: Any, name: str, original: Any) -> bool:
    """Returns whether the attribute exists and has the original's parameters, in the same order."""
    original = getattr(original, "__func__", original)
    if not callable(original):
        return hasattr(owner, name)

    def parameters(function: Any) -> list[str]:
        names = list(inspect.signature(function).parameters)
        return names[1:] if names[:1] in (["self"], ["cls"]) else names

    wanted = parameters(original)
    return hasattr(owner, name) and parameters(getattr(owner, name))[: len(wanted)] == wanted


def test_constants(all_bindings: dict[str, Bindings]) -> None:
    for name in ("DEFAULT_MAX_MSG_SIZE", "MAX_UNARY_PAYLOAD_SIZE", "DEFAULT_MAX_BITS", "CallID"):
        assert len({getattr(b, name) for b in all_bindings.values()}) == 1


# The original's __del__ fails on an object whose __init__ failed.
@pytest.mark.filterwarnings("ignore:Exception ignored .*<function (Client|ControlClient).__del__")
async def test_clients_are_made_by_create(b: Bindings) -> None:
    with pytest.raises(AssertionError, match=r"Please use Client\.create"):
        b.Client()
    with pytest.raises(AssertionError, match=r"Please use ControlClient\.create"):
        b.ControlClient(b.DaemonConnector())
    with pytest.raises((ValueError, TypeError)):
        b.DaemonConnector(b.Multiaddr("/tcp/1234"))


def test_parse_conn_protocol(b: Bindings) -> None:
    assert b.parse_conn_protocol(b.Multiaddr("/unix/tmp/x")) == 400
    assert b.parse_conn_protocol(b.Multiaddr("/ip4/127.0.0.1/tcp/1")) == 4
    with pytest.raises(ValueError, match="only one protocol"):
        b.parse_conn_protocol(b.Multiaddr("/tcp/1"))


async def test_control_client_has_the_attributes_of_the_original(
    b: Bindings, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    connector = b.DaemonConnector(b.Multiaddr(two_daemons[0].control_maddr))
    listen_maddr = b.Multiaddr(two_daemons[0].listen_maddr())
    control = await b.ControlClient.create(connector, listen_maddr, False)
    assert connector.proto_code == 400
    assert str(connector.control_maddr) == two_daemons[0].control_maddr
    assert control.daemon_connector is connector
    assert control.listen_maddr is listen_maddr
    assert control.persistent_conn_max_msg_size == 8 * MIB
    assert (control.handlers, control.unary_handlers) == ({}, {})
    peer_id, _ = await control.identify()
    assert peer_id == two_daemons[0].peer_id.to_base58()
    control.close()


# --- peers ---


async def test_identify_and_list_peers_return_the_types_of_the_bindings(two: Pair) -> None:
    b = two.b
    peer_id, maddrs = await two.far.identify()
    assert type(peer_id) is b.PeerID
    assert isinstance(maddrs, tuple) and {type(maddr) for maddr in maddrs} == {b.Multiaddr}
    peers = await two.near.list_peers()
    assert isinstance(peers, tuple)
    (info,) = (info for info in peers if info.peer_id == peer_id)
    assert isinstance(info, b.PeerInfo)
    assert type(info.peer_id) is b.PeerID
    assert isinstance(info.addrs, list) and {type(a) for a in info.addrs} == {b.Multiaddr}


async def test_connect_and_disconnect(
    two: Pair, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    async def is_connected() -> bool:
        return any(info.peer_id == two.far_id for info in await two.near.list_peers())

    assert await is_connected()
    await two.near.disconnect(two.far_id)
    while await is_connected():
        await asyncio.sleep(0.01)
    with pytest.raises(two.b.ControlFailure):
        await two.near.connect(two.b.PeerID(b"\x12\x20" + bytes(32)), [])


# --- unary calls ---


async def test_call_returns_the_handlers_reply(two: Pair) -> None:
    callers = []

    async def double(request: bytes, caller: Any) -> bytes:
        callers.append(caller)
        return request * 2

    await two.far.add_unary_handler("double", double)
    assert two.far.control.unary_handlers == {"double": double}
    for request in (b"", b"x", os.urandom(MIB)):
        assert await two.near.call_unary_handler(two.far_id, "double", request) == request * 2
    assert callers == [two.near_id] * 3
    assert {type(caller) for caller in callers} == {two.b.PeerID}
    replies = await asyncio.gather(
        *(two.near.call_unary_handler(two.far_id, "double", b"%d" % n) for n in range(200))
    )
    assert replies == [b"%d%d" % (n, n) for n in range(200)]


async def test_handlers_exception_reaches_the_caller(two: Pair) -> None:
    async def fail(request: bytes, caller: Any) -> bytes:
        raise KeyError("of the handler")

    await two.far.add_unary_handler("fail", fail)
    with pytest.raises(two.b.P2PHandlerError) as raised:
        await two.near.call_unary_handler(two.far_id, "fail", b"")
    assert str(raised.value) == "KeyError('of the handler')"
    assert not isinstance(raised.value, two.b.P2PDaemonError)


async def test_handler_is_registered_once_and_can_be_removed(two: Pair) -> None:
    async def echo(request: bytes, caller: Any) -> bytes:
        return request

    with pytest.raises(two.b.P2PDaemonError, match="^Handler for protocol e is not registered$"):
        await two.far.remove_unary_handler("e")
    await two.far.add_unary_handler("e", echo)
    with pytest.raises(two.b.P2PDaemonError, match="^Handler for protocol e already registered$"):
        await two.far.add_unary_handler("e", echo)
    assert await two.near.call_unary_handler(two.far_id, "e", b"x") == b"x"
    await two.far.remove_unary_handler("e")
    assert two.far.control.unary_handlers == {}
    with pytest.raises(two.b.P2PDaemonError):
        await two.near.call_unary_handler(two.far_id, "e", b"x")
    await two.far.add_unary_handler("e", echo)
    assert await two.near.call_unary_handler(two.far_id, "e", b"x") == b"x"


async def test_protocol_that_another_client_serves_is_refused_unless_balanced(
    two: Pair, clients: Clients, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    def handler(answer: bytes) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(request: bytes, caller: Any) -> bytes:
            return answer

        return handle

    other = await clients.make(two_daemons[1])
    await two.far.add_unary_handler("one", handler(b"1"))
    with pytest.raises(two.b.P2PDaemonError):
        await other.add_unary_handler("one", handler(b"2"))
    await two.far.add_unary_handler("both", handler(b"1"), balanced=True)
    await other.add_unary_handler("both", handler(b"2"), True)
    answers = [await two.near.call_unary_handler(two.far_id, "both", b"") for _ in range(10)]
    assert set(answers) == {b"1", b"2"}


async def test_request_over_the_limit_is_refused_unsent(
    two: Pair, clients: Clients, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    async def echo(request: bytes, caller: Any) -> bytes:
        return b"ok"

    small = await clients.make(two_daemons[0], persistent_conn_max_msg_size=10_000)
    await two.far.add_unary_handler("size", echo)
    with pytest.raises(two.b.P2PDaemonError, match="limit"):
        await small.call_unary_handler(two.far_id, "size", bytes(10_000))
    assert await small.call_unary_handler(two.far_id, "size", bytes(9_000)) == b"ok"


async def test_cancelled_call_cancels_its_handler(two: Pair) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def slow(request: bytes, caller: Any) -> bytes:
        began.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        raise AssertionError

    await two.far.add_unary_handler("slow", slow)
    call = asyncio.create_task(two.near.control.call_unary_handler(two.far_id, "slow", b""))
    await began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await ended.wait()


# --- streams ---


async def test_stream_reaches_its_handler(two: Pair) -> None:
    b = two.b
    infos = []

    async def shout(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        infos.append(info)
        size = int.from_bytes(await reader.readexactly(8), "big")
        data = memoryview((await reader.readexactly(size)).upper())
        for offset in range(0, size, 1 << 16):
            writer.write(data[offset : offset + (1 << 16)])
        await writer.drain()
        await reader.readexactly(1)  # The daemon may lose data that is unread at the close.
        writer.close()

    async with two.far.listen() as listening:
        assert listening is two.far
        await two.far.stream_handler("shout", shout)
        assert list(two.far.control.handlers) == ["shout"]
        info, reader, writer = await two.near.stream_open(two.far_id, ("not there", "shout"))
        assert isinstance(reader, asyncio.StreamReader)
        assert isinstance(writer, asyncio.StreamWriter)
        data = b"abc" * MIB
        writer.write(len(data).to_bytes(8, "big"))
        writer.write(data)
        await writer.drain()
        assert await reader.readexactly(len(data)) == data.upper()
        writer.write(b".")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        await two.far.remove_stream_handler("shout")
        assert two.far.control.handlers == {}
    for seen, peer_id in ((info, two.far_id), (infos[0], two.near_id)):
        assert isinstance(seen, b.StreamInfo)
        assert type(seen.peer_id) is b.PeerID and seen.peer_id == peer_id
        assert type(seen.addr) is b.Multiaddr
        assert seen.proto == "shout"


async def test_second_registration_of_a_stream_handler_is_refused(
    two: Pair,
) -> None:
    async def first(info: Any, reader: Any, writer: Any) -> None:
        writer.write(b"first")
        await writer.drain()
        writer.close()

    async def second(info: Any, reader: Any, writer: Any) -> None:
        writer.close()

    async with two.far.listen():
        await two.far.stream_handler("twice", first)
        with pytest.raises(two.b.ControlFailure):
            await two.far.stream_handler("twice", second)
        if not two.b.is_original:  # The original's table has the refused handler.
            _, reader, writer = await two.near.stream_open(two.far_id, ("twice",))
            assert await reader.read(100) == b"first"
            writer.close()
        await two.far.remove_stream_handler("twice")


async def test_another_task_can_end_listening(two: Pair) -> None:
    context = two.far.listen()
    await asyncio.create_task(context.__aenter__())
    served = asyncio.Event()

    async def handler(info: Any, reader: Any, writer: Any) -> None:
        served.set()
        writer.close()

    await two.far.stream_handler("handed on", handler)
    _, _, writer = await two.near.stream_open(two.far_id, ("handed on",))
    await served.wait()
    writer.close()
    await two.far.remove_stream_handler("handed on")
    await asyncio.create_task(context.__aexit__(None, None, None))


async def test_cancelled_error_of_a_handler_ends_only_its_stream(two: Pair) -> None:
    async def gives_up(info: Any, reader: Any, writer: Any) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await reader.readexactly(1)
        await future

    async def echo(info: Any, reader: Any, writer: Any) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    async with two.far.listen():
        await two.far.stream_handler("echo", echo)
        await two.far.stream_handler("gives up", gives_up)
        _, running, to_running = await two.near.stream_open(two.far_id, ("echo",))
        to_running.write(b"a")
        assert await running.readexactly(1) == b"a"
        if not two.b.is_original:  # Some versions of asyncio's server fail here.
            _, ended, to_ended = await two.near.stream_open(two.far_id, ("gives up",))
            to_ended.write(b"a")
            with anyio.fail_after(10):
                assert await ended.read() == b""
            to_ended.close()
        _, later, to_later = await two.near.stream_open(two.far_id, ("echo",))
        for reader, writer in ((running, to_running), (later, to_later)):
            writer.write(b"b")
            with anyio.fail_after(10):
                assert await reader.readexactly(1) == b"b"
            writer.close()
        await two.far.remove_stream_handler("echo")
        await two.far.remove_stream_handler("gives up")


@pytest.mark.parametrize("b", ["ours", "ours alone"], indirect=True)  # asyncio's logs differ.
async def test_data_that_a_handler_wrote_before_it_raised_arrives(two: Pair) -> None:
    async def refuse(info: Any, reader: Any, writer: Any) -> None:
        await reader.readexactly(3)
        writer.write(b"no: bad ")
        writer.write(b"request")
        raise ValueError("bad request")

    async with two.far.listen():
        await two.far.stream_handler("refuse", refuse)
        for _ in range(10):
            _, reader, writer = await two.near.stream_open(two.far_id, ("refuse",))
            writer.write(b"abc")
            with anyio.fail_after(10):
                assert await reader.readexactly(15) == b"no: bad request"
            writer.close()
        await two.far.remove_stream_handler("refuse")


# --- handlers whose peer has left: kept alive for as long as asyncio does ---


async def get_stuck() -> None:
    """Waits for space in a queue without a reader, so that nothing can wake the task."""
    queue: asyncio.Queue[int] = asyncio.Queue(1)
    await queue.put(1)
    await queue.put(2)


def unused_name() -> str:
    """Removes the handlers, which the original leaves registered with the daemon."""
    return f"handler {os.urandom(8).hex()}"


@pytest.mark.parametrize(
    "what", ["closes", "closes with unread input", "fills its reader", "sends small messages"]
)
async def test_collector_ends_stuck_handlers_that_asyncio_would_release(
    two: Pair, what: str
) -> None:
    name, handling = unused_name(), weakref.WeakSet[Any]()
    said: list[str] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda loop, context: said.append(context["message"]))

    async def handler(info: Any, reader: Any, writer: Any) -> None:
        handling.add(asyncio.current_task())
        with contextlib.closing(writer):
            await get_stuck()

    def collected() -> bool:
        gc.collect()
        return len(handling) == 0

    async with two.far.listen():
        await two.far.stream_handler(name, handler)
        await two.near.list_peers()  # Leaves a pooled connection, as at the end of the test.
        gc.collect()
        tasks, descriptors = len(asyncio.all_tasks()), len(open_descriptors())
        writers = [(await two.near.stream_open(two.far_id, [name]))[2] for _ in range(20)]
        await until(lambda: len(handling) == 20)
        if what != "closes":
            for writer in writers:
                writer.write(bytes(MIB if what == "fills its reader" else 1000))
        if what == "sends small messages":
            for _ in range(500):
                for writer in writers:
                    writer.write(bytes(20))
                await asyncio.sleep(0)
        if what != "fills its reader":
            for writer in writers:
                writer.close()
        await until(collected)
        for writer in writers:
            writer.close()
        del writers, writer
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        await two.near.list_peers()
        await until(lambda: gc.collect() >= 0 and len(open_descriptors()) <= descriptors)
    assert said.count("Task was destroyed but it is pending!") == 20
    loop.set_exception_handler(before)


async def test_collector_spares_handlers_whose_peer_is_connected(
    two: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[str] = []

    async def wait(info: Any, reader: Any, writer: Any) -> None:
        try:
            await get_stuck()
        finally:
            ended.append("stuck")

    async def read(info: Any, reader: Any, writer: Any) -> None:
        assert await reader.read(1) == b"a"
        ended.append("read")

    async def drain(info: Any, reader: Any, writer: Any) -> None:
        writer.write(bytes(64 * MIB))
        await writer.drain()
        ended.append("drained")

    async def wait_closed(info: Any, reader: Any, writer: Any) -> None:
        try:
            await writer.wait_closed()
        finally:
            ended.append("closed")

    begun = 0

    def noting(handler: Any) -> Any:
        async def noted(*args: Any) -> None:
            nonlocal begun
            begun += 1
            with contextlib.closing(args[2]):
                await handler(*args)

        return noted

    opened = []
    async with two.far.listen():
        for handler in (wait, read, drain, wait_closed):
            name = unused_name()
            await two.far.stream_handler(name, noting(handler))
            opened.append(await two.near.stream_open(two.far_id, [name]))
        await until(lambda: begun == 4)
        for _ in range(5):
            gc.collect()
            await asyncio.sleep(0.01)
        assert ended == []
        opened[1][2].write(b"a")
        await until(lambda: ended == ["read"])
        assert len(await opened[2][1].readexactly(64 * MIB)) == 64 * MIB
        await until(lambda: ended == ["read", "drained"])
        for _, _, writer in opened:
            writer.close()
        for task in asyncio.all_tasks():
            if "_handler()" in repr(task) or "_dispatch()" in repr(task):
                task.cancel()
        del task
        await until(lambda: sorted(ended) == ["closed", "drained", "read", "stuck"])
    caplog.clear()  # The original's server logs the cancellations.


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize("when", ["with the header", "later"])
async def test_collector_spares_handlers_with_unread_input(
    two: Pair, size: int, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = unused_name()
    begun, ended = list[Any](), list[Any]()
    go_on = asyncio.Event()
    keep: list[Any] = []

    async def handler(info: Any, reader: Any, writer: Any) -> None:
        begun.append(weakref.ref(asyncio.current_task()))
        with contextlib.closing(writer):
            try:
                await get_stuck()
            finally:
                ended.append("stuck")

    async def read_later(info: Any, reader: Any, writer: Any) -> None:
        with contextlib.closing(writer):
            begun.append(None)
            await go_on.wait()
            ended.append(await reader.readexactly(size + 1))

    data = bytes(range(1, 251)) * 400
    async with two.far.listen():
        await two.far.stream_handler(name, handler)
        await two.far.stream_handler(name + " read", read_later)
        for proto in (name, name + " read"):
            _, _, writer = await two.near.stream_open(two.far_id, [proto])
            keep.append(writer)
            if when == "later":
                await until(lambda: len(begun) == len(keep))
            writer.write(data[:size])
            await writer.drain()
        await until(lambda: len(begun) == 2)
        for _ in range(5):
            await asyncio.sleep(0.1)  # Time for the daemons to deliver the data.
            gc.collect()
        assert ended == []
        go_on.set()
        keep[1].write(b"z")
        await until(lambda: ended)
        assert ended == [data[:size] + b"z"]
        for writer in keep:
            writer.close()
        for task in begun:
            if task is not None:
                task().cancel()
        await until(lambda: len(ended) == 2)
    caplog.clear()  # The original's server logs the cancellation.


async def test_leaving_listen_waits_for_cancelled_handlers(
    ours: Bindings, anyio_backend: Any, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    events: list[str] = []

    async def handler(info: Any, reader: Any, writer: Any) -> None:
        events.append("begun")
        try:
            await get_stuck()
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            events.append("cleaned up")
            raise

    clients = Clients(ours)
    near, far = [await clients.make(daemon) for daemon in two_daemons]
    far_id, maddrs = await far.identify()
    await near.connect(far_id, maddrs)
    async with far.listen():
        await far.stream_handler("stuck", handler)
        _, _, writer = await near.stream_open(far_id, ["stuck"])
        await until(lambda: events)
    assert events == ["begun", "cleaned up"]
    writer.close()
    await clients.close()


async def test_gc_callback_exists_only_while_listening(
    ours: Bindings, anyio_backend: Any, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    before = len(gc.callbacks)
    clients = Clients(ours)
    client = await clients.make(two_daemons[0])
    async with client.listen():
        assert len(gc.callbacks) == before + 1
    assert len(gc.callbacks) == before
    await clients.close()


async def test_failed_stream_open_raises_control_failure(two: Pair) -> None:
    with pytest.raises(two.b.ControlFailure):
        await two.near.stream_open(two.far_id, ("nobody serves it",))
    with pytest.raises(two.b.ControlFailure):
        await two.near.remove_stream_handler("nobody serves it")


async def test_balanced_stream_handlers_serve_in_turn(
    two: Pair, clients: Clients, two_daemons: tuple[DaemonProcess, DaemonProcess]
) -> None:
    def handler(answer: bytes) -> Callable[..., Awaitable[None]]:
        async def handle(info: Any, reader: Any, writer: Any) -> None:
            writer.write(answer)
            writer.close()

        return handle

    other = await clients.make(two_daemons[1])
    async with two.far.listen(), other.listen():
        await two.far.stream_handler("turns", handler(b"1"), True)
        await other.stream_handler("turns", handler(b"2"), balanced=True)
        answers = []
        for _ in range(6):
            _, reader, writer = await two.near.stream_open(two.far_id, ("turns",))
            answers.append(await reader.read())
            writer.close()
        assert sorted(answers) == [b"1"] * 3 + [b"2"] * 3
        await two.far.remove_stream_handler("turns")
        await other.remove_stream_handler("turns")


# --- direct use of the control socket ---


@pytest.mark.parametrize("persistent", [False, True])
async def test_control_socket_can_be_used_directly(
    b: Bindings, two_daemons: tuple[DaemonProcess, DaemonProcess], persistent: bool
) -> None:
    connector = b.DaemonConnector(b.Multiaddr(two_daemons[0].control_maddr))
    if persistent:
        reader, writer = await connector.open_persistent_connection()
        request: Any = p2pd_pb2.PersistentConnectionRequest(callId=bytes(16))
        request.removeUnaryHandler.proto = "not there"
        await b.write_pbmsg(writer, request)
        answer: Any = p2pd_pb2.PersistentConnectionResponse()
        await b.read_pbmsg_safe(reader, answer)
        assert answer.daemonError.message
    else:
        reader, writer = await connector.open_connection()
        await b.write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        answer = p2pd_pb2.Response()
        await b.read_pbmsg_safe(reader, answer)
        b.raise_if_failed(answer)
        assert answer.identify.id == two_daemons[0].peer_id.to_bytes()
    writer.close()
    await writer.wait_closed()


def test_raise_if_failed(b: Bindings) -> None:
    response = p2pd_pb2.Response(type=p2pd_pb2.Response.ERROR)
    response.error.msg = "in its own words"
    with pytest.raises(b.ControlFailure, match="in its own words"):
        b.raise_if_failed(response)


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**32, 2**64 - 1])
async def test_varints(b: Bindings, number: int) -> None:
    left, right = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=left)
    far_reader, far_writer = await asyncio.open_connection(sock=right)
    await b.write_unsigned_varint(writer, number)
    assert await b.read_unsigned_varint(far_reader) == number
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="integer"):
            await b.write_unsigned_varint(writer, wrong)
    writer.write(b"\xff" * 10)
    with pytest.raises(ValueError, match="overflow"):
        await b.read_unsigned_varint(far_reader)
    for each in (writer, far_writer):
        each.close()
        await each.wait_closed()


# --- errors ---


async def test_missing_daemon_is_an_os_error(b: Bindings) -> None:
    with pytest.raises(OSError) as raised:
        await b.Client.create(b.Multiaddr(f"/unix{new_directory()}/nothing.sock"))
    assert b.is_original or isinstance(raised.value, b.ControlFailure)


async def test_errors_are_of_both_packages_and_can_be_pickled(
    ours: Bindings, all_bindings: dict[str, Bindings], anyio_backend: Any
) -> None:
    hivemind = all_bindings["original"]
    with DaemonProcess() as daemon:
        client = await ours.Client.create(
            ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(daemon.listen_maddr())
        )
        unknown = ours.PeerID(b"\x12\x20" + bytes(32))
        requests: list[tuple[Callable[[], Awaitable[object]], type[Exception]]] = [
            (lambda: client.call_unary_handler(unknown, "x", b""), p2pclient_rs.DaemonRefused),
            (lambda: client.connect(unknown, []), p2pclient_rs.DaemonRefused),
            (
                lambda: client.call_unary_handler(unknown, "x", bytes(5 * MIB)),
                p2pclient_rs.MessageTooLarge,
            ),
            (lambda: client.remove_unary_handler("x"), p2pclient_rs.ControlFailure),
        ]
        for request, kind in requests:
            with pytest.raises(hivemind.P2PDaemonError) as raised:
                await request()
            check_error(raised.value, kind, hivemind.ControlFailure)
            assert raised.value.__suppress_context__ or raised.value.__cause__ is None
        daemon.kill()
        with pytest.raises(hivemind.P2PDaemonError) as raised:
            await client.identify()
        assert isinstance(raised.value, OSError)
        client.close()
    text = importlib.import_module("p2pclient_rs.compat.hivemind.exceptions").to_hivemind(
        p2pclient_rs.P2PHandlerError("KeyError('x')")
    )
    check_error(text, p2pclient_rs.P2PHandlerError, hivemind.P2PHandlerError)
    assert not isinstance(text, hivemind.P2PDaemonError)


async def test_errors_of_unary_calls_have_exactly_the_originals_text(
    all_bindings: dict[str, Bindings],
    two_daemons: tuple[DaemonProcess, DaemonProcess],
    anyio_backend: Any,
) -> None:
    # Petals compares the texts with the daemon's: str(e) == "protocol not supported".
    async def handler(request: bytes, caller: Any) -> bytes:
        return request

    said: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    for kind, b in all_bindings.items():
        clients = Clients(b)
        near, far, other = [await clients.make(two_daemons[n]) for n in (0, 1, 1)]
        far_id, maddrs = await far.identify()
        await near.connect(far_id, maddrs)
        await far.add_unary_handler("taken", handler)
        unknown = b.PeerID(b"\x12\x20" + bytes(32))
        said[kind] = []
        for request in (
            near.call_unary_handler(far_id, "nobody serves it", b""),
            near.call_unary_handler(unknown, "x", b""),
            far.add_unary_handler("taken", handler),
            other.add_unary_handler("taken", handler),
            far.remove_unary_handler("not there"),
        ):
            with pytest.raises(b.P2PDaemonError) as raised:
                await request
            said[kind].append((str(raised.value), raised.value.args))
        if not b.is_original:
            assert raised.value.request == "REMOVE_UNARY_HANDLER"
            assert raised.value.protocol == "not there"
            again = pickle.loads(pickle.dumps(raised.value))
            assert (str(again), again.args) == said[kind][-1]
        await clients.close()
    assert "protocols not supported" in said["original"][0][0]
    assert said["ours"] == said["ours alone"] == said["original"]


async def test_errors_of_control_requests_contain_the_originals_text(
    all_bindings: dict[str, Bindings],
    two_daemons: tuple[DaemonProcess, DaemonProcess],
    anyio_backend: Any,
) -> None:
    said: dict[str, list[str]] = {}
    for kind, b in all_bindings.items():
        clients = Clients(b)
        near, far = [await clients.make(daemon) for daemon in two_daemons]
        far_id, maddrs = await far.identify()
        await near.connect(far_id, maddrs)
        said[kind] = []
        for request in (
            near.stream_open(far_id, ("nobody serves it",)),
            near.remove_stream_handler("nobody serves it"),
        ):
            with pytest.raises(b.ControlFailure) as raised:
                await request
            said[kind].append(str(raised.value))
        await clients.close()
    for theirs, ours, alone in zip(*said.values(), strict=True):
        words = theirs.removeprefix("Connect failed. msg=")
        assert words != theirs and words in ours and words in alone


def check_error(error: Exception, ours: type[Exception], theirs: type[Exception]) -> None:
    assert isinstance(error, ours) and isinstance(error, theirs)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), repr(again)) == (type(error), str(error), repr(error))
    assert vars(again) == vars(error)


def test_errors_can_be_unpickled_without_hivemind(ours: Bindings) -> None:
    to_hivemind = ours.modules["control"]._Types().error
    peer_id = p2pclient_rs.PeerID(b"\x12\x20" + bytes(32))
    errors = [
        to_hivemind(p2pclient_rs.ControlFailure("one")),
        to_hivemind(p2pclient_rs.ConnectionLost("two", peer_id=peer_id, request="CALL_UNARY")),
        to_hivemind(p2pclient_rs.P2PHandlerError("three", peer_id=peer_id)),
    ]
    for error, again in zip(errors, pickle.loads(pickle.dumps(errors)), strict=True):
        assert vars(again) == vars(error)
        assert type(again.peer_id) is type(error.peer_id) is not p2pclient_rs.PeerID
    code = """if True:
        import pickle, sys
        for error in pickle.load(sys.stdin.buffer):
            print(type(error), repr(error), type(error.peer_id), error.peer_id)
        assert "hivemind" not in sys.modules
    """
    source = str(Path(p2pclient_rs.__file__).parent.parent)
    output = subprocess.check_output(
        [sys.executable, "-W", "ignore", "-c", code],
        input=pickle.dumps(errors),
        env={**os.environ, "PYTHONPATH": source},
    ).decode()
    one, two, three = output.splitlines()
    assert "exceptions.ControlFailure" in one and "ControlFailure('one')" in one
    assert "NoneType" in one
    assert "exceptions.ConnectionLost" in two and "request CALL_UNARY" in two
    assert "exceptions.P2PHandlerError" in three and "P2PHandlerError('three')" in three
    for line in (two, three):
        assert "<class 'p2pclient_rs.PeerID'>" in line and line.endswith(str(peer_id))


# --- ours alone ---


async def test_many_slow_requests_do_not_delay_another(ours: Bindings, anyio_backend: Any) -> None:
    answer = threading.Event()

    def script(connection: Connection) -> None:
        request = connection.read_request()
        if request == UPGRADE:
            connection.send(frame(OK))
            connection.wait_closed()
        elif decode(request)[1] == p2pd_pb2.Request.CONNECT:
            assert answer.wait(30)
            connection.send(frame(OK))
        else:
            connection.send(frame(STREAM_OPENED))
            connection.wait_closed()

    with FakeDaemon(script) as daemon:
        client = await ours.Client.create(
            ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(f"/unix{new_directory()}/s")
        )
        peer_id = ours.PeerID(PEER)
        slow = [asyncio.create_task(client.connect(peer_id, [])) for _ in range(200)]
        try:
            await until(lambda: len(daemon.requests) > 64)
            with anyio.fail_after(10):
                _, _, writer = await client.stream_open(peer_id, ("x",))
            writer.close()
        finally:
            answer.set()
            await asyncio.gather(*slow)
        client.close()


async def test_peer_ids_are_cached(ours: Bindings, anyio_backend: Any) -> None:
    with DaemonProcess() as daemon:
        client = await ours.Client.create(
            ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(daemon.listen_maddr())
        )
        first, _ = await client.identify()
        second, _ = await client.identify()
        assert first is second
        client.close()
    assert ours.modules["control"]._peer_id.cache_info().maxsize == 4096


async def test_shutdown_without_awaiting_is_quick_and_quiet(
    ours: Bindings, anyio_backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # As hivemind's P2P does, also from __del__: nothing is awaited.
    with DaemonProcess() as daemon:
        client = await ours.Client.create(
            ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(daemon.listen_maddr())
        )
        began = asyncio.Event()

        async def handler(info: Any, reader: Any, writer: Any) -> None: ...

        async def listen() -> None:
            async with client.listen():
                began.set()
                await asyncio.Future()

        listening = asyncio.create_task(listen())
        await began.wait()
        await client.stream_handler("x", handler)
        with caplog.at_level(logging.DEBUG, "p2pclient_rs"):
            client.close()
            listening.cancel()
            daemon.process.terminate()
            with anyio.fail_after(0.5), pytest.raises(asyncio.CancelledError):
                await listening
        assert caplog.records == []
        client.close()


async def test_listening_ends_quickly_after_the_daemon_died(
    ours: Bindings, anyio_backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with DaemonProcess() as daemon:
        client = await ours.Client.create(
            ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(daemon.listen_maddr())
        )

        async def handler(info: Any, reader: Any, writer: Any) -> None: ...

        async with client.listen():
            await client.stream_handler("x", handler)
            daemon.kill()
            stopping = anyio.current_time()
        assert anyio.current_time() - stopping < 0.5
        client.close()
    assert {record.name for record in caplog.records} <= {"p2pclient_rs.unary"}


def test_close_works_at_any_time_and_in_any_thread(ours: Bindings) -> None:
    """While the loop runs in another thread, is stopped or closed; in a forked child; and twice."""
    with DaemonProcess() as daemon:

        async def create() -> Any:
            client = await ours.Client.create(
                ours.Multiaddr(daemon.control_maddr), ours.Multiaddr(daemon.listen_maddr())
            )
            await client.identify()
            return client

        loop = asyncio.new_event_loop()
        keeper, elsewhere, stopped, closed, deleted, forked = [
            loop.run_until_complete(create()) for _ in range(6)
        ]
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        elsewhere.close()
        # The loop runs the scheduled close.
        future = asyncio.run_coroutine_threadsafe(elsewhere.identify(), loop)
        future.result(10)
        elsewhere.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        stopped.close()
        stopped.close()
        child = fork()
        if child == 0:
            status = 1
            try:
                forked.close()
                forked.control.close()
                del forked
                gc.collect()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        loop.run_until_complete(forked.identify())
        forked.close()
        del deleted
        gc.collect()
        loop.run_until_complete(keeper.identify())
        keeper.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        closed.close()
        closed.close()
