"""The results of a DHT query: all at once, or one by one as the daemon finds them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from p2pclient_rs._native import Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike
from p2pclient_rs.exceptions import ControlFailure, timed_out
from p2pclient_rs.loops import UnlessClosed
from p2pclient_rs.pool import Pool, PooledConnection

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Results"]

T = TypeVar("T")


class Results(Coroutine[Any, Any, tuple[T, ...]], AsyncIterator[T], Generic[T]):
    """The results of a DHT query. The query begins when the first one is requested.

    ``await`` returns all of them as a tuple. ``async for`` yields each as soon as the daemon has
    found it. An object can be awaited or iterated, not both, and only once.

    Leaving the loop early ends the query, because garbage collection of this object closes its
    connection. If a variable refers to the object, use ``aclose()`` or ``async with`` instead. A
    cancelled wait for the next result loses nothing, so the iteration may continue.

    Example:
        async for provider in client.dht.find_providers(cid, 20):
            print(provider.peer_id)
            break  # the first one will do
    """

    def __init__(
        self,
        connector: DaemonConnector,
        name: str,
        encode: Callable[[], Request[tuple[T, ...]]],
        *,
        timeout: float | None = None,
        peer_id: PeerIDLike | None = None,
        convert: Callable[[T], T] | None = None,
    ) -> None:
        self._connector = connector
        self._name = name
        self._encode = encode
        self._timeout = timeout
        self._peer_id = peer_id
        self._convert = convert
        #: The coroutine that collects all results, if this object is awaited.
        self._all: Coroutine[Any, Any, tuple[T, ...]] | None = None
        # The request, its deadline, and its connection, if this object is iterated.
        self._request: Request[tuple[T, ...]] | None = None
        self._deadline = math.inf
        #: The connection, and its pool: the client may use another daemon's address by now.
        self._source: tuple[PooledConnection, Pool] | None = None
        #: The number of further results to return before letting other tasks run.
        self._turns = 0
        self._waiting = False
        self._ended = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._name}>"

    # --- all at once: a coroutine, as functions that start tasks require ---

    def __await__(self) -> Generator[Any, Any, tuple[T, ...]]:
        return self._collected().__await__()

    def send(self, value: Any, /) -> Any:
        """See ``collections.abc.Coroutine``."""
        return self._collected().send(value)

    def throw(self, *error: Any) -> Any:
        """See ``collections.abc.Coroutine``."""
        return self._collected().throw(*error)

    def close(self) -> None:
        """Ends the query and closes its connection. Same as ``aclose()``, without waiting."""
        self._ended = True
        if self._all is not None:
            self._all.close()
        source, self._source = self._source, None
        if source is not None:
            source[0].close()

    def _collected(self) -> Coroutine[Any, Any, tuple[T, ...]]:
        if self._all is None:
            if self._ended or self._request is not None:
                raise RuntimeError(f"{self!r} was iterated and cannot be awaited")
            self._all = self._collect()
        return self._all

    async def _collect(self) -> tuple[T, ...]:
        found = await self._connector.request(
            self._name, self._encode(), timeout=self._timeout, peer_id=self._peer_id
        )
        return found if self._convert is None else tuple(map(self._convert, found))

    # --- one by one ---

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Waits for the next result.

        Raises:
            ControlFailure: The query failed, with one of the subclasses. The iteration has ended.
            ControlTimeout: ``timeout`` seconds have passed since the first call.
            anyio.BusyResourceError: Another task is waiting for the next result.
        """
        if self._all is not None:
            raise RuntimeError(f"{self!r} was awaited and cannot be iterated")
        if self._waiting:
            raise anyio.BusyResourceError("iterating over")
        if self._ended:
            raise StopAsyncIteration
        if self._request is None:
            self._request = self._encode()
            if self._timeout is not None:
                self._deadline = anyio.current_time() + self._timeout
        self._waiting = True
        try:
            with UnlessClosed(anyio.CancelScope(deadline=self._deadline)):
                for result in await self._next(self._request):
                    return result if self._convert is None else self._convert(result)
                self._ended = True
                raise StopAsyncIteration
            raise timed_out(self._timeout)
        except ControlFailure as error:
            self.close()
            self._connector.raise_described(error, self._name, self._peer_id)
        finally:
            self._waiting = False

    async def _next(self, request: Request[tuple[T, ...]]) -> tuple[T, ...]:
        """Returns a tuple of the next result, or an empty tuple after the last one."""
        if self._source is None:
            result, connection, pool = await self._connector.start_query(request)
            self._turns = connection.watch.turns
            if self._ended:  # closed by another task while this one waited
                connection.close()
                return ()
            self._source = connection, pool
        else:
            connection, pool = self._source
            if self._turns == 0:
                await connection.watch.checkpoint()
                self._turns = connection.watch.turns
            self._turns -= 1
            while (found := connection.raw.next_value()) is None:
                await connection.watch.readable()
            result = found
        if not result:
            self._source = None
            pool.give_back(connection)
        return result

    async def aclose(self) -> None:
        """Ends the query and closes its connection."""
        self.close()
        await anyio.lowlevel.checkpoint()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        source = getattr(self, "_source", None)
        if source is not None:
            connection, _ = source
            connection.watch.abandon(connection.raw)
