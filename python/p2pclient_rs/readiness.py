"""Waiting until a descriptor is readable or writable, on asyncio, uvloop and trio."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, Protocol, TypeAlias

import anyio

from p2pclient_rs._native import ControlConnection, RawStream, Readiness
from p2pclient_rs.loops import call_in_its_thread, current_loop

__all__ = ["AsyncioWatch", "TrioWatch", "Watch", "watch"]

#: A call to make: in a context with one argument, or without a context with several.
_WakeUp: TypeAlias = tuple[Context | None, Callable[..., Any], Any]


class Watch(Protocol):
    """The wait of one event loop for one file descriptor.

    Waits can end early; what is done then must be tried, and waited for, again.
    """

    #: How many operations may find their data ready before the loop gets a turn.
    turns: int
    #: Whether the loop runs callbacks by itself, without a task that waits.
    runs_callbacks: bool

    def checkpoint(self) -> Awaitable[object]:
        """Lets other tasks run, and is cancelled if that is due."""

    def readable(self) -> Awaitable[object]:
        """Waits until the socket may be readable."""

    def writable(self) -> Awaitable[object]:
        """Waits until the socket may be writable."""

    def answer(self, raw: ControlConnection) -> Awaitable[Any]:
        """Waits for the answer to the request that ``raw`` has sent."""

    def flush_later(self, raw: RawStream, owner: object) -> None:
        """Has the loop write what a stream has left over, if it runs callbacks."""

    def drained(self, mark: int) -> Awaitable[object]:
        """Waits until no more than ``mark`` bytes are left of what is flushed later, or, where
        nothing is, until the socket may be writable."""

    def close(self) -> None:
        """Ends every wait, for the descriptor is about to be closed."""

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        """Closes a socket that nobody holds any more, in whichever thread or forked child that is
        found."""


def watch(fd: int) -> Watch:
    """A watch of the running event loop over a file descriptor."""
    loop = current_loop()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return AsyncioWatch(loop, fd)
    return TrioWatch(fd)


class AsyncioWatch:
    """A watch of an asyncio or uvloop loop."""

    turns = 16
    runs_callbacks = True

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop = loop
        self._pid = os.getpid()
        readiness = Readiness(loop, fd, _on_readable, _on_writable)
        self.readable: Callable[[], Awaitable[None]] = readiness.readable
        self.writable: Callable[[], Awaitable[None]] = readiness.writable
        self.answer: Callable[[ControlConnection], Awaitable[Any]] = readiness.answer
        self.drained: Callable[[int], Awaitable[None]] = readiness.drained
        self.flush_later: Callable[[RawStream, object], None] = readiness.flush_later
        self.close: Callable[[], None] = readiness.close

    async def checkpoint(self) -> None:
        # What anyio's does here, but for finding out that it is here.
        await asyncio.sleep(0)

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        if os.getpid() != self._pid:
            self._close_both(raw)
        else:
            call_in_its_thread(self._loop, functools.partial(self._close_both, raw))

    def _close_both(self, raw: RawStream | ControlConnection) -> None:
        try:
            self.close()
        finally:
            raw.close()


def _on_readable(readiness: Readiness) -> None:
    # A task is resumed here and now, not by a callback that schedules it: the loop would make a
    # system call in between, which costs more than the rest.
    ready: list[_WakeUp] = []
    try:
        readiness.read_ready(ready)
    finally:  # also if a signal handler raises as that returns
        _run_first(ready)


def _on_writable(readiness: Readiness) -> None:
    ready: list[_WakeUp] = []
    try:
        readiness.write_ready(ready)
    finally:
        try:
            _run_first(ready)
        finally:
            readiness.remove_idle_writer()


def _run_first(ready: list[_WakeUp]) -> None:
    for context, function, argument in ready:
        # The task may keep an exception whose frames reach this one.
        ready.clear()
        try:
            if context is not None:
                context.run(function, argument)
            else:
                function(*argument)
        finally:
            del function, argument


class TrioWatch:
    """A watch of a trio run."""

    turns = 1
    runs_callbacks = False

    def __init__(self, fd: int) -> None:
        import trio

        self._trio: Any = trio  # typed as it is, whatever stubs of an older trio are about
        self._fd = fd
        self._pid = os.getpid()
        self._writing: trio.Event | None = None
        #: The descriptor's number may be another file's by now.
        self._closed = False

    async def checkpoint(self) -> None:
        await self._trio.lowlevel.checkpoint()

    async def readable(self) -> None:
        if self._closed:
            await self.checkpoint()
            return
        try:
            await self._trio.lowlevel.wait_readable(self._fd)
        except self._trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None

    async def writable(self) -> None:
        if self._writing is not None:
            # Trio lets one task wait for a descriptor; several may drain the same stream.
            await self._writing.wait()
            return
        if self._closed:
            await self.checkpoint()
            return
        self._writing = self._trio.Event()
        try:
            await self._trio.lowlevel.wait_writable(self._fd)
        except self._trio.ClosedResourceError:
            # Whoever goes on is told; one that drained what another has sent, and closed, is done.
            pass
        finally:
            self._writing.set()
            self._writing = None

    async def answer(self, raw: ControlConnection) -> Any:
        while (answer := raw.step()) is None:
            await self.readable()
        return answer[0]

    def flush_later(self, raw: RawStream, owner: object) -> None:
        pass

    async def drained(self, mark: int) -> None:
        await self.writable()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # In a forked child trio's epoll is the parent's too.
        if self._trio.lowlevel.in_trio_task() and os.getpid() == self._pid:
            self._trio.lowlevel.notify_closing(self._fd)

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        # A task that waited would hold the stream, so none does.
        self._closed = True
        raw.close()
