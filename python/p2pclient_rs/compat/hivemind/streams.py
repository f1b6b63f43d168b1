"""asyncio's reader and writer over a stream, as hivemind's bindings return them.

They inherit from asyncio's classes only for ``isinstance``. Reads and writes go straight to the
stream's socket and behave as in ``asyncio.streams``. After a close, reads still return the data
that had arrived, and then the end. When the connection is lost, reads and ``drain`` raise
``ConnectionResetError``, and ``write`` does nothing.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from p2pclient_rs.exceptions import ForkedClientError
from p2pclient_rs.loops import call_in_its_thread
from p2pclient_rs.stream import HIGH_WATER, LOW_WATER, IncompleteRead, Stream, _bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["StreamReader", "StreamTransport", "StreamWriter", "reader_and_writer"]

T = TypeVar("T")

#: asyncio's limit for the length of a line, in bytes.
_LIMIT = 64 * 1024

#: Writes smaller than this, in bytes, are collected and sent in the event loop's next iteration.
#: hivemind writes a marker, a length and a message separately. Collected, they take one system call
#: and reach the daemon together.
_CORK = 4096


class StreamReader(asyncio.StreamReader):
    """asyncio's reader over a ``Stream``."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lost: OSError | None = None
        self._closed: asyncio.Future[None] | None = None
        raw = stream._raw
        self._try_receive = raw.try_receive
        self._try_read_exactly = raw.try_read_exactly
        self._try_read_until = raw.try_read_until

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._stream!r}>"

    async def read(self, n: int = -1) -> bytes:
        """Reads between 1 and ``n`` bytes, or everything up to the end if ``n`` is negative.

        Returns ``b""`` at the end.

        Raises:
            ConnectionResetError: The connection was lost. It may be another ConnectionError.
            RuntimeError: Another task is reading.
        """
        if n > 0:
            count = n if n < sys.maxsize else sys.maxsize
            data = await self._pull("read", self._try_receive, count)
            if not data and self._lost is not None:
                raise self._lost
            return data
        if self._lost is not None:
            raise self._lost
        if n == 0:
            return b""
        data = await self._pull("read", self._try_read_exactly, sys.maxsize)
        if self._lost is not None:  # A write found the connection lost: not the stream's end.
            raise self._lost
        return data

    async def readexactly(self, n: int) -> bytes:
        """Reads exactly ``n`` bytes.

        Raises:
            asyncio.IncompleteReadError: The stream ended, or this program closed it, before ``n``
                bytes had arrived. Its ``partial`` holds the data up to there.
            ConnectionResetError, RuntimeError: As for ``read``.
        """
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")
        if n == 0 and self._lost is None:
            return b""
        count = n if n < sys.maxsize else sys.maxsize
        data = await self._pull("readexactly", self._try_read_exactly, count)
        if len(data) < n:
            raise self._lost or IncompleteRead(data, n)
        return data

    async def readuntil(self, separator: Buffer = b"\n") -> bytes:
        """Reads up to and including ``separator``.

        Raises:
            asyncio.IncompleteReadError: The stream ended, or this program closed it, before it.
            asyncio.LimitOverrunError: There is no separator within 64 KiB. The data stays unread.
            ConnectionResetError, RuntimeError: As for ``read``.
        """
        sought = bytes(separator)
        if not sought:
            raise ValueError("Separator should be at least one-byte string")
        limit = _LIMIT + len(sought)
        data = await self._pull("readuntil", self._try_read_until, sought, limit)
        if not data.endswith(sought):
            raise self._lost or IncompleteRead(data, None)
        return data

    async def readline(self) -> bytes:
        """Reads a line with its newline, or the rest of the stream if there is no newline.

        Raises:
            ValueError: The line is longer than 64 KiB. The part that has arrived is discarded.
            ConnectionResetError, RuntimeError: As for ``read``.
        """
        try:
            return await self.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return error.partial
        except asyncio.LimitOverrunError as error:
            newline_found = "not found" not in str(error.args[0])
            await self.readexactly(error.consumed + newline_found)
            raise ValueError(error.args[0]) from None

    def at_eof(self) -> bool:
        """Returns whether everything up to the end of the stream has been read."""
        if self._lost is not None:
            return False
        try:
            # If a task waits for this data, reading it here would not wake the task.
            if not self._stream._reading:
                self._stream._raw.look_ahead()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ForkedClientError):
            return False  # The next read raises the error.
        return self._stream._raw.at_eof

    def exception(self) -> Exception | None:
        """Returns the error that lost the connection; None if it is not lost."""
        return self._lost

    async def _pull(self, name: str, attempt: Callable[..., T | None], *args: Any) -> T:
        if self._lost is not None:
            raise self._lost
        stream = self._stream
        try:
            if stream._turns > 0 and not stream._reading:
                stream._turns -= 1
                result = attempt(*args)
                return await stream._pull_later(attempt, *args) if result is None else result
            return await stream._pull(attempt, *args)
        except anyio.BrokenResourceError as error:
            raise self._lose(error) from None
        except anyio.BusyResourceError:
            raise RuntimeError(
                f"{name}() called while another coroutine is already waiting for incoming data"
            ) from None

    def _lose(self, error: BaseException) -> OSError:
        """Records the error that lost the connection, and closes the stream."""
        if self._lost is None:
            cause = error.__cause__
            self._lost = (
                cause if isinstance(cause, ConnectionError) else ConnectionResetError(str(error))
            )
            self._stream.abort()
            self._wake()
        return self._lost

    async def _until_closed(self) -> None:
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._closed)

    def _wake(self) -> None:
        if self._closed is not None and not self._closed.done():
            self._closed.set_result(None)


class StreamTransport(asyncio.Transport):
    """The part of asyncio's transport that programs use through a writer."""

    def __init__(self, stream: Stream, reader: StreamReader) -> None:
        self._stream = stream
        self._raw = stream._raw
        self._reader = reader
        self._high, self._low = HIGH_WATER, LOW_WATER
        self._loop = asyncio.get_running_loop()
        self._corked = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._stream!r}>"

    def write(self, data: Buffer) -> None:
        """Writes ``data``, and buffers a copy of the part that the socket does not take at once.

        Does nothing if the connection is closed or lost.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(
                f"data argument must be a bytes-like object, not {type(data).__name__!r}"
            )
        stream = self._stream
        if stream._ending:
            raise RuntimeError("Cannot call write() after write_eof()")
        data = _bytes(data)
        try:
            if len(data) >= _CORK:
                if self._raw.write(data):
                    stream._watch.flush_later(self._raw, stream)
            elif self._raw.cork(data) >= HIGH_WATER:
                self._uncork()
            elif not (self._corked or self._raw.blocked):
                self._corked = True
                self._loop.call_soon(self._uncork)
        except anyio.ClosedResourceError:
            pass
        except anyio.BrokenResourceError as error:
            self._reader._lose(error)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Writes the buffers in ``list_of_data`` with one ``write``."""
        self.write(b"".join(list_of_data))

    def write_eof(self) -> None:
        """Ends this side of the stream.

        Go daemons then end both directions; see ``Stream.send_eof``.
        """
        if self._stream._closing or self._stream._ending:
            return
        try:
            self._stream.write_eof()
        except anyio.BrokenResourceError as error:
            self._reader._lose(error)

    def can_write_eof(self) -> bool:
        """Returns True."""
        return True

    def is_closing(self) -> bool:
        """Returns whether the stream is closed, being closed or lost."""
        return self._stream._closing

    def close(self) -> None:
        """Closes the stream after sending the buffer. A pending read returns the end."""
        self._stream._closing = True
        # The garbage collector can run a handler's cleanup in any thread.
        call_in_its_thread(self._loop, self._close)

    def abort(self) -> None:
        """Closes the stream at once. Buffered data that the socket does not take now is lost."""
        self._stream._closing = True
        call_in_its_thread(self._loop, self._abort)

    def _close(self) -> None:
        self._stream.close()
        self._reader._wake()

    def _abort(self) -> None:
        self._stream.abort()
        self._reader._wake()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Returns ``"socket"``, ``"sockname"`` or ``"peername"`` while the stream is open."""
        return self._stream.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        """Returns the number of buffered bytes."""
        return self._raw.buffered

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Returns the low- and the high-water mark, in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Sets the water marks.

        While more than ``high`` bytes are buffered, ``drain`` waits until at most ``low`` are left.
        """
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._high, self._low = high, low

    def _uncork(self) -> None:
        """Sends the collected writes."""
        self._corked = False
        try:
            if self._raw.flush():
                self._stream._watch.flush_later(self._raw, self._stream)
        except anyio.ClosedResourceError:
            pass
        except anyio.BrokenResourceError as error:
            self._reader._lose(error)

    async def _drain(self) -> None:
        if self._corked:
            self._uncork()
        stream = self._stream
        if stream._closing:
            await asyncio.sleep(0)
            if self._reader._lost is not None:
                raise self._reader._lost
            if self._raw.closed:
                raise ConnectionResetError("Connection lost")
        try:
            buffered = self._raw.buffered
            if buffered > self._high:
                await stream._flush(self._low)
                if self._reader._lost is not None:  # A read found the connection lost meanwhile.
                    raise self._reader._lost
            elif buffered and not self._raw.blocked:
                # The event loop failed to send the buffer.
                await stream._flush(buffered)
            stream._turns -= 1
            if stream._turns < 0:
                await stream._turn()
        except anyio.BrokenResourceError as error:
            raise self._reader._lose(error) from None
        except anyio.ClosedResourceError:
            raise ConnectionResetError("Connection lost") from None

    async def _wait_closed(self) -> None:
        stream = self._stream
        if not stream._closing:
            await self._reader._until_closed()
        try:
            if self._raw.closed:
                await asyncio.sleep(0)
            else:
                await stream._flush(0)
        except anyio.ClosedResourceError:
            pass
        except anyio.BrokenResourceError as error:
            self._reader._lose(error)
        if self._reader._lost is not None:
            raise self._reader._lost


class StreamWriter(asyncio.StreamWriter):
    """asyncio's writer over a ``Stream``."""

    def __init__(self, stream: Stream, reader: StreamReader) -> None:
        self._transport = transport = StreamTransport(stream, reader)
        self._reader = reader
        # The transport's methods themselves: asyncio's writer adds a call in between.
        self.write: Callable[[Buffer], None] = transport.write  # type: ignore[assignment]
        self.drain: Callable[[], Coroutine[Any, Any, None]] = transport._drain

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._transport!r}>"

    @property
    def transport(self) -> StreamTransport:
        """The transport that the writer writes to."""
        return self._transport

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Writes the buffers in ``data`` with one ``write``."""
        self._transport.writelines(data)

    def write_eof(self) -> None:
        """Ends this side of the stream.

        Go daemons then end both directions; see ``Stream.send_eof``.
        """
        self._transport.write_eof()

    def can_write_eof(self) -> bool:
        """Returns True."""
        return True

    def close(self) -> None:
        """Closes the stream after sending the buffer. A pending read returns the end."""
        self._transport.close()

    def is_closing(self) -> bool:
        """Returns whether the stream is closed, being closed or lost."""
        return self._transport.is_closing()

    async def wait_closed(self) -> None:
        """Waits until the stream is closed. Call ``close`` first.

        Raises:
            ConnectionResetError: The connection was lost. It may be another ConnectionError.
        """
        await self._transport._wait_closed()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Returns ``"socket"``, ``"sockname"`` or ``"peername"`` while the stream is open."""
        return self._transport.get_extra_info(name, default)

    async def start_tls(self, *_: Any, **__: Any) -> None:
        """Not supported: the daemons encrypt streams.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a stream through the daemon has no TLS of its own")

    def __del__(self) -> None:
        # asyncio's method would use attributes that this class lacks. The stream closes itself when
        # it is garbage-collected.
        pass


def reader_and_writer(stream: Stream) -> tuple[StreamReader, StreamWriter]:
    """Makes a reader and a writer of a stream, on asyncio or uvloop.

    From then on, use the stream only through them.
    """
    stream._keep_input = True
    reader = StreamReader(stream)
    return reader, StreamWriter(stream, reader)
