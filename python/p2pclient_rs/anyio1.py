"""The stream methods of anyio 1, which programs for p2pclient 0.2 use."""

from __future__ import annotations

import asyncio
import socket
import sys
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio.abc import ByteStream
from anyio.lowlevel import checkpoint_if_cancelled

from p2pclient_rs._native import RawStream

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["IncompleteRead", "SocketStream"]

T = TypeVar("T")


class IncompleteRead(asyncio.IncompleteReadError, anyio.IncompleteRead):
    """The stream ended before a read was complete. A subclass of asyncio's and anyio's errors.

    Attributes:
        partial: The bytes before the end.
        expected: The number of bytes wanted, or None if it was not known.
    """

    def __init__(self, partial: bytes, expected: int | None) -> None:
        # Does not call asyncio's __init__. That calls super().__init__(message), which from Python
        # 3.15 on is anyio's __init__, without parameters.
        total = "undefined" if expected is None else repr(expected)
        message = f"{len(partial)} bytes read on a total of {total} expected bytes"
        Exception.__init__(self, message)
        self.partial = partial
        self.expected = expected


class SocketStream(ByteStream):
    """anyio 1's ``SocketStream`` over the reads of a ``Stream``."""

    _raw: RawStream

    @abstractmethod
    async def send(self, item: Buffer) -> None: ...
    @abstractmethod
    async def read(self, n: int = -1) -> bytes: ...
    @abstractmethod
    async def readexactly(self, n: int) -> bytes: ...
    @abstractmethod
    async def _pull(self, attempt: Callable[..., T | None], *args: Any) -> T: ...
    @abstractmethod
    def _raw_socket(self) -> socket.socket: ...

    async def send_all(self, data: Buffer) -> None:
        """As ``send``, under anyio 1's name."""
        await self.send(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        """As ``receive``, but returns ``b""`` at the end of the stream, as in anyio 1."""
        if max_bytes < 0:
            raise ValueError("max_bytes must not be negative")
        await checkpoint_if_cancelled()
        return await self.read(max_bytes)

    async def receive_exactly(self, nbytes: int) -> bytes:
        """As ``readexactly``. If the stream ends first, the data can still be read, as in anyio 1.

        Raises:
            IncompleteRead: The stream ended first; a subclass of ``anyio.IncompleteRead``.
        """
        await checkpoint_if_cancelled()
        try:
            return await self.readexactly(nbytes)
        except IncompleteRead as error:
            self._raw.put_back(error.partial)
            raise

    async def receive_until(self, delimiter: Buffer, max_bytes: int) -> bytes:
        """Reads up to ``delimiter`` and returns the bytes before it, as anyio 1 does.

        Args:
            delimiter: One or more bytes, which are read and dropped.
            max_bytes: How many bytes to search.

        Raises:
            anyio.DelimiterNotFound: No delimiter ends within ``max_bytes``. The data can still be
                read.
            IncompleteRead: The stream ended first; a subclass of ``anyio.IncompleteRead``. The data
                can still be read.
        """
        sought = bytes(delimiter)
        if not sought:
            raise ValueError("delimiter must not be empty")
        limit = min(max(max_bytes, 0), sys.maxsize)
        await checkpoint_if_cancelled()
        try:
            data = await self._pull(self._raw.try_read_until, sought, limit, True)
        except asyncio.LimitOverrunError:
            raise anyio.DelimiterNotFound(max_bytes) from None
        if not data.endswith(sought):
            self._raw.put_back(data)
            raise IncompleteRead(data, None)
        return data[: -len(sought)]

    def receive_chunks(self, max_size: int) -> AsyncIterator[bytes]:
        """Iterates over the results of ``receive_some``, up to the end of the stream."""

        async def next_chunk() -> bytes | None:
            return await self.receive_some(max_size) or None

        return _Chunks(next_chunk)

    def receive_delimited_chunks(
        self, delimiter: Buffer, max_chunk_size: int
    ) -> AsyncIterator[bytes]:
        """Iterates over the results of ``receive_until``, up to the end of the stream.

        Raises:
            anyio.DelimiterNotFound, IncompleteRead: As from ``receive_until``, but the stream may
                end after a delimiter.
        """

        async def next_chunk() -> bytes | None:
            try:
                return await self.receive_until(delimiter, max_chunk_size)
            except IncompleteRead as error:
                if error.partial:
                    raise
                return None

        return _Chunks(next_chunk)

    @property
    def buffered_data(self) -> bytes:
        """The bytes that were received from the socket and not read yet."""
        return self._raw.read_ahead

    @property
    def address(self) -> Any:
        """The local address of the socket to the daemon: a path, or ``(host, port)``."""
        return self._raw.local_address

    @property
    def peer_address(self) -> Any:
        """The daemon's address of that socket: a path, or ``(host, port)``."""
        return self._raw.remote_address

    def getsockopt(self, level: int, optname: int, *args: int) -> int | bytes:
        """Returns an option of the socket to the daemon, as ``socket.socket.getsockopt`` does."""
        return self._raw_socket().getsockopt(level, optname, *args)

    def setsockopt(self, level: int, optname: int, value: Any, *args: int) -> None:
        """Sets an option of the socket to the daemon, as ``socket.socket.setsockopt`` does."""
        self._raw_socket().setsockopt(level, optname, value, *args)


class _Chunks(AsyncIterator[bytes]):
    """Iterates over the results of a function until it returns None.

    Not a generator, as trio warns about generators that are not exhausted.
    """

    def __init__(self, next_chunk: Callable[[], Awaitable[bytes | None]]) -> None:
        self._next_chunk = next_chunk

    async def __anext__(self) -> bytes:
        chunk = await self._next_chunk()
        if chunk is None:
            raise StopAsyncIteration
        return chunk
