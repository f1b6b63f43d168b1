"""Sends requests to the daemon, over a pool of control connections for each event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import anyio

from p2pclient_rs._native import (
    MAX_IDLE,
    MAX_SLOW_REQUESTS,
    UNKNOWN_REQUEST,
    Multiaddr,
    PeerID,
    PersistentConnection,
    Request,
    classify_refusal,
    may_retry,
)
from p2pclient_rs.dial import dial
from p2pclient_rs.driver import on_readable, run_ready
from p2pclient_rs.exceptions import (
    AlreadyRegistered,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    ForkedClientError,
    NotRegistered,
    NotSupported,
    combined,
    timed_out,
)
from p2pclient_rs.loops import UnlessClosed, current_loop, is_current
from p2pclient_rs.pool import Pool, PooledConnection
from p2pclient_rs.reactor import Reactor
from p2pclient_rs.stream import Stream
from p2pclient_rs.types import MultiaddrLike, PeerIDLike, Types

__all__ = ["DEFAULT_CONTROL_MADDR", "DaemonConnector", "MultiaddrLike", "PeerIDLike", "Types"]

DEFAULT_CONTROL_MADDR = "/unix/tmp/p2pd.sock"

#: The limits of a persistent connection: ``max_message_size``, ``max_incoming_size``,
#: ``max_unanswered``, ``max_unanswered_bytes`` and ``hold``, as in ``UnaryClient``.
UnaryLimits: TypeAlias = tuple[int, int | None, int | None, int | None, float | None]

T = TypeVar("T")
S = TypeVar("S", bound=Stream)


class DaemonConnector:
    """Sends requests to one daemon.

    Args:
        control_maddr: ``/unix/PATH`` or ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``;
            ``/unix/tmp/p2pd.sock`` by default.
        max_connections: The maximum number of concurrent requests, per event loop, that make the
            daemon contact other peers (CONNECT, STREAM_OPEN, DHT). Each uses a connection of its
            own; further ones wait. Open streams do not count.
        max_idle: The maximum number of other concurrent requests, and of idle connections that are
            kept. Queries for what the daemon itself knows (IDENTIFY, LIST_PEERS, pubsub's lists)
            are pipelined on one more connection.
        max_message_size: The largest message accepted from the daemon, in bytes. The default is
            4 MiB plus 64 KiB.
        types: Converts results. The default converts nothing.

    Raises:
        InvalidMultiaddr: ``control_maddr`` is not a multiaddr (a ValueError). An address of the
            wrong kind fails at the first request.

    Example:
        async with await connector.open_connection(timeout=5) as connection:
            print(connection.get_extra_info("peername"))
    """

    def __init__(
        self,
        control_maddr: MultiaddrLike | None = None,
        *,
        max_connections: int = MAX_SLOW_REQUESTS,
        max_idle: int = MAX_IDLE,
        max_message_size: int | None = None,
        types: Types | None = None,
    ) -> None:
        if control_maddr is None:
            control_maddr = DEFAULT_CONTROL_MADDR
        self.types: Types = types if types is not None else Types()
        self._maddr, self._shown_maddr = self._parse(control_maddr)
        self._max_connections = max_connections
        self._max_idle = max_idle
        self._max_message_size = max_message_size
        self._pid = os.getpid()
        self._pools: WeakKeyDictionary[Any, Pool] = WeakKeyDictionary()
        #: The most recently used pool, and its asyncio loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recent: Pool | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._maddr}>"

    @property
    def control_maddr(self) -> Multiaddr:
        """The daemon's control address. Requests made after setting it go to the new address.

        Setting it closes the idle connections. Requests in flight complete at the former address;
        streams, subscriptions and an open persistent connection stay with the former daemon.

        Raises:
            InvalidMultiaddr: The new value is not a multiaddr (a ValueError).
        """
        return self._shown_maddr

    @control_maddr.setter
    def control_maddr(self, control_maddr: MultiaddrLike) -> None:
        maddr, self._shown_maddr = self._parse(control_maddr)
        if maddr != self._maddr:
            self._maddr = maddr
            self.close()

    def _parse(self, control_maddr: MultiaddrLike) -> tuple[Multiaddr, Multiaddr]:
        """Returns a control address as a ``Multiaddr``, and as ``control_maddr`` returns it."""
        maddr = Multiaddr(control_maddr)
        return maddr, self.types.multiaddr(maddr)

    async def request(
        self,
        name: str,
        request: Request[T],
        *,
        timeout: float | None = None,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> T:
        """Sends a request and returns the daemon's reply.

        Args:
            name: The request's name, for errors.
            request: The request.
            timeout: How long the whole request may take, in seconds.
            peer_id, protocol: The peer and protocol that it is about, for errors.

        Raises:
            ControlFailure: A subclass, with the arguments above.
        """
        if timeout is not None:
            return await self.described(self._answer(request), name, timeout, peer_id, protocol)
        try:
            return await self._answer(request)
        except ControlFailure as error:
            self.raise_described(error, name, peer_id, protocol)

    async def request_stream(
        self,
        stream_type: type[S],
        name: str,
        request: Request[T],
        *,
        timeout: float | None = None,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> tuple[T, S]:
        """As ``request``, for a request that turns its connection into a stream."""
        work = self._exchange(request)
        reply, connection = await self.described(work, name, timeout, peer_id, protocol)
        return reply, stream_type(connection.raw.take_stream(), connection.watch)

    async def request_peerstore(
        self,
        name: str,
        request: Request[T],
        *,
        timeout: float | None = None,
        peer_id: PeerIDLike | None = None,
    ) -> T:
        """As ``request``, for requests that only the JavaScript daemon has.

        Raises:
            NotSupported: The daemon is not the JavaScript one.
        """
        return await self.described(self._peerstore(request), name, timeout, peer_id)

    async def _peerstore(self, request: Request[T]) -> T:
        # hivemind's daemon would mistake the request for another one, and could exit.
        try:
            await self._exchange(Request.peerstore_probe())
        except DaemonRefused as error:
            if not isinstance(_precise(error), NotSupported):
                raise
        except ConnectionLost as error:
            if not await self.is_unknown_request(error):
                raise
            raise NotSupported(UNKNOWN_REQUEST) from error
        else:
            raise NotSupported("the daemon has no peerstore")
        return (await self._exchange(request))[0]

    def registered(self) -> object | None:
        """Returns a token that identifies the daemon's process. Call it right after STREAM_HANDLER.

        Returns:
            A token for ``still_registered``; None if no connection can be kept open.
        """
        return self._pool().choose_witness()

    async def still_registered(self, token: object | None) -> bool:
        """Returns whether the daemon is certainly the one that ``token`` came from.

        If not, the daemon may have been restarted since and so have lost the registration.
        """
        self.check_fork()
        return await self._pool().is_same_daemon(token)

    async def open_persistent_connection(
        self,
        limits: Callable[[int], UnaryLimits],
        reactor: Reactor,
        owner: Callable[[], object],
        *,
        timeout: float | None = None,
    ) -> PersistentConnection:
        """Opens a persistent connection, for unary calls.

        Args:
            limits: Returns the connection's limits, given its descriptor.
            reactor: The running event loop.
            owner: Returns the object that handles incoming calls, or None if it is gone.

        Raises:
            NotSupported: The daemon is not hivemind's.
            ControlFailure: As from ``request``.
        """
        name = "PERSISTENT_CONN_UPGRADE"
        work = self._upgrade(name)
        connection = await self.described(work, name, timeout)
        connection.watch.close()
        limited = limits(connection.raw.fileno())
        persistent, rest = connection.raw.take_persistent(
            os.urandom(32), limited, reactor.event_loop, on_readable, owner
        )
        came: list[Any] = []
        persistent.start(rest, came)
        run_ready(persistent, came)
        return persistent

    async def _upgrade(self, name: str) -> PooledConnection:
        try:
            _, connection = await self._exchange(Request.persistent_conn_upgrade())
        except DaemonRefused as error:
            raise NotSupported(
                "the daemon has no persistent connections", daemon_message=error.daemon_message
            ) from error
        except ConnectionLost as error:
            if not await self.is_unknown_request(error):
                raise
            raise NotSupported(UNKNOWN_REQUEST) from error
        return connection

    async def is_unknown_request(self, error: ConnectionLost) -> bool:
        """Returns whether the daemon closed the connection because it does not know the request.

        The daemon still answers other requests.
        """
        if error.mid_answer:
            return False
        try:
            await self._exchange(Request.identify())
        except ControlFailure:
            return False
        return True

    async def open_connection(self, *, timeout: float | None = None) -> Stream:
        """Opens a connection to the control socket, for a caller that speaks the protocol itself.

        Raises:
            DaemonUnreachable: There is no daemon at the address.
            ControlTimeout: No connection within ``timeout`` seconds.
        """
        self.check_fork()
        connection = await self.described(self._connect(), "open_connection", timeout)
        return Stream(connection.raw.take_stream(), connection.watch)

    async def aclose(self) -> None:
        """Closes the idle connections. Requests in flight complete. The connector stays usable."""
        self.close()

    def close(self) -> None:
        """As ``aclose``."""
        self._loop = self._recent = None
        pools = list(self._pools.values())
        self._pools.clear()
        for pool in pools:
            pool.close()

    async def _answer(self, request: Request[T]) -> T:
        repeated = False
        if request.is_query:
            pool = self._recent  # None on trio
            pipeline = None if pool is None else pool.pipeline
            # Fast path: no lookup of the running loop.
            if (
                pool is None
                or pipeline is None
                or not (pipeline.in_wake_batch or is_current(self._loop))
            ):
                pool = self._pool()
                pipeline = pool.pipeline
            if pipeline is None or pipeline.retired:
                self.check_fork()
                pipeline = pool.open_pipeline()
            if pipeline is not None and (answer := pipeline.request(request)) is not None:
                try:
                    return await answer
                except ConnectionLost as error:
                    if not may_retry(True, repeated, error.unexecuted):
                        raise
                    repeated = True
                except ControlFailure:
                    raise
                except BaseException:
                    with suppress(RuntimeError):  # from a closed loop
                        answer.cancel()  # not done yet if the coroutine was closed
                    # The daemon may be slow with this query, and others must not queue behind it.
                    pipeline.retire()
                    raise
                finally:
                    del answer  # breaks a reference cycle: its exception's traceback has this frame
        return (await self._exchange(request, repeated))[0]

    async def start_query(
        self, request: Request[tuple[T, ...]]
    ) -> tuple[tuple[T, ...], PooledConnection, Pool]:
        """Sends a DHT query and waits for its first result.

        The permit is released then, as the caller may send other requests while it reads the
        results.

        Returns:
            The first result, or an empty tuple if there are no results. The connection, on which
            the others follow, and its pool: give it back after the last one, or close it.

        Raises:
            ControlFailure: A subclass.
        """
        exchange: Any = self._exchange(request, read=_first_result)
        pool = self._pool()
        result, connection = await exchange
        return result, connection, pool

    async def _exchange(
        self,
        request: Request[T],
        repeated: bool = False,
        read: Callable[[PooledConnection], Awaitable[Any]] | None = None,
    ) -> tuple[T, PooledConnection]:
        """Sends a request, and waits for its reply or for the first part of that.

        Args:
            request: The request.
            repeated: Whether it was already sent on another connection.
            read: Waits for the reply, or for the first part of it.

        Returns:
            The result of ``read``, and the connection. The connection is open only if it became a
            stream, or if ``read`` returned a part of the reply.
        """
        self.check_fork()
        # Fast path: no lookup of the pool.
        pool = self._recent
        if pool is None or not is_current(self._loop):
            pool = self._pool()
        permit = pool.permits[request.permit]
        try:
            permit.acquire_nowait()
        except anyio.WouldBlock:
            await permit.acquire()
        try:
            connection = pool.take()
            pooled = connection is not None
            while True:
                if connection is None:
                    connection = await self._connect()
                raw, watch = connection
                consumed = False
                try:
                    # Same as `pool.send`, without the cost of its coroutine.
                    if not raw.start(request):
                        await watch.writable()
                        while not raw.flush():
                            await watch.writable()
                    if read is None:
                        answer = await watch.answer(raw)
                        consumed = raw.consumed
                    else:
                        answer = await read(connection)
                        consumed = True
                    return answer, connection
                except ConnectionLost as error:
                    if not may_retry(pooled, repeated, error.unexecuted):
                        raise
                    pooled, repeated = False, True
                finally:
                    if not consumed:
                        pool.give_back(connection)
                connection = None
        finally:
            permit.release()

    def _pool(self) -> Pool:
        """Returns the pool of the running event loop."""
        loop = self.current_loop()
        pool = self._pools.get(loop)
        if pool is None:
            # If something refers to a closed loop, its pool is still here.
            for other in list(self._pools):
                if isinstance(other, asyncio.AbstractEventLoop) and other.is_closed():
                    self._pools.pop(other).close()
            pool = self._pools[loop] = Pool(self._max_connections, self._max_idle)
        if isinstance(loop, asyncio.AbstractEventLoop):
            self._loop, self._recent = loop, pool
        return pool

    async def _connect(self) -> PooledConnection:
        return await dial(self._maddr, self._max_message_size)

    def current_loop(self) -> Any:
        """Returns the running event loop.

        Raises:
            ForkedClientError: This is a forked child, in which asyncio's loop is not running.
            RuntimeError: No event loop is running.
        """
        try:
            return current_loop()
        except RuntimeError:
            self.check_fork()
            raise

    def check_fork(self) -> None:
        """Raises ForkedClientError in a forked child of the process that made this."""
        pid = os.getpid()
        if pid != self._pid:
            raise ForkedClientError(
                f"this client belongs to process {self._pid} and cannot be used in its forked "
                f"child {pid}: make a new one here"
            )

    async def described(
        self,
        work: Coroutine[Any, Any, T],
        name: str,
        timeout: float | None,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> T:
        """Awaits ``work``, and adds the context of the request to its error.

        Args:
            work: A coroutine that raises ``ControlFailure``.
            name: The request's name.
            timeout: How long it may take, in seconds.
            peer_id, protocol: The context, for errors.

        Raises:
            ControlTimeout: It took longer.
        """
        if timeout is not None and not timeout >= 0:  # also rejects NaN
            work.close()
            raise ValueError(f"a timeout is a number of seconds from 0 on, not {timeout}")
        try:
            if timeout is None:
                return await work
            with UnlessClosed(anyio.move_on_after(timeout)):
                return await work
            raise timed_out(timeout)
        except ControlFailure as error:
            self.raise_described(error, name, peer_id, protocol)

    def raise_described(
        self,
        error: ControlFailure,
        name: str,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> NoReturn:
        """Raises the exception for ``error``, with the context of the request."""
        raised = self.describe(error, name, peer_id, protocol)
        try:
            if raised is error:
                raise error
            raise raised from error.__cause__
        finally:
            # Breaks a reference cycle: the traceback has this frame.
            del error, raised

    def describe(
        self,
        error: ControlFailure,
        request: str,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> Exception:
        """Returns the exception to raise for ``error``, with the context of the request."""
        precise = _precise(error)
        # If an earlier, preparatory request failed, its error already has that request's name.
        if not (isinstance(precise, NotSupported) and precise.request):
            precise.request = request
        precise.peer_id = None if peer_id is None else PeerID(peer_id)
        precise.protocol = protocol
        return self.types.error(precise)


async def _first_result(connection: PooledConnection) -> tuple[Any, ...]:
    while (result := connection.raw.next_value()) is None:
        await connection.watch.readable()
    return result


def _precise(error: ControlFailure) -> ControlFailure:
    """Returns the error as the subclass that fits the daemon's message."""
    message = error.daemon_message
    if isinstance(error, DaemonRefused) and message is not None:
        kind, hint = classify_refusal(message)
        if kind == "not supported":
            return NotSupported(str(error.args[0]), daemon_message=message)
        if kind == "timed out":
            return ControlTimeout("the daemon gave up", daemon_message=message)
        if kind in ("already registered", "not registered"):
            made = AlreadyRegistered if kind == "already registered" else NotRegistered
            refused: Any = combined(made, (DaemonRefused,))
            return refused(str(error.args[0]), daemon_message=message, hint=hint)  # type: ignore[no-any-return]
    return error
