"""Streams: the bytes between two peers."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from anyio.abc import SocketAttribute
from anyio.lowlevel import checkpoint, checkpoint_if_cancelled

from p2pclient_rs._native import RawStream, StreamInfo
from p2pclient_rs.anyio1 import IncompleteRead, SocketStream

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from p2pclient_rs.readiness import Watch

__all__ = ["IncompleteRead", "Stream", "StreamAttribute"]

T = TypeVar("T")

#: ``drain`` waits if more than this many bytes are buffered.
HIGH_WATER = 64 * 1024
#: ``drain`` returns when at most this many bytes are buffered.
LOW_WATER = 16 * 1024


class StreamAttribute(anyio.TypedAttributeSet):
    """Extra attributes of a stream to a peer, beside those of ``anyio.abc.SocketAttribute``.

    Example:
        async with await client.stream_open(peer_id, ["/echo/1"]) as stream:
            print(stream.extra(StreamAttribute.stream_info).proto)
    """

    #: The remote peer, its address and the protocol.
    stream_info: StreamInfo = anyio.typed_attribute()


class Stream(SocketStream):
    """A stream of bytes, as an anyio ``ByteStream`` and as asyncio's reader and writer.

    ``receive``, ``send``, ``send_eof`` and ``aclose`` follow anyio. They raise ``EndOfStream`` at
    the end, ``ClosedResourceError`` after a close on this side, ``BrokenResourceError`` after the
    connection was lost, and ``BusyResourceError`` if another task is already reading or writing.

    ``read…``, ``write`` and ``drain`` follow asyncio. ``read`` returns ``b""`` at the end, and
    ``readexactly`` raises ``IncompleteReadError``. Other errors are as above.

    A cancelled read loses no data: the next read returns it. After a cancelled ``send``, an unknown
    part of the data has been sent.

    The garbage collector closes a stream as it closes a file.

    Example:
        info, stream = await client.stream_open(peer_id, ["/echo/1"])
        async with stream:
            await stream.send(b"ping")
            assert await stream.receive(1024) == b"ping"
    """

    def __init__(self, raw: RawStream, watch: Watch, info: StreamInfo | None = None) -> None:
        self._raw = raw
        self._watch = watch
        self._readable = watch.readable
        #: The peer, its address and the protocol. None in a subscription or a bare control
        #: connection, which has no peer. The type omits None, as all other streams have a peer.
        self.info: StreamInfo = info  # type: ignore[assignment]
        self._pid = os.getpid()
        self._reading = False
        self._sending = False
        self._turns = watch.turns
        #: Whether the event loop will call back once the buffer is empty.
        self._finishing = False
        self._ending = False
        self._closing = False
        #: Whether received data can be read after a close, as with asyncio but not with anyio.
        self._keep_input = False
        self._socket: socket.socket | None = None

    def __repr__(self) -> str:
        state = "closed" if self._raw.closed else f"fd={self._raw.fileno()}"
        about = "" if self.info is None else f" {self.info.proto!r} {self.info.peer_id}"
        return f"<{type(self).__name__}{about} {state}>"

    # --- anyio's ByteStream ---

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receives the available data. Waits if there is none.

        Args:
            max_bytes: The maximum number of bytes to return.

        Raises:
            anyio.EndOfStream: The other side has ended its direction.
            anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.BusyResourceError
        """
        if max_bytes < 1:
            raise ValueError("max_bytes must be positive")
        await checkpoint_if_cancelled()
        if self._turns > 0 and not self._reading:
            self._turns -= 1
            data = self._raw.try_receive(max_bytes)
            if data is None:
                data = await self._pull_later(self._raw.try_receive, max_bytes)
        else:
            data = await self._pull(self._raw.try_receive, max_bytes)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: Buffer) -> None:
        """Sends all of ``item``, any buffer of bytes, without copying it.

        Raises:
            anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.BusyResourceError
        """
        await checkpoint_if_cancelled()
        if self._turns > 0:
            self._turns -= 1
        else:
            await self._turn()
        data = _bytes(item)
        if isinstance(data, bytearray):
            data = memoryview(data)  # keeps the bytearray from shrinking
        size = len(data)
        self._begin_sending()
        try:
            sent = self._raw.try_send(data, 0)
            while sent < size:
                await self._watch.writable()
                self._turns = self._watch.turns
                sent += self._raw.try_send(data, sent)
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Ends this side's direction of the stream.

        The daemon then ends the whole stream. The other peer receives every byte and then the
        end, but this side reads the end at once, and data that the other peer sends later is lost.
        See ``docs/streams.md``.

        Raises:
            anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.BusyResourceError
        """
        await checkpoint_if_cancelled()
        self._begin_sending()
        try:
            await self._flush(0)
            self._raw.shutdown_write()
        finally:
            self._sending = False

    async def aclose(self) -> None:
        """Sends the data that ``write`` has buffered, and closes the stream.

        It is closed even if sending is cancelled or the connection is lost.
        """
        try:
            if not self._raw.closed and self._raw.buffered and os.getpid() == self._pid:
                await self._flush(0)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        finally:
            self._close()
        await checkpoint()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """anyio's ``SocketAttribute``s, and ``StreamAttribute``s on a stream to a peer."""
        raw = self._raw
        unix = raw.family == "unix"
        attributes: dict[Any, Callable[[], Any]] = {
            SocketAttribute.family: lambda: socket.AF_UNIX if unix else self._family(),
            SocketAttribute.local_address: lambda: raw.local_address,
            SocketAttribute.remote_address: lambda: raw.remote_address,
            SocketAttribute.raw_socket: self._raw_socket,
        }
        if not unix:
            attributes[SocketAttribute.local_port] = lambda: raw.local_address[1]
            attributes[SocketAttribute.remote_port] = lambda: raw.remote_address[1]
        if self.info is not None:
            attributes[StreamAttribute.stream_info] = lambda: self.info
        return attributes

    # --- asyncio's StreamReader ---

    async def read(self, n: int = -1) -> bytes:
        """Reads the available data, up to ``n`` bytes. Waits if there is none.

        Args:
            n: The maximum number of bytes; if negative, everything up to the end.

        Returns:
            The bytes; ``b""`` at the end of the stream, or if ``n`` is 0.
        """
        if n == 0:
            return b""
        if n > 0:
            count = n if n < sys.maxsize else sys.maxsize
            if self._turns > 0 and not self._reading:
                self._turns -= 1
                data = self._raw.try_receive(count)
                if data is None:
                    data = await self._pull_later(self._raw.try_receive, count)
                return data
            return await self._pull(self._raw.try_receive, count)
        return await self._pull(self._raw.try_read_exactly, sys.maxsize)

    async def readexactly(self, n: int) -> bytes:
        """Reads ``n`` bytes.

        Raises:
            IncompleteRead: The stream ended first. It is an ``asyncio.IncompleteReadError``, whose
                ``partial`` has the data up to the end.
        """
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")
        if n == 0:
            return b""
        count = n if n < sys.maxsize else sys.maxsize
        if self._turns > 0 and not self._reading:
            self._turns -= 1
            data = self._raw.try_read_exactly(count)
            if data is None:
                data = await self._pull_later(self._raw.try_read_exactly, count)
        else:
            data = await self._pull(self._raw.try_read_exactly, count)
        if len(data) < n:
            raise IncompleteRead(data, n)
        return data

    async def readuntil(self, separator: Buffer = b"\n", limit: int = 65536) -> bytes:
        """Reads up to and including ``separator``.

        Args:
            separator: One or more bytes.
            limit: How many bytes to search.

        Raises:
            IncompleteRead: The stream ended first.
            asyncio.LimitOverrunError: There was no separator within ``limit``. The data can still
                be read.
        """
        sought = bytes(separator)
        if not sought:
            raise ValueError("Separator should be at least one-byte string")
        data = await self._pull(self._raw.try_read_until, sought, limit)
        if not data.endswith(sought):
            raise IncompleteRead(data, None)
        return data

    async def readline(self) -> bytes:
        """Reads a line with its newline, or the rest of the stream if there is no newline."""
        try:
            return await self.readuntil(b"\n")
        except IncompleteRead as error:
            return error.partial

    async def receive_frame(self, max_bytes: int = 4 << 20) -> bytes:
        """Reads a message that is preceded by its length, an unsigned varint.

        Args:
            max_bytes: The maximum length. A longer message is refused before memory is allocated.

        Raises:
            anyio.EndOfStream: The stream ended before the message.
            ConnectionLost: The stream ended within the message.
            ProtocolViolation: The message exceeds ``max_bytes``, or its length is malformed.
        """
        frames = await self._pull(self._raw.try_read_frame, max_bytes)
        if not frames:
            raise anyio.EndOfStream
        return frames[0]

    def at_eof(self) -> bool:
        """Whether the program has read everything up to the end."""
        return self._raw.at_eof

    # --- asyncio's StreamWriter ---

    def write(self, data: Buffer) -> Awaitable[None]:
        """Writes ``data``. Buffers the part that the socket does not take at once.

        Returns:
            An awaitable with the effect of ``drain()``. It need not be awaited.

        Raises:
            anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.BusyResourceError
        """
        if self._sending:
            # The data would end up in the middle of the other task's data.
            raise anyio.BusyResourceError("writing to")
        if self._raw.write(_bytes(data)):
            self._watch.flush_later(self._raw, self)
        return _Later(self.drain)

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Writes each of ``data``."""
        for item in data:
            self.write(item)

    async def drain(self) -> None:
        """Waits until the buffer has room.

        On trio, buffered data is sent only by ``drain``, ``send``, ``send_eof`` and ``aclose``.
        """
        if not self._watch.runs_callbacks:
            await self._flush(0)
        elif self._raw.buffered > HIGH_WATER:
            await self._flush(LOW_WATER)
        if self._turns > 0:
            self._turns -= 1
        else:
            await self._turn()

    def can_write_eof(self) -> bool:
        """Returns True."""
        return True

    def write_eof(self) -> None:
        """As ``send_eof``, once the buffered data is sent."""
        self._ending = True
        self._raw.flush()
        self._after_flush()

    def close(self) -> Awaitable[None]:
        """Closes the stream once the buffered data is sent.

        Returns:
            An awaitable with the effect of ``wait_closed()``. On asyncio it need not be awaited; on
            trio, awaiting it sends the buffered data.
        """
        self._closing = True
        if self._raw.closed or not self._raw.buffered or os.getpid() != self._pid:
            self._close()
        elif self._watch.runs_callbacks and not self._finishing:
            self._on_drained(None)
        return _Later(self.wait_closed)

    def is_closing(self) -> bool:
        """Whether the stream is closed or being closed."""
        return self._closing or self._raw.closed

    async def wait_closed(self) -> None:
        """Waits until the stream is closed, after ``close``."""
        await self.aclose()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Returns asyncio's ``"socket"``, ``"sockname"`` or ``"peername"``."""
        sources: dict[str, Callable[[], Any]] = {
            "socket": self._raw_socket,
            "sockname": lambda: self._raw.local_address,
            "peername": lambda: self._raw.remote_address,
        }
        if name not in sources:
            return default
        try:
            return sources[name]()
        except anyio.ClosedResourceError:
            return default

    # --- ours ---

    def abort(self) -> None:
        """Closes the stream at once and discards buffered data.

        The other side sees a reset if the daemon passes it on.
        """
        self._close(abort=True)

    async def _pull(self, attempt: Callable[..., T | None], *args: Any) -> T:
        """Calls ``attempt`` until it returns a result, and waits for input in between."""
        await self._turn()
        if self._reading:
            raise anyio.BusyResourceError("reading from")
        # Cancellation before this point loses no data.
        result = attempt(*args)
        return await self._pull_later(attempt, *args) if result is None else result

    async def _pull_later(self, attempt: Callable[..., T | None], *args: Any) -> T:
        """As ``_pull``, after a first attempt without a result."""
        self._reading = True
        try:
            while True:
                await self._readable()
                self._turns = self._watch.turns
                result = attempt(*args)
                if result is not None:
                    return result
        finally:
            self._reading = False

    async def _turn(self) -> None:
        """Lets other tasks run if this stream has kept the event loop busy for too long."""
        self._turns -= 1
        if self._turns < 0:
            self._turns = self._watch.turns
            await self._watch.checkpoint()

    def _begin_sending(self) -> None:
        if self._sending:
            raise anyio.BusyResourceError("writing to")
        self._sending = True

    async def _flush(self, until: int) -> None:
        """Sends buffered data until no more than ``until`` bytes are left."""
        raw = self._raw
        left = raw.buffered if raw.blocked else raw.flush()
        while left > until:
            self._watch.flush_later(raw, self)
            await self._watch.drained(until)
            left = raw.flush()
        self._after_flush()

    def _after_flush(self) -> None:
        """Ends or closes the stream, if requested, once the buffer is empty.

        If the buffer is not empty, lets the event loop send the rest and call this again.
        """
        if not self._raw.buffered:
            if self._closing:
                self._close()
            elif self._ending and not self._raw.write_ended:
                self._raw.shutdown_write()
        elif self._watch.runs_callbacks and not self._finishing:
            self._watch.flush_later(self._raw, self)
            if self._closing or self._ending:
                self._finishing = True
                waiting = self._watch.drained(0)
                assert isinstance(waiting, asyncio.Future)
                waiting.add_done_callback(self._on_drained)

    def _on_drained(self, waiting: object) -> None:
        self._finishing = False
        try:
            self._raw.flush()
            self._after_flush()
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            # The next read or write raises the error.
            if self._closing:
                self._close()

    def _close(self, abort: bool = False) -> None:
        self._closing = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if not self._raw.closed:
            self._watch.close()
            self._raw.close(abort, self._keep_input)

    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self._raw.local_address[0] else socket.AF_INET

    def _raw_socket(self) -> socket.socket:
        """Returns the socket under another descriptor, which is closed with the stream."""
        if self._raw.closed:
            raise anyio.ClosedResourceError("the stream is closed")
        if self._socket is None:
            fd = self._raw.duplicate()
            try:
                self._socket = socket.socket(fileno=fd)
            except BaseException:
                os.close(fd)
                raise
            if self._raw.closed:  # by another thread or a signal handler
                self._socket.close()
                raise anyio.ClosedResourceError("the stream is closed")
        return self._socket

    def __del__(self) -> None:
        raw = getattr(self, "_raw", None)
        if raw is not None and not raw.closed and os.getpid() == self._pid:
            self._watch.abandon(raw)


class _Later:
    """An operation that is already running. Awaiting it is optional."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()


def _bytes(data: Buffer) -> bytes | bytearray | memoryview:
    """Returns ``data`` as an object whose ``len()`` is the number of bytes."""
    if isinstance(data, bytes | bytearray):
        return data
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
