"""Incoming unary calls: each runs its handler in its own task."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Context, copy_context
from typing import TYPE_CHECKING, Any, TypeAlias

from p2pclient_rs._native import PeerID, PersistentConnection
from p2pclient_rs.reactor import Reactor, Work

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["IncomingCalls", "UnaryHandler"]

#: Handles an incoming call, in its own task. Gets the request and the caller's peer id, and returns
#: the reply.
UnaryHandler: TypeAlias = Callable[[bytes, Any], Awaitable["Buffer"]]

#: The size of the cache of callers' peer ids, in the form that handlers get.
_MAX_PEERS = 4096


class IncomingCalls:
    """The handlers of one event loop, and their calls in progress.

    Args:
        reactor: The event loop.
        handlers: The handlers by name. Other code may change it.
        peer_id: Converts a caller's peer id to what handlers get.
    """

    def __init__(
        self,
        reactor: Reactor,
        handlers: MutableMapping[str, UnaryHandler],
        peer_id: Callable[[PeerID], Any],
    ) -> None:
        self._reactor = reactor
        self._peer_id = peer_id
        self.handlers = handlers
        #: The context for the calls of each handler, by name.
        self.contexts: dict[str, Context] = {}
        #: The context for handlers that other code put into the table.
        self._context = copy_context()
        #: The tasks of the current connection, by call id.
        self.tasks: dict[bytes, Work | None] = {}
        self._peers: dict[bytes, Any] = {}

    def on_call(
        self, connection: PersistentConnection, call_id: bytes, proto: str, peer: bytes, data: bytes
    ) -> None:
        """Starts a task for a call."""
        if connection.closed:  # because of an earlier message in the same read
            return
        handler = self.handlers.get(proto)
        if handler is None:
            connection.reply_error(call_id, f"no handler for the protocol {proto!r}")
            return
        context, tasks = self.contexts.get(proto, self._context), self.tasks
        try:
            caller = self._peers.get(peer)
            if caller is None:
                if len(self._peers) >= _MAX_PEERS:
                    self._peers.clear()
                caller = self._peers[peer] = self._peer_id(PeerID(peer))
            tasks[call_id] = None
            task = self._reactor.spawn(
                _handle(connection, call_id, handler, data, caller, tasks), context
            )
        except BaseException as error:
            tasks.pop(call_id, None)
            connection.reply_error(call_id, _repr(error))
            raise
        # An eager task may have ended already.
        if call_id in tasks:
            tasks[call_id] = task
            if connection.closed:
                self._cancel(connection, call_id, tasks)

    def on_cancelled(self, connection: PersistentConnection, call_id: bytes) -> None:
        """Cancels the task of a call whose caller is gone."""
        self._cancel(connection, call_id, self.tasks)

    def cancel_all(self, connection: PersistentConnection) -> None:
        """Cancels all tasks of a lost connection."""
        tasks, self.tasks = self.tasks, {}
        for call_id in list(tasks):
            self._cancel(connection, call_id, tasks)

    def _cancel(
        self, connection: PersistentConnection, call_id: bytes, tasks: dict[bytes, Work | None]
    ) -> None:
        task = tasks.get(call_id)
        if task is None:
            return
        task.cancel()

        def ended() -> None:
            # A task that was cancelled before it began has not replied.
            if tasks.get(call_id) is task:
                del tasks[call_id]
                connection.reply_error(call_id, "cancelled")

        self._reactor.when_ended(task, ended)


async def _handle(
    connection: PersistentConnection,
    call_id: bytes,
    handler: UnaryHandler,
    data: bytes,
    caller: Any,
    tasks: dict[bytes, Work | None],
) -> None:
    try:
        connection.reply(call_id, await handler(data, caller))
    except Exception as error:
        connection.reply_error(call_id, _repr(error))
    except BaseException as error:
        connection.reply_error(call_id, _repr(error))
        raise
    finally:
        tasks.pop(call_id, None)


def _repr(error: BaseException) -> str:
    try:
        # Lone surrogates cannot be sent.
        return repr(error).encode("utf-8", "backslashreplace").decode()
    except Exception:
        return f"<{type(error).__name__}>"
