"""Listening: the result of ``listen()``, the background listener, private addresses, and counters
and logging of refused streams."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager
from contextvars import copy_context
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import anyio

from p2pclient_rs._native import LogThrottle, Multiaddr, RawListener, endpoint
from p2pclient_rs.exceptions import ControlFailure
from p2pclient_rs.loops import current_loop
from p2pclient_rs.reactor import Work, reactor, silence
from p2pclient_rs.readiness import watch

__all__ = ["BackgroundListener", "ListenerStats", "Listening", "PrivateSocket", "Refusals"]

#: The maximum length of a unix socket's path on all systems, in bytes.
_MAX_SOCKET_PATH = 103

#: The socket's name in a private directory.
_SOCKET = "listen.sock"

T = TypeVar("T")


class Listening(AbstractAsyncContextManager[T], Generic[T]):
    """The result of ``listen()``. ``async with`` listens until the end of the block, ``await``
    until the client is closed. Both return the client.

    Nothing happens until it is used in one of these ways.
    """

    def __init__(
        self,
        within: Callable[[], AbstractAsyncContextManager[T]],
        from_now_on: Callable[[], Coroutine[Any, Any, T]],
    ) -> None:
        self._within = within
        self._from_now_on = from_now_on
        self._context: AbstractAsyncContextManager[T] | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._from_now_on().__await__()

    async def __aenter__(self) -> T:
        if self._context is not None:
            raise RuntimeError("call listen() again for each block")
        self._context = self._within()
        return await self._context.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._context is not None, "__aexit__ is called after __aenter__"
        return await self._context.__aexit__(kind, error, traceback)


#: Calls an async function with one argument, in a new task.
Start = Callable[[Callable[[Any], Coroutine[Any, Any, None]], Any], object]


class Acceptor(Protocol):
    """The owner of a listener: a ``ControlClient``."""

    def _accept_one(self, listener: RawListener, start: Start) -> float | None:
        """Accepts at most one connection and serves it in a task made by ``start``.

        Returns:
            How long to wait before the next attempt, in seconds; None to wait until the listener is
            readable.
        """

    def _stopped_listening(self, listener: BackgroundListener) -> None:
        """Called when the listener has ended."""


class _Job:
    work: Work | None = None


class _Jobs:
    """The tasks of a listener."""

    def __init__(self) -> None:
        self.running: set[_Job] = set()
        #: Whether no more tasks will start.
        self.closed = False
        #: Set once no more tasks will start and all tasks have ended.
        self.ended = anyio.Event()

    def left(self, job: _Job) -> None:
        """Called when a task has ended."""
        self.running.discard(job)
        if self.closed and not self.running:
            self.ended.set()


class BackgroundListener:
    """Accepts inbound streams in tasks of the event loop; on trio, in system tasks.

    It ends after ``aclose`` or ``close``, when the client is garbage-collected, or when the event
    loop ends. Running handlers keep the client alive.

    Args:
        client: The client that the streams are for. The listener holds only a weak reference.
        listener: The socket. It is closed when the listener ends.
        poll: A function to run in another task until the listener ends. It must not hold a
            reference to the client.
    """

    def __init__(
        self,
        client: Acceptor,
        listener: RawListener,
        poll: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._client = weakref.ref(client, self._abandoned)
        self._listener = listener
        self._watched = watch(listener.fileno())
        self._loop = current_loop()
        self._reactor = reactor()
        self._context = copy_context()
        self._pid = os.getpid()
        self._jobs = _Jobs()
        self._begun = anyio.Event()
        for function in (self._accept, poll):
            if function is not None:
                self._start_silently(function)

    async def begun(self) -> None:
        """Waits until the accepting task has started.

        asyncio warns if a loop is closed with a task that never started.
        """
        await self._begun.wait()

    @property
    def loop_ended(self) -> bool:
        """Whether the event loop has ended."""
        return self._reactor.is_closed()

    async def aclose(self) -> None:
        """Stops, cancels the running handlers, and waits until they have ended."""
        self.close()
        if self._jobs.running and not self._reactor.is_closed() and current_loop() is self._loop:
            await self._jobs.ended.wait()

    def close(self) -> None:
        """Stops, and cancels the running handlers. Any thread may call this.

        In a forked child this only closes the descriptor.
        """
        if os.getpid() != self._pid:
            self._listener.close()
        else:
            self._reactor.call_from_anywhere(self._close)

    def _close(self) -> None:
        if self._jobs.closed:
            return
        self._jobs.closed = True
        if self._reactor.is_closed():
            # A closed loop cannot cancel tasks. Drop them, so that the garbage collector ends them.
            self._jobs.running.clear()
        for job in list(self._jobs.running):
            if job.work is not None:
                job.work.cancel()
        self._release()
        client = self._client()
        if client is not None:
            client._stopped_listening(self)

    def _abandoned(self, _: object) -> None:
        self.close()

    def _release(self) -> None:
        self._watched.close()
        self._listener.close()

    def _start(self, function: Callable[[Any], Coroutine[Any, Any, None]], argument: Any) -> Work:
        job, jobs = _Job(), self._jobs
        jobs.running.add(job)

        async def run() -> None:
            try:
                await function(argument)
            finally:
                jobs.left(job)

        job.work = work = self._reactor.spawn(run(), self._context)
        # If the task never starts, its finally block does not run.
        self._reactor.when_ended(work, lambda: jobs.left(job))
        return work

    def _start_silently(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        work = self._start(lambda _: function(), None)
        silence(work)

    async def _accept(self) -> None:
        self._begun.set()
        try:
            while not self._jobs.closed:
                client = self._client()
                if client is None:
                    break
                wait = client._accept_one(self._listener, self._start)
                del client  # this task must not keep the client alive while it waits
                await pause(wait, self._watched.readable)
        finally:
            # The loop may end without a call of `close`.
            if os.getpid() == self._pid:
                self._close()


async def pause(wait: float | None, readable: Callable[[], Awaitable[object]]) -> None:
    """Waits as ``Acceptor._accept_one`` requests."""
    if wait is None:
        await readable()
    else:
        await anyio.sleep(wait)


# --- a private address ---


class PrivateSocket:
    """A path for a unix socket in a new directory that only this user can access.

    ``remove`` removes the directory, as do garbage collection of this object and the end of the
    program. In a forked child, none of them does.
    """

    def __init__(self) -> None:
        directory = tempfile.mkdtemp(prefix="p2pclient-")
        if not _fits(directory):
            os.rmdir(directory)
            directory = tempfile.mkdtemp(prefix="p2pclient-", dir="/tmp")
        self.path: str = os.path.join(directory, _SOCKET)
        self.remove: Callable[[], object] = weakref.finalize(self, _remove, directory, os.getpid())


def _fits(directory: str) -> bool:
    try:
        path = os.path.join(directory, _SOCKET).encode()
    except UnicodeEncodeError:  # the path is not UTF-8, as a multiaddr must be
        return False
    return len(path) <= _MAX_SOCKET_PATH


def _remove(directory: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)


def check_same_machine(control_maddr: Multiaddr) -> None:
    """Raises ControlFailure unless a control address is on this machine.

    A daemon elsewhere cannot connect to a unix socket here.
    """
    kind, host, _ = endpoint(control_maddr)
    if kind == "unix" or host == "localhost":
        return
    if kind in ("ip4", "ip6") and ipaddress.ip_address(host).is_loopback:
        return
    raise ControlFailure(
        f"the daemon at {control_maddr} may be on another machine, from which the default address "
        "for inbound streams, a private unix socket, cannot be reached: pass listen_maddr"
    )


# --- refused streams ---


@dataclass(frozen=True)
class ListenerStats:
    """The numbers of a client's accepted and refused inbound streams.

    Attributes:
        accepted: Accepted connections of the daemon.
        no_handler: Streams of protocols without a handler.
        bad_header: Connections without a valid stream header.
        accept_errors: Failed attempts to accept a connection, for example without free descriptors.
    """

    accepted: int = 0
    no_handler: int = 0
    bad_header: int = 0
    accept_errors: int = 0


class Refusals:
    """Counts inbound streams and logs refusals, at most one line per kind and second.

    A line includes the number of suppressed lines before it.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._throttles: dict[str, LogThrottle] = {}

    def count(self, kind: str) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def stats(self) -> ListenerStats:
        return ListenerStats(**self._counts)

    def log(
        self, kind: str, logger: logging.Logger, level: int, message: str, *args: object
    ) -> None:
        """Counts an event and logs it, unless the last line of its kind is too recent."""
        self.count(kind)
        throttle = self._throttles.get(kind)
        if throttle is None:
            throttle = self._throttles[kind] = LogThrottle()
        suppressed = throttle.note(time.monotonic())
        if suppressed is None:
            return
        if suppressed:
            message += " (and %d more since the last such line)"
            args = (*args, suppressed)
        logger.log(level, message, *args)
