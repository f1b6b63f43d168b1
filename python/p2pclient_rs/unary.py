"""Unary calls: requests to a peer's handlers and their replies, over a persistent connection."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, MutableMapping
from contextvars import copy_context
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import anyio

from p2pclient_rs._native import PeerID, may_retry
from p2pclient_rs.connector import DaemonConnector, PeerIDLike
from p2pclient_rs.daemon_limit import DEFAULT_MAX_MESSAGE_SIZE
from p2pclient_rs.exceptions import ConnectionLost, ControlFailure, P2PHandlerError, timed_out
from p2pclient_rs.incoming_calls import UnaryHandler
from p2pclient_rs.loops import UnlessClosed, current_loop, is_current
from p2pclient_rs.persistent import Session, Settings

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "DEFAULT_HOLD",
    "DEFAULT_MAX_MESSAGE_SIZE",
    "DEFAULT_MAX_UNANSWERED",
    "DEFAULT_MAX_UNANSWERED_BYTES",
    "UnaryClient",
    "UnaryHandler",
]

#: Default number of incoming calls in progress above which no more are read.
DEFAULT_MAX_UNANSWERED = 4096
#: Default total size of their payloads above which no more are read, in bytes.
DEFAULT_MAX_UNANSWERED_BYTES = 64 << 20
#: Default time for which reading may pause because of these two limits, in seconds.
DEFAULT_HOLD = 5.0

#: Protobuf's limit on the size of a message, in bytes.
MAX_PROTOBUF_SIZE = 2**31 - 1


class UnaryClient:
    """Unary calls. Only hivemind's daemon supports them.

    All calls, in both directions, share one persistent connection to the daemon. The first call or
    the first handler opens it. When it is lost, all pending calls fail and all handlers that are
    running are cancelled. The next call opens a new connection and registers the handlers again. A
    client with handlers also reconnects by itself, with exponential backoff. hivemind's daemon
    exits when its last persistent connection is closed.

    Incoming calls are limited: while ``max_unanswered`` of them, or ``max_unanswered_bytes``, are
    in progress, the client stops reading for up to ``hold`` seconds, so that the peers wait. After
    that it answers further calls with an error. While a call of its own is pending, on which a
    handler may depend, the client continues to read, and refuses incoming calls over four times the
    limit.

    Every ``timeout`` is in seconds. All errors are subclasses of ``ControlFailure``. The limits are
    also attributes; a new value applies from the next message on.

    Args:
        daemon_connector: Opens the persistent connection. A new value is used for the next
            connection.
        max_message_size: The largest message to send, in bytes: the payload, the handler's name
            and less than 100 bytes more. It must not exceed the daemon's
            ``-persistentConnMaxMsgSize``. None means the daemon's limit if the client can determine
            it when it connects (see ``p2pclient_rs.daemon_limit``), and 4 MiB otherwise; the
            attribute then gives the limit in effect.
        max_incoming_size: The largest message to receive, in bytes. Larger ones are skipped: a
            reply raises ``MessageTooLarge``, an incoming call is answered with an error. If None,
            64 KiB more than ``max_message_size``.
        max_unanswered: Number of incoming calls in progress above which the client stops reading;
            None for no limit.
        max_unanswered_bytes: Size of their payloads above which it does so; None for no limit.
        hold: How long it stops reading, in seconds; None for as long as a limit is exceeded. While
            it does not read, it notices neither cancels nor a lost connection.
        handlers: A table of handlers by name, which the client reads at each call and keeps up to
            date. None for one table per event loop.

    Raises:
        ValueError: A limit is negative or not a number.

    Example:
        async def double(request: bytes, caller: PeerID) -> bytes:
            return 2 * request

        await client.unary.add_handler("double", double)
        reply = await client.unary.call(peer_id, "square", b"12", timeout=5)
        await client.unary.remove_handler("double")
    """

    def __init__(
        self,
        daemon_connector: DaemonConnector,
        *,
        max_message_size: int | None = None,
        max_incoming_size: int | None = None,
        max_unanswered: int | None = DEFAULT_MAX_UNANSWERED,
        max_unanswered_bytes: int | None = DEFAULT_MAX_UNANSWERED_BYTES,
        hold: float | None = DEFAULT_HOLD,
        handlers: MutableMapping[str, UnaryHandler] | None = None,
    ) -> None:
        self._settings = Settings(daemon_connector)
        self._table = handlers
        #: One session per event loop.
        self._sessions: dict[Any, Session] = {}
        #: The most recently used session, and its asyncio loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recent: Session | None = None
        self.max_message_size = max_message_size
        self.max_incoming_size = max_incoming_size
        self.max_unanswered = max_unanswered
        self.max_unanswered_bytes = max_unanswered_bytes
        self.hold = hold

    @property
    def daemon_connector(self) -> DaemonConnector:
        """Opens the persistent connection. A new value is used for the next connection; an open one
        stays."""
        return self._settings.connector

    @daemon_connector.setter
    def daemon_connector(self, connector: DaemonConnector) -> None:
        self._settings.connector = connector

    @property
    def max_message_size(self) -> int:
        """The largest message to send, in bytes: the value set, or the daemon's limit."""
        return self._settings.largest

    @max_message_size.setter
    def max_message_size(self, size: int | None) -> None:
        self._settings.max_message_size = _limit("max_message_size", size)
        self._apply()

    @property
    def max_incoming_size(self) -> int | None:
        """The largest message to receive, in bytes."""
        return self._settings.max_incoming_size

    @max_incoming_size.setter
    def max_incoming_size(self, size: int | None) -> None:
        self._settings.max_incoming_size = _limit("max_incoming_size", size)
        self._apply()

    @property
    def max_unanswered(self) -> int | None:
        """Number of incoming calls in progress above which the client stops reading."""
        return self._settings.max_unanswered

    @max_unanswered.setter
    def max_unanswered(self, count: int | None) -> None:
        self._settings.max_unanswered = _limit("max_unanswered", count)
        self._apply()

    @property
    def max_unanswered_bytes(self) -> int | None:
        """Size of their payloads above which the client stops reading, in bytes."""
        return self._settings.max_unanswered_bytes

    @max_unanswered_bytes.setter
    def max_unanswered_bytes(self, size: int | None) -> None:
        self._settings.max_unanswered_bytes = _limit("max_unanswered_bytes", size)
        self._apply()

    @property
    def hold(self) -> float | None:
        """How long the client stops reading because of these limits, in seconds."""
        return self._settings.hold

    @hold.setter
    def hold(self, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:  # also rejects NaN
            raise ValueError(f"hold must be None or a number of seconds from 0 on, not {seconds}")
        self._settings.hold = None if seconds == math.inf else seconds
        self._apply()

    def _apply(self) -> None:
        """Applies changed limits to the open connections."""
        for session in list(self._sessions.values()):
            session.apply_limits()

    async def open(self, *, timeout: float | None = None) -> None:
        """Opens the persistent connection, unless it is open.

        Raises:
            NotSupported: The daemon is not hivemind's.
            DaemonUnreachable: No daemon listens at the control address.
        """
        session = self._session()
        with _deadline(timeout):
            await session.connect()
            return
        raise self.daemon_connector.describe(timed_out(timeout), "PERSISTENT_CONN_UPGRADE")

    async def register_again(self) -> None:
        """Opens the persistent connection after a restart of the daemon, if there are handlers and
        it is not open."""
        session = self._sessions.get(current_loop())
        if session is not None and session.serves:
            await self.open()

    async def call(
        self, peer_id: PeerIDLike, proto: str, data: Buffer, *, timeout: float | None = None
    ) -> bytes:
        """Calls a peer's handler and returns its reply.

        If the call is cancelled or times out, the handler is cancelled.

        Args:
            peer_id: The peer. The daemon must be connected to it or know its address.
            proto: Name of the handler.
            data: The request, any buffer of bytes.

        Raises:
            P2PHandlerError: The handler failed, or the peer's client has no handler of that name.
            DaemonRefused: The peer is not reachable, or none of its clients serves that name.
            MessageTooLarge: The request exceeds ``max_message_size``, and was not sent; or the
                reply exceeds ``max_incoming_size``.
            ConnectionLost: The connection to the daemon was lost before the reply arrived.
            ControlTimeout: No reply arrived within ``timeout`` seconds.
        """
        if timeout is not None:
            return await self._call_within(timeout, peer_id, proto, data)
        # Fast path: no lookup of the running loop.
        session = self._recent
        connection = None if session is None else session.current
        if session is None or not (
            (connection is not None and connection.in_wake_batch) or is_current(self._loop)
        ):
            session = self._session()
            connection = session.current
        try:
            called, repeated = None, False
            if connection is not None:
                try:
                    called = connection.call(peer_id, proto, data)
                except ConnectionLost as error:
                    if not may_retry(True, False, error.unexecuted):
                        raise
                    repeated = True
            if connection is None or called is None:
                connection, called = await session.call(peer_id, proto, data, repeated)
            reply, call_id = called
            try:
                return await reply
            except BaseException:
                # Does nothing if the call has failed.
                connection.cancel(call_id)
                raise
            finally:
                del called, reply  # breaks a reference cycle through the exception's traceback
        except ControlFailure as error:
            self.daemon_connector.raise_described(error, "CALL_UNARY", peer_id, proto)
        except P2PHandlerError as error:
            error.peer_id, error.protocol = PeerID(peer_id), proto
            converted = self.daemon_connector.types.error(error)
            try:
                if converted is error:
                    raise
                raise converted from None
            finally:
                del converted

    async def _call_within(
        self, timeout: float, peer_id: PeerIDLike, proto: str, data: Buffer
    ) -> bytes:
        with _deadline(timeout):
            # Not self.call: a subclass may have overridden it to set a timeout.
            return await UnaryClient.call(self, peer_id, proto, data)
        raise self.daemon_connector.describe(timed_out(timeout), "CALL_UNARY", peer_id, proto)

    async def add_handler(
        self,
        proto: str,
        handler: UnaryHandler,
        *,
        balanced: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Registers a handler for incoming calls, until ``remove_handler`` or ``close``.

        Each call runs in a task of its own, in a copy of the context in which ``add_handler`` was
        called; on trio, in a system task. The task is cancelled if the caller is gone. Cancelling
        ``add_handler`` undoes the registration.

        Args:
            proto: Name of the handler.
            handler: An async function that gets the request and the caller's peer id, and returns
                the reply, any buffer of bytes. If it raises an exception, the caller gets the
                ``repr``.
            balanced: Whether several clients may serve the name. The daemon then gives each of them
                a call in turn.

        Raises:
            AlreadyRegistered: This client already has a handler of that name, or another client
                has one. The latter is also a DaemonRefused.
        """
        adding = self._session().add_handler(
            proto, handler, balanced=balanced, context=copy_context()
        )
        await self.daemon_connector.described(adding, "ADD_UNARY_HANDLER", timeout, protocol=proto)

    async def remove_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Removes a handler. Calls in progress continue.

        Raises:
            NotRegistered: This client has no handler of that name.
        """
        removing = self._session().remove_handler(proto)
        await self.daemon_connector.described(
            removing, "REMOVE_UNARY_HANDLER", timeout, protocol=proto
        )

    def close(self) -> None:
        """Closes the persistent connection and drops all handlers. Pending calls fail, and running
        handlers are cancelled. A later call opens a new connection.

        In a forked child this only closes the descriptor.
        """
        self._recent = self._loop = None
        for session in list(self._sessions.values()):
            session.close()
        self._sessions.clear()

    @property
    def handlers(self) -> Mapping[str, UnaryHandler]:
        """The handlers of all event loops by name, as a read-only copy."""
        sessions = list(self._sessions.values())
        return MappingProxyType({name: h for s in sessions for name, h in s.handlers.items()})

    def _use_table(self, table: MutableMapping[str, UnaryHandler]) -> None:
        """Replaces the table of handlers."""
        self._table = table
        for session in list(self._sessions.values()):
            session.handlers = table

    @property
    def connected(self) -> bool:
        """Whether the persistent connection is open."""
        return any(s.current is not None for s in self._sessions.values())

    @property
    def pending_calls(self) -> int:
        """Number of calls, and of requests to add or remove a handler, without a reply."""
        return sum(s.pending for s in self._sessions.values())

    @property
    def unanswered_calls(self) -> int:
        """Number of incoming calls in progress."""
        return sum(s.unanswered for s in self._sessions.values())

    def _session(self) -> Session:
        """Returns the session of the running event loop."""
        loop = self.daemon_connector.current_loop()
        session = self._sessions.get(loop)
        if session is None:
            for other, used in list(self._sessions.items()):
                if used.ended:
                    del self._sessions[other]
                    used.close()
            table = {} if self._table is None else self._table
            session = self._sessions[loop] = Session(self._settings, table)
        if isinstance(loop, asyncio.AbstractEventLoop):
            self._loop, self._recent = loop, session
        return session


def _limit(name: str, limit: int | None) -> int | None:
    if limit is None:
        return None
    if not limit >= 0:  # also rejects NaN
        raise ValueError(f"{name} must be None or a number from 0 on, not {limit}")
    # The native code does not accept larger numbers.
    return int(min(limit, sys.maxsize))


def _deadline(timeout: float | None) -> UnlessClosed[anyio.CancelScope]:
    if timeout is not None and not timeout >= 0:  # also rejects NaN
        raise ValueError(f"a timeout is a number of seconds from 0 on, not {timeout}")
    return UnlessClosed(anyio.move_on_after(timeout))
