"""Handlers of inbound streams: how each is called, and when one is cancelled."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeAlias

import anyio

from p2pclient_rs.streams import Stream

__all__ = ["DEFAULT_LINGER", "HandlerOptions", "Lingering", "StreamHandler", "takes_info"]

#: A handler of inbound streams, called in a task of its own: with the ``StreamInfo`` and the
#: stream, or with the stream alone.
StreamHandler: TypeAlias = (
    Callable[[Any, Stream], Awaitable[object]] | Callable[[Stream], Awaitable[object]]
)

#: How long a handler may leave a stream unused after its peer has closed it, in seconds.
DEFAULT_LINGER = 300.0

#: Peers are polled this many times within a linger, at intervals within these bounds, in seconds.
_POLLS = 8
_SHORTEST_INTERVAL = 0.05
_LONGEST_INTERVAL = 30.0

#: How much input is read ahead of a handler that does not read, to find the peer's end, in bytes.
_PREFETCH = 1 << 20

#: The logger for everything that happens to inbound streams.
logger = logging.getLogger("p2pclient_rs.control")


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
                is no number.
            ValueError: ``linger`` is negative or not a number.
        """
        if linger is not None and not linger >= 0:  # NaN compares false
            raise ValueError(f"linger is a number of seconds from 0 on, or None, not {linger}")
        return cls(handler, linger, takes_info(handler))


def takes_info(handler: Callable[..., Any]) -> bool:
    """Whether a stream handler is called as ``handler(info, stream)`` rather than
    ``handler(stream)``.

    A handler that accepts either gets two arguments, and so does one whose signature is unknown.

    Raises:
        TypeError: It accepts neither.
    """
    if not callable(handler):
        raise TypeError(f"a stream handler must be callable, not {handler!r}")
    one, two = _accepts(handler, follow_wrapped=False)
    if one and two:
        # Such as a decorator's (*args): the wrapped function may be stricter.
        one, two = _accepts(handler, follow_wrapped=True)
        return two or not one
    if not one and not two:
        raise TypeError(
            "a stream handler takes (info, stream) or (stream): "
            f"{handler!r} has the parameters {inspect.signature(handler, follow_wrapped=False)}"
        )
    return two


def _accepts(handler: Callable[..., Any], follow_wrapped: bool) -> tuple[bool, bool]:
    """Whether ``handler`` can be called with one positional argument, and with two."""
    try:
        signature = inspect.signature(handler, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):  # of a C function, for example
        return True, True
    return _binds(signature, 1), _binds(signature, 2)


def _binds(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


class _Run:
    """A handler at work."""

    def __init__(self, stream: Stream, info: Any, linger: float) -> None:
        self.scope = anyio.CancelScope()
        self.interval = min(max(linger / _POLLS, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)
        #: When to look at it next.
        self.due = anyio.current_time() + self.interval
        self._stream = stream
        self._info = info
        self._linger = linger
        self._operations = -1
        #: Since when its stream has been unused after the peer closed it.
        self._unused_since: float | None = None

    def check(self, now: float) -> None:
        """Cancels the handler if its time is up; otherwise sets when to look again."""
        raw = self._stream._raw
        self.due = now + self.interval
        operations = raw.operations
        used = operations != self._operations
        self._operations = operations
        if not raw.peer_closed:
            self._unused_since = None
            # A daemon that cannot deliver input does not tell of the peer's end behind it.
            if not (used or self._stream._reading) and raw.prefetch(_PREFETCH):
                self.due = now + _SHORTEST_INTERVAL
            return
        if self._unused_since is None or used:
            self._unused_since = now
        deadline = self._unused_since + self._linger
        if deadline > now:
            self.due = min(self.due, deadline)
            return
        self.due = math.inf
        logger.warning(
            "cancelled the handler of %r on a stream from %s: the peer has closed the stream, and "
            "the handler has not used it for %g s",
            self._info.proto,
            self._info.peer_id,
            self._linger,
        )
        self.scope.cancel()


class Lingering:
    """Cancels the handlers of a listener that go on long after their peers have left.

    ``poll`` does that, in a task of its own. It sleeps while there are no handlers.
    """

    def __init__(self) -> None:
        self._runs: set[_Run] = set()
        #: Set to wake the poll earlier than at this time.
        self._wake = anyio.Event()
        self._planned = math.inf

    async def run(
        self, handle: Callable[[], Awaitable[object]], stream: Stream, info: Any, linger: float
    ) -> None:
        """Calls and awaits ``handle``. If it outlives its peer for too long, cancels it and aborts
        the stream."""
        run = _Run(stream, info, linger)
        self._runs.add(run)
        if run.due < self._planned:
            self._planned = run.due
            self._wake.set()
        try:
            with run.scope:
                await handle()
        finally:
            self._runs.discard(run)
        if run.scope.cancelled_caught:
            stream.abort()

    async def poll(self) -> None:
        """Polls the peers for as long as the task lives."""
        while True:
            self._wake = anyio.Event()
            self._planned = self._check()
            with anyio.CancelScope(deadline=self._planned):
                await self._wake.wait()

    def _check(self) -> float:
        """Checks the handlers that are due. Returns when to check again."""
        # In a method of its own, whose variables keep no stream open while the task sleeps.
        if not self._runs:
            return math.inf
        now = anyio.current_time()
        for run in self._runs:
            if run.due <= now:
                run.check(now)
        # Bounds the number of checks where many handlers are due at different times.
        earliest = now + min(run.interval for run in self._runs) / 4
        return max(min(run.due for run in self._runs), earliest)
