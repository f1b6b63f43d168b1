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

#: ``drain`` waits while more than this is buffered, in bytes, …
HIGH_WATER = 64 * 1024
#: … until no more than this is.
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

    ``receive``, ``send``, ``send_eof`` and ``aclose`` follow anyio: they raise ``EndOfStream`` at
    the end, ``ClosedResourceError`` once closed on this side, ``BrokenResourceError`` when the
    connection was lost, ``BusyResourceError`` when another task is doing the same.

    ``read…``, ``write`` and ``drain`` follow asyncio: ``read`` gives ``b""`` at the end,
    ``readexactly`` raises ``IncompleteReadError``; the other errors are as above.

    A cancelled read loses nothing: what had come is there for the next. After a cancelled
    ``send`` an unknown part of the data has been sent.

    Closed by garbage collection like a file, if it comes to that.

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
        #: The peer, its address and the protocol. None if the stream leads to no peer, as a
        #: subscription and a bare control connection do; the type is that of all others.
        self.info: StreamInfo = info  # type: ignore[assignment]
        self._pid = os.getpid()
        self._reading = False
        self._sending = False
        self._turns = watch.turns
        #: The loop calls back once everything is written.
        self._finishing = False
        self._ending = False
        self._closing = False
        #: Whether closing leaves what had come to be read: asyncio's way, not anyio's.
        self._keep_input = False
        self._socket: socket.socket | None = None

    def __repr__(self) -> str:
        state = "closed" if self._raw.closed else f"fd={self._raw.fileno()}"
        about = "" if self.info is None else f" {self.info.proto!r} {self.info.peer_id}"
        return f"<{type(self).__name__}{about} {state}>"

    # --- anyio's ByteStream ---

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receives what is there, waiting for the first byte of it.

        Args:
            max_bytes: How many bytes at the most.

        Raises:
            anyio.EndOfStream: The other side has sent everything.
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
        """Sends all of ``item``, any buffer of bytes, which is not copied.

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
            data = memoryview(data)  # which keeps it from shrinking
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
        """Tells the other side that nothing more will be sent.

        With the Go daemons this ends the whole stream: the other peer gets every byte and then
        the end, but this side reads the end at once, and what the other peer sends from then on
        is lost. See ``docs/streams.md``.

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
        """Closes the stream, after sending what ``write`` has left in the buffer.

        If that is cancelled, or the connection is lost, the stream is closed all the same.
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
        """Reads up to ``n`` bytes, waiting for the first; all up to the end if negative.

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
            IncompleteRead: The stream ended before; asyncio's ``IncompleteReadError`` too. Its
                ``partial`` has what there was.
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
            limit: How many bytes may come before it is given up, in bytes.

        Raises:
            IncompleteRead: The stream ended before.
            asyncio.LimitOverrunError: There was no separator within ``limit``. The data stays.
        """
        sought = bytes(separator)
        if not sought:
            raise ValueError("Separator should be at least one-byte string")
        data = await self._pull(self._raw.try_read_until, sought, limit)
        if not data.endswith(sought):
            raise IncompleteRead(data, None)
        return data

    async def readline(self) -> bytes:
        """Reads a line with its newline; what is left if the stream ends before one."""
        try:
            return await self.readuntil(b"\n")
        except IncompleteRead as error:
            return error.partial

    async def receive_frame(self, max_bytes: int = 4 << 20) -> bytes:
        """Reads a message with its length, an unsigned varint, in front of it.

        Args:
            max_bytes: How long it may be. More is refused before anything is allocated for it.

        Raises:
            anyio.EndOfStream: The stream ended before it.
            ConnectionLost: The stream ended within it.
            ProtocolViolation: It is longer, or its length is malformed.
        """
        frames = await self._pull(self._raw.try_read_frame, max_bytes)
        if not frames:
            raise anyio.EndOfStream
        return frames[0]

    def at_eof(self) -> bool:
        """Whether the end was reached and everything before it was read."""
        return self._raw.at_eof

    # --- asyncio's StreamWriter ---

    def write(self, data: Buffer) -> Awaitable[None]:
        """Writes ``data``, buffering what the socket does not take at once.

        Returns:
            Something to await, as ``drain()``. It need not be awaited.

        Raises:
            anyio.ClosedResourceError, anyio.BrokenResourceError, anyio.BusyResourceError
        """
        if self._sending:
            # It would land in the middle of what the other task has sent a part of.
            raise anyio.BusyResourceError("writing to")
        if self._raw.write(_bytes(data)):
            self._watch.flush_later(self._raw, self)
        return _Later(self.drain)

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Writes each of ``data``."""
        for item in data:
            self.write(item)

    async def drain(self) -> None:
        """Waits until little enough is buffered to go on writing.

        On trio, where nothing runs by itself, what ``write`` left over is sent only by this,
        ``send``, ``send_eof`` and ``aclose``.
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
        """True."""
        return True

    def write_eof(self) -> None:
        """As ``send_eof``, after what is left in the buffer."""
        self._ending = True
        self._raw.flush()
        self._after_flush()

    def close(self) -> Awaitable[None]:
        """Closes the stream, after sending what is left in the buffer.

        Returns:
            Something to await, as ``wait_closed()``. It need not be awaited on asyncio; on trio
            what is left in the buffer is only sent if it is.
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
        """Waits until the stream, on which ``close`` was called, is closed."""
        await self.aclose()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """asyncio's ``"socket"``, ``"sockname"`` and ``"peername"``."""
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
        """Closes the stream at once: what is buffered is lost, and the other side is to see that
        as far as the daemon passes it on."""
        self._close(abort=True)

    async def _pull(self, attempt: Callable[..., T | None], *args: Any) -> T:
        """What ``attempt`` gives, once the socket has enough for it to give something."""
        await self._turn()
        if self._reading:
            raise anyio.BusyResourceError("reading from")
        # Nothing has been taken before: nothing was lost by being cancelled until here.
        result = attempt(*args)
        return await self._pull_later(attempt, *args) if result is None else result

    async def _pull_later(self, attempt: Callable[..., T | None], *args: Any) -> T:
        """As ``_pull``, when the first attempt has come to nothing."""
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
        """Lets the loop do other things, if this stream has kept it busy for long."""
        self._turns -= 1
        if self._turns < 0:
            self._turns = self._watch.turns
            await self._watch.checkpoint()

    def _begin_sending(self) -> None:
        if self._sending:
            raise anyio.BusyResourceError("writing to")
        self._sending = True

    async def _flush(self, until: int) -> None:
        """Sends what is buffered until no more than ``until`` bytes are."""
        raw = self._raw
        left = raw.buffered if raw.blocked else raw.flush()
        while left > until:
            self._watch.flush_later(raw, self)
            await self._watch.drained(until)
            left = raw.flush()
        self._after_flush()

    def _after_flush(self) -> None:
        """Does what waited for the buffer to be empty, or sees to it that it will be done."""
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
            # Whoever reads or writes next is told.
            if self._closing:
                self._close()

    def _close(self, abort: bool = False) -> None:
        self._closing = True
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if not self._raw.closed:
            self._watch.close()
            self._raw.close(abort=abort, keep_input=self._keep_input)

    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self._raw.local_address[0] else socket.AF_INET

    def _raw_socket(self) -> socket.socket:
        """Another descriptor of the same socket, for its options. It is closed with the stream."""
        if self._raw.closed:
            raise anyio.ClosedResourceError("the stream is closed")
        if self._socket is None:
            fd = self._raw.duplicate()
            try:
                self._socket = socket.socket(fileno=fd)
            except BaseException:
                os.close(fd)
                raise
            if self._raw.closed:  # meanwhile, in another thread or by a signal's handler
                self._socket.close()
                raise anyio.ClosedResourceError("the stream is closed")
        return self._socket

    def __del__(self) -> None:
        raw = getattr(self, "_raw", None)
        if raw is not None and not raw.closed and os.getpid() == self._pid:
            self._watch.abandon(raw)


class _Later:
    """Something already under way, whose end can be awaited or not."""

    __slots__ = ("_wait",)

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()


def _bytes(data: Buffer) -> bytes | bytearray | memoryview:
    """``data`` as something whose length is its number of bytes."""
    if isinstance(data, bytes | bytearray):
        return data
    view = memoryview(data)
    if view.format == "B" and view.ndim == 1:
        return view
    return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
