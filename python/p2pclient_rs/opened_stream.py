"""The result of ``stream_open``: a stream that also unpacks as ``(info, stream)``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from anyio.abc import ByteStream

from p2pclient_rs.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["OpenedStream"]

InfoT = TypeVar("InfoT")
T = TypeVar("T")
D = TypeVar("D")

_NONE: Any = object()


class OpenedStream(tuple[InfoT, Stream], Generic[InfoT]):
    """A stream to a peer: the tuple ``(info, stream)``, with all methods of the ``Stream``.

    Attributes:
        info: The ``StreamInfo``: the peer, its address and the protocol agreed on.
        stream: The ``Stream``.

    Example:
        async with await client.stream_open(peer_id, ["/echo/1"]) as opened:
            await opened.send(b"ping")
            print(opened.info.proto, await opened.receive())
    """

    __slots__ = ()

    def __new__(cls, info: InfoT, stream: Stream) -> Self:
        return tuple.__new__(cls, (info, stream))

    @property
    def info(self) -> InfoT:
        """The ``StreamInfo``: the peer, its address and the protocol agreed on."""
        return self[0]

    @property
    def stream(self) -> Stream:
        """The ``Stream``."""
        return self[1]

    async def __aenter__(self) -> Self:
        await self[1].__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self[1].__aexit__(kind, error, traceback)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self[1].__anext__()

    # --- anyio's ByteStream ---

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """See ``Stream.receive``."""
        return await self[1].receive(max_bytes)

    async def send(self, item: Buffer) -> None:
        """See ``Stream.send``."""
        await self[1].send(item)

    async def send_eof(self) -> None:
        """See ``Stream.send_eof``."""
        await self[1].send_eof()

    async def aclose(self) -> None:
        """See ``Stream.aclose``."""
        await self[1].aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """See ``Stream.extra_attributes``."""
        return self[1].extra_attributes

    @overload
    def extra(self, attribute: T) -> T: ...

    @overload
    def extra(self, attribute: T, default: D) -> T | D: ...

    def extra(self, attribute: Any, default: Any = _NONE) -> Any:
        """See anyio's ``TypedAttributeProvider.extra``."""
        if default is _NONE:
            return self[1].extra(attribute)
        return self[1].extra(attribute, default)

    # --- asyncio's StreamReader ---

    async def read(self, n: int = -1) -> bytes:
        """See ``Stream.read``."""
        return await self[1].read(n)

    async def readexactly(self, n: int) -> bytes:
        """See ``Stream.readexactly``."""
        return await self[1].readexactly(n)

    async def readuntil(self, separator: Buffer = b"\n", limit: int = 65536) -> bytes:
        """See ``Stream.readuntil``."""
        return await self[1].readuntil(separator, limit)

    async def readline(self) -> bytes:
        """See ``Stream.readline``."""
        return await self[1].readline()

    async def receive_frame(self, max_bytes: int = 4 << 20) -> bytes:
        """See ``Stream.receive_frame``."""
        return await self[1].receive_frame(max_bytes)

    def at_eof(self) -> bool:
        """See ``Stream.at_eof``."""
        return self[1].at_eof()

    # --- asyncio's StreamWriter ---

    def write(self, data: Buffer) -> Awaitable[None]:
        """See ``Stream.write``."""
        return self[1].write(data)

    def writelines(self, data: Iterable[Buffer]) -> None:
        """See ``Stream.writelines``."""
        self[1].writelines(data)

    async def drain(self) -> None:
        """See ``Stream.drain``."""
        await self[1].drain()

    def can_write_eof(self) -> bool:
        """See ``Stream.can_write_eof``."""
        return self[1].can_write_eof()

    def write_eof(self) -> None:
        """See ``Stream.write_eof``."""
        self[1].write_eof()

    def close(self) -> Awaitable[None]:
        """See ``Stream.close``."""
        return self[1].close()

    def is_closing(self) -> bool:
        """See ``Stream.is_closing``."""
        return self[1].is_closing()

    async def wait_closed(self) -> None:
        """See ``Stream.wait_closed``."""
        await self[1].wait_closed()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See ``Stream.get_extra_info``."""
        return self[1].get_extra_info(name, default)

    def abort(self) -> None:
        """See ``Stream.abort``."""
        self[1].abort()

    # --- anyio 1's SocketStream ---

    async def send_all(self, data: Buffer) -> None:
        """See ``Stream.send_all``."""
        await self[1].send_all(data)

    async def receive_some(self, max_bytes: int) -> bytes:
        """See ``Stream.receive_some``."""
        return await self[1].receive_some(max_bytes)

    async def receive_exactly(self, nbytes: int) -> bytes:
        """See ``Stream.receive_exactly``."""
        return await self[1].receive_exactly(nbytes)

    async def receive_until(self, delimiter: Buffer, max_bytes: int) -> bytes:
        """See ``Stream.receive_until``."""
        return await self[1].receive_until(delimiter, max_bytes)

    def receive_chunks(self, max_size: int) -> AsyncIterator[bytes]:
        """See ``Stream.receive_chunks``."""
        return self[1].receive_chunks(max_size)

    def receive_delimited_chunks(
        self, delimiter: Buffer, max_chunk_size: int
    ) -> AsyncIterator[bytes]:
        """See ``Stream.receive_delimited_chunks``."""
        return self[1].receive_delimited_chunks(delimiter, max_chunk_size)

    @property
    def buffered_data(self) -> bytes:
        """See ``Stream.buffered_data``."""
        return self[1].buffered_data

    @property
    def address(self) -> Any:
        """See ``Stream.address``."""
        return self[1].address

    @property
    def peer_address(self) -> Any:
        """See ``Stream.peer_address``."""
        return self[1].peer_address

    def getsockopt(self, level: int, optname: int, *args: int) -> int | bytes:
        """See ``Stream.getsockopt``."""
        return self[1].getsockopt(level, optname, *args)

    def setsockopt(self, level: int, optname: int, value: Any, *args: int) -> None:
        """See ``Stream.setsockopt``."""
        self[1].setsockopt(level, optname, value, *args)


# anyio's helpers accept only instances of ByteStream.
ByteStream.register(OpenedStream)
