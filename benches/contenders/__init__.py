"""The clients that are compared: what the scenarios need of each."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from faces import Face

UnaryHandler: TypeAlias = Callable[[bytes, Any], Awaitable[bytes]]
StreamHandler: TypeAlias = Callable[[Face], Awaitable[None]]


@dataclass
class Contender:
    """A client of one daemon, whose streams and calls go to one peer."""

    identify: Callable[[], Awaitable[Any]]
    #: Opens a stream of a protocol.
    open: Callable[[str], Awaitable[Face]]
    #: Opens streams of a protocol, so many one after another, and closes each.
    open_and_close: Callable[[str, int], Awaitable[None]]
    #: Calls a protocol.
    call: Callable[[str, bytes], Awaitable[bytes]] | None = None
    #: Has calls of a protocol handled.
    serve_calls: Callable[[str, UnaryHandler], Awaitable[None]] | None = None
    #: Accepts streams, as long as the context lasts.
    listen: Callable[[], AbstractAsyncContextManager[Any]] | None = None
    #: Has streams of a protocol handled.
    serve_streams: Callable[[str, StreamHandler], Awaitable[None]] | None = None


#: Where the daemon is, who the peer is, and where streams may come in.
Kind: TypeAlias = Callable[[str, str, str], AbstractAsyncContextManager[Contender]]


@asynccontextmanager
async def contender(kind: str, control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    """One of that kind, of which nothing is imported before."""
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
