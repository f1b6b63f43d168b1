"""Handlers of inbound streams: how they are called, and when they are cancelled."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

import anyio

from p2pclient_rs._native import StreamInfo
from p2pclient_rs.loops import current_loop
from p2pclient_rs.stream import Stream

__all__ = ["DEFAULT_LINGER", "HandlerOptions", "Lingering", "StreamHandler", "takes_info"]

#: A handler of inbound streams. It is called in its own task, with the ``StreamInfo`` and the
#: stream, or with the stream alone.
StreamHandler: TypeAlias = (
    Callable[[StreamInfo, Stream], Awaitable[object]] | Callable[[Stream], Awaitable[object]]
)

#: How long a handler may leave its stream unused after the peer has closed it, in seconds.
DEFAULT_LINGER = 300.0

#: The number of polls of a peer within its linger, and the bounds of the interval, in seconds.
_POLLS = 8
_SHORTEST_INTERVAL = 0.05
_LONGEST_INTERVAL = 30.0

#: The maximum amount to read ahead per step for a handler that does not read, in bytes.
_STEP = 1 << 20
#: The maximum amount to read ahead for one handler, in bytes. This is more than the daemon and the
#: sockets buffer for a peer that has left.
_MAX_AHEAD = 32 << 20
#: The maximum amount to read ahead for all handlers of a listener together, in bytes.
_MAX_ALL_AHEAD = 64 << 20

#: If this many bytes were read ahead for a handler, reading ahead for it continues until there has
#: been no input for ``_PATIENCE`` seconds. The daemon may need that time to deliver the rest.
_MUCH_AHEAD = 64 << 10
_PATIENCE = 0.5

#: The logger for inbound streams.
logger: logging.Logger = logging.getLogger("p2pclient_rs.control")


class HandlerOptions(NamedTuple):
    """A handler with its options."""

    handler: StreamHandler
    linger: float | None
    takes_info: bool

    @classmethod
    def of(cls, handler: StreamHandler, linger: float | None) -> HandlerOptions:
        """Checks a handler and its options.

        Raises:
            TypeError: The handler takes neither ``(info, stream)`` nor ``(stream)``, or ``linger``
                is not a number.
            ValueError: ``linger`` is negative or NaN.
        """
        if linger is not None and not linger >= 0:  # also rejects NaN
            raise ValueError(f"linger is a number of seconds from 0 on, or None, not {linger}")
        return cls(handler, linger, takes_info(handler))


def takes_info(handler: Callable[..., Any]) -> bool:
    """Returns whether a stream handler is called as ``handler(info, stream)`` rather than
    ``handler(stream)``.

    A handler that accepts both, or whose signature is unknown, is called with two arguments.

    Raises:
        TypeError: The handler accepts neither.
    """
    if not callable(handler):
        raise TypeError(f"a stream handler must be callable, not {handler!r}")
    one, two = _accepts(handler, follow_wrapped=False)
    if one and two:
        # For example a decorator's (*args). The wrapped function may accept only one of the two.
        one, two = _accepts(handler, follow_wrapped=True)
        return two or not one
    if not one and not two:
        raise TypeError(
            "a stream handler takes (info, stream) or (stream): "
            f"{handler!r} has the parameters {inspect.signature(handler, follow_wrapped=False)}"
        )
    return two


def _accepts(handler: Callable[..., Any], follow_wrapped: bool) -> tuple[bool, bool]:
    """Returns whether ``handler`` accepts one positional argument, and whether it accepts two."""
    try:
        signature = inspect.signature(handler, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):  # for example, for a C function
        return True, True
    return _binds(signature, 1), _binds(signature, 2)


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


class _Run:
    """A running handler."""

    def __init__(
        self,
        stream: Stream,
        info: StreamInfo,
        linger: float,
        cancel: Callable[[], object],
        ahead: _ReadingAhead,
    ) -> None:
        self.interval = min(max(linger / _POLLS, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        #: The time of the next check.
        self.due = anyio.current_time() + self.interval
        #: Whether ``check`` has cancelled it.
        self.expired = False
        #: The number of bytes that were read ahead for the handler.
        self.ahead = 0
        self._stream = stream
        self._info = info
        self._linger = linger
        self._cancel = cancel
        self._reading_ahead = ahead
        self._operations = -1
        #: When a check last found the stream in use.
        self._used_at = self.due
        #: The time since which the handler has not used the stream that the peer has closed.
        self._unused_since: float | None = None

    def check(self, now: float) -> None:
        """Cancels the handler if its time is up; otherwise sets the time of the next check."""
        raw = self._stream._raw
        self.due = now + self.interval
        operations = raw.operations
        used = operations != self._operations
        if used or self._stream._reading:
            self._used_at = now
            if self.ahead:
                self.ahead = min(self.ahead, raw.read_ahead_size)
            self._reading_ahead.stop(self)
        self._operations = operations
        if not raw.peer_closed:
            self._unused_since = None
            self._read_ahead(now)
            return
        if self._unused_since is None or used:
            # The close came after the unread input, so it may be as old as the last use.
            self._unused_since = self._used_at if self.ahead else now
        deadline = self._unused_since + self._linger
        if deadline > now:
            self.due = min(self.due, deadline)
            return
        self.due = math.inf
        self.expired = True
        logger.warning(
            "cancelled the handler of %r on a stream from %s: the peer has closed the stream, and "
            "the handler has not used it for %g s",
            self._info.proto,
            self._info.peer_id,
            self._linger,
        )
        self._cancel()

    def _read_ahead(self, now: float) -> None:
        """Reads some input ahead if the handler has not used its stream for its linger.

        While input is undelivered, the daemon cannot report the close that follows it.
        """
        unused_until = self._used_at + self._linger
        if unused_until > now:
            self.due = min(self.due, unused_until)
        elif not self._stream._reading and self._reading_ahead.read(self, now):
            self.due = now + _SHORTEST_INTERVAL

    def read_ahead(self, limit: int) -> int:
        """Reads up to ``limit`` bytes ahead; returns how many."""
        raw = self._stream._raw
        count = raw.prefetch(raw.read_ahead_size + limit)
        self.ahead += count
        return count


class _ReadingAhead:
    """Reads ahead for the handlers of one listener, within bounds.

    Reads from the streams of a few handlers at a time, each up to the peer's close or to the bound
    per handler. The other handlers queue. If it read from all streams at once, the common bound
    could stop all of them before their ends.
    """

    def __init__(self, runs: set[_Run]) -> None:
        self._runs = runs
        #: The handlers for which it reads ahead, and when each last had input.
        self._active: dict[_Run, float] = {}
        #: The queue of handlers for which it does not read ahead yet.
        self._waiting: dict[_Run, None] = {}

    def read(self, run: _Run, now: float) -> bool:
        """Reads one step ahead. Returns whether more input may arrive soon."""
        self._waiting.pop(run, None)
        left = _MAX_ALL_AHEAD - sum(run.ahead for run in self._runs)
        if run not in self._active and not self._has_room(left):
            self._waiting[run] = None
            return False
        limit = min(_STEP, _MAX_AHEAD - run.ahead, left)
        # At the bound per handler, the peer must still be there: more has arrived than the daemon
        # and the sockets buffer for a peer that has left.
        if limit > 0 and run.read_ahead(limit):
            self._active[run] = now
            return True
        patient = limit > 0 and run.ahead >= _MUCH_AHEAD
        if patient and now - self._active.get(run, -math.inf) < _PATIENCE:
            return True
        self._active.pop(run, None)
        return False

    def stop(self, run: _Run) -> None:
        """Called when the handler has ended, or has used its stream."""
        self._active.pop(run, None)
        self._waiting.pop(run, None)

    def next(self, now: float) -> None:
        """Makes the first handler in the queue due, if there is room to read for it."""
        if self._waiting:
            left = _MAX_ALL_AHEAD - sum(run.ahead for run in self._runs)
            if self._has_room(left):
                next(iter(self._waiting)).due = now

    def _has_room(self, left: int) -> bool:
        """Returns whether another stream may be read from, if ``left`` bytes are free."""
        if not self._active:
            return left > 0
        promised = sum(_MAX_AHEAD - run.ahead for run in self._active)
        return left - promised >= _MAX_AHEAD

    @property
    def busy(self) -> bool:
        """Whether it is reading from any stream."""
        return bool(self._active)


class Lingering:
    """Cancels a listener's handlers that continue for too long after their peers have left.

    ``poll`` does this in a task of its own, which sleeps while there are no handlers.
    """

    def __init__(self) -> None:
        self._runs: set[_Run] = set()
        self._ahead = _ReadingAhead(self._runs)
        #: Set to wake ``poll`` before ``_planned``.
        self._wake = anyio.Event()
        self._planned = math.inf

    async def run(
        self,
        handle: Callable[[], Awaitable[object]],
        stream: Stream,
        info: StreamInfo,
        linger: float,
    ) -> None:
        """Calls and awaits ``handle``. If it outlives its peer for too long, cancels it and aborts
        the stream."""
        if isinstance(current_loop(), asyncio.AbstractEventLoop):
            await self._run_in_asyncio(handle, stream, info, linger)
            return
        scope = anyio.CancelScope()
        run = self._add(stream, info, linger, scope.cancel)
        try:
            with scope:
                await handle()
        finally:
            self._remove(run)
        if scope.cancelled_caught:
            stream.abort()

    async def _run_in_asyncio(
        self,
        handle: Callable[[], Awaitable[object]],
        stream: Stream,
        info: StreamInfo,
        linger: float,
    ) -> None:
        # Uses no scope, as anyio would keep a reference to the task even if its loop is closed.
        task = asyncio.current_task()
        assert task is not None
        run = self._add(stream, info, linger, task.cancel)
        try:
            await handle()
        except asyncio.CancelledError:
            if not run.expired or anyio.current_effective_deadline() == -math.inf:
                raise
            # Python 3.10 does not count cancellations.
            if getattr(task, "uncancel", int)() > 0:
                raise
            stream.abort()
        else:
            if run.expired:
                getattr(task, "uncancel", int)()
        finally:
            self._remove(run)

    def _add(
        self, stream: Stream, info: StreamInfo, linger: float, cancel: Callable[[], object]
    ) -> _Run:
        run = _Run(stream, info, linger, cancel, self._ahead)
        self._runs.add(run)
        if run.due < self._planned:
            self._planned = run.due
            self._wake.set()
        return run

    def _remove(self, run: _Run) -> None:
        self._runs.discard(run)
        self._ahead.stop(run)

    async def poll(self) -> None:
        """Polls the peers until cancelled."""
        loop = current_loop()
        while True:
            self._wake = wake = anyio.Event()
            self._planned = planned = self._check()
            if planned == math.inf:
                await wake.wait()
            elif isinstance(loop, asyncio.AbstractEventLoop):
                # Uses no scope, as in ``_run_in_asyncio``.
                timer = loop.call_at(planned, wake.set)
                try:
                    await wake.wait()
                finally:
                    timer.cancel()
            else:
                with anyio.CancelScope(deadline=planned):
                    await wake.wait()

    def _check(self) -> float:
        """Checks the handlers that are due. Returns when to check again."""
        # A separate method, so that no local variable keeps a stream open while the task sleeps.
        if not self._runs:
            return math.inf
        now = anyio.current_time()
        for run in list(self._runs):
            if run.due <= now:
                run.check(now)
        self._ahead.next(now)
        # Checks no more often than this, even if many handlers are due at different times.
        interval = _SHORTEST_INTERVAL
        if not self._ahead.busy:
            interval = min(run.interval for run in self._runs) / 4
        return max(min(run.due for run in self._runs), now + interval)
