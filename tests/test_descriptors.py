"""Closed descriptors, whose numbers may already belong to other files."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from fake_daemon import IDENTITY, Connection, FakeDaemon, frame
from support import BACKENDS, new_directory, until

from p2pclient_rs import DaemonConnector, Stream
from p2pclient_rs._native import ControlConnection, RawListener, Request
from p2pclient_rs.readiness import Watch, watch

pytestmark = [pytest.mark.anyio, pytest.mark.independent]


def echo(connection: Connection) -> None:
    while data := connection.socket.recv(1 << 16):
        connection.socket.sendall(data)


@asynccontextmanager
async def echoing() -> AsyncIterator[Stream]:
    """A stream to an echo peer. Only the current thread opens descriptors."""
    path = f"{new_directory()}/s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        stream = await DaemonConnector(f"/unix{path}").open_connection()
        peer, _ = listener.accept()
    os.unlink(path)

    def echo() -> None:
        with suppress(ConnectionError):
            while data := peer.recv(1 << 16):
                peer.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()
    try:
        async with stream:
            yield stream
    finally:
        thread.join()
        peer.close()


async def close_it(stream: Stream, how: str) -> None:
    if how == "close":
        await stream.close()
    elif how == "aclose":
        await stream.aclose()
    elif how == "abort":
        stream.abort()
    else:
        stream._raw.close()


@contextmanager
def taking(fd: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Gives the free number ``fd`` to the first of a pair of sockets."""
    near, far = socket.socketpair()
    if far.fileno() == fd:
        near, far = far, near
    if near.fileno() != fd:
        os.dup2(near.fileno(), fd)
        near.close()
    else:
        near.detach()
    with socket.socket(fileno=fd) as taken, far:
        taken.setblocking(False)
        yield taken, far


@pytest.mark.parametrize("how", ["close", "aclose", "abort", "raw"])
async def test_closed_stream_exposes_no_descriptor(how: str) -> None:
    async with echoing() as stream:
        attributes = stream.extra_attributes
        fd = stream._raw.fileno()
        assert os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        await close_it(stream, how)
        with taking(fd):  # the number now belongs to another socket
            assert stream._raw.fileno() == -1
            assert stream.get_extra_info("socket") is None
            assert stream.get_extra_info("socket", 5) == 5
            assert "closed" in repr(stream) and f"fd={fd}" not in repr(stream)
            for attempt in (
                lambda: stream.extra(SocketAttribute.raw_socket),
                lambda: attributes[SocketAttribute.raw_socket](),
                lambda: attributes[SocketAttribute.local_address](),
                lambda: stream.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE),
                lambda: stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                lambda: stream._raw.duplicate(),
                lambda: stream.address,
                lambda: stream.peer_address,
            ):
                with pytest.raises(anyio.ClosedResourceError):
                    attempt()


async def test_duplicate_is_not_inheritable_and_closed_with_its_stream() -> None:
    async with echoing() as stream:
        sock = stream.get_extra_info("socket")
        assert sock.fileno() != stream._raw.fileno()
        assert not os.get_inheritable(sock.fileno())
        assert stream.extra(SocketAttribute.raw_socket) is sock
        await stream.aclose()
        assert sock.fileno() == -1


async def test_duplicate_during_close_is_never_of_another_file() -> None:
    wrong: list[str] = []
    for _ in range(50):
        with FakeDaemon(echo) as fake:
            stream = await DaemonConnector(fake.control_maddr).open_connection()
            path = os.readlink(f"/proc/self/fd/{stream._raw.fileno()}")
            closing = threading.Event()

            def duplicate(
                stream: Stream = stream, path: str = path, closing: threading.Event = closing
            ) -> None:
                closing.set()
                with suppress(anyio.ClosedResourceError):
                    while True:
                        fd = stream._raw.duplicate()
                        if os.readlink(f"/proc/self/fd/{fd}") != path:
                            wrong.append(path)
                        os.close(fd)

            thread = threading.Thread(target=duplicate)
            thread.start()
            closing.wait()
            stream.abort()
            others = [socket.socket() for _ in range(20)]
            thread.join()
            for other in others:
                other.close()
    assert wrong == []


async def test_closed_or_taken_connections_and_closed_listeners_have_no_descriptor() -> None:
    def answer(connection: Connection) -> None:
        connection.answer(IDENTITY)
        echo(connection)

    with FakeDaemon(answer) as fake:
        path = fake.control_maddr.removeprefix("/unix")
        closed, taken = ControlConnection.connect(path), ControlConnection.connect(path)
        assert closed is not None and taken is not None
        assert closed.fileno() >= 0 and taken.fileno() >= 0
        closed.close()
        assert closed.fileno() == -1
        fd = taken.fileno()
        raw = taken.take_stream()
        assert (taken.fileno(), raw.fileno()) == (-1, fd)
        taken.close()
        assert raw.fileno() == fd
        raw.close()
        refused = ControlConnection.connect(path)
        assert refused is not None
        refused.start(Request.identify())
        with pytest.raises(ConnectionError):
            refused.take_stream()  # in the middle of a request
        assert refused.fileno() == -1
    listener = RawListener(f"{new_directory()}/s")
    assert listener.fileno() >= 0
    listener.close()
    assert listener.fileno() == -1


async def assert_watch_unaffected(stream: Stream, taken: socket.socket, far: socket.socket) -> None:
    """Asserts that nothing done through ``stream`` affects a watch on the reused number."""
    old: Watch = stream._watch
    new = watch(taken.fileno())
    received: list[str] = []

    async def wait() -> None:
        while not received:
            await new.readable()
            with suppress(BlockingIOError):
                received.append(taken.recv(1).decode())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        # None of these calls may affect the file that now has the number.
        old.close()
        old.flush_later(stream._raw, stream)
        for wait_for in (old.readable, old.writable, lambda: old.drained(0)):
            with anyio.fail_after(5):
                await wait_for()
        with suppress(anyio.ClosedResourceError):
            await stream.read(1)
        stream.abort()
        old.abandon(stream._raw)
        assert not received
        far.send(b"x")
        with anyio.fail_after(5):
            await until(lambda: received)
    new.close()
    assert received == ["x"]


@pytest.mark.parametrize("how", ["close", "aclose", "abort"])
async def test_watch_of_a_closed_stream_leaves_the_reused_number_alone(
    how: str,
) -> None:
    async with echoing() as stream:
        await stream.send(b"a")
        assert await stream.readexactly(1) == b"a"  # registers the descriptor with the loop
        fd = stream._raw.fileno()
        await close_it(stream, how)
        with taking(fd) as (taken, far):
            await assert_watch_unaffected(stream, taken, far)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
async def test_watch_closed_while_a_wait_begins_registers_nothing(
    anyio_backend: Any,
) -> None:
    class Future(asyncio.Future[None]):
        """Closes the watch when asked whether it is done."""

        def done(self) -> bool:
            if super().done():
                return True
            old.close()
            return super().done()

    loop = asyncio.get_running_loop()
    near, far = socket.socketpair()
    with near, far, pytest.MonkeyPatch.context() as patch:
        near.setblocking(False)
        old = watch(near.fileno())
        first = old.readable()
        patch.setattr(loop, "create_future", lambda: Future(loop=loop))
        second = old.readable()
        third = old.readable()
        with anyio.fail_after(5):
            await second
            await third
        assert not loop.remove_reader(near.fileno())
        with anyio.fail_after(5):
            await first


async def test_stream_on_a_reused_number_receives_whole_frames() -> None:
    async with echoing() as first:
        fd = first._raw.fileno()
        await first.aclose()
        async with echoing() as second:
            assert second._raw.fileno() >= 0 and first._raw.fileno() == -1
            first.abort()
            del first
            await second.send(frame(b"abc"))
            assert await second.receive_frame() == b"abc"
    assert fd >= 0
