"""``listen()`` as a context manager and in the background, the private default address, and the
counters of refused streams."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import uvloop
from fake_daemon import (
    ADDR,
    OK,
    PATIENCE,
    PEER,
    STREAM_INFO,
    Connection,
    FakeDaemon,
    field,
    frame,
)
from forking import fork
from support import connect_to_listener, is_closed, new_directory, open_descriptors, until

from p2pclient_rs import Client, ControlFailure, ForkedClientError, StreamInfo, listening
from p2pclient_rs.control import ListenerStats
from p2pclient_rs.stream import Stream

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = [pytest.mark.anyio]


async def hello(_: StreamInfo, stream: Stream) -> None:
    await stream.send(b"hello")
    await stream.aclose()


async def greeted(pair: Pair, proto: str) -> bytes:
    _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, [proto])
    async with stream:
        return await stream.receive()


def private_path(client: Client) -> Path:
    maddr = str(client.control.listen_maddr)
    assert maddr.startswith("/unix/")
    return Path(maddr.removeprefix("/unix"))


def dial(client: Client) -> socket.socket:
    """Connects to a client's listener, as the daemon would."""
    connection = connect_to_listener(client)
    connection.setblocking(False)
    return connection


def ok(connection: Connection) -> None:
    """A daemon that answers every request with OK."""
    while True:
        connection.answer(OK)


# --- listening in the background ---


@pytest.mark.needs("remove_stream_handler")
async def test_awaited_listen_serves_until_the_client_is_closed(pair: Pair) -> None:
    client = pair.bob_daemon.client()
    assert await client.listen() is client
    await client.stream_handler("/await", hello)
    for _ in range(3):
        assert await greeted(pair, "/await") == b"hello"
    path = private_path(client) if pair.bob_daemon.transport == "unix" else None
    await client.close()
    assert client.control.handlers == {}
    assert path is None or not path.exists()
    # The daemon has released the protocol, so another client can register it.
    async with pair.bob_daemon.client() as other, other.listen():
        await other.stream_handler("/await", hello)
        assert await greeted(pair, "/await") == b"hello"


@pytest.mark.independent
async def test_closed_client_can_listen_again_in_either_way() -> None:
    client = Client(listen_maddr=f"/unix{new_directory()}/listen.sock")
    for _ in range(2):
        await client.listen()
        dial(client).close()
        with pytest.raises(ControlFailure, match="already listening"):
            await client.listen()
        with pytest.raises(ControlFailure, match="already listening"):
            async with client.listen():
                pass
        await client.close()
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(FileNotFoundError):
            late.connect(str(private_path(client)))
        async with client.listen() as same:
            assert same is client
            dial(client).close()
            with pytest.raises(ControlFailure, match="already listening"):
                await client.listen()


@pytest.mark.independent
async def test_control_client_can_listen_in_both_ways() -> None:
    control = Client(listen_maddr=f"/unix{new_directory()}/listen.sock").control
    assert await control.listen() is control
    await control.close()
    async with control.listen() as same:
        assert same is control


@pytest.mark.independent
def test_cancelled_close_still_stops_listening() -> None:
    silent, done = threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        while connection.read_request():
            if silent.is_set():
                done.wait(PATIENCE)
                return
            connection.send(frame(OK))

    async def main(control: str) -> None:
        client = Client(control)
        await client.listen()
        await client.stream_handler("/hello", hello)
        path = private_path(client)
        silent.set()
        # anyio's shields do not protect against asyncio's own cancellation.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.close(), 0.1)
        assert not path.exists()
        done.set()
        await client.close()

    with FakeDaemon(script) as daemon:
        asyncio.run(main(daemon.control_maddr))


@pytest.mark.independent
async def test_close_cancels_handlers_and_waits_for_them() -> None:
    begun, ended = anyio.Event(), list[str]()

    async def handler(info: StreamInfo, stream: Stream) -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(info.proto)

    with FakeDaemon(ok) as fake:
        client = await Client(fake.control_maddr).listen()
        await client.stream_handler("/echo", handler)
        connection = dial(client)
        connection.sendall(frame(STREAM_INFO))
        await begun.wait()
        await client.close()
        assert ended == ["/echo"]
        connection.close()


@pytest.mark.independent
async def test_handler_may_close_the_client() -> None:
    closed = anyio.Event()

    async def handler(info: StreamInfo, stream: Stream) -> None:
        try:
            await client.close()
        finally:
            closed.set()

    with FakeDaemon(ok) as fake:
        client = await Client(fake.control_maddr).listen()
        path = private_path(client)
        await client.stream_handler("/echo", handler)
        with dial(client) as connection:
            connection.sendall(frame(STREAM_INFO))
            await closed.wait()
        await until(lambda: not path.exists())


@pytest.mark.independent
async def test_listening_ends_when_the_client_is_garbage_collected() -> None:
    path = new_directory() / "listen.sock"
    client = await Client(listen_maddr=f"/unix{path}").listen()
    assert path.exists()
    del client
    gc.collect()
    await until(lambda: not path.exists())


@pytest.mark.independent
async def test_listen_that_is_never_awaited_does_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    path = new_directory() / "listen.sock"
    client = Client(listen_maddr=f"/unix{path}")
    client.listen()
    gc.collect()
    assert not path.exists()
    assert recwarn.list == []
    await client.listen()  # not "already listening"
    await client.close()


@pytest.mark.independent
async def test_failed_listen_raises_where_it_is_awaited() -> None:
    client = Client(listen_maddr=f"/unix{new_directory()}/none/listen.sock")
    with pytest.raises(FileNotFoundError, match="cannot listen at"):
        await client.listen()
    client.control.listen_maddr = f"/unix{new_directory()}/listen.sock"
    await client.listen()
    await client.close()


ENDS = {
    "asyncio.run": "asyncio.run(main())",
    "the loop is closed without shutdown": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
        """,
    "the loop is never closed": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        """,
    "trio": "trio.run(main)",
}


@pytest.mark.independent
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("held", [True, False])
def test_listening_ends_silently_with_the_event_loop(how: str, held: bool) -> None:
    path = new_directory() / "listen.sock"
    code = f"""
        import asyncio, gc, sys, trio
        from p2pclient_rs import Client
        clients = []
        async def main():
            client = await Client(listen_maddr={f"/unix{path}"!r}).listen()
            {"clients.append(client)" if held else "main.client = client"}
        {textwrap.dedent(ENDS[how]).strip().replace(chr(10), chr(10) + " " * 8)}
        {"" if held else "del main"}
        gc.collect()
        print("ended")
    """
    run = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
    )
    assert (run.stdout, run.returncode) == ("ended\n", 0), run.stderr
    said = [line for line in run.stderr.splitlines() if "unclosed event loop" not in line]
    assert not any("GeneratorExit" in line or "never awaited" in line for line in said), said
    assert "destroyed" not in run.stderr
    assert not path.exists()


@pytest.mark.independent
def test_client_can_listen_on_one_event_loop_after_another() -> None:
    client = Client(listen_maddr=f"/unix{new_directory()}/listen.sock")

    async def main() -> None:
        await client.listen()

    for _ in range(2):
        asyncio.run(main())
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    asyncio.run(client.close())


@pytest.mark.independent
@pytest.mark.parametrize("linger", [300.0, None])
@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_handlers_are_collected_if_their_loop_is_closed_without_shutdown(
    new_loop: Callable[[], asyncio.AbstractEventLoop], linger: float | None
) -> None:
    handling: list[weakref.ref[Any]] = []

    async def handler(stream: Stream) -> None:
        handling.append(weakref.ref(stream))
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        client = await Client(fake.control_maddr).listen()
        await client.stream_handler("/echo", handler, linger=linger)
        for _ in range(3):
            connection = dial(client)
            connection.sendall(frame(STREAM_INFO))
            connections.append(connection)
        await until(lambda: len(handling) == 3)

    with FakeDaemon(ok) as fake:
        descriptors = len(open_descriptors())
        connections: list[socket.socket] = []
        loop = new_loop()
        # Silences messages about tasks destroyed while pending.
        loop.set_exception_handler(lambda loop, context: None)
        loop.run_until_complete(main())
        loop.close()
        del loop
        gc.collect()
        for connection in connections:
            connection.close()
        assert [stream for stream in handling if stream() is not None] == []
    assert len(open_descriptors()) <= descriptors


@pytest.mark.independent
async def test_client_of_the_p2pclient_layer_can_listen_in_both_ways() -> None:
    from multiaddr import Multiaddr

    from p2pclient_rs.compat.p2pclient import Client as P2PClient

    maddr = Multiaddr(f"/unix{new_directory()}/listen.sock")
    client = P2PClient(listen_maddr=maddr)
    assert await client.listen() is client
    assert client.control.listener is not None
    await client.close()
    assert client.control.listener is None
    async with client.listen() as same:
        assert same is client
        assert client.control.task_group is not None


# --- the private default address ---


@pytest.mark.independent
async def test_each_client_without_an_address_gets_a_private_one() -> None:
    with FakeDaemon(ok) as fake:
        async with Client(fake.control_maddr) as one, Client(fake.control_maddr) as other:
            await one.listen()
            async with other.listen():
                paths = private_path(one), private_path(other)
                assert paths[0] != paths[1]
                for path in paths:
                    assert path.is_socket() and len(os.fsencode(path)) <= 103
                    directory = path.parent.stat()
                    assert stat.S_IMODE(directory.st_mode) == 0o700
                    assert directory.st_uid == os.geteuid()
        for path in paths:
            assert not path.parent.exists()


@pytest.mark.independent
async def test_registration_sends_the_private_address() -> None:
    with FakeDaemon(ok) as fake:
        async with Client(fake.control_maddr) as client:
            await client.stream_handler("/echo", hello)
            path = private_path(client)
            await client.listen()
            assert private_path(client) == path
            assert any(str(path).encode() in request for request in fake.requests)


@pytest.mark.independent
def test_private_directory_is_created_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("a directory was made")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    repr(Client())


@pytest.mark.independent
def test_private_directory_is_removed_with_the_client_and_at_exit() -> None:
    client = Client()
    path = private_path(client)
    assert path.parent.is_dir()
    del client
    gc.collect()
    assert not path.parent.exists()
    code = "from p2pclient_rs import Client; c = Client(); print(c.control.listen_maddr)"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    path = Path(output.strip().removeprefix("/unix"))
    assert path.name == "listen.sock" and not path.parent.exists()


@pytest.mark.independent
def test_tmpdir_too_long_for_a_socket_path_is_not_used(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    code = "from p2pclient_rs import Client; c = Client(); print(c.control.listen_maddr)"
    output = subprocess.check_output(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(long)}, text=True
    )
    assert output.startswith("/unix/tmp/p2pclient-")
    assert list(long.iterdir()) == []


@pytest.mark.independent
def test_forked_child_keeps_the_private_directory() -> None:
    client = Client()
    path = private_path(client)
    pid = fork()
    if pid == 0:
        code = 1
        try:
            try:
                client.control.daemon_connector.check_fork()
            except ForkedClientError:
                asyncio.run(client.close())
                client.control._private = None
                gc.collect()
                code = 0 if path.parent.is_dir() else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert path.parent.is_dir()


@pytest.mark.independent
@pytest.mark.parametrize(
    ("control", "is_local"),
    [
        ("/ip4/127.0.0.1/tcp/4001", True),
        ("/ip4/127.9.9.9/tcp/4001", True),
        ("/ip6/::1/tcp/4001", True),
        ("/dns/localhost/tcp/4001", True),
        ("/ip4/10.0.0.1/tcp/4001", False),
        ("/ip6/2001:db8::1/tcp/4001", False),
        ("/dns4/daemon.example/tcp/4001", False),
    ],
)
async def test_daemon_on_another_host_requires_a_listen_maddr(control: str, is_local: bool) -> None:
    client = Client(control)
    if is_local:
        await client.listen()
        assert private_path(client).is_socket()
        await client.close()
        return
    for call in (client.listen, lambda: client.stream_handler("/echo", hello)):
        with pytest.raises(ControlFailure, match="pass listen_maddr"):
            await call()
    client.control.listen_maddr = "/ip4/127.0.0.1/tcp/0"
    await client.listen()
    await client.close()


# --- refused streams ---


async def flood(client: Client, count: int, header: bytes) -> None:
    for _ in range(count):
        with dial(client) as connection:
            connection.sendall(header)
            await until(lambda: is_closed(connection))  # noqa: B023


@pytest.mark.independent
@pytest.mark.parametrize("awaited", [True, False])
async def test_refused_streams_are_counted_and_logged_once_a_second(
    awaited: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(listening, "time", SimpleNamespace(monotonic=lambda: now))
    unknown = frame(field(1, PEER) + field(2, ADDR) + field(3, b"/x"))

    async def check(client: Client) -> None:
        nonlocal now
        assert client.control.stats == ListenerStats()
        await flood(client, 5, unknown)
        await flood(client, 3, b"\x03\xff\xff\xff")
        assert client.control.stats == ListenerStats(accepted=8, no_handler=5, bad_header=3)
        assert len(caplog.messages) == 2
        assert "no handler for the protocol '/x'" in caplog.messages[0]
        now += 1.1
        await flood(client, 1, unknown)
        assert caplog.messages[2].endswith("(and 4 more since the last such line)")
        assert client.control.stats.no_handler == 6

    with FakeDaemon(ok) as fake, caplog.at_level(logging.WARNING, "p2pclient_rs"):
        async with Client(fake.control_maddr) as client:
            if awaited:
                await client.listen()
                await check(client)
            else:
                async with client.listen():
                    await check(client)
