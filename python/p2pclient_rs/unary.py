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
from p2pclient_rs.exceptions import ConnectionLost, ControlFailure, P2PHandlerError
from p2pclient_rs.incoming_calls import UnaryHandler
from p2pclient_rs.loops import UnlessClosed, current_loop, is_current
from p2pclient_rs.persistent import Session, Settings, timed_out

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

#: How many calls of peers may be in progress before no more are read.
DEFAULT_MAX_UNANSWERED = 4096
#: How many bytes their payloads may have.
DEFAULT_MAX_UNANSWERED_BYTES = 64 << 20
#: How long reading may pause for that, in seconds.
DEFAULT_HOLD = 5.0

#: No message is larger, in bytes: it is protobuf's own limit.
MAX_PROTOBUF_SIZE = 2**31 - 1


class UnaryClient:
    """Unary calls, for daemons that have them: hivemind's.

    All calls, in both directions, share one persistent connection to the daemon, which the first of
    them opens. When it is lost, everything that waits for it fails at once, handlers at work are
    cancelled, and the next call opens another one and registers the handlers again; if there are
    handlers, that is tried without a call, too, until the daemon is there again. hivemind's daemon
    ends when its last persistent connection is closed.

    Calls of peers are bounded: when ``max_unanswered`` of them, or ``max_unanswered_bytes``, are in
    progress, no more are read for up to ``hold`` seconds, so that the peers wait. After that the
    calls over the bound are answered with an error. While a call of ours is under way, on which a
    handler may depend, reading goes on, and calls over four times the bound are refused.

    Every ``timeout`` is in seconds. All raise subclasses of ``ControlFailure``. The limits are
    attributes, too, and can be set at any time: new values apply from the next message on.

    Args:
        daemon_connector: The way to the daemon. Set later, it is used for the next persistent
            connection.
        max_message_size: The largest message to send, in bytes: the payload, the handler's name
            and less than 100 bytes more. It must not exceed the daemon's
            ``-persistentConnMaxMsgSize``. None takes the daemon's limit if it can be found out when
            the connection is opened (see ``p2pclient_rs.daemon_limit``), and 4 MiB otherwise; the
            attribute then gives the limit in effect.
        max_incoming_size: The largest message to receive, in bytes. A larger one is skipped: a
            reply raises ``MessageTooLarge``, a peer's call is answered with an error. None is
            ``max_message_size`` and 64 KiB.
        max_unanswered: How many calls of peers may be in progress; None for any number.
        max_unanswered_bytes: How many bytes their payloads may have; None for any number.
        hold: How long reading may pause because of these two, in seconds; None for as long as
            they are exceeded, during which neither cancels nor the connection's end are seen.
        handlers: A table of handlers to read at each call, and to keep up to date; None for one
            of its own for each event loop.

    Raises:
        ValueError: A limit is negative or no number.

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
        #: By event loop.
        self._sessions: dict[Any, Session] = {}
        #: The last one used, and its asyncio loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recent: Session | None = None
        self.max_message_size = max_message_size
        self.max_incoming_size = max_incoming_size
        self.max_unanswered = max_unanswered
        self.max_unanswered_bytes = max_unanswered_bytes
        self.hold = hold

    @property
    def daemon_connector(self) -> DaemonConnector:
        """The way to the daemon. Set later, it is used for the next persistent connection; one that
        is open stays."""
        return self._settings.connector

    @daemon_connector.setter
    def daemon_connector(self, connector: DaemonConnector) -> None:
        self._settings.connector = connector

    @property
    def max_message_size(self) -> int:
        """The largest message to send, in bytes: the value that was set, or the daemon's."""
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
        """How many calls of peers may be in progress."""
        return self._settings.max_unanswered

    @max_unanswered.setter
    def max_unanswered(self, count: int | None) -> None:
        self._settings.max_unanswered = _limit("max_unanswered", count)
        self._apply()

    @property
    def max_unanswered_bytes(self) -> int | None:
        """How many bytes the payloads of calls in progress may have."""
        return self._settings.max_unanswered_bytes

    @max_unanswered_bytes.setter
    def max_unanswered_bytes(self, size: int | None) -> None:
        self._settings.max_unanswered_bytes = _limit("max_unanswered_bytes", size)
        self._apply()

    @property
    def hold(self) -> float | None:
        """How long reading may pause because of too many calls, in seconds."""
        return self._settings.hold

    @hold.setter
    def hold(self, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:  # NaN, too
            raise ValueError(f"hold is a number of seconds from 0 on, or None, not {seconds}")
        self._settings.hold = None if seconds == math.inf else seconds
        self._apply()

    def _apply(self) -> None:
        """Tells the open connections of limits that changed."""
        for session in list(self._sessions.values()):
            session.apply_limits()

    async def open(self, *, timeout: float | None = None) -> None:
        """Opens the persistent connection, if it is not open.

        Raises:
            NotSupported: The daemon is not hivemind's.
            DaemonUnreachable: There is no daemon.
        """
        session = self._session()
        with _deadline(timeout):
            await session.connect()
            return
        raise self.daemon_connector.describe(timed_out(timeout), "PERSISTENT_CONN_UPGRADE")

    async def register_again(self) -> None:
        """Opens the persistent connection, if it is not open and there are handlers to be called
        over it: for a daemon that was started anew."""
        session = self._sessions.get(current_loop())
        if session is not None and session.serves:
            await self.open()

    async def call(
        self, peer_id: PeerIDLike, proto: str, data: Buffer, *, timeout: float | None = None
    ) -> bytes:
        """Calls a peer's handler and returns its reply.

        Cancelling it, or running out of time, cancels the handler.

        Args:
            peer_id: The peer, to which the daemon must be connected or know the way.
            proto: The handler's name.
            data: What the handler gets.

        Raises:
            P2PHandlerError: The handler failed, or there is none of that name.
            DaemonRefused: The peer cannot be reached, or does not serve calls of that name.
            MessageTooLarge: The request exceeds ``max_message_size``, and was not sent, or the
                reply exceeds ``max_incoming_size``.
            ConnectionLost: The connection to the daemon ended before the reply.
            ControlTimeout: No reply within ``timeout`` seconds.
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
                # Cancelled, most likely: whoever answered has no call to be given up.
                connection.cancel(call_id)
                raise
            finally:
                del called, reply  # which has the exception, whose traceback has this frame
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
            # Not what a subclass has put in its place, which may have brought the timeout.
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
        """Serves the peers' calls of a handler, from now until ``remove_handler`` or ``close``.

        Each call runs in a task of its own, in a copy of the context of the call to this method,
        and is cancelled if the caller is gone. On trio that is a system task.

        Args:
            proto: The handler's name.
            handler: An async function of a request and the caller's peer id, which returns the
                reply, any buffer of bytes. What it raises reaches the caller as its ``repr``.
            balanced: Whether several clients may serve the name in turn.

        Raises:
            ControlFailure: This client serves the name already.
            DaemonRefused: Another client does.
        """
        session = self._session()
        try:
            with _deadline(timeout):
                await session.add_handler(proto, handler, balanced=balanced, context=copy_context())
                return
            raise timed_out(timeout)
        except ControlFailure as error:
            raise self.daemon_connector.describe(
                error, "ADD_UNARY_HANDLER", protocol=proto
            ) from error.__cause__

    async def remove_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Takes back ``add_handler``. Calls at work are finished.

        Raises:
            ControlFailure: This client does not serve the name.
        """
        session = self._session()
        try:
            with _deadline(timeout):
                await session.remove_handler(proto)
                return
            raise timed_out(timeout)
        except ControlFailure as error:
            raise self.daemon_connector.describe(
                error, "REMOVE_UNARY_HANDLER", protocol=proto
            ) from error.__cause__

    def close(self) -> None:
        """Closes the persistent connection, fails what waits for it, cancels the handlers at work
        and forgets all handlers. A later call opens another connection.

        In a forked child only the descriptor is closed.
        """
        self._recent = self._loop = None
        for session in list(self._sessions.values()):
            session.close()
        self._sessions.clear()

    @property
    def handlers(self) -> Mapping[str, UnaryHandler]:
        """The handlers by name, of whichever event loop. A copy, which cannot be changed: see
        ``add_handler`` and ``remove_handler``."""
        sessions = list(self._sessions.values())
        return MappingProxyType({name: h for s in sessions for name, h in s.handlers.items()})

    def _use_table(self, table: MutableMapping[str, UnaryHandler]) -> None:
        """Reads the handlers from another table from now on."""
        self._table = table
        for session in list(self._sessions.values()):
            session.handlers = table

    @property
    def connected(self) -> bool:
        """Whether the persistent connection is open."""
        return any(s.current is not None for s in self._sessions.values())

    @property
    def pending_calls(self) -> int:
        """How many calls, and changes of handlers, wait for their answers."""
        return sum(s.pending for s in self._sessions.values())

    @property
    def unanswered_calls(self) -> int:
        """How many calls of peers are at work here."""
        return sum(s.unanswered for s in self._sessions.values())

    def _session(self) -> Session:
        """This loop's."""
        loop = current_loop()
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
    if not limit >= 0:  # NaN, too
        raise ValueError(f"{name} is a number from 0 on, or None, not {limit}")
    # What fits nowhere is no limit.
    return int(min(limit, sys.maxsize))


def _deadline(timeout: float | None) -> UnlessClosed[anyio.CancelScope]:
    if timeout is not None and not timeout >= 0:  # NaN, too
        raise ValueError(f"a timeout is a number of seconds from 0 on, not {timeout}")
    return UnlessClosed(anyio.move_on_after(timeout))
