"""The control connections of one event loop: the idle ones, and the one that queries share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import anyio

from p2pclient_rs._native import ConnectionPool, ControlConnection, Pipeline, Request
from p2pclient_rs.driver import on_readable
from p2pclient_rs.exceptions import ControlFailure
from p2pclient_rs.reactor import Reactor, reactor
from p2pclient_rs.readiness import Watch

__all__ = ["Pool", "PooledConnection", "send"]

_IDENTIFY = Request.identify()


class PooledConnection(NamedTuple):
    """A control connection, and its event loop's watch of its descriptor."""

    raw: ControlConnection
    watch: Watch

    def close(self) -> None:
        self.watch.close()
        self.raw.close()


async def send(connection: PooledConnection, request: Request[object]) -> None:
    """Sends a request."""
    raw, watch = connection
    if not raw.start(request):
        await watch.writable()
        while not raw.flush():
            await watch.writable()


class Pool:
    """The control connections of one event loop.

    Args:
        max_slow: Maximum number of concurrent requests that make the daemon contact other peers.
        max_idle: Maximum number of other concurrent requests, and of idle connections kept.
    """

    def __init__(self, max_slow: int, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: ConnectionPool[PooledConnection] = ConnectionPool(max_idle)
        idle = self._idle
        #: Takes an idle connection, or returns None.
        self.take: Callable[[], PooledConnection | None] = idle.take
        #: Takes a connection back after a request, or closes it.
        self.give_back: Callable[[PooledConnection], None] = idle.give_back
        #: The semaphores for quick and for slow requests, indexed by ``Request.permit``.
        self.permits: tuple[anyio.Semaphore, anyio.Semaphore] = (
            anyio.Semaphore(max_idle, fast_acquire=True),
            anyio.Semaphore(max_slow, fast_acquire=True),
        )
        #: The pipeline for queries; None until a connection is idle.
        self.pipeline: Pipeline | None = None
        #: All pipelines that are not yet closed, including retired ones.
        self._pipelines: list[Pipeline] = []
        #: The reactor of the pipelines. Created with the first one, as it keeps the loop alive.
        self._reactor: Reactor | None = None
        #: Identifies this pool in the tokens of its witnesses.
        self._key = object()
        self._probing = anyio.Lock()

    def open_pipeline(self) -> Pipeline | None:
        """Turns an idle connection into the pipeline for queries."""
        self.pipeline = None
        self._pipelines = [pipeline for pipeline in self._pipelines if not pipeline.closed]
        # Each cancelled query retires a pipeline. If too many are still open, the next queries wait
        # for a permit instead.
        if len(self._pipelines) >= self._max_idle:
            return None
        connection = self.take()
        if connection is not None:
            connection.watch.close()
            if self._reactor is None:
                self._reactor = reactor()
            self.pipeline = connection.raw.take_pipeline(self._reactor.event_loop, on_readable)
            self._pipelines.append(self.pipeline)
        return self.pipeline

    def choose_witness(self) -> object | None:
        """Returns a token for ``is_same_daemon``. Call it right after a registration.

        Returns:
            The token; None if no connection can be kept open.
        """
        witness = self._idle.choose_witness()
        return None if witness is None else (self._key, witness)

    async def is_same_daemon(self, token: object | None) -> bool:
        """Returns whether the daemon is certainly the one that ``token`` came from."""
        if not isinstance(token, tuple) or token[0] is not self._key:
            return False
        witness: int = token[1]
        async with self._probing:
            connection = self._idle.begin_probe(witness)
            if connection is None:
                return False
            try:
                # A TCP connection to a lost host looks open until something is sent.
                await send(connection, _IDENTIFY)
                await connection.watch.answer(connection.raw)
            except ControlFailure:
                return False
            finally:
                self._idle.end_probe(witness)
            return True

    def close(self) -> None:
        """Closes the idle connections at once, and the others when they are given back."""
        for connection in self._idle.close():
            connection.close()
        if self.pipeline is not None:
            self.pipeline.retire()

    def __del__(self) -> None:
        for connection in self._idle.close():
            connection.watch.abandon(connection.raw)
        if self.pipeline is not None and self._reactor is not None:
            self._reactor.call_from_anywhere(self.pipeline.close)
