"""Unary calls: requests to a peer's handlers and their replies, over a persistent connection."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import os
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextvars import Context, copy_context
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from p2pclient_rs import daemon_limit
from p2pclient_rs._native import PeerID, PersistentConnection
from p2pclient_rs.connector import DaemonConnector, PeerIDLike, UnaryLimits
from p2pclient_rs.daemon_limit import DEFAULT_MAX_MESSAGE_SIZE
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonRefused,
    ForkedClientError,
    P2PHandlerError,
)
from p2pclient_rs.loops import (
    Promise,
    UnlessClosed,
    UnlessClosedAsync,
    Work,
    current_loop,
    is_current,
    reactor,
)

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

#: What is called for an incoming call, in a task of its own, with the request and the caller's
#: peer id. What it returns is the reply.
UnaryHandler: TypeAlias = Callable[[bytes, PeerID], Awaitable["Buffer"]]

#: How long the opening of the connection may take, in seconds, whoever waits for it.
_OPENING = 30.0

#: How long the daemon may take to see that a lost connection ended, in seconds.
_FORGETTING = 1.0

#: The pauses between the attempts to serve again when the connection was lost, in seconds: the
#: first, and the longest, from one to the other doubling.
_PAUSES = 0.05, 5.0

#: How many callers are remembered as the objects that handlers get.
_MAX_PEERS = 4096

logger: logging.Logger = logging.getLogger(__name__)


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
        self._settings = _Settings(daemon_connector)
        self._table = handlers
        #: By event loop.
        self._links: dict[Any, _Link] = {}
        #: The last one used, and its asyncio loop.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._recent: _Link | None = None
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
        for link in list(self._links.values()):
            link.apply_limits()

    async def open(self, *, timeout: float | None = None) -> None:
        """Opens the persistent connection, if it is not open.

        Raises:
            NotSupported: The daemon is not hivemind's.
            DaemonUnreachable: There is no daemon.
        """
        link = self._link()
        with _deadline(timeout):
            await link.connection()
            return
        raise self.daemon_connector.describe(_timed_out(timeout), "PERSISTENT_CONN_UPGRADE")

    async def register_again(self) -> None:
        """Opens the persistent connection, if it is not open and there are handlers to be called
        over it: for a daemon that was started anew."""
        link = self._links.get(current_loop())
        if link is not None and link.serves():
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
        # What comes here often is to go a short way.
        link = self._recent
        connection = None if link is None else link.current
        if link is None or not (
            (connection is not None and connection.in_turn) or is_current(self._loop)
        ):
            link = self._link()
            connection = link.current
        try:
            called = None
            if connection is not None:
                try:
                    called = connection.call(peer_id, proto, data)
                except ConnectionLost as error:
                    # The daemon may be there again, and cannot have seen this call.
                    if not error.unexecuted:
                        raise
            if connection is None or called is None:
                connection, called = await link.call(peer_id, proto, data)
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
        raise self.daemon_connector.describe(_timed_out(timeout), "CALL_UNARY", peer_id, proto)

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
        link = self._link()
        try:
            with _deadline(timeout):
                await link.add_handler(proto, handler, _Registration(balanced, copy_context()))
                return
            raise _timed_out(timeout)
        except ControlFailure as error:
            raise self.daemon_connector.describe(
                error, "ADD_UNARY_HANDLER", protocol=proto
            ) from error.__cause__

    async def remove_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Takes back ``add_handler``. Calls at work are finished.

        Raises:
            ControlFailure: This client does not serve the name.
        """
        link = self._link()
        try:
            with _deadline(timeout):
                await link.remove_handler(proto)
                return
            raise _timed_out(timeout)
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
        for link in list(self._links.values()):
            link.close()
        self._links.clear()

    @property
    def handlers(self) -> Mapping[str, UnaryHandler]:
        """The handlers by name, of whichever event loop. A copy, which cannot be changed: see
        ``add_handler`` and ``remove_handler``."""
        links = list(self._links.values())
        return MappingProxyType({name: h for link in links for name, h in link.handlers.items()})

    def _use_table(self, table: MutableMapping[str, UnaryHandler]) -> None:
        """Reads the handlers from another table from now on."""
        self._table = table
        for link in list(self._links.values()):
            link.handlers = table

    @property
    def connected(self) -> bool:
        """Whether the persistent connection is open."""
        return any(link.connected for link in self._links.values())

    @property
    def pending_calls(self) -> int:
        """How many calls, and changes of handlers, wait for their answers."""
        return sum(link.pending for link in self._links.values())

    @property
    def unanswered_calls(self) -> int:
        """How many calls of peers are at work here."""
        return sum(link.unanswered for link in self._links.values())

    def _link(self) -> _Link:
        """This loop's."""
        loop = current_loop()
        link = self._links.get(loop)
        if link is None:
            for other, used in list(self._links.items()):
                if used.ended:
                    del self._links[other]
                    used.close()
            table = {} if self._table is None else self._table
            link = self._links[loop] = _Link(self._settings, table)
        if isinstance(loop, asyncio.AbstractEventLoop):
            self._loop, self._recent = loop, link
        return link


@dataclass
class _Settings:
    """The settings of a client, which its links read."""

    connector: DaemonConnector
    max_message_size: int | None = None
    max_incoming_size: int | None = None
    max_unanswered: int | None = None
    max_unanswered_bytes: int | None = None
    hold: float | None = None
    #: The daemon's limit, in bytes, if it was found out.
    found: int | None = None
    #: The limit if it was not.
    fallback: int = DEFAULT_MAX_MESSAGE_SIZE
    #: The level of the log line about a lost connection.
    loss_level: int = logging.WARNING

    @property
    def largest(self) -> int:
        """The largest message to send, in bytes."""
        for size in (self.max_message_size, self.found):
            if size is not None:
                return size
        return self.fallback

    def find(self, fd: int) -> UnaryLimits:
        """The limits for a connection, on which the daemon's are looked for."""
        self.found = daemon_limit.find(fd, self.connector.control_maddr)
        return self.limits()

    def limits(self) -> UnaryLimits:
        return (
            self.largest,
            self.max_incoming_size,
            self.max_unanswered,
            self.max_unanswered_bytes,
            self.hold,
        )


@dataclass(frozen=True)
class _Registration:
    """A handler's registration with the daemon, and the context that its calls run in."""

    balanced: bool
    context: Context


@dataclass
class _Opening:
    """A persistent connection on its way, for all who wait for it."""

    ended: anyio.Event
    connection: PersistentConnection | None = None
    error: Exception | None = None
    work: Work | None = None

    def result(self) -> PersistentConnection:
        """What came of it, once it has ended."""
        if self.connection is not None and self.error is None:
            return self.connection
        failed = self.error or ConnectionLost("the opening of the connection was cancelled")
        # Each adds to it what it was about.
        raise copy.copy(failed) from failed.__cause__

    def give_up(self) -> None:
        """The client was closed."""
        self.error = ConnectionLost("the client was closed")
        if self.work is not None:
            self.work.cancel()
        # A task that never began does not do it.
        self.ended.set()


class _Link:
    """The persistent connection that belongs to one event loop, with what it serves."""

    def __init__(self, settings: _Settings, handlers: MutableMapping[str, UnaryHandler]) -> None:
        self._settings = settings
        self._reactor = reactor()
        self._promise = self._reactor.promise
        #: The connection, if it is open.
        self.current: PersistentConnection | None = None
        #: Held while what is registered changes, and while a connection is opened.
        self._changing = anyio.Lock()
        self._opening: _Opening | None = None
        self._return: Work | None = None
        self._closed = False
        self._pid = os.getpid()
        #: The handlers that are called. Others may change it.
        self.handlers = handlers
        #: The handlers that the daemon knows of.
        self.registered: dict[str, _Registration] = {}
        #: The context for handlers that others put into the table.
        self._context = copy_context()
        #: The names that the daemon is being told to forget, and who waits for that: it does not
        #: keep the order of what it is told.
        self._leaving: dict[str, anyio.Event] = {}
        #: The incoming calls at work on the present connection.
        self._work: dict[bytes, Work | None] = {}
        self._peers: dict[bytes, Any] = {}

    # --- out ---

    async def call(
        self, peer_id: PeerIDLike, proto: str, data: Buffer
    ) -> tuple[PersistentConnection, tuple[Awaitable[bytes], bytes]]:
        """Makes a call, once there is a connection and room; gives what to await for the reply, and
        the call's id."""
        retried = False
        while True:
            connection = await self.connection()
            try:
                called = connection.call(peer_id, proto, data)
            except ConnectionLost as error:
                # As in `UnaryClient.call`.
                if retried or not error.unexecuted:
                    raise
                retried = True
                continue
            if called is not None:
                return connection, called
            await self._room(connection)

    async def add_handler(
        self, proto: str, handler: UnaryHandler, registration: _Registration
    ) -> None:
        retried = False
        while True:
            connection = await self.connection()
            async with UnlessClosedAsync(self._changing):
                connection = self.current or connection  # lost while others had their turn
                if proto in self.registered and proto not in self.handlers:
                    # Taken out of the table by others.
                    self._leave(proto, connection)
                while (leaving := self._leaving.get(proto)) is not None:
                    await leaving.wait()
                if proto in self.handlers:
                    raise ControlFailure(f"Handler for protocol {proto} already registered")
                # In place before the daemon has it: a call can come sooner than its answer.
                self.handlers[proto] = handler
                self.registered[proto] = registration
                try:
                    await self._register(connection, proto, registration)
                    return
                except BaseException as error:
                    self._forget(proto)
                    # As in `call`.
                    if retried or not isinstance(error, ConnectionLost) or not error.unexecuted:
                        raise
                    retried = True

    async def remove_handler(self, proto: str) -> None:
        self._settings.connector.check_fork()
        async with UnlessClosedAsync(self._changing):
            if proto not in self.handlers:
                raise ControlFailure(f"Handler for protocol {proto} is not registered")
            left = self._leave(proto, self.current)
            try:
                # It serves the calls that come until then.
                await left.wait()
            finally:
                self._forget(proto)

    def _forget(self, proto: str) -> None:
        self.handlers.pop(proto, None)
        self.registered.pop(proto, None)

    def serves(self) -> bool:
        """Whether there are handlers for the daemon to know of."""
        return any(proto in self.handlers for proto in self.registered)

    def apply_limits(self) -> None:
        """Tells the connection of the limits, which have changed."""
        connection = self.current
        if connection is not None and os.getpid() == self._pid:
            limits = self._settings.limits()
            self._reactor.call_from_anywhere(lambda: connection.set_limits(limits))

    async def connection(self) -> PersistentConnection:
        """The connection, opened and with all handlers registered."""
        self._settings.connector.check_fork()  # whose lock the parent may hold
        if self.current is not None:
            return self.current
        if self._closed:
            raise ConnectionLost("the client was closed")
        opening = self._opening
        if opening is None:
            opening = self._opening = _Opening(anyio.Event())
            opening.work = self._spawn(self._open(opening))
            # A task that never began does not do it.
            self._reactor.when_ended(opening.work, lambda: self._opened(opening))
        await opening.ended.wait()
        return opening.result()

    async def _open(self, opening: _Opening) -> None:
        """Opens the connection, in a task of its own: to give it up in the middle of its upgrade
        would end hivemind's daemon if it has no other, and is no business of whoever waits."""
        try:
            with _deadline(_OPENING):
                async with UnlessClosedAsync(self._changing):
                    opening.connection = await self._open_and_register()
            if opening.connection is None:
                raise _timed_out(_OPENING)
        except Exception as error:
            opening.error = error
            cause: BaseException | None = error
            while cause is not None:
                # It would hold this frame, which holds the error.
                cause = cause.with_traceback(None).__cause__ or cause.__context__
        finally:
            self._opened(opening)

    def _opened(self, opening: _Opening) -> None:
        if self._opening is opening:
            self._opening = None
        opening.ended.set()

    async def _open_and_register(self) -> PersistentConnection:
        self._work = {}
        opened = await self._settings.connector.open_persistent_connection(
            self._settings.find, self._reactor, weakref.ref(self)
        )
        # They may have been set since they were looked at.
        opened.set_limits(self._settings.limits())
        # The daemon may not have seen yet that our last connection ended.
        give_up = time.monotonic() + _FORGETTING
        try:
            for proto, registration in list(self.registered.items()):
                if proto not in self.handlers:  # taken out of the table by others
                    self._forget(proto)
                    continue
                try:
                    await self._register_again(opened, proto, registration, give_up)
                except DaemonRefused as error:
                    # Taken by another client meanwhile: no reason to do without the rest.
                    logger.error("lost the handler of %r: %s", proto, error.daemon_message)
                    self._forget(proto)
        except BaseException:
            opened.close()
            raise
        if self._closed:  # at the last moment
            opened.close()
        elif opened.closed:  # which `on_lost` was told of before this was anybody's
            raise ConnectionLost("the connection was lost as soon as it was opened")
        else:
            self.current = opened
        return opened

    async def _register_again(
        self,
        connection: PersistentConnection,
        proto: str,
        registration: _Registration,
        give_up: float,
    ) -> None:
        while True:
            try:
                return await self._register(connection, proto, registration)
            except DaemonRefused:
                if time.monotonic() > give_up:
                    raise
            await anyio.sleep(0.02)

    async def _register(
        self, connection: PersistentConnection, proto: str, registration: _Registration
    ) -> None:
        promise = self._promise()
        answer = _Answer(promise)
        connection.add_handler(proto, registration.balanced, answer)
        try:
            await promise
        except BaseException:
            # Cancelled: the daemon has, or is about to have, a handler that nobody is going to
            # know of. Asking it to forget that now could overtake the request.
            if answer.result:
                self._leave(proto, connection)
            elif answer.result is None:
                self._leaving[proto] = anyio.Event()
                answer.instead = lambda added: (
                    self._leave(proto, connection) if added else self._left(proto)
                )
            raise

    def _leave(self, proto: str, connection: PersistentConnection | None) -> anyio.Event:
        """Has the daemon forget a handler; says when it has, or that it had none."""
        left = self._leaving.setdefault(proto, anyio.Event())
        answer = _Answer(None)
        answer.instead = lambda _: self._left(proto)
        try:
            if connection is None:
                self._left(proto)
            else:
                connection.remove_handler(proto, answer)
        except ConnectionLost:  # and with it the registration
            self._left(proto)
        return left

    def _left(self, proto: str) -> None:
        left = self._leaving.pop(proto, None)
        if left is not None:
            left.set()

    async def _room(self, connection: PersistentConnection) -> None:
        """Waits until there is room for another call, one caller after the other."""
        promise = self._promise()
        if not connection.room(promise):
            try:
                await promise
            except BaseException:
                connection.pass_on(promise)
                raise

    # --- in: called back by the connection ---

    def on_call(
        self, connection: PersistentConnection, call_id: bytes, proto: str, peer: bytes, data: bytes
    ) -> None:
        if connection.closed:  # by what came before: this would be at work for nobody
            return
        handler = self.handlers.get(proto)
        if handler is None:
            connection.reply_error(call_id, f"no handler for the protocol {proto!r}")
            return
        registration, all_work = self.registered.get(proto), self._work
        try:
            caller = self._peers.get(peer)
            if caller is None:
                if len(self._peers) >= _MAX_PEERS:
                    self._peers.clear()
                caller = self._peers[peer] = self._settings.connector.types.peer_id(PeerID(peer))
            all_work[call_id] = None
            work = self._reactor.spawn(
                self._handle(connection, call_id, handler, data, caller, all_work),
                self._context if registration is None else registration.context,
            )
        except BaseException as error:
            all_work.pop(call_id, None)
            connection.reply_error(call_id, _repr(error))
            raise
        # Unless it has ended already.
        if call_id in all_work:
            all_work[call_id] = work
            if connection.closed:
                self._cancel(connection, call_id, all_work)

    def on_cancelled(self, connection: PersistentConnection, call_id: bytes) -> None:
        self._cancel(connection, call_id, self._work)

    def on_skipped(self, connection: PersistentConnection, reason: str) -> None:
        logger.warning("skipped a message of the daemon without a call id: %s", reason)

    def on_lost(self, connection: PersistentConnection, error: ControlFailure) -> None:
        if self.current is connection:
            self.current = None
        if not self._closed:
            words = "the persistent connection to the daemon was lost: %s"
            logger.log(self._settings.loss_level, words, error)
        all_work, self._work = self._work, {}
        for call_id in list(all_work):
            self._cancel(connection, call_id, all_work)
        if self._is_missed() and self._return is None and not self.ended:
            link = weakref.ref(self)  # a client that nobody holds any more serves nobody
            work = self._spawn(_come_back(link))
            self._return = work
            self._reactor.when_ended(work, lambda: _returned(link))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> Work:
        spawned = self._reactor.spawn(work, copy_context())
        # asyncio logs nothing if the loop ends before this task.
        if hasattr(spawned, "_log_destroy_pending"):
            spawned._log_destroy_pending = False
        return spawned

    def returned(self) -> None:
        """Its connection is there again, or nobody looks for it any more."""
        self._return = None

    def _is_missed(self) -> bool:
        """Whether there are handlers that nobody can call."""
        return self.current is None and not self._closed and self.serves()

    async def come_back(self) -> bool:
        """Tries to serve again; says whether to try it later."""
        if not self._is_missed():
            return False
        try:
            await self.connection()
        except ForkedClientError:
            return False
        except ControlFailure:
            # Not supported, even: so it seems where a daemon goes down, or comes up.
            pass
        return self._is_missed()

    def _cancel(
        self, connection: PersistentConnection, call_id: bytes, all_work: dict[bytes, Work | None]
    ) -> None:
        work = all_work.get(call_id)
        if work is None:
            return
        work.cancel()

        def ended() -> None:
            # A task that never began has not done it.
            if all_work.get(call_id) is work:
                del all_work[call_id]
                connection.reply_error(call_id, "cancelled")

        self._reactor.when_ended(work, ended)

    async def _handle(
        self,
        connection: PersistentConnection,
        call_id: bytes,
        handler: UnaryHandler,
        data: bytes,
        caller: Any,
        all_work: dict[bytes, Work | None],
    ) -> None:
        try:
            connection.reply(call_id, await handler(data, caller))
        except Exception as error:
            connection.reply_error(call_id, _repr(error))
        except BaseException as error:
            connection.reply_error(call_id, _repr(error))
            raise
        finally:
            all_work.pop(call_id, None)

    # --- its end ---

    @property
    def ended(self) -> bool:
        """Whether the event loop is no more."""
        return self._reactor.ended

    @property
    def connected(self) -> bool:
        return self.current is not None

    @property
    def opening(self) -> bool:
        return self._opening is not None

    @property
    def pending(self) -> int:
        return self.current.pending if self.current is not None else 0

    @property
    def unanswered(self) -> int:
        return self.current.unanswered if self.current is not None else 0

    def close(self) -> None:
        self._closed = True
        for proto in list(self.registered):
            self._forget(proto)
        connection, self.current = self.current, None
        if os.getpid() != self._pid:
            if connection is not None:
                connection.close()
            return
        if not self.ended:
            if self._return is not None:
                self._reactor.call_from_anywhere(self._return.cancel)
            if self._opening is not None:
                self._reactor.call_from_anywhere(self._opening.give_up)
        if connection is not None:
            self._reactor.call_from_anywhere(connection.close)

    def __del__(self) -> None:
        if getattr(self, "current", None) is not None:
            self.close()


async def _come_back(link: Callable[[], _Link | None]) -> None:
    pause, longest = _PAUSES
    try:
        while True:
            await anyio.sleep(pause)
            pause = min(2 * pause, longest)
            missed = link()
            if missed is None or not await missed.come_back():
                return
            del missed
    finally:
        _returned(link)


def _returned(link: Callable[[], _Link | None]) -> None:
    missed = link()
    if missed is not None:
        missed.returned()


class _Answer:
    """Takes the daemon's answer to other than a call, also when nobody awaits the promise of it any
    more."""

    def __init__(self, promise: Promise | None) -> None:
        self._promise = promise
        #: Whether it was a yes; None before it comes.
        self.result: bool | None = None
        #: What is called with that, if anything, and not the promise set.
        self.instead: Callable[[bool], object] | None = None

    def set_result(self, result: object) -> None:
        self.result = True
        if self.instead is not None:
            self.instead(True)
        elif self._promise is not None and not self._promise.done():
            self._promise.set_result(result)

    def set_exception(self, exception: object) -> None:
        self.result = False
        if self.instead is not None:
            self.instead(False)
        elif self._promise is not None and not self._promise.done():
            self._promise.set_exception(exception)

    def done(self) -> bool:
        return self.result is not None


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


def _repr(error: BaseException) -> str:
    try:
        # Lone surrogates cannot be sent.
        return repr(error).encode("utf-8", "backslashreplace").decode()
    except Exception:
        return f"<{type(error).__name__}>"


def _timed_out(timeout: float | None) -> ControlTimeout:
    return ControlTimeout(f"no answer within {timeout:g} s")
