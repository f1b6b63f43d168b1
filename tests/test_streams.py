"""Streams between two daemons, stream handlers, and the client's listener."""

from __future__ import annotations

import array
import asyncio
import errno
import gc
import hashlib
import logging
import os
import random
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.abc import SocketAttribute
from fake_daemon import ADDR, PEER, STREAM_INFO, Connection, FakeDaemon, Script, field, frame
from support import (
    BACKENDS,
    DaemonProcess,
    connect_to_listener,
    is_closed,
    new_directory,
    open_descriptors,
    until,
)

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlFailure,
    DaemonConnector,
    IncompleteRead,
    ProtocolViolation,
    Stream,
    StreamAttribute,
    StreamInfo,
)

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio

MIB = 1 << 20
#: More data than fits between two clients, in several windows and socket buffers, in bytes.
PIPELINE = 64 * MIB


@asynccontextmanager
async def both_ends(pair: Pair, protocol: str = "/both") -> AsyncIterator[tuple[Stream, Stream]]:
    """Opens a stream from alice to bob and yields both ends."""
    arrived: list[Stream] = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        arrived.append(stream)

    await pair.bob.stream_handler(protocol, handler)
    _, near = await pair.alice.stream_open(pair.bob_daemon.peer_id, [protocol])
    await until(lambda: arrived)
    far = arrived.pop()
    async with near, far:
        yield near, far


async def echo(info: StreamInfo, stream: Stream) -> None:
    """Echoes every chunk."""
    async with stream:
        async for data in stream:
            await stream.send(data)


# --- round trips ---


@pytest.mark.parametrize("size", [1, 64 * 1024], ids=["1 byte", "64 KiB"])
async def test_small_payloads_arrive_in_both_directions(pair: Pair, size: int) -> None:
    there, back = os.urandom(size), os.urandom(size)
    async with both_ends(pair) as (near, far):
        await near.send(there)
        assert await far.readexactly(size) == there
        await far.send(back)
        assert await near.readexactly(size) == back


async def test_read_accepts_counts_over_the_address_space(pair: Pair) -> None:
    async with both_ends(pair) as (near, far):
        await near.send(b"abc")
        assert await far.read(2**70) == b"abc"
        await near.send(b"def")
        await near.send_eof()
        with pytest.raises(IncompleteRead) as error:
            await far.readexactly(2**70)
        assert (error.value.partial, error.value.expected) == (b"def", 2**70)


async def test_many_mebibytes_in_both_directions_at_once_arrive_intact(pair: Pair) -> None:
    count = 8 if pair.alice_daemon.kind == "js" else 64  # jsp2pd is much slower
    blocks = [random.Random(seed).randbytes(MIB) for seed in range(4)]

    def block(number: int, salt: int) -> bytes:
        return number.to_bytes(4, "big") + blocks[(number + salt) % 4]

    async def send(stream: Stream, salt: int) -> None:
        for number in range(count):
            await stream.send(block(number, salt))

    async def receive(stream: Stream, salt: int) -> None:
        expected, actual, size = hashlib.sha1(), hashlib.sha1(), count * (MIB + 4)
        for number in range(count):
            expected.update(block(number, salt))
        while size:
            data = await stream.receive(min(size, MIB))
            actual.update(data)
            size -= len(data)
        assert actual.digest() == expected.digest()
        done.append(salt)

    done: list[int] = []
    async with both_ends(pair) as (near, far), anyio.create_task_group() as tasks:
        tasks.start_soon(send, near, 1)
        tasks.start_soon(send, far, 2)
        tasks.start_soon(receive, far, 1)
        tasks.start_soon(receive, near, 2)
    assert sorted(done) == [1, 2]


@pytest.mark.needs("many_streams")
async def test_200_streams_at_once_do_not_mix(pair: Pair) -> None:
    answers = {}

    async def talk(number: int) -> None:
        _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/echo"])
        async with stream:
            opened.append(number)
            await until(lambda: len(opened) == 200)
            data = b"%d " % number * 500
            await stream.send(data)
            answers[number] = await stream.readexactly(len(data)) == data

    opened: list[int] = []
    await pair.bob.stream_handler("/echo", echo)
    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(talk, number)
    assert answers == dict.fromkeys(range(200), True)


# The Go daemon sometimes cuts off the end of such a stream: see docs/defects.md.
@pytest.mark.flaky(reruns=2)
@pytest.mark.parametrize("size", [64 * 1024, MIB, 8 * MIB], ids=["64 KiB", "1 MiB", "8 MiB"])
async def test_close_delivers_buffered_data_to_a_slow_reader(pair: Pair, size: int) -> None:
    data = os.urandom(size)

    async def write_and_close() -> None:
        near.write(data)
        near.close()
        assert near.is_closing()
        await near.wait_closed()
        assert near._raw.closed

    async with both_ends(pair) as (near, far), anyio.create_task_group() as tasks:
        tasks.start_soon(write_and_close)
        if size == 64 * 1024:  # fits into the buffers along the way
            await until(lambda: near._raw.closed)
        received = bytearray()
        while part := await far.read(size // 250):
            received += part
            await anyio.lowlevel.checkpoint()
        assert received == data


@pytest.mark.flaky(reruns=2)  # same defect as above
async def test_handler_data_sent_before_close_arrives_whole(pair: Pair) -> None:
    data = os.urandom(MIB)

    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            await stream.send(data)

    await pair.bob.stream_handler("/burst", handler)
    _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/burst"])
    async with stream:
        received = bytearray()
        while part := await stream.read(4096):
            received += part
            await anyio.lowlevel.checkpoint()
        assert received == data


# The Go daemon can cut off the end of a stream closed right after writing: see docs/defects.md.
@pytest.mark.flaky(reruns=2)
async def test_event_loop_flushes_after_close_without_await(pair: Pair, anyio_backend: Any) -> None:
    if anyio_backend[0] == "trio":
        # On trio nothing runs in the background, so close must be awaited.
        return
    data = os.urandom(8 * MIB)
    async with both_ends(pair) as (near, far):
        near.write(data)
        near.close()
        assert await far.read() == data
        await until(lambda: near._raw.closed)


# --- end of stream and close ---


@pytest.mark.daemons("hivemind", "go")
async def test_send_eof_ends_both_directions_on_go_daemons(pair: Pair) -> None:
    async with both_ends(pair) as (near, far):
        await near.send(b"all of it")
        await near.send_eof()
        # The peer gets every byte and then EOF,
        assert await far.read() == b"all of it"
        assert far.at_eof()
        # but this side also gets EOF, at once,
        with pytest.raises(anyio.EndOfStream):
            await near.receive()
        # and data that the peer sends afterwards is lost.
        with pytest.raises(anyio.BrokenResourceError):
            while True:
                await far.send(b"answer")
                await anyio.lowlevel.checkpoint()
        with pytest.raises(anyio.ClosedResourceError):
            await near.send(b"more")
        await near.send_eof()  # a second call is a no-op


async def test_every_read_after_eof_reports_eof(pair: Pair) -> None:
    async with both_ends(pair) as (near, far):
        await far.send(b"last")
        await far.aclose()
        assert await near.receive() == b"last"
        for _ in range(3):
            with pytest.raises(anyio.EndOfStream):
                await near.receive()
            assert await near.read() == await near.read(10) == await near.readline() == b""
            with pytest.raises(IncompleteRead):
                await near.readexactly(1)
            assert near.at_eof()


async def test_closed_stream_refuses_every_operation(pair: Pair) -> None:
    async with both_ends(pair) as (near, _):
        await near.aclose()
        calls: list[Callable[[], Awaitable[Any]]] = [
            near.receive,
            near.read,
            near.send_eof,
            near.readline,
            near.receive_frame,
            lambda: near.send(b"data"),
            lambda: near.readexactly(1),
            lambda: near.write(b"data"),
        ]
        for call in calls:
            with pytest.raises(anyio.ClosedResourceError):
                await call()
        await near.aclose()
        near.close()
        await near.wait_closed()
        near.abort()
        assert near.is_closing()
        assert "closed" in repr(near)


@pytest.mark.parametrize("how", ["aclose", "close", "abort"])
async def test_closing_wakes_waiting_tasks(pair: Pair, how: str) -> None:
    woken = []

    async def receive(stream: Stream) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await stream.receive()
        woken.append("receive")

    async def send(stream: Stream) -> None:
        with pytest.raises(anyio.ClosedResourceError):
            while True:
                await stream.send(bytes(MIB))
        woken.append("send")

    async with both_ends(pair) as (near, _):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive, near)
            tasks.start_soon(send, near)
            await until(lambda: is_stuck(near))
            result = getattr(near, how)()
            if how == "aclose":
                await result
        assert sorted(woken) == ["receive", "send"]


def is_stuck(stream: Stream) -> bool:
    """Whether the socket buffer is full and both a reader and a writer are waiting."""
    poll = select.poll()
    poll.register(stream._raw.fileno(), select.POLLOUT)
    return stream._reading and stream._sending and not poll.poll(20)


async def test_second_concurrent_reader_or_writer_is_refused(pair: Pair) -> None:
    async def keep_receiving() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            await near.receive()

    async def keep_sending() -> None:
        with pytest.raises(anyio.ClosedResourceError):
            while True:
                await near.send(bytes(MIB))

    async with both_ends(pair) as (near, _), anyio.create_task_group() as tasks:
        tasks.start_soon(keep_receiving)
        tasks.start_soon(keep_sending)
        await until(lambda: is_stuck(near))
        for call in (near.receive, near.read, near.readline, lambda: near.readexactly(1)):
            with pytest.raises(anyio.BusyResourceError, match="reading"):
                await call()
        with pytest.raises(anyio.BusyResourceError, match="writing"):
            await near.send(b"data")
        with pytest.raises(anyio.BusyResourceError, match="writing"):
            await near.send_eof()
        await near.aclose()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_killed_daemon_breaks_its_streams(kind: str) -> None:
    with DaemonProcess(transport=kind) as here, DaemonProcess(transport=kind) as there:
        async with here.client() as alice, there.client() as bob, bob.listen():
            await alice.connect(there.peer_id, there.addrs)
            await bob.stream_handler("/echo", echo)
            _, stream = await alice.stream_open(there.peer_id, ["/echo"])
            async with stream:
                await stream.send(b"ping")
                assert await stream.readexactly(4) == b"ping"
                here.kill()
                start = time.monotonic()
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await stream.receive()
                with pytest.raises(anyio.BrokenResourceError) as error:
                    while True:
                        await stream.send(b"ping")
                assert isinstance(error.value.__cause__, ConnectionError)
                with pytest.raises(anyio.BrokenResourceError):
                    stream.write(b"ping")
                assert time.monotonic() - start < 1


@pytest.mark.needs("stream_handler_again")
async def test_garbage_collected_stream_closes_its_descriptor(
    pair: Pair, capfd: pytest.CaptureFixture[str]
) -> None:
    async with both_ends(pair) as (_, far):
        sockets = []

        async def open_and_forget() -> None:
            _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/echo"])
            await stream.send(b"ping")
            assert await stream.readexactly(4) == b"ping"
            with anyio.move_on_after(0.01):
                await stream.receive()  # registers the descriptor with the loop
            stream.write(b"unsent")
            sockets.append(os.readlink(f"/proc/self/fd/{stream._raw.fileno()}"))

        async def handler(info: StreamInfo, stream: Stream) -> None:
            assert await stream.readexactly(4) == b"ping"
            await stream.send(b"ping")
            with suppress(anyio.BrokenResourceError):
                assert await stream.read() in (b"", b"unsent")
            ended.append(True)

        ended: list[bool] = []
        await pair.bob.stream_handler("/echo", handler)
        for _ in range(3):
            await open_and_forget()
        gc.collect()
        await until(lambda: len(ended) == 3)
        assert len(set(sockets)) == 3
        assert not set(sockets) & set(open_descriptors())
        await far.send(b"others are left alone")
    assert capfd.readouterr().err == ""


async def test_context_manager_closes_the_stream_on_error(pair: Pair) -> None:
    async with both_ends(pair) as (near, far):
        with pytest.raises(KeyError):
            async with near:
                raise KeyError
        with pytest.raises(anyio.ClosedResourceError):
            await near.receive()
        assert await far.read() == b""


# --- attributes ---


async def test_extra_attributes_include_anyios_and_stream_info(pair: Pair, transport: str) -> None:
    async with both_ends(pair) as (near, far):
        for stream, remote in ((near, pair.bob_daemon), (far, pair.alice_daemon)):
            info = stream.extra(StreamAttribute.stream_info)
            assert info is stream.info
            assert (info.peer_id, info.proto) == (remote.peer_id, "/both")
            sock = stream.extra(SocketAttribute.raw_socket)
            assert isinstance(sock, socket.socket) and sock.family == stream.extra(
                SocketAttribute.family
            )
            assert stream.get_extra_info("socket") is sock
            assert stream.extra(SocketAttribute.local_address) == sock.getsockname()
            assert stream.get_extra_info("sockname") == sock.getsockname()
            assert stream.extra(SocketAttribute.remote_address) == sock.getpeername()
            assert stream.get_extra_info("peername") == sock.getpeername()
            if transport == "tcp":
                assert sock.family == socket.AF_INET
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert stream.extra(SocketAttribute.local_port) == sock.getsockname()[1]
                assert stream.extra(SocketAttribute.remote_port) == sock.getpeername()[1]
            else:
                assert sock.family == socket.AF_UNIX
                assert stream.extra(SocketAttribute.local_port, None) is None
            assert stream.get_extra_info("nonsense", 5) == 5
            assert "/both" in repr(stream) and str(remote.peer_id) in repr(stream)
            assert stream.can_write_eof()
        control = pair.alice_daemon.control_maddr
        if transport == "unix":
            assert f"/unix{near.extra(SocketAttribute.remote_address)}" == control
        else:
            assert control.endswith(f"/tcp/{near.extra(SocketAttribute.remote_port)}")
    assert sock.fileno() == -1  # the stream closed it
    assert near.get_extra_info("peername") is None


# --- reading from a scripted peer, so that the test controls what has arrived ---


@asynccontextmanager
async def raw_stream(script: Callable[[Connection], None]) -> AsyncIterator[Stream]:
    """A stream whose other end runs ``script``."""
    with FakeDaemon(script) as fake:
        async with await DaemonConnector(fake.control_maddr).open_connection() as stream:
            yield stream
        await until(lambda: fake.accepted and not fake.open)


async def test_reads_return_the_requested_bytes() -> None:
    def script(connection: Connection) -> None:
        connection.send(b"0123456789" * 10)
        connection.wait_closed()

    async with raw_stream(script) as stream:
        assert await stream.read(0) == b""
        assert await stream.readexactly(0) == b""
        assert await stream.receive(3) == b"012"
        assert await stream.read(4) == b"3456"
        assert await stream.readexactly(5) == b"78901"
        assert not stream.at_eof()
        assert await stream.receive() == (b"0123456789" * 10)[12:]
        for wrong in (stream.receive(0), stream.receive(-1), stream.readexactly(-1)):
            with pytest.raises(ValueError):
                await wrong


async def test_read_without_a_limit_reads_to_the_end() -> None:
    data = os.urandom(3 * MIB)
    async with raw_stream(lambda c: c.send(data)) as stream:
        assert await stream.read() == data
        assert stream.at_eof()


async def test_readexactly_at_eof_raises_with_the_partial_bytes() -> None:
    async with raw_stream(lambda c: c.send(b"seven b")) as stream:
        with pytest.raises(IncompleteRead) as error:
            await stream.readexactly(10)
        assert (error.value.partial, error.value.expected) == (b"seven b", 10)
        assert isinstance(error.value, asyncio.IncompleteReadError)
        assert isinstance(error.value, anyio.IncompleteRead)
        assert await stream.read() == b""


async def test_readline_and_readuntil_split_at_separators() -> None:
    async with raw_stream(lambda c: c.send(b"one\ntwo\n\nENDthree END, four")) as stream:
        assert await stream.readline() == b"one\n"
        assert await stream.readuntil() == b"two\n"
        assert await stream.readline() == b"\n"
        assert await stream.readuntil(b"END") == b"END"
        assert await stream.readuntil(bytearray(b"END")) == b"three END"
        assert await stream.readline() == b", four"
        assert await stream.readline() == b""
        with pytest.raises(ValueError, match="at least one-byte"):
            await stream.readuntil(b"")


async def test_readuntil_at_eof_raises_with_the_partial_bytes() -> None:
    async with raw_stream(lambda c: c.send(b"no newline")) as stream:
        with pytest.raises(IncompleteRead) as error:
            await stream.readuntil(b"\n")
        assert (error.value.partial, error.value.expected) == (b"no newline", None)


async def test_readuntil_finds_a_separator_split_across_reads() -> None:
    def script(connection: Connection) -> None:
        for byte in b"ab-=-=--=-=!rest":
            connection.send(bytes([byte]))

    async with raw_stream(script) as stream:
        assert await stream.readuntil(b"-=-=!") == b"ab-=-=--=-=!"
        assert await stream.read() == b"rest"


async def test_line_over_the_limit_raises_and_stays_buffered() -> None:
    data = b"x" * 100_000 + b"\nrest"
    async with raw_stream(lambda c: c.send(data)) as stream:
        for _ in range(2):
            with pytest.raises(asyncio.LimitOverrunError) as error:
                await stream.readuntil(b"\n")
            assert error.value.consumed > 65536 - 1
            with pytest.raises(asyncio.LimitOverrunError):
                await stream.readuntil(b"\n", limit=10)
        assert await stream.readuntil(b"\n", limit=1 << 20) == data[:-4]
        assert await stream.read() == b"rest"


async def test_receive_frame_reads_all_sizes_and_reports_broken_frames() -> None:
    frames = [b"", b"x", b"y" * 127, b"z" * 128, os.urandom(100_000)]

    def script(connection: Connection) -> None:
        connection.send(b"".join(map(frame, frames)) + frame(bytes(50))[:-1])

    async with raw_stream(script) as stream:
        assert [await stream.receive_frame() for _ in frames] == frames
        with pytest.raises(ConnectionLost):
            await stream.receive_frame()
    async with raw_stream(lambda c: c.send(frame(bytes(1001)))) as stream:
        with pytest.raises(ProtocolViolation, match="1001 bytes; the limit is 1000"):
            await stream.receive_frame(1000)
    async with raw_stream(lambda c: None) as stream:
        with pytest.raises(anyio.EndOfStream):
            await stream.receive_frame()


@pytest.mark.parametrize("size", [20, 200_000])
async def test_cancelled_read_loses_no_data(size: int) -> None:
    data = os.urandom(size)

    def script(connection: Connection) -> None:
        connection.send(data[: size // 2])
        assert connection.read(1) == b"!"
        connection.send(data[size // 2 :])

    async with raw_stream(script) as stream:
        received = await stream.readexactly(5)
        cancelled: list[Callable[[], Awaitable[bytes]]] = [
            lambda: stream.readexactly(size - 5),
            lambda: stream.readuntil(b"no such thing", limit=MIB),
            lambda: stream.readexactly(size),
            lambda: stream.read(),
        ]
        for read in cancelled:
            with anyio.move_on_after(0.03) as scope:
                await read()
            assert scope.cancelled_caught
        await stream.send(b"!")
        received += await stream.readexactly(7)
        received += await stream.read()
        assert received == data


async def test_cancelled_receive_loses_no_data() -> None:
    def script(connection: Connection) -> None:
        for number in range(100):
            assert connection.read(1) == b"!"
            connection.send(b"%03d" % number)

    async with raw_stream(script) as stream:
        received = b""
        for _ in range(100):
            with anyio.CancelScope(deadline=anyio.current_time() - 1) as scope:
                await stream.receive()
            assert scope.cancelled_caught
            await stream.send(b"!")
            with anyio.move_on_after(0.0001):
                received += await stream.receive()
        received += await stream.read()
        assert received == b"".join(b"%03d" % number for number in range(100))


async def test_iteration_yields_everything_up_to_eof() -> None:
    data = os.urandom(300_000)
    async with raw_stream(lambda c: c.send(data)) as stream:
        assert b"".join([part async for part in stream]) == data


async def test_stream_with_constant_data_does_not_starve_other_tasks() -> None:
    def script(connection: Connection) -> None:
        while True:
            connection.send(bytes(MIB))

    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with raw_stream(script) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        for _ in range(2000):
            await stream.readexactly(100)
        tasks.cancel_scope.cancel()
    assert turns >= 2000 // 20


# --- anyio 1's names, which programs for p2pclient 0.2 use ---


async def test_p2pclient_0_2_names_work_on_both_ends(pair: Pair) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        data = await stream.receive_exactly(4)
        await stream.send_all(data[::-1])
        assert await stream.receive_some(100) == b""
        await stream.close()

    await pair.bob.stream_handler("/0.2", handler)
    _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/0.2"])
    await stream.send_all(b"ping")
    received = b""
    while len(received) < 4:
        received += await stream.receive_some(2)
    assert received == b"gnip"
    await stream.close()


async def test_receive_some_returns_available_bytes_and_empty_at_eof() -> None:
    async with raw_stream(lambda connection: connection.send(b"abcdef")) as stream:
        assert await stream.receive_some(0) == b""
        assert await stream.receive_some(4) == b"abcd"
        assert stream.buffered_data == b"ef"
        assert await stream.receive_some(10**30) == b"ef"
        assert await stream.receive_some(1) == await stream.receive_some(1) == b""
        with pytest.raises(ValueError):
            await stream.receive_some(-1)
    with pytest.raises(anyio.ClosedResourceError):
        await stream.receive_some(1)


@pytest.mark.parametrize("size", [3, 200_000])
async def test_receive_exactly_keeps_incomplete_data_buffered(size: int) -> None:
    data = os.urandom(size)
    async with raw_stream(lambda connection: connection.send(b"ab" + data)) as stream:
        assert await stream.receive_exactly(2) == b"ab"
        for error in (anyio.IncompleteRead, asyncio.IncompleteReadError):
            with pytest.raises(error):
                await stream.receive_exactly(size + 1)
        assert stream.buffered_data == data
        assert await stream.receive_exactly(0) == b""
        assert await stream.receive_exactly(size) == data
        assert stream.at_eof()


async def test_receive_until_returns_the_bytes_before_the_delimiter() -> None:
    async with raw_stream(lambda connection: connection.send(b"ab\r\ncd\r\n\r\nxyz")) as stream:
        assert await stream.receive_until(b"\r\n", 4) == b"ab"
        with pytest.raises(anyio.DelimiterNotFound):
            await stream.receive_until(b"\r\n", 3)
        assert await stream.receive_until(b"\r\n", 10**30) == b"cd"
        assert await stream.receive_until(b"\r\n", 2) == b""
        for _ in range(2):
            with pytest.raises(anyio.IncompleteRead):
                await stream.receive_until(b"\r\n", 100)
        assert stream.buffered_data == b"xyz"
        with pytest.raises(anyio.DelimiterNotFound):
            await stream.receive_until(b"\r\n", 0)
        with pytest.raises(ValueError):
            await stream.receive_until(b"", 1)


async def test_receive_until_fails_as_soon_as_the_limit_is_reached() -> None:
    def script(connection: Connection) -> None:
        connection.send(b"abc")
        connection.wait_closed()

    async with raw_stream(script) as stream:
        with pytest.raises(anyio.DelimiterNotFound), anyio.fail_after(5):
            await stream.receive_until(b"\n", 3)
        assert await stream.receive_some(10) == b"abc"


async def test_receive_chunks_yields_up_to_eof() -> None:
    async with raw_stream(lambda connection: connection.send(b"abcdefg")) as stream:
        await stream.receive_exactly(2)
        assert [chunk async for chunk in stream.receive_chunks(2)] == [b"cd", b"ef", b"g"]


async def test_receive_delimited_chunks_yields_up_to_eof() -> None:
    async with raw_stream(lambda connection: connection.send(b"a,b,,c,")) as stream:
        chunks = [chunk async for chunk in stream.receive_delimited_chunks(b",", 10)]
        assert chunks == [b"a", b"b", b"", b"c"]
    async with raw_stream(lambda connection: connection.send(b"a,rest")) as stream:
        chunks = []
        with pytest.raises(anyio.IncompleteRead):
            async for chunk in stream.receive_delimited_chunks(b",", 10):
                chunks.append(chunk)
        assert chunks == [b"a"] and stream.buffered_data == b"rest"


async def test_socket_options_and_addresses_match_the_socket() -> None:
    async with raw_stream(lambda connection: connection.send(b"a")) as stream:
        sock = stream.get_extra_info("socket")
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF
        )
        assert stream.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE, 4) == sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_TYPE, 4
        )
        assert (stream.address, stream.peer_address) == (sock.getsockname(), sock.getpeername())


# --- large reads, received straight into the returned bytes ---


async def cancel_readexactly_midway(stream: Stream, count: int, sent: threading.Event) -> None:
    """Cancels a read of ``count`` bytes after it has consumed everything that was sent."""
    poll = select.poll()
    poll.register(stream._raw.fileno(), select.POLLIN)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stream.readexactly, count)
        await until(lambda: sent.is_set() and stream._reading and not poll.poll(0))
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["again", "shorter", "longer", "read", "receive", "line", "frame"])
async def test_next_read_of_any_kind_gets_the_data_of_a_cancelled_large_read(how: str) -> None:
    size = 150_000
    data = frame(os.urandom(size).replace(b"\n", b"") + b"\n")

    def script(connection: Connection) -> None:
        connection.send(data[: len(data) // 2])
        sent.set()
        assert connection.read(1) == b"!"
        connection.send(data[len(data) // 2 :])

    sent = threading.Event()
    async with raw_stream(script) as stream:
        await cancel_readexactly_midway(stream, len(data), sent)
        await stream.send(b"!")
        if how == "again":
            received = await stream.readexactly(len(data))
        elif how == "shorter":
            received = await stream.readexactly(5) + await stream.readexactly(len(data) - 5)
        elif how == "longer":
            with pytest.raises(IncompleteRead) as caught:
                await stream.readexactly(len(data) + 1)
            received = caught.value.partial
        elif how == "read":
            received = await stream.read()
        elif how == "receive":
            received = b"".join([part async for part in stream])
        elif how == "line":
            received = await stream.readuntil(b"\n", limit=size)
        else:
            received = frame(await stream.receive_frame())
        assert received == data
        assert await stream.read() == b""


async def test_eof_during_a_large_read_raises_with_the_partial_bytes() -> None:
    data = os.urandom(100_000)
    async with raw_stream(lambda c: c.send(data)) as stream:
        assert await stream.readexactly(10) == data[:10]
        # Counts that exceed the memory, as a peer may declare them.
        for count in (data[10:], 1 << 46), (b"", MIB), (b"", 1 << 60):
            with pytest.raises(IncompleteRead) as caught:
                await stream.readexactly(count[1])
            assert (caught.value.partial, caught.value.expected) == count
            assert stream.at_eof()


async def test_mixed_read_sizes_return_consecutive_data() -> None:
    rng = random.Random(6)
    sizes = [65_535, 65_536, 65_537, 1, 8, MIB, 4096, 3 * MIB, 1, 100_000, 0, 300_000] * 2
    data = rng.randbytes(sum(sizes))

    async with raw_stream(lambda c: c.send(data)) as stream:
        at = 0
        for size in sizes:
            assert await stream.readexactly(size) == data[at : at + size]
            at += size
        assert await stream.read() == b""


async def test_close_discards_the_data_of_a_cancelled_large_read() -> None:
    sent = threading.Event()

    def script(connection: Connection) -> None:
        connection.send(bytes(100_000))
        sent.set()
        connection.wait_closed()

    async with raw_stream(script) as stream:
        await cancel_readexactly_midway(stream, MIB, sent)
        await stream.aclose()
        with pytest.raises(anyio.ClosedResourceError):
            await stream.readexactly(MIB)
        with pytest.raises(anyio.ClosedResourceError):
            await stream.read(1)


# --- waking tasks ---


async def test_woken_task_keeps_its_context_and_identity() -> None:
    def script(connection: Connection) -> None:
        for _ in range(20):
            assert connection.read(1) == b"!"
            connection.send(b"?")

    name: ContextVar[int] = ContextVar("name")

    async def ask(number: int) -> None:
        name.set(number)
        before = anyio.get_current_task()
        async with raw_stream(script) as stream:
            for _ in range(20):
                await stream.send(b"!")
                assert await stream.readexactly(1) == b"?"
                assert (name.get(), anyio.get_current_task()) == (number, before)

    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(ask, number)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
async def test_cancelling_a_waiting_task_passes_on_the_message() -> None:
    def hold(connection: Connection) -> None:
        connection.wait_closed()

    async with raw_stream(hold) as stream:
        for args in [], ["why"]:
            task = asyncio.ensure_future(stream.read())
            await until(lambda: stream._reading)
            task.cancel(*args)
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert list(caught.value.args) == args
        # The stream stays usable: the next read waits again.
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(stream.read(), 0.01)


def reads_later(release: threading.Event, received: list[bytes]) -> Script:
    """A peer that reads nothing until ``release`` is set, and then reads everything."""

    def script(connection: Connection) -> None:
        release.wait(20)
        received.append(connection.wait_closed())

    return script


# On trio, nothing runs in the background.
@pytest.mark.parametrize("anyio_backend", BACKENDS[:2], indirect=True)
async def test_garbage_collected_stream_still_sends_its_buffer() -> None:
    release = threading.Event()
    received: list[bytes] = []
    data = os.urandom(4 * MIB)
    with FakeDaemon(reads_later(release, received)) as fake:
        stream = await DaemonConnector(fake.control_maddr).open_connection()
        stream.write(data)
        assert stream._raw.buffered
        del stream
        gc.collect()
        release.set()
        await until(lambda: received)
    assert received == [data]


# --- writing ---


async def test_buffer_cannot_be_resized_while_it_is_sent() -> None:
    release = threading.Event()
    received: list[bytes] = []
    data = bytearray(os.urandom(4 * MIB))
    async with raw_stream(reads_later(release, received)) as stream:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, data)
            await until(lambda: stream._sending)
            with pytest.raises(BufferError):
                data.clear()
            release.set()
    await until(lambda: received)
    assert received == [data]


async def test_every_kind_of_buffer_is_accepted() -> None:
    numbers = array.array("d", [1.5, -2.0, float("inf")])
    grid = memoryview(bytes(range(12))).cast("B", (3, 4))
    buffers: list[Any] = [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"memoryview"),
        memoryview(b"a slice of one")[2:7],
        memoryview(b"every second byte")[::2],
        numbers,
        memoryview(numbers),
        grid,
        b"",
        memoryview(b""),
    ]
    expected = b"".join(memoryview(buffer).tobytes() for buffer in buffers)
    received = []

    def script(connection: Connection) -> None:
        received.append(connection.wait_closed())

    async with raw_stream(script) as stream:
        for buffer in buffers:
            await stream.send(buffer)
        for buffer in buffers:
            stream.write(buffer)
        await stream.drain()
        for buffer in buffers:
            await stream.write(buffer)
        stream.writelines(buffers)
        await stream.drain()
        for wrong in ("text", 5, None):
            with pytest.raises(TypeError):
                await stream.send(wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                stream.write(wrong)  # type: ignore[arg-type]
    assert received == [expected * 4]


async def test_buffer_can_be_changed_after_write_returns() -> None:
    received = []

    def script(connection: Connection) -> None:
        received.append(connection.wait_closed())

    buffer = bytearray(os.urandom(4 * MIB))
    expected = bytes(buffer)
    async with raw_stream(script) as stream:
        stream.write(buffer)
        buffer[:] = bytes(4 * MIB)
    assert received == [expected]


async def test_write_eof_after_drain_half_closes() -> None:
    received = []

    def script(connection: Connection) -> None:
        connection.read(1)
        received.append(connection.wait_closed())
        connection.send(b"answer")

    async with raw_stream(script) as stream:
        await stream.send(b"!")
        stream.write(bytes(4 * MIB))
        while stream._raw.buffered:
            await stream.drain()
            await anyio.lowlevel.checkpoint()
        stream.write_eof()
        assert await stream.read() == b"answer"  # no daemon in between, so half-close works
        with pytest.raises(anyio.ClosedResourceError):
            stream.write(b"more")
    assert received == [bytes(4 * MIB)]


async def test_send_eof_flushes_the_buffer_first() -> None:
    received = []

    def script(connection: Connection) -> None:
        received.append(connection.wait_closed())

    async with raw_stream(script) as stream:
        stream.write(bytes(4 * MIB))
        await stream.send_eof()
        assert await stream.read() == b""
    assert received == [bytes(4 * MIB)]


async def test_send_after_write_preserves_order() -> None:
    received = []

    def script(connection: Connection) -> None:
        received.append(connection.wait_closed())

    parts = [os.urandom(300_000) for _ in range(10)]
    async with raw_stream(script) as stream:
        for first, second in zip(parts[::2], parts[1::2], strict=True):
            stream.write(first)
            await stream.send(second)
    assert received == [b"".join(parts)]


async def test_write_during_another_tasks_send_is_refused() -> None:
    received: list[bytes] = []

    def script(connection: Connection) -> None:
        release.wait(20)
        received.append(connection.wait_closed())

    release = threading.Event()
    data = os.urandom(8 * MIB)
    async with raw_stream(script) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(stream.send, data)
        await until(lambda: stream._sending)
        with pytest.raises(anyio.BusyResourceError):
            stream.write(b"intruder")
        release.set()
    assert received == [data]


async def test_drain_and_close_may_run_concurrently() -> None:
    received: list[bytes] = []

    def script(connection: Connection) -> None:
        release.wait(20)
        received.append(connection.wait_closed())

    async def drain() -> None:
        waiting.append(True)
        await stream.drain()

    release = threading.Event()
    waiting: list[bool] = []
    data = os.urandom(8 * MIB)
    async with raw_stream(script) as stream:
        stream.write(data)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(drain)
            await until(lambda: len(waiting) == 3)
            with anyio.move_on_after(0.05) as scope:
                await stream.drain()
            assert scope.cancelled_caught
            release.set()
            await stream.aclose()
    assert received == [data]


@pytest.mark.needs("backpressure")
async def test_drain_blocks_while_the_peer_does_not_read(pair: Pair) -> None:
    chunk = os.urandom(64 * 1024)
    async with both_ends(pair) as (near, far):
        written, progress = 0, True
        while progress:
            assert written < PIPELINE
            with anyio.move_on_after(0.5) as scope:
                near.write(chunk)
                written += len(chunk)
                assert near._raw.buffered <= 64 * 1024 + len(chunk)
                await near.drain()
            progress = not scope.cancelled_caught
        # Nothing is lost, and the writer continues once the peer reads.
        digest = hashlib.sha1(chunk * (written // len(chunk)))
        actual = hashlib.sha1()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(near.drain)
            while written:
                data = await far.receive(min(written, MIB))
                actual.update(data)
                written -= len(data)
        assert actual.digest() == digest.digest()
        await near.send(b"more")
        assert await far.readexactly(4) == b"more"


async def test_cancelled_send_leaves_the_stream_usable() -> None:
    def script(connection: Connection) -> None:
        connection.send(b"unasked")
        connection.wait_readable()
        release.wait(20)
        received.append(connection.wait_closed())

    release = threading.Event()
    received: list[bytes] = []
    data = os.urandom(8 * MIB)
    async with raw_stream(script) as stream:
        with anyio.move_on_after(0.1) as scope:
            await stream.send(data)
        assert scope.cancelled_caught
        release.set()
        assert await stream.receive() == b"unasked"
        await stream.send(b"next")
    assert received[0].endswith(b"next") and data.startswith(received[0][:-4])


# --- handlers ---


@pytest.mark.needs("stream_handler_again")
async def test_handler_exception_is_logged_and_ends_only_its_stream(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        if await stream.readline() == b"fail\n":
            raise LookupError("a bug in the handler")
        await echo(info, stream)

    await pair.bob.stream_handler("/fragile", handler)

    async def opened() -> Stream:
        _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/fragile"])
        return stream

    async with await opened() as good:
        await good.send(b"fine\n")
        async with await opened() as bad:
            await bad.send(b"fail\n")
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await bad.receive()
        await good.send(b"ping")
        assert await good.readexactly(4) == b"ping"
    async with await opened() as later:
        await later.send(b"fine\nping")
        assert await later.readexactly(4) == b"ping"
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.name == "p2pclient_rs.control"
    assert "/fragile" in record.getMessage()
    assert str(pair.alice_daemon.peer_id) in record.getMessage()
    assert record.exc_info is not None and record.exc_info[0] is LookupError
    assert "a bug in the handler" in caplog.text and "in handler" in caplog.text


@pytest.mark.needs("stream_handler_again")
async def test_handler_raising_cancelled_error_ends_only_its_stream(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def gives_up(info: StreamInfo, stream: Stream) -> None:
        await stream.receive()
        raise asyncio.CancelledError  # as awaiting a cancelled task would

    await pair.bob.stream_handler("/echo", echo)
    await pair.bob.stream_handler("/gives up", gives_up)
    bob = pair.bob_daemon.peer_id
    _, running = await pair.alice.stream_open(bob, ["/echo"])
    await running.send(b"a")
    assert await running.receive() == b"a"
    with caplog.at_level(logging.WARNING, "p2pclient_rs.control"):
        _, ended = await pair.alice.stream_open(bob, ["/gives up"])
        await ended.send(b"a")
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError), anyio.fail_after(10):
            await ended.receive()
        _, later = await pair.alice.stream_open(bob, ["/echo"])
        for stream in (running, later):
            await stream.send(b"b")
            with anyio.fail_after(10):
                assert await stream.receive() == b"b"
    assert "the handler of '/gives up' on a stream from" in caplog.text
    assert "was cancelled, but not by its client" in caplog.text
    assert "in gives_up" in caplog.text
    for stream in (running, ended, later):
        await stream.aclose()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Task.cancelling is new in Python 3.11")
def test_handler_cancelled_at_loop_shutdown_logs_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = new_directory()
    client = Client(f"/unix{directory}/nobody", f"/unix{directory}/s")

    async def listen(listening: asyncio.Event) -> None:
        async with client.listen():
            listening.set()
            await asyncio.Future()

    async def main(peer: socket.socket) -> asyncio.Task[None]:
        listening = asyncio.Event()
        handling = asyncio.get_running_loop().create_future()

        async def handler(info: StreamInfo, stream: Stream) -> None:
            handling.set_result(asyncio.current_task())
            await stream.receive()

        client.control.handlers["/echo"] = handler
        task = asyncio.create_task(listen(listening))
        await listening.wait()
        peer.connect(f"{directory}/s")
        peer.sendall(frame(STREAM_INFO))
        handler_task = await handling
        handler_task.cancel()
        await asyncio.wait([handler_task])
        assert not task.done()
        return task

    with socket.socket(socket.AF_UNIX) as peer:
        task = asyncio.run(main(peer))  # cancels all remaining tasks
        assert task.cancelled()
        assert peer.recv(1) == b""
    assert [record.message for record in caplog.records] == []


async def test_leaving_listen_cancels_handlers(pair: Pair) -> None:
    events = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        events.append("begun")
        try:
            await stream.receive()
        except anyio.get_cancelled_exc_class():
            events.append("cancelled")
            raise

    async with pair.bob_daemon.client() as client:
        async with client.listen():
            await client.stream_handler("/wait", handler)
            _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/wait"])
            await until(lambda: events)
        assert events == ["begun", "cancelled"]
        async with stream:
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await stream.receive()


async def test_exception_in_the_body_of_listen_propagates_unchanged(pair: Pair) -> None:
    async def wait(info: StreamInfo, stream: Stream) -> None:
        begun.append(True)
        await stream.receive()

    begun: list[bool] = []
    async with pair.bob_daemon.client() as client:
        with pytest.raises(KeyError, match="mine") as error:
            async with client.listen():
                await client.stream_handler("/wait", wait)
                _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/wait"])
                await until(lambda: begun)
                raise KeyError("mine")
        assert error.type is KeyError
        await stream.aclose()
        with anyio.CancelScope() as scope:
            async with client.listen():
                scope.cancel()
                await anyio.sleep(10)
        assert scope.cancelled_caught


@pytest.mark.needs("stream_handler_again")
async def test_stream_is_closed_when_its_handler_returns_without_closing(pair: Pair) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        assert await stream.readexactly(2) == b"hi"
        done.append(True)

    done: list[bool] = []
    await pair.bob.stream_handler("/forgets", handler)
    before = open_descriptors()
    for times in range(1, 6):
        _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/forgets"])
        async with stream:
            await stream.send(b"hi")
            await until(lambda: len(done) == times)  # noqa: B023
            gc.collect()
            assert await stream.read() == b""
    await until(lambda: len(open_descriptors()) <= len(before))


async def test_abandoned_stream_is_closed_if_its_loop_is_closed_meanwhile() -> None:
    def hold(connection: Connection) -> None:
        connection.wait_closed()

    with FakeDaemon(hold) as daemon:
        loop = asyncio.new_event_loop()
        opening = DaemonConnector(daemon.control_maddr).open_connection()
        stream = await anyio.to_thread.run_sync(loop.run_until_complete, opening)
        raw, watched = stream._raw, stream._watch
        loop.close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "is_running", lambda: True)  # as if checked just before the close
            watched.abandon(raw)
        assert raw.closed


async def test_handler_may_keep_its_stream(pair: Pair) -> None:
    async with both_ends(pair) as (near, far):
        gc.collect()
        await near.send(b"still there?")
        assert await far.receive() == b"still there?"


# --- the listener ---


async def test_second_listen_is_refused_while_the_first_runs(pair: Pair) -> None:
    with pytest.raises(ControlFailure, match="already listening"):
        async with pair.alice.listen():
            pass
    async with both_ends(pair) as (near, far):  # the first listener keeps working
        await near.send(b"x")
        assert await far.receive() == b"x"


async def test_client_close_stops_listening_but_not_the_body_of_listen(
    bare_daemon: DaemonProcess,
) -> None:
    client = bare_daemon.client()
    path = Path(str(client.control.listen_maddr).removeprefix("/unix"))
    for _ in range(2):
        reached = False
        async with client.listen():
            assert path.is_socket()
            await client.close()
            await until(lambda: not path.exists())
            assert (await client.identify()).peer_id == bare_daemon.peer_id
            reached = True
        assert reached
    await client.close()


async def test_client_close_cancels_handlers(pair: Pair) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        events.append("begun")
        try:
            await anyio.sleep_forever()
        finally:
            events.append("ended")

    events: list[str] = []
    await pair.bob.stream_handler("/wait", handler)
    _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/wait"])
    async with stream:
        await until(lambda: events)
        await pair.bob.close()
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        assert events == ["begun", "ended"]


async def test_socket_file_is_private_and_removed_with_the_listener() -> None:
    path = new_directory() / "listen.sock"
    async with Client(None, f"/unix{path}").listen() as client:
        assert client.control.handlers == {}
        assert path.is_socket()
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_stale_socket_file_is_replaced() -> None:
    path = new_directory() / "listen.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    async with Client(None, f"/unix{path}").listen():
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    assert not path.exists()


async def test_listen_on_an_address_in_use_raises_os_error_naming_it() -> None:
    directory = new_directory()
    path, file = directory / "listen.sock", directory / "file"
    file.write_text("precious")
    with socket.socket(socket.AF_UNIX) as live, socket.create_server(("127.0.0.1", 0)) as tcp:
        live.bind(str(path))
        live.listen()
        for addr in (
            f"/unix{path}",
            f"/unix{file}",
            f"/ip4/127.0.0.1/tcp/{tcp.getsockname()[1]}",
        ):
            client = Client(None, addr)
            for _ in range(2):  # the second failure must not be "already listening"
                with pytest.raises(OSError, match=addr) as error:
                    async with client.listen():
                        pass
                assert "in use" in str(error.value)
                assert error.value.errno == errno.EADDRINUSE
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))  # the socket still accepts connections
    assert file.read_text() == "precious"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="/missing/listen.sock"):
        async with Client(None, f"/unix{directory}/missing/listen.sock").listen():
            pass


HEADER = field(1, PEER) + field(2, ADDR) + field(3, b"/echo")
NONSENSE = {
    "nothing": b"",
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "an endless length": b"\xff" * 11,
    "a length over the limit": b"\xff\xff\xff\x7f",
    "half a header": frame(HEADER)[:-3],
    "an unknown protocol": frame(field(1, PEER) + field(2, ADDR) + field(3, b"/unknown")),
    "no peer": frame(field(2, ADDR) + field(3, b"/echo")),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
async def test_listener_survives_invalid_connections(
    pair: Pair, nonsense: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.bob.stream_handler("/echo", echo)
    with connect_to_listener(pair.bob) as invalid, connect_to_listener(pair.bob) as silent:
        invalid.sendall(nonsense)
        invalid.shutdown(socket.SHUT_WR)
        # The listener closes the invalid connection and keeps the silent one.
        invalid.setblocking(False)
        await until(lambda: is_closed(invalid))
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)
        _, stream = await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/echo"])
        async with stream:
            await stream.send(b"ping")
            assert await stream.readexactly(4) == b"ping"
    assert "refused an inbound stream" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def peek(sock: socket.socket) -> bytes:
    """Returns what has arrived at a non-blocking socket, without consuming it."""
    try:
        return sock.recv(100, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


async def test_listener_out_of_descriptors_logs_once_and_accepts_later(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    await pair.bob.stream_handler("/echo", echo)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect_to_listener(pair.bob) as daemon:
        daemon.setblocking(False)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            await until(lambda: "Too many open files" in caplog.text)
            await anyio.sleep(0.35)  # a few more attempts
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        daemon.sendall(frame(HEADER) + b"ping")
        await until(lambda: peek(daemon) == b"ping")
    # alice's listener may log the same message for its own streams.
    message = f"cannot accept a stream at {pair.bob.control.listen_maddr}"
    assert [message in record.getMessage() for record in caplog.records].count(True) == 1


async def test_header_arriving_byte_by_byte_is_accepted(pair: Pair) -> None:
    await pair.bob.stream_handler("/echo", echo)
    with connect_to_listener(pair.bob) as daemon:
        for byte in frame(HEADER):
            daemon.sendall(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        daemon.sendall(b"ping")
        daemon.setblocking(False)
        received = bytearray()

        def answered() -> bool:
            try:
                received.extend(daemon.recv(100))
            except BlockingIOError:
                pass
            return bytes(received) == b"ping"

        await until(answered)


async def test_header_timeout_starts_with_its_first_byte(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pclient_rs.inbound.HEADER_TIMEOUT", 0.05)
    pair.bob.control.handlers["/echo"] = echo
    with connect_to_listener(pair.bob) as daemon:
        daemon.setblocking(False)
        await anyio.sleep(0.2)  # jsp2pd connects early too, though not this early
        daemon.sendall(frame(HEADER) + b"ping")
        received = bytearray()

        def answered() -> bool:
            with suppress(BlockingIOError):
                received.extend(daemon.recv(100))
            return bytes(received) == b"ping"

        await until(answered)
    # An incomplete header times out.
    with connect_to_listener(pair.bob) as daemon:
        daemon.setblocking(False)
        daemon.sendall(frame(HEADER)[:-1])
        await until(lambda: is_closed(daemon))


async def test_bytes_after_the_header_belong_to_the_stream(pair: Pair) -> None:
    got: list[bytes] = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            got.append(await stream.read())

    await pair.bob.stream_handler("/echo", handler)
    with connect_to_listener(pair.bob) as daemon:
        daemon.sendall(frame(HEADER) + b"first bytes")
        daemon.shutdown(socket.SHUT_WR)
        await until(lambda: got)
    assert got == [b"first bytes"]
