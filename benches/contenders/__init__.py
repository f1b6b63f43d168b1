"""The clients that are compared, with the operations that the scenarios use."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from adapters import StreamAdapter

UnaryHandler: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]
StreamHandler: TypeAlias = Callable[[StreamAdapter], Awaitable[None]]


@dataclass
class Contender:
    """A client of one daemon, with operations on one peer."""

    identify: Callable[[], Awaitable[Any]]
    #: Opens a stream of a protocol.
    open: Callable[[str], Awaitable[StreamAdapter]]
    #: Opens and closes streams of a protocol, one after another, this many times.
    open_and_close: Callable[[str, int], Awaitable[None]]
    #: Makes a unary call.
    call: Callable[[str, bytes], Awaitable[bytes]] | None = None
    #: Serves unary calls of a protocol.
    serve_calls: Callable[[str, UnaryHandler], Awaitable[None]] | None = None
    #: Accepts inbound streams until the context is left.
    listen: Callable[[], AbstractAsyncContextManager[Any]] | None = None
    #: Serves inbound streams of a protocol.
    serve_streams: Callable[[str, StreamHandler], Awaitable[None]] | None = None


#: Makes a contender from the daemon's control address, the peer's id and the listener's address.
Kind: TypeAlias = Callable[[str, str, str], AbstractAsyncContextManager[Contender]]


@asynccontextmanager
async def contender(kind: str, control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    """Makes a contender of a kind, and imports only that kind's package."""
    make: Kind
    if kind == "ours":
        from contenders.ours import ours as make
    elif kind == "p2pclient":
        from contenders.p2pclient import p2pclient as make
    elif kind == "hivemind":
        from contenders.hivemind import hivemind as make
    elif kind == "ours-as-hivemind":
        from contenders.hivemind import ours_as_hivemind as make
    else:
        raise SystemExit(f"there is no contender {kind}")
    async with make(control, peer, listen) as made:
        yield made
