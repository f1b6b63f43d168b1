"""The hivemind layer's reader and writer behave like asyncio's: every test runs on both."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from support import BACKENDS, new_directory, until

from p2pclient_rs import DaemonConnector
from p2pclient_rs.compat.hivemind.streams import reader_and_writer

pytestmark = [pytest.mark.anyio, pytest.mark.independent]

MIB = 1 << 20


@pytest.fixture(params=BACKENDS[:2])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Ends:
    """A reader and a writer, and the socket at the other end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: socket.socket
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.peer = peer

    def reset(self) -> None:
        """Makes the other end reset the connection."""
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.peer.close()


@pytest.fixture(params=["asyncio", "ours"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@asynccontextmanager
async def connected(kind: str, family: str) -> AsyncIterator[Ends]:
    listener = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
    directory = new_directory()
    with listener:
        listener.bind(f"{directory}/s" if family == "unix" else ("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        reader: asyncio.StreamReader
        writer: asyncio.StreamWriter
        if kind == "ours":
            maddr = f"/unix{address}" if family == "unix" else f"/ip4/127.0.0.1/tcp/{address[1]}"
            stream = await DaemonConnector(maddr).open_connection()
            reader, writer = reader_and_writer(stream)
            del stream
        elif family == "unix":
            reader, writer = await asyncio.open_unix_connection(address)
        else:
            reader, writer = await asyncio.open_connection(*address)
        peer, _ = listener.accept()
    if family == "unix":
        os.unlink(address)
    peer.settimeout(5)
    with peer:
        ends = Ends(reader, writer, peer)
        del reader, writer
        try:
            yield ends
        finally:
            with suppress(AttributeError, OSError, asyncio.CancelledError):
                ends.writer.transport.abort()
                await ends.writer.wait_closed()


@pytest.fixture
async def ends(kind: str, anyio_backend: Any) -> AsyncIterator[Ends]:
    async with connected(kind, "unix") as ends:
        yield ends


@pytest.fixture
async def tcp_ends(kind: str, anyio_backend: Any) -> AsyncIterator[Ends]:
    async with connected(kind, "tcp") as ends:
        yield ends


async def until_waiting(task: asyncio.Task[Any]) -> None:
    """Lets a task run until it waits."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()


async def run_loop() -> None:
    """Runs the event loop until it has noticed the data that has arrived."""
    for _ in range(3):
        await asyncio.sleep(0)


# --- reading ---


async def test_reader_and_writer_are_instances_of_asyncios_classes(ends: Ends) -> None:
    assert isinstance(ends.reader, asyncio.StreamReader)
    assert isinstance(ends.writer, asyncio.StreamWriter)
    assert "Stream" in repr(ends.reader) and "Stream" in repr(ends.writer)


async def test_each_read_method_returns_the_documented_data(ends: Ends) -> None:
    ends.peer.sendall(b"\x00" + (5).to_bytes(8, "big") + b"hello" + b"line\nrest|more")
    assert await ends.reader.readexactly(1) == b"\x00"
    assert await ends.reader.readexactly(8) == b"\x00\x00\x00\x00\x00\x00\x00\x05"
    assert await ends.reader.readexactly(0) == b""
    assert await ends.reader.readexactly(5) == b"hello"
    assert await ends.reader.readline() == b"line\n"
    assert await ends.reader.readuntil(b"|") == b"rest|"
    assert await ends.reader.read(0) == b""
    assert await ends.reader.read(100) == b"more"
    ends.peer.sendall(b"to the end")
    ends.peer.shutdown(socket.SHUT_WR)
    assert await ends.reader.read() == b"to the end"
    assert ends.reader.at_eof()
    assert await ends.reader.read() == b""
    assert await ends.reader.read(1) == b""
    assert await ends.reader.readline() == b""
    assert ends.reader.exception() is None


@pytest.mark.parametrize("size", [1, 70_000, 3 * MIB])
async def test_readexactly_waits_for_all_bytes(ends: Ends, size: int) -> None:
    data = os.urandom(size)
    sender = threading.Thread(target=ends.peer.sendall, args=(data,))
    sender.start()
    try:
        assert await ends.reader.readexactly(size) == data
    finally:
        await finished(sender)


async def test_end_within_a_read_gives_the_partial_data(ends: Ends) -> None:
    ends.peer.sendall(b"some")
    ends.peer.close()
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await ends.reader.readexactly(10)
    assert (raised.value.partial, raised.value.expected) == (b"some", 10)
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await ends.reader.readexactly(10)
    assert (raised.value.partial, raised.value.expected) == (b"", 10)
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await ends.reader.readuntil(b"\n")
    assert (raised.value.partial, raised.value.expected) == (b"", None)


async def test_lines_can_be_iterated_over(ends: Ends) -> None:
    ends.peer.sendall(b"one\ntwo\n\nlast")
    ends.peer.close()
    assert [line async for line in ends.reader] == [b"one\n", b"two\n", b"\n", b"last"]


async def test_at_eof_notices_an_unread_end(ends: Ends) -> None:
    assert not ends.reader.at_eof()
    ends.peer.sendall(b"abc")
    ends.peer.close()
    assert await ends.reader.readexactly(2) == b"ab"
    assert not ends.reader.at_eof()
    assert await ends.reader.readexactly(1) == b"c"
    await until(ends.reader.at_eof)


async def test_at_eof_takes_no_data_from_a_reading_task(ends: Ends) -> None:
    reading = asyncio.create_task(ends.reader.readexactly(5))
    await until_waiting(reading)
    ends.peer.sendall(b"hello")
    assert not ends.reader.at_eof()
    assert await asyncio.wait_for(reading, 5) == b"hello"


async def test_count_may_exceed_the_largest_size(ends: Ends) -> None:
    ends.peer.sendall(b"abc")
    assert await ends.reader.read(2**70) == b"abc"
    ends.peer.sendall(b"def")
    ends.peer.close()
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await ends.reader.readexactly(2**70)
    assert (raised.value.partial, raised.value.expected) == (b"def", 2**70)


@pytest.mark.parametrize("length", [65536, 65537])
async def test_line_over_the_limit_is_refused(ends: Ends, length: int) -> None:
    line = b"x" * length + b"\n"
    sender = threading.Thread(target=ends.peer.sendall, args=(line + b"next\n",))
    sender.start()
    try:
        if length <= 65536:
            assert await ends.reader.readline() == line
        else:
            with pytest.raises(asyncio.LimitOverrunError) as raised:
                await ends.reader.readuntil(b"\n")
            assert raised.value.consumed == length
            with pytest.raises(ValueError, match="[Ss]eparator is|separator was"):
                await ends.reader.readline()
        assert await ends.reader.readline() == b"next\n"
    finally:
        await finished(sender)


async def test_invalid_arguments_are_refused(ends: Ends) -> None:
    with pytest.raises(ValueError, match="less than zero"):
        await ends.reader.readexactly(-1)
    with pytest.raises(ValueError, match="at least one-byte"):
        await ends.reader.readuntil(b"")
    with pytest.raises(TypeError):
        ends.writer.write("text")  # type: ignore[arg-type]


async def test_second_reading_task_is_refused(ends: Ends) -> None:
    first = asyncio.create_task(ends.reader.readexactly(3))
    await until_waiting(first)
    with pytest.raises(RuntimeError, match=r"read\(\) called while another coroutine"):
        await ends.reader.read(1)
    ends.peer.sendall(b"abc")
    assert await first == b"abc"


async def test_cancelled_read_loses_no_data(ends: Ends) -> None:
    ends.peer.sendall(b"ab")
    task = asyncio.create_task(ends.reader.readexactly(4))
    await until_waiting(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ends.peer.sendall(b"cd")
    assert await ends.reader.readexactly(4) == b"abcd"


# --- closing ---


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_close_ends_a_pending_read(ends: Ends, how: str) -> None:
    reading = asyncio.create_task(ends.reader.read(10))
    await until_waiting(reading)
    if how == "close":
        ends.writer.close()
    else:
        ends.writer.transport.abort()
    assert await reading == b""
    assert ends.reader.at_eof()


async def test_close_gives_a_pending_readexactly_the_partial_data(ends: Ends) -> None:
    ends.peer.sendall(b"ab")
    reading = asyncio.create_task(ends.reader.readexactly(4))
    await until_waiting(reading)
    ends.writer.close()
    with pytest.raises(asyncio.IncompleteReadError) as raised:
        await reading
    assert (raised.value.partial, raised.value.expected) == (b"ab", 4)


async def test_data_read_ahead_can_be_read_after_close(ends: Ends) -> None:
    ends.peer.sendall(b"abcdef\nxyz")
    assert await ends.reader.readexactly(2) == b"ab"
    ends.writer.close()
    await ends.writer.wait_closed()
    assert await ends.reader.readexactly(2) == b"cd"
    assert await ends.reader.readline() == b"ef\n"
    assert await ends.reader.read() == b"xyz"
    assert await ends.reader.read(5) == b""
    assert ends.reader.at_eof()


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_data_that_had_arrived_can_be_read_after_close(ends: Ends, how: str) -> None:
    ends.peer.sendall(b"abc\ndef")
    await run_loop()  # asyncio's reader then reads the data.
    if how == "close":
        ends.writer.close()
        await ends.writer.wait_closed()
    else:
        ends.writer.transport.abort()
    assert await ends.reader.readline() == b"abc\n"
    assert await ends.reader.readexactly(3) == b"def"
    assert await ends.reader.read(5) == b""
    assert ends.reader.at_eof()


async def test_data_of_a_cancelled_large_read_can_be_read_after_close(ends: Ends) -> None:
    data = os.urandom(100_000)
    reading = asyncio.ensure_future(ends.reader.readexactly(2 * len(data)))
    await run_loop()
    ends.peer.sendall(data)
    await run_loop()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    ends.writer.close()
    await ends.writer.wait_closed()
    assert await ends.reader.readexactly(10) == data[:10]
    assert await ends.reader.read() == data[10:]
    assert ends.reader.at_eof()


async def test_at_most_128_kib_of_input_are_kept_after_close(anyio_backend: Any) -> None:
    # Not on asyncio's reader: it also keeps the data of its last read, whose size varies.
    async with connected("ours", "unix") as ends:
        ends.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        ends.peer.setblocking(False)
        sent = 0
        with suppress(BlockingIOError):
            while True:
                sent += ends.peer.send(bytes(50_000))
        assert sent > 128 * 1024
        ends.writer.close()
        assert len(await ends.reader.read()) == 128 * 1024


async def test_closed_writer_discards_writes(ends: Ends) -> None:
    assert not ends.writer.is_closing()
    assert not ends.writer.transport.is_closing()
    ends.writer.close()
    assert ends.writer.is_closing()
    assert ends.writer.transport.is_closing()
    ends.writer.write(b"nothing")
    ends.writer.writelines([b"at", b"all"])
    ends.writer.close()
    await ends.writer.wait_closed()
    with pytest.raises(ConnectionResetError):
        await ends.writer.drain()
    assert await receive(ends.peer, 10) == b""


async def test_close_sends_the_buffer(ends: Ends) -> None:
    data = os.urandom(4 * MIB)
    ends.writer.write(data)
    assert ends.writer.transport.get_write_buffer_size() > 0
    ends.writer.close()
    received, receiver = receive_all(ends.peer)
    await ends.writer.wait_closed()
    await finished(receiver)
    assert bytes(received) == data


async def test_wait_closed_waits_for_close(ends: Ends) -> None:
    waiting = asyncio.create_task(ends.writer.wait_closed())
    await until_waiting(waiting)
    ends.writer.close()
    await waiting


async def test_cancelled_wait_closed_loses_no_data(ends: Ends) -> None:
    data = os.urandom(4 * MIB)
    ends.writer.write(data)
    ends.writer.close()
    waiting = asyncio.create_task(ends.writer.wait_closed())
    await until_waiting(waiting)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    received, receiver = receive_all(ends.peer)
    await finished(receiver)
    assert bytes(received) == data


@pytest.mark.parametrize("family", ["unix", "tcp"])
async def test_abort_sends_the_data_that_the_socket_accepts(
    kind: str, family: str, anyio_backend: Any
) -> None:
    async with connected(kind, family) as ends:
        ends.writer.write(b"the ")
        ends.writer.write(b"end")
        # uvloop's writer sends nothing before the next iteration.
        await run_loop()
        ends.writer.write(b"" if kind == "asyncio" else b".")
        ends.writer.transport.abort()
        received, receiver = receive_all(ends.peer)
        await finished(receiver)
        assert bytes(received) == (b"the end" if kind == "asyncio" else b"the end.")


async def test_abort_discards_the_buffer(anyio_backend: Any) -> None:
    # Not on uvloop's writer, which sometimes sends the buffer.
    async with connected("ours", "unix") as ends:
        ends.writer.write(bytes(4 * MIB))
        ends.writer.transport.abort()
        received, receiver = receive_all(ends.peer)
        await finished(receiver)
        assert len(received) < 4 * MIB


# --- losing the connection ---


async def test_pending_read_raises_when_the_connection_is_lost(tcp_ends: Ends) -> None:
    reading = asyncio.create_task(tcp_ends.reader.readexactly(4))
    await until_waiting(reading)
    tcp_ends.reset()
    with pytest.raises(ConnectionResetError):
        await reading
    assert isinstance(tcp_ends.reader.exception(), ConnectionResetError)
    assert tcp_ends.writer.is_closing()
    assert not tcp_ends.reader.at_eof()
    for read in (tcp_ends.reader.read, tcp_ends.reader.readexactly):
        for count in (0, 3):
            with pytest.raises(ConnectionResetError):
                await read(count)
    with pytest.raises(ConnectionResetError):
        await tcp_ends.reader.readline()
    with suppress(RuntimeError):  # Raised by uvloop's writer.
        tcp_ends.writer.write(b"nothing")
    with pytest.raises(ConnectionResetError):
        await tcp_ends.writer.drain()
    with pytest.raises(ConnectionResetError):
        await tcp_ends.writer.wait_closed()


async def test_drain_raises_after_writing_to_a_lost_peer(ends: Ends) -> None:
    ends.peer.close()
    with pytest.raises(ConnectionError):
        for _ in range(100):
            ends.writer.write(b"x" * 1000)
            await ends.writer.drain()
            await asyncio.sleep(0)
    with suppress(RuntimeError):  # Raised by uvloop's writer.
        ends.writer.write(b"x")
    assert ends.writer.is_closing()


async def test_pending_drain_raises_when_the_connection_is_lost(tcp_ends: Ends) -> None:
    tcp_ends.writer.write(bytes(64 * MIB))
    draining = asyncio.create_task(tcp_ends.writer.drain())
    await until_waiting(draining)
    tcp_ends.reset()
    with pytest.raises(ConnectionError):
        await draining


async def test_pending_drain_raises_a_loss_that_a_reader_found(
    tcp_ends: Ends,
) -> None:
    tcp_ends.writer.write(bytes(16 * MIB))
    reading = asyncio.ensure_future(tcp_ends.reader.read(1))
    draining = asyncio.ensure_future(tcp_ends.writer.drain())
    await until_waiting(reading)
    await until_waiting(draining)
    tcp_ends.reset()
    for task in reading, draining:
        with pytest.raises(ConnectionResetError):
            await task


async def test_loss_found_by_a_write_leaves_arrived_data_to_the_reader(
    anyio_backend: Any,
) -> None:
    # Not on asyncio's writer, which does so only if it has noticed the loss before.
    for wanted, got in ((5, b"hello"), (6, None)):
        async with connected("ours", "unix") as ends:
            reading = asyncio.create_task(ends.reader.readexactly(wanted))
            await until_waiting(reading)
            ends.peer.sendall(b"hello")
            ends.peer.close()
            ends.writer.write(bytes(5000))
            assert ends.writer.is_closing()
            if got is not None:
                assert await reading == got
            else:
                with pytest.raises(ConnectionError):
                    await reading
            with pytest.raises(ConnectionError):
                await ends.reader.read(1)


@pytest.mark.parametrize("read", ["read", "readline"])
async def test_loss_found_by_a_write_is_not_an_end_to_the_reader(
    anyio_backend: Any, read: str
) -> None:
    async with connected("ours", "unix") as ends:
        reading = asyncio.create_task(getattr(ends.reader, read)())
        await until_waiting(reading)
        ends.peer.close()
        ends.writer.write(bytes(5000))
        with pytest.raises(ConnectionError):
            await reading


# --- writing ---


@pytest.mark.parametrize("as_what", [bytes, bytearray, memoryview])
async def test_any_kind_of_buffer_can_be_written(
    ends: Ends, as_what: Callable[[bytes], Any]
) -> None:
    data = os.urandom(64 * 1024)
    received, receiver = receive_all(ends.peer)
    view = memoryview(as_what(data))
    for offset in range(0, len(data), 5000):
        ends.writer.write(view[offset : offset + 5000])
    await ends.writer.drain()
    ends.writer.writelines([as_what(b"one"), as_what(b""), as_what(b"two")])
    assert ends.writer.can_write_eof()
    ends.writer.write_eof()
    await finished(receiver)
    assert bytes(received) == data + b"onetwo"


async def test_buffer_may_be_changed_after_write(anyio_backend: Any) -> None:
    # Not on uvloop's writer, with which the buffer may not be changed.
    async with connected("ours", "unix") as ends:
        data = bytearray(b"a" * 4 * MIB)
        ends.writer.write(data)
        data[:] = bytes(len(data))
        received, receiver = receive_all(ends.peer)
        await ends.writer.drain()
        ends.writer.close()
        await finished(receiver)
        assert received == b"a" * 4 * MIB


async def test_drain_waits_while_the_buffer_is_above_the_high_water_mark(ends: Ends) -> None:
    ends.writer.write(bytes(4 * MIB))
    draining = asyncio.create_task(ends.writer.drain())
    await until_waiting(draining)
    received, receiver = receive_all(ends.peer)
    await draining
    assert ends.writer.transport.get_write_buffer_size() <= 64 * 1024
    await ends.writer.drain()
    ends.writer.close()
    await finished(receiver)
    assert len(received) == 4 * MIB


async def test_drain_follows_the_given_water_marks(ends: Ends) -> None:
    ends.writer.transport.set_write_buffer_limits(high=64 * MIB)
    ends.writer.write(bytes(4 * MIB))
    await ends.writer.drain()
    assert ends.writer.transport.get_write_buffer_size() > MIB
    with pytest.raises(ValueError, match="must be >="):
        ends.writer.transport.set_write_buffer_limits(high=1, low=2)


async def test_write_after_write_eof_is_an_error(ends: Ends) -> None:
    ends.writer.write(b"all")
    ends.writer.write_eof()
    ends.writer.write_eof()
    with pytest.raises(RuntimeError, match="after write_eof"):
        ends.writer.write(b"more")
    assert await receive(ends.peer, 10) == b"all"
    assert await receive(ends.peer, 10) == b""
    ends.peer.sendall(b"answer")
    assert await ends.reader.readexactly(6) == b"answer"


async def test_extra_info(ends: Ends, tcp_ends: Ends) -> None:
    name = tcp_ends.peer.getsockname()
    assert tcp_ends.writer.get_extra_info("peername") == name
    assert tcp_ends.writer.transport.get_extra_info("peername") == name
    assert tcp_ends.writer.get_extra_info("sockname") == tcp_ends.peer.getpeername()
    assert tcp_ends.writer.get_extra_info("socket").getpeername() == name
    assert ends.writer.get_extra_info("nonsense", 7) == 7
    assert ends.writer.get_extra_info("nonsense") is None


async def test_dropped_writer_closes_its_stream(anyio_backend: Any) -> None:
    async with connected("ours", "unix") as ends:
        ends.writer.write(b"bye")
        del ends.reader, ends.writer
        gc.collect()
        assert await receive(ends.peer, 10) == b"bye"
        assert await receive(ends.peer, 10) == b""


async def receive(peer: socket.socket, count: int) -> bytes:
    """Receives from the socket while the event loop keeps running."""
    peer.setblocking(False)
    return await asyncio.get_running_loop().sock_recv(peer, count)


async def finished(thread: threading.Thread) -> None:
    """Waits for a thread while the event loop keeps running."""
    await until(lambda: not thread.is_alive())


def receive_all(peer: socket.socket) -> tuple[bytearray, threading.Thread]:
    """Starts a thread that receives up to the end; returns the received data and the thread."""
    received = bytearray()

    def work() -> None:
        with suppress(ConnectionResetError):
            while part := peer.recv(1 << 16):
                received.extend(part)

    thread = threading.Thread(target=work)
    thread.start()
    return received, thread
