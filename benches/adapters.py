"""Adapters: the same stream operations for each client, as its users would write them.

Loops around an operation are in the adapters, so that the bench adds nothing between operations.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

#: Size of a read or write in bulk, in bytes; suits all clients.
CHUNK = 256 << 10
#: Size of hivemind's writes, in bytes.
HIVEMIND_CHUNK = 64 << 10
#: The byte that fills messages from and to the mock daemon.
BODY = b"\x07"


class StreamAdapter(Protocol):
    """A stream of one of the clients."""

    async def receive(self) -> bytes:
        """Returns available bytes; none at EOF."""

    async def send(self, data: bytes) -> None:
        """Sends all of ``data``."""

    async def readexactly(self, count: int) -> bytes:
        """Returns exactly ``count`` bytes."""

    async def exchange(self, data: bytes, count: int) -> bytes:
        """Sends ``data`` and reads as many bytes, ``count`` times; returns the last bytes read."""

    async def read_bulk(self, count: int) -> None:
        """Reads at least ``count`` bytes."""

    async def write_bulk(self, count: int) -> None:
        """Writes ``count`` bytes, a multiple of CHUNK."""

    async def send_message(self, body: bytes, marker: bytes) -> None:
        """Sends a message framed as hivemind does."""

    async def receive_message(self) -> bytes:
        """Receives a message framed as hivemind does."""

    async def aclose(self) -> None:
        """Closes the stream."""


class AsyncioAdapter:
    """asyncio's reader and writer, as returned by hivemind's bindings.

    Messages are framed like ``P2P.send_raw_data`` and ``receive_raw_data``, after the marker.
    """

    def __init__(self, reader: Any, writer: Any) -> None:
        self.reader, self.writer = reader, writer

    async def receive(self) -> bytes:
        data: bytes = await self.reader.read(CHUNK)
        return data

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def readexactly(self, count: int) -> bytes:
        data: bytes = await self.reader.readexactly(count)
        return data

    async def exchange(self, data: bytes, count: int) -> bytes:
        reader, writer, size, back = self.reader, self.writer, len(data), b""
        for _ in range(count):
            writer.write(data)
            await writer.drain()
            back = await reader.readexactly(size)
        return back

    async def read_bulk(self, count: int) -> None:
        reader = self.reader
        while count > 0:
            count -= len(await reader.read(CHUNK))

    async def write_bulk(self, count: int) -> None:
        writer, chunk = self.writer, BODY * CHUNK
        for _ in range(count // CHUNK):
            writer.write(chunk)
            await writer.drain()

    async def send_message(self, body: bytes, marker: bytes) -> None:
        writer = self.writer
        writer.write(marker)
        writer.write(len(body).to_bytes(8, "big"))
        view = memoryview(body)
        for offset in range(0, len(view), HIVEMIND_CHUNK):
            writer.write(view[offset : offset + HIVEMIND_CHUNK])
        await writer.drain()

    async def receive_message(self) -> bytes:
        reader = self.reader
        await reader.readexactly(1)
        size = int.from_bytes(await reader.readexactly(8), "big")
        data: bytes = await reader.readexactly(size)
        return data

    async def aclose(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def receive_bulk(stream: Any, count: int) -> None:
    """Reads at least ``count`` bytes from a stream of anyio."""
    while count > 0:
        count -= len(await stream.receive(CHUNK))


async def send_bulk(stream: Any, count: int) -> None:
    """Writes ``count`` bytes to a stream of anyio."""
    chunk = BODY * CHUNK
    for _ in range(count // CHUNK):
        await stream.send(chunk)


class OurAdapter(AsyncioAdapter):
    """Our stream, which has the methods of asyncio's and of anyio's streams."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, stream)
        self.stream = stream

    async def exchange(self, data: bytes, count: int) -> bytes:
        stream, size, back = self.stream, len(data), b""
        for _ in range(count):
            await stream.send(data)
            back = await stream.readexactly(size)
        return back

    async def read_bulk(self, count: int) -> None:
        await receive_bulk(self.stream, count)

    async def write_bulk(self, count: int) -> None:
        await send_bulk(self.stream, count)

    async def aclose(self) -> None:
        await self.stream.aclose()


class AnyioAdapter:
    """anyio's stream, as returned by p2pclient, with its helper for exact reads."""

    def __init__(self, stream: Any, exactly: Callable[[Any, int], Awaitable[bytes]]) -> None:
        self.stream, self.exactly = stream, exactly

    async def receive(self) -> bytes:
        data: bytes = await self.stream.receive(CHUNK)
        return data

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def readexactly(self, count: int) -> bytes:
        return await self.exactly(self.stream, count)

    async def exchange(self, data: bytes, count: int) -> bytes:
        stream, exactly, size, back = self.stream, self.exactly, len(data), b""
        for _ in range(count):
            await stream.send(data)
            back = await exactly(stream, size)
        return back

    async def read_bulk(self, count: int) -> None:
        await receive_bulk(self.stream, count)

    async def write_bulk(self, count: int) -> None:
        await send_bulk(self.stream, count)

    async def send_message(self, body: bytes, marker: bytes) -> None:
        stream = self.stream
        await stream.send(marker)
        await stream.send(len(body).to_bytes(8, "big"))
        view = memoryview(body)
        for offset in range(0, len(view), HIVEMIND_CHUNK):
            await stream.send(view[offset : offset + HIVEMIND_CHUNK])

    async def receive_message(self) -> bytes:
        stream, exactly = self.stream, self.exactly
        await exactly(stream, 1)
        size = int.from_bytes(await exactly(stream, 8), "big")
        return await exactly(stream, size)

    async def aclose(self) -> None:
        await self.stream.aclose()
