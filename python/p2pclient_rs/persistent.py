"""The persistent connection of one event loop, with its handlers.

``Lifecycle`` makes the decisions. ``Session`` owns the connection, tasks and timers.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import time
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Context, copy_context
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from p2pclient_rs import daemon_limit
from p2pclient_rs._native import Lifecycle, PeerID, PersistentConnection, may_retry
from p2pclient_rs.connector import DaemonConnector, PeerIDLike, UnaryLimits
from p2pclient_rs.daemon_limit import DEFAULT_MAX_MESSAGE_SIZE
from p2pclient_rs.exceptions import (
    ConnectionLost,
    ControlFailure,
    NotRegistered,
    already_registered,
    timed_out,
)
from p2pclient_rs.incoming_calls import IncomingCalls, UnaryHandler
from p2pclient_rs.reactor import Future, Work, reactor, silence

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Session", "Settings"]

logger: logging.Logger = logging.getLogger("p2pclient_rs.unary")


@dataclass
class Settings:
    """The settings of a client, shared by its sessions."""

    connector: DaemonConnector
    max_message_size: int | None = None
    max_incoming_size: int | None = None
    max_unanswered: int | None = None
    max_unanswered_bytes: int | None = None
    hold: float | None = None
    #: The daemon's limit on messages, in bytes; None if unknown.
    found: int | None = None
    #: The limit on messages to use if the daemon's is unknown, in bytes.
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

    def peer_id(self, peer_id: PeerID) -> Any:
        """Converts a peer id to the type that handlers get."""
        return self.connector.types.peer_id(peer_id)

    def find(self, fd: int) -> UnaryLimits:
        """Determines the daemon's limit on messages, and returns the limits of a connection.

        Args:
            fd: The descriptor of that connection.
        """
        self.found = daemon_limit.find(fd, self.connector.control_maddr)
        return self.limits()

    def limits(self) -> UnaryLimits:
        """The limits of a connection."""
        return (
            self.largest,
            self.max_incoming_size,
            self.max_unanswered,
            self.max_unanswered_bytes,
            self.hold,
        )


@dataclass(frozen=True)
class _Addition:
    """A handler that is being added."""

    handler: UnaryHandler
    context: Context


@dataclass(frozen=True)
class _Operation:
    """A task that waits for the lifecycle."""

    promise: Future
    name: str | None = None
    addition: _Addition | None = None


class Session:
    """The persistent connection of one event loop, with its handlers.

    Args:
        settings: The client's settings.
        handlers: The handlers by name. Other code may change it.
    """

    def __init__(self, settings: Settings, handlers: MutableMapping[str, UnaryHandler]) -> None:
        self._settings = settings
        self._reactor = reactor()
        self._pid = os.getpid()
        self._lifecycle = Lifecycle(int.from_bytes(os.urandom(8), "big"))
        #: The connection, if it is ready for calls.
        self.current: PersistentConnection | None = None
        #: The id that the lifecycle has given to the connection, and the connection.
        self._connection: tuple[int, PersistentConnection] | None = None
        #: The task that opens a connection.
        self._opening: Work | None = None
        self._tokens = count()
        self._operations: dict[int, _Operation] = {}
        self._carrying_out = False
        #: Whether the session is closing a connection.
        self._closing = False
        #: Whether a registration is being sent.
        self._registering = False
        #: A loss of the connection to report after that.
        self._held_loss: ControlFailure | None = None
        #: The time at which the timer fires; None if it is not set.
        self._timer: float | None = None
        self._timer_handle: Work | None = None
        self.incoming: IncomingCalls = IncomingCalls(self._reactor, handlers, settings.peer_id)
        # The connection calls these callbacks.
        self.on_call: Callable[[PersistentConnection, bytes, str, bytes, bytes], None] = (
            self.incoming.on_call
        )
        self.on_cancelled: Callable[[PersistentConnection, bytes], None] = (
            self.incoming.on_cancelled
        )

    # --- operations ---

    async def connect(self) -> None:
        """Opens the connection and registers all handlers, unless it is open."""
        self._settings.connector.check_fork()
        if self.current is None:
            await self._operate(self._lifecycle.connect)

    async def call(
        self, peer_id: PeerIDLike, proto: str, data: Buffer, repeated: bool = False
    ) -> tuple[PersistentConnection, tuple[Awaitable[bytes], bytes]]:
        """Sends a call as soon as a connection is open and its output buffer has room.

        ``repeated`` means that this is the second attempt.

        Returns:
            The connection, the awaitable for the reply, and the call's id.
        """
        while True:
            await self.connect()
            connection = self.current
            try:
                if connection is None:
                    lost = ConnectionLost("the connection was lost as soon as it was opened")
                    lost.unexecuted = True
                    raise lost
                called = connection.call(peer_id, proto, data)
            except ConnectionLost as error:
                if not may_retry(True, repeated, error.unexecuted):
                    raise
                repeated = True
                continue
            if called is not None:
                return connection, called
            await self._room(connection)

    async def add_handler(
        self, proto: str, handler: UnaryHandler, *, balanced: bool, context: Context
    ) -> None:
        """Registers a handler with the daemon."""
        self._settings.connector.check_fork()
        if proto in self._lifecycle.handlers:
            self._drop_withdrawn()
        elif proto in self.handlers:  # added by other code
            raise _failure("already_registered", proto)
        addition = _Addition(handler, context)
        await self._operate(
            lambda token: self._lifecycle.add(token, proto, balanced), proto, addition
        )

    async def remove_handler(self, proto: str) -> None:
        """Unregisters a handler. It serves calls until the daemon acknowledges the removal."""
        self._settings.connector.check_fork()
        if proto not in self.handlers:
            raise _failure("not_registered", proto)
        if proto not in self._lifecycle.handlers:  # added by other code
            del self.handlers[proto]
            return
        await self._operate(lambda token: self._lifecycle.remove(token, proto), proto)

    async def _operate(
        self,
        begin: Callable[[int], None],
        name: str | None = None,
        addition: _Addition | None = None,
    ) -> None:
        """Begins an operation of the lifecycle and waits until it is complete."""
        token, promise = next(self._tokens), self._reactor.create_future()
        self._operations[token] = _Operation(promise, name, addition)
        try:
            begin(token)
            self._carry_out()
            await promise
        except BaseException:
            self._operations.pop(token, None)
            if os.getpid() == self._pid and not self.ended:
                # Does nothing if the operation has failed.
                self._lifecycle.cancel(token)
                self._carry_out()
            raise
        finally:
            del promise  # breaks a reference cycle through the exception's traceback

    async def _room(self, connection: PersistentConnection) -> None:
        """Waits until there is room for another call. Waiting callers continue in order."""
        promise = self._reactor.create_future()
        if not connection.has_room(promise):
            try:
                await promise
            except BaseException:
                connection.pass_on(promise)
                raise

    # --- actions of the lifecycle ---

    def _carry_out(self) -> None:
        """Carries out the lifecycle's actions, and sets its timer."""
        if self._carrying_out:  # called from within an action
            return
        self._carrying_out = True
        try:
            while (action := self._lifecycle.poll()) is not None:
                self._act(*action)
        finally:
            self._carrying_out = False
        self._set_timer()

    def _act(self, action: str, *arguments: Any) -> None:
        getattr(self, f"_do_{action}")(*arguments)

    def _do_open(self, connection_id: int) -> None:
        self._opening = work = self._reactor.spawn(self._open(connection_id), copy_context())
        silence(work)

        def ended() -> None:
            # If the task was cancelled before it began, it has not reported its outcome.
            error = ConnectionLost("the opening of the connection was cancelled")
            self._lifecycle.open_failed(connection_id, error)
            self._carry_out()

        self._reactor.when_ended(work, ended)

    def _do_cancel_open(self, connection_id: int) -> None:
        if self._opening is not None:
            self._opening.cancel()

    def _do_close(self) -> None:
        if self._connection is not None:
            _, connection = self._connection
            self._connection = self.current = None
            self._close_connection(connection)

    def _close_connection(self, connection: PersistentConnection) -> None:
        self._closing = True
        try:
            connection.close()
        finally:
            self._closing = False

    def _do_ready(self) -> None:
        if self._connection is not None:
            _, self.current = self._connection

    def _do_serve(self, name: str, token: int) -> None:
        addition = self._operations[token].addition
        assert addition is not None
        self.handlers[name] = addition.handler
        self.incoming.contexts[name] = addition.context

    def _do_forget(self, name: str) -> None:
        self.handlers.pop(name, None)
        self.incoming.contexts.pop(name, None)

    def _do_register(self, name: str, balanced: bool) -> None:
        if self._connection is None:
            return
        connection_id, connection = self._connection

        def answered(error: BaseException | None, unsent: bool = False) -> None:
            self._lifecycle.registered(connection_id, name, error, unsent=unsent)
            self._carry_out()

        self._registering = True
        try:
            connection.add_handler(name, balanced, _Answer(answered))
        except ConnectionLost as error:
            answered(error, error.unexecuted)
        except Exception as error:
            answered(error)
        finally:
            self._registering = False
            loss, self._held_loss = self._held_loss, None
            if loss is not None:
                self._report_loss(connection, loss)

    def _do_unregister(self, name: str) -> None:
        if self._connection is None:
            return
        connection_id, connection = self._connection

        def answered(error: BaseException | None) -> None:
            self._lifecycle.unregistered(connection_id, name)
            self._carry_out()

        try:
            connection.remove_handler(name, _Answer(answered))
        except ControlFailure as error:
            answered(error)

    def _do_report(self, name: str, error: Any) -> None:
        described = self._settings.connector.describe(error, "ADD_UNARY_HANDLER", protocol=name)
        logger.error("lost the unary handler of %r: %s", name, described)

    def _do_complete(self, tokens: list[int]) -> None:
        operations = [self._operations.pop(token, None) for token in tokens]
        promises = [operation.promise for operation in operations if operation is not None]

        def complete() -> None:
            for promise in promises:
                if not promise.done():
                    promise.set_result(None)

        if promises:
            # Completes in the loop's next iteration, so that calls that arrived together with the
            # acknowledgement are served first.
            self._reactor.call_soon(complete)

    def _do_fail(self, tokens: list[int], reason: str, detail: Any) -> None:
        for token in tokens:
            operation = self._operations.pop(token, None)
            if operation is not None and not operation.promise.done():
                error = _failure(reason, operation.name, detail)
                operation.promise.set_exception(error)

    async def _open(self, connection_id: int) -> None:
        """Opens a connection.

        Runs in its own task, so that no caller can cancel it: hivemind's daemon exits when its last
        persistent connection is closed.
        """
        self.incoming.tasks = {}
        try:
            opened = await self._settings.connector.open_persistent_connection(
                self._settings.find, self._reactor, weakref.ref(self)
            )
            if opened.closed:
                raise ConnectionLost("the connection was lost as soon as it was opened")
        except Exception as error:
            _drop_frames(error)
            self._lifecycle.open_failed(connection_id, error)
        else:
            # The settings may have changed in the meantime.
            opened.set_limits(self._settings.limits())
            self._drop_withdrawn()
            before, self._connection = self._connection, (connection_id, opened)
            if not self._lifecycle.opened(connection_id):
                self._connection = before
                self._close_connection(opened)
        self._carry_out()

    def _drop_withdrawn(self) -> None:
        """Drops handlers that other code has removed from the table."""
        for name in self._lifecycle.handlers:
            if name not in self.handlers:
                self._lifecycle.withdraw(name)

    # --- timer ---

    def _set_timer(self) -> None:
        seconds = self._lifecycle.deadline
        if seconds is None:
            # A pending timer slows every iteration of an asyncio loop.
            self._cancel_timer()
            return
        at = time.monotonic() + seconds
        # If the deadline moves back, keep the timer: firing too early has no effect.
        if self._timer is None or at < self._timer - 0.001:
            self._cancel_timer()
            callback = functools.partial(_on_time, weakref.ref(self), at)
            self._timer, self._timer_handle = at, self._reactor.call_later(seconds, callback)

    def _cancel_timer(self) -> None:
        handle, self._timer, self._timer_handle = self._timer_handle, None, None
        if handle is not None:
            handle.cancel()

    def on_time(self, at: float) -> None:
        """Called when the timer for this time fires."""
        if os.getpid() != self._pid:
            return
        if self._timer == at:
            self._timer = self._timer_handle = None
        self._drop_withdrawn()
        self._lifecycle.time()
        self._carry_out()

    # --- called by the connection ---

    def on_skipped(self, connection: PersistentConnection, reason: str) -> None:
        logger.warning("skipped a message of the daemon without a call id: %s", reason)

    def on_lost(self, connection: PersistentConnection, error: ControlFailure) -> None:
        if self.current is connection:
            self.current = None
        if not self._closing:
            message = "the persistent connection to the daemon was lost: %s"
            logger.log(self._settings.loss_level, message, error)
        self.incoming.cancel_all(connection)
        # While a registration is being sent, its outcome must reach the lifecycle before the loss.
        if self._registering:
            self._held_loss = error
        else:
            self._report_loss(connection, error)

    def _report_loss(self, connection: PersistentConnection, error: ControlFailure) -> None:
        if self._connection is not None and self._connection[1] is connection:
            connection_id, _ = self._connection
            self._connection = None
            self._drop_withdrawn()
            self._lifecycle.lost(connection_id, error)
            self._carry_out()

    # --- state ---

    @property
    def handlers(self) -> MutableMapping[str, UnaryHandler]:
        """The handlers by name. Other code may change it."""
        return self.incoming.handlers

    @handlers.setter
    def handlers(self, handlers: MutableMapping[str, UnaryHandler]) -> None:
        self.incoming.handlers = handlers

    @property
    def serves(self) -> bool:
        """Whether there are handlers to be registered with the daemon."""
        return any(name in self.handlers for name in self._lifecycle.handlers)

    @property
    def pending(self) -> int:
        """Number of requests without a reply."""
        return self.current.pending if self.current is not None else 0

    @property
    def unanswered(self) -> int:
        """Number of incoming calls in progress."""
        return self.current.unanswered if self.current is not None else 0

    @property
    def ended(self) -> bool:
        """Whether the event loop has ended."""
        return self._reactor.is_closed()

    def apply_limits(self) -> None:
        """Applies changed settings to the connection."""
        connection = self.current
        if connection is not None and os.getpid() == self._pid:
            limits = self._settings.limits()
            self._reactor.call_from_anywhere(lambda: connection.set_limits(limits))

    # --- end ---

    def close(self) -> None:
        """Closes the connection and drops the handlers. Any thread may call this.

        In a forked child this only closes the descriptor.
        """
        if os.getpid() != self._pid:
            self._do_close()
        elif self.ended:
            # The loop has ended, so no task can be resumed or cancelled.
            self._operations.clear()
            self._opening = None
            self._close()
        else:
            self._reactor.call_from_anywhere(self._close)

    def _close(self) -> None:
        self._lifecycle.close()
        self._carry_out()

    def __del__(self) -> None:
        if getattr(self, "_connection", None) is not None:
            self.close()


def _on_time(session: Callable[[], Session | None], at: float) -> None:
    alive = session()
    if alive is not None:
        alive.on_time(at)


class _Answer:
    """A future that calls back with the daemon's answer: None, or an exception."""

    def __init__(self, callback: Callable[[BaseException | None], object]) -> None:
        self._callback = callback
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, result: object) -> None:
        self._done = True
        self._callback(None)

    def set_exception(self, error: BaseException) -> None:
        self._done = True
        self._callback(error)


def _failure(reason: str, name: str | None, detail: Any = None) -> BaseException:
    """Returns the exception for a failed operation of the lifecycle."""
    if reason == "already_registered":
        return already_registered(name, "remove it first, or use another name")
    if reason == "not_registered":
        return NotRegistered(
            f"Handler for protocol {name} is not registered",
            hint="this client can remove only the handlers that it has added",
        )
    if reason == "timed_out":
        return timed_out(detail)
    if reason == "closed":
        return ConnectionLost("the client was closed")
    # A copy, since each caller adds the context of its own request.
    error: BaseException = copy.copy(detail)
    error.__cause__ = detail.__cause__
    return error


def _drop_frames(error: BaseException) -> None:
    """Drops the traceback of an exception, whose frames may refer to the exception."""
    cause: BaseException | None = error
    while cause is not None:
        cause = cause.with_traceback(None).__cause__ or cause.__context__
