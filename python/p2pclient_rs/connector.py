"""Requests to the daemon over a small pool of reused control connections."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import anyio

from p2pclient_rs._native import (
    ControlConnection,
    Identity,
    Multiaddr,
    PeerID,
    PeerInfo,
    PersistentConnection,
    Pipeline,
    PublicKey,
    Request,
    StreamInfo,
    endpoint,
    refusal_kind,
)
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    DaemonUnreachable,
    ForkedClientError,
    NotSupported,
    from_os_error,
)
from p2pclient_rs.loops import (
    Reactor,
    UnlessClosed,
    Watch,
    carry_out,
    current_loop,
    is_current,
    pump,
    watch,
)
from p2pclient_rs.streams import Stream

__all__ = ["DEFAULT_CONTROL_MADDR", "DaemonConnector", "MultiaddrLike", "PeerIDLike", "Types"]

DEFAULT_CONTROL_MADDR = "/unix/tmp/p2pd.sock"

#: What is said of a request that a daemon closed the connection on.
UNKNOWN_REQUEST = "the daemon closed the connection, as it does on a request it does not know"

#: Of a persistent connection; see ``UnaryClient``: ``max_message_size``, ``max_incoming_size``,
#: ``max_unanswered``, ``max_unanswered_bytes`` and ``hold``.
UnaryLimits: TypeAlias = tuple[int, int | None, int | None, int | None, float | None]

_IDENTIFY = Request.identify()

#: Errors of a connection attempt that say nothing of the control socket.
_NOT_ABOUT_THE_SOCKET = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

T = TypeVar("T")
S = TypeVar("S", bound=Stream)


class SupportsToBytes(Protocol):
    """A peer id or multiaddr of another library, as py-multiaddr's."""

    def to_bytes(self) -> bytes: ...


#: A peer id: a PeerID, its text (base58 or CID), its bytes, or another library's.
PeerIDLike: TypeAlias = PeerID | str | bytes | bytearray | memoryview | SupportsToBytes
#: A multiaddr: a Multiaddr, its text, its bytes, or another library's.
MultiaddrLike: TypeAlias = Multiaddr | str | bytes | bytearray | memoryview | SupportsToBytes


class Types:
    """What requests return. An API compatibility layer overrides these to return the types of its
    ecosystem, and declares the methods of its clients accordingly."""

    def multiaddr(self, addr: Multiaddr) -> Multiaddr:
        """A multiaddr, wherever one is returned by itself."""
        return addr

    def peer_info(self, info: PeerInfo) -> PeerInfo:
        """An entry of ``list_peers`` and of the DHT's answers."""
        return info

    def stream_info(self, info: StreamInfo) -> StreamInfo:
        """What is said of a stream, opened or inbound."""
        return info

    def public_key(self, key: PublicKey) -> PublicKey:
        """The answer to ``dht_get_public_key``."""
        return key

    def identity(self, identity: Identity) -> Identity:
        """The answer to ``identify``."""
        return identity

    def peer_id(self, peer_id: PeerID) -> PeerID:
        """The caller that a unary handler is told. What is returned is kept for the next call."""
        return peer_id

    def error(self, error: Exception) -> Exception:
        """What is raised in the place of a ``ControlFailure`` or a ``P2PHandlerError``."""
        return error


class Connection(NamedTuple):
    """A control connection, and the wait of its event loop for it."""

    raw: ControlConnection
    watch: Watch

    def close(self) -> None:
        self.watch.close()
        self.raw.close()


class _Pool:
    """The connections that belong to one event loop."""

    def __init__(self, max_connections: int, max_idle: int) -> None:
        self._max_idle = max_idle
        self._idle: list[Connection] = []
        #: For the queries of asyncio's tasks, once there was a connection to spare.
        self.pipeline: Pipeline | None = None
        #: That one, and those that take no more and are not yet closed.
        self._pipelines: list[Pipeline] = []
        self._pipeline_watch: Watch | None = None
        #: An idle connection that is kept out of the pool. While it stays open, the daemon has not
        #: been restarted since it took the registrations. The lock guards requests on it.
        self.witness: Connection | None = None
        self.witness_lock = anyio.Lock()
        self.slow = anyio.Semaphore(max_connections, fast_acquire=True)
        self.quick = anyio.Semaphore(max_idle, fast_acquire=True)

    def take(self) -> Connection | None:
        """An idle connection on which nothing has arrived unasked, as the end would have."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.raw.stale:
                return connection
            connection.close()
        return None

    def open_pipeline(self) -> Pipeline | None:
        """Makes an idle connection one for queries, on an event loop that runs callbacks."""
        self.pipeline = None
        self._pipelines = [pipeline for pipeline in self._pipelines if not pipeline.closed]
        loop = current_loop()
        # With many on which somebody gave up, those who ask are to wait for their turn.
        full = len(self._pipelines) >= self._max_idle
        if full or not isinstance(loop, asyncio.AbstractEventLoop):
            return None
        connection = self.take()
        if connection is not None:
            connection.watch.close()
            self.pipeline = connection.raw.take_pipeline(loop, pump)
            self._pipelines.append(self.pipeline)
            self._pipeline_watch = connection.watch
        return self.pipeline

    def give_back(self, connection: Connection) -> None:
        if connection.raw.reusable and len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            connection.close()

    def take_witness(self) -> Connection | None:
        """Returns the witness of a registration that was just made.

        The first one is the connection given back last, which carried the registration.
        """
        if self.witness is not None:
            if self.witness_lock.locked() or not self.witness.raw.stale:
                return self.witness
            self.drop_witness()
        if self._idle and not self._idle[-1].raw.stale:
            self.witness = self._idle.pop()
        return self.witness

    def drop_witness(self) -> None:
        if self.witness is not None:
            self.witness.close()
            self.witness = None

    def close(self) -> None:
        """Closes the idle connections, and those in use when they are given back."""
        self._max_idle = 0
        self.drop_witness()
        while self._idle:
            self._idle.pop().close()
        if self.pipeline is not None:
            self.pipeline.retire()

    def __del__(self) -> None:
        idle = self._idle if self.witness is None else [*self._idle, self.witness]
        for connection in idle:
            connection.watch.abandon(connection.raw)
        if self.pipeline is not None and self._pipeline_watch is not None:
            self._pipeline_watch.abandon(self.pipeline)


class DaemonConnector:
    """The way to one daemon's control socket.

    Args:
        control_maddr: ``/unix/PATH`` or ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``;
            ``/unix/tmp/p2pd.sock`` if none.
        max_connections: How many requests for which the daemon asks other peers (CONNECT,
            STREAM_OPEN, DHT) may be under way at once in one event loop, each on a connection of
            its own; further ones wait their turn. Open streams do not count.
        max_idle: How many connections are kept for the next requests, and how many of the other
            requests, which the daemon answers at once, may be under way. Those that only ask what
            it knows (IDENTIFY, LIST_PEERS, pubsub's lists) follow each other on one more
            connection, on asyncio and uvloop.
        max_message_size: The largest message taken from the daemon, in bytes; 4 MiB and a
            little if none.
        types: What requests return.

    Raises:
        InvalidMultiaddr: ``control_maddr`` is no multiaddr (a ValueError). Whether it can be a
            control address shows when it is used.
    """

    def __init__(
        self,
        control_maddr: MultiaddrLike | None = None,
        *,
        max_connections: int = 64,
        max_idle: int = 8,
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
        self._pools: WeakKeyDictionary[Any, _Pool] = WeakKeyDictionary()
        #: The last one used, and its asyncio loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recent: _Pool | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._maddr}>"

    @property
    def control_maddr(self) -> Multiaddr:
        """The daemon's control address. Requests made after setting it go to the new address.

        The idle connections to the former address are closed. Requests in flight end as they would;
        streams, subscriptions and an open persistent connection stay with the former daemon.

        Raises:
            InvalidMultiaddr: The new value is no multiaddr (a ValueError).
        """
        return self._shown_maddr

    @control_maddr.setter
    def control_maddr(self, control_maddr: MultiaddrLike) -> None:
        maddr, self._shown_maddr = self._parse(control_maddr)
        if maddr != self._maddr:
            self._maddr = maddr
            self.close()

    def _parse(self, control_maddr: MultiaddrLike) -> tuple[Multiaddr, Multiaddr]:
        """A control address, and how the attribute shows it."""
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
        """Sends a request and returns what the daemon answered.

        Args:
            name: The request's name, for errors.
            request: The request.
            timeout: How long to wait, in seconds, for everything together.
            peer_id, protocol: What it is about, for errors.

        Raises:
            ControlFailure: One of its subclasses, with the arguments above.
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
        """As ``request``, for one whose success makes its connection a stream."""
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
        """As ``request``, for those that only the JavaScript daemon has.

        Raises:
            NotSupported: It is another.
        """
        return await self.described(self._peerstore(request), name, timeout, peer_id)

    async def _peerstore(self, request: Request[T]) -> T:
        # hivemind's daemon would take it for another request, and could end from that.
        try:
            await self._exchange(Request.peerstore_is_there())
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
        """Returns a token of the daemon; call it right after a STREAM_HANDLER request.

        Returns:
            A token for ``still_registered``; None if no connection could be kept open.
        """
        return self._pool().take_witness()

    async def still_registered(self, token: object | None) -> bool:
        """Returns whether the daemon is certainly the one that ``token`` came from.

        If not, it may have been restarted since, and have lost the registration.
        """
        self.check_fork()
        pool = self._pool()
        async with pool.witness_lock:
            witness = pool.witness
            if witness is None or witness is not token:
                return False
            raw, watched = witness
            try:
                # A TCP connection to a host that is gone looks open until something is sent.
                if not raw.start(_IDENTIFY):
                    await watched.writable()
                    while not raw.flush():
                        await watched.writable()
                await watched.answer(raw)
            except ControlFailure:
                return False
            finally:
                if not raw.reusable and pool.witness is witness:
                    pool.drop_witness()
            return True

    async def open_persistent_connection(
        self,
        limits: Callable[[int], UnaryLimits],
        reactor: Reactor,
        owner: Callable[[], object],
        *,
        timeout: float | None = None,
    ) -> PersistentConnection:
        """A new persistent connection, for unary calls.

        Args:
            limits: Gives the connection's limits, for its descriptor.
            reactor: The running event loop.
            owner: Gives what incoming calls are handed to, or None if that is gone.

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
            os.urandom(32), limited, reactor, reactor.event_loop, pump, owner
        )
        came: list[Any] = []
        persistent.start(rest, came)
        carry_out(persistent, came)
        return persistent

    async def _upgrade(self, name: str) -> Connection:
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
        """Whether the daemon closed the connection because it does not know the request: it is
        there still."""
        if error.mid_answer:
            return False
        try:
            await self._exchange(Request.identify())
        except ControlFailure:
            return False
        return True

    async def open_connection(self, *, timeout: float | None = None) -> Stream:
        """A new connection to the control socket, on which nothing was said yet.

        Raises:
            DaemonUnreachable: There is no daemon at the address.
            ControlTimeout: No connection within ``timeout`` seconds.
        """
        self.check_fork()
        connection = await self.described(self._connect(), "open_connection", timeout)
        return Stream(connection.raw.take_stream(), connection.watch)

    async def aclose(self) -> None:
        """Closes the idle connections. Requests in flight end as they would; the connector can
        be used again."""
        self.close()

    def close(self) -> None:
        """As ``aclose``."""
        self._loop = self._recent = None
        pools = list(self._pools.values())
        self._pools.clear()
        for pool in pools:
            pool.close()

    async def _answer(self, request: Request[T]) -> T:
        retry = True
        pool = self._recent  # of trio it is none
        if request.is_query and pool is not None:
            # What comes here often is to go a short way.
            pipeline = pool.pipeline
            if pipeline is None or not (pipeline.in_turn or is_current(self._loop)):
                pool = self._pool()
                pipeline = pool.pipeline
            if pipeline is None or pipeline.retired:
                self.check_fork()
                pipeline = pool.open_pipeline()
            if pipeline is not None and (answer := pipeline.ask(request)) is not None:
                try:
                    return await answer
                except ConnectionLost as error:
                    # As in `_exchange`.
                    if not error.unexecuted:
                        raise
                    retry = False
                except ControlFailure:
                    raise
                except BaseException:
                    with suppress(RuntimeError):  # from a closed loop
                        answer.cancel()  # if it was not: the coroutine may have been closed
                    # The daemon may be slow for what this asked: nobody is to wait behind it.
                    pipeline.retire()
                    raise
                finally:
                    del answer  # which has the exception, whose traceback has this frame
        return (await self._exchange(request, retry))[0]

    async def start_query(
        self, request: Request[tuple[T, ...]]
    ) -> tuple[tuple[T, ...], Connection]:
        """Sends a DHT query and waits for its first result.

        The query no longer counts as a request under way after that, since the caller may need
        others for what it does with the results.

        Returns:
            The first result, or an empty tuple if there are none. The connection, on which the
            others follow: pass it to ``give_back`` after the last one, or close it.

        Raises:
            ControlFailure: One of its subclasses.
        """
        exchange: Any = self._exchange(request, read=_first_result)
        result, connection = await exchange
        return result, connection

    def give_back(self, connection: Connection) -> None:
        """Keeps a connection for the next request, or closes it if it cannot be used again."""
        self._pool().give_back(connection)

    async def _exchange(
        self,
        request: Request[T],
        retry: bool = True,
        read: Callable[[Connection], Awaitable[Any]] | None = None,
    ) -> tuple[T, Connection]:
        """Sends a request.

        Args:
            request: The request.
            retry: Whether it may be sent again on another connection.
            read: Waits for the reply, or for the first part of it.

        Returns:
            The reply. The connection, which is open only if it became a stream, or if ``read``
            has returned a part of the reply.
        """
        self.check_fork()
        # What comes here often is to go a short way.
        pool = self._recent
        if pool is None or not is_current(self._loop):
            pool = self._pool()
        turn = pool.slow if request.waits_for_peers else pool.quick
        try:
            turn.acquire_nowait()
        except anyio.WouldBlock:
            await turn.acquire()
        try:
            connection = pool.take()
            retry = retry and connection is not None
            while True:
                if connection is None:
                    connection = await self._connect()
                raw, watch = connection
                consumed = False
                try:
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
                    # The daemon closed it meanwhile, perhaps by a restart. Only where it cannot
                    # have acted on the request is it right to send that again.
                    if not (retry and error.unexecuted):
                        raise
                    retry = False
                finally:
                    # One with half an answer on it is of no use to anybody else.
                    if not consumed:
                        pool.give_back(connection)
                connection = None
        finally:
            turn.release()

    def _pool(self) -> _Pool:
        """This loop's."""
        loop = current_loop()
        pool = self._pools.get(loop)
        if pool is None:
            # A closed loop can live on, with what was idle on it.
            for other in list(self._pools):
                if isinstance(other, asyncio.AbstractEventLoop) and other.is_closed():
                    self._pools.pop(other).close()
            pool = self._pools[loop] = _Pool(self._max_connections, self._max_idle)
        if isinstance(loop, asyncio.AbstractEventLoop):
            self._loop, self._recent = loop, pool
        return pool

    async def _connect(self) -> Connection:
        maddr, path = self._maddr, None
        try:
            addresses = await resolve(maddr)
            for attempt, address in enumerate(addresses, 1):
                path = address if isinstance(address, str) else None
                try:
                    return await self._connect_to(address)
                except OSError:
                    if attempt == len(addresses):
                        raise
            raise OSError(errno.EADDRNOTAVAIL, "the name has no address")
        except OSError as error:
            if error.errno in _NOT_ABOUT_THE_SOCKET:
                path = None
            raise _unreachable(error, maddr, path) from error

    async def _connect_to(self, address: str | tuple[str, int]) -> Connection:
        delay = 0.001
        while (raw := ControlConnection.connect(address, max_frame=self._max_message_size)) is None:
            # The daemon's queue of connections is full, and nothing says when it is not.
            await anyio.sleep(delay)
            delay = min(2 * delay, 0.05)
        connection = Connection(raw, watch(raw.fileno()))
        try:
            if not raw.connected:
                await connection.watch.writable()
                raw.finish_connect()
        except BaseException:
            connection.close()
            raise
        return connection

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
        if timeout is not None and not timeout >= 0:  # NaN, too
            work.close()
            raise ValueError(f"a timeout is a number of seconds from 0 on, not {timeout}")
        try:
            if timeout is None:
                return await work
            with UnlessClosed(anyio.move_on_after(timeout)):
                return await work
            raise ControlTimeout(f"no answer within {timeout:g} s")
        except ControlFailure as error:
            self.raise_described(error, name, peer_id, protocol)

    def raise_described(
        self,
        error: ControlFailure,
        name: str,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> NoReturn:
        """Raises ``error``, or what stands for it, saying what it was about."""
        raised = self.describe(error, name, peer_id, protocol)
        try:
            if raised is error:
                raise error
            raise raised from error.__cause__
        finally:
            # Its traceback has this frame, which is not to have it.
            del error, raised

    def describe(
        self,
        error: ControlFailure,
        request: str,
        peer_id: PeerIDLike | None = None,
        protocol: str | None = None,
    ) -> Exception:
        """What is raised for ``error``, which says what it was about."""
        precise = _precise(error)
        if not (isinstance(precise, NotSupported) and precise.request):  # of what it needed first
            precise.request = request
        precise.peer_id = None if peer_id is None else PeerID(peer_id)
        precise.protocol = protocol
        return self.types.error(precise)


async def _first_result(connection: Connection) -> tuple[Any, ...]:
    while (result := connection.raw.next_value()) is None:
        await connection.watch.readable()
    return result


def _unreachable(error: OSError, maddr: Multiaddr, path: str | None) -> DaemonUnreachable:
    message = f"no connection to the daemon's control socket at {maddr}: {error}"
    hint = _hint(error, maddr)
    text = f"{message}; {hint}" if hint else message
    unreachable = from_os_error(DaemonUnreachable, text, error, path)
    unreachable._without_hint = message
    return unreachable


def _hint(error: OSError, maddr: Multiaddr) -> str | None:
    """Suggests a fix for a failed connection to a control socket."""
    if error.errno == errno.ENOENT:
        return "start a daemon with p2pclient_rs.Daemon(), or pass another control_maddr"
    if error.errno == errno.ECONNREFUSED:
        if str(maddr).startswith("/unix"):
            return "nothing listens at this file: start the daemon again"
        return "no daemon listens there: start one, or pass another control_maddr"
    if error.errno == errno.EACCES:
        return (
            "this user may not connect to it: check the permissions of the socket and of its "
            "directories"
        )
    return None


def _precise(error: ControlFailure) -> ControlFailure:
    """The subclass that the daemon's words call for."""
    words = error.daemon_message
    if isinstance(error, DaemonRefused) and words is not None:
        kind = refusal_kind(words)
        if kind == "not supported":
            return NotSupported(str(error.args[0]), daemon_message=words)
        if kind == "timed out":
            return ControlTimeout("the daemon gave up", daemon_message=words)
    return error


async def resolve(maddr: Multiaddr) -> list[str | tuple[str, int]]:
    """The addresses of sockets that a control or listen address stands for."""
    kind, host, port = endpoint(maddr)
    if kind == "unix":
        return [host]
    if kind in ("ip4", "ip6"):
        return [(host, port)]
    import socket

    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    found = await anyio.getaddrinfo(
        host, port, family=families.get(kind, 0), type=socket.SOCK_STREAM
    )
    return list(dict.fromkeys((str(address[0]), port) for *_, address in found))
