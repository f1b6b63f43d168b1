"""Waiting until a descriptor is readable or writable, on asyncio, uvloop and trio."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio

from p2pclient_rs._native import ControlConnection, RawStream, Readiness
from p2pclient_rs.driver import WakeUp
from p2pclient_rs.loops import call_in_its_thread, current_loop

__all__ = ["AsyncioWatch", "TrioWatch", "Watch", "watch"]


class Watch(Protocol):
    """One file descriptor on one event loop.

    A wait can end early: the caller must try the operation, and wait again if it would block.
    """

    #: The number of operations in a row that may find data ready before a checkpoint is needed.
    turns: int
    #: Whether ``flush_later`` has an effect.
    runs_callbacks: bool

    def checkpoint(self) -> Awaitable[object]:
        """Lets other tasks run. A cancellation point."""

    def readable(self) -> Awaitable[object]:
        """Waits until the descriptor may be readable."""

    def writable(self) -> Awaitable[object]:
        """Waits until the descriptor may be writable."""

    def answer(self, raw: ControlConnection) -> Awaitable[Any]:
        """Waits for the reply to the request that ``raw`` has sent, and returns it."""

    def flush_later(self, raw: RawStream, owner: object) -> None:
        """Lets the event loop write a stream's unsent output, if ``runs_callbacks``."""

    def drained(self, mark: int) -> Awaitable[object]:
        """Waits until at most ``mark`` bytes are unsent.

        Without ``runs_callbacks``, waits until the descriptor may be writable.
        """

    def close(self) -> None:
        """Ends all waits. Call this before closing the descriptor."""

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        """Closes a socket from a finalizer, in any thread or forked child."""


def watch(fd: int) -> Watch:
    """Returns a watch of the running event loop."""
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
        # Same as anyio's checkpoint, without looking up the running loop.
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
    # Resumes a task in place. An asyncio future would schedule it for the loop's next iteration,
    # whose system call costs more than everything else here.
    ready: list[WakeUp] = []
    try:
        readiness.read_ready(ready)
    finally:  # also if a signal handler has raised
        _run_first(ready)


def _on_writable(readiness: Readiness) -> None:
    ready: list[WakeUp] = []
    try:
        readiness.write_ready(ready)
    finally:
        try:
            _run_first(ready)
        finally:
            readiness.remove_idle_writer()


def _run_first(ready: list[WakeUp]) -> None:
    for context, function, argument in ready:
        # The task may keep an exception whose traceback includes this frame.
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

        self._trio: Any = trio  # untyped, since stubs of an older trio may be installed
        self._fd = fd
        self._pid = os.getpid()
        self._writing: trio.Event | None = None
        #: Whether it is closed. The descriptor's number may then belong to another file.
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
            # Trio allows one waiting task per descriptor; several may drain the same stream.
            await self._writing.wait()
            return
        if self._closed:
            await self.checkpoint()
            return
        self._writing = self._trio.Event()
        try:
            await self._trio.lowlevel.wait_writable(self._fd)
        except self._trio.ClosedResourceError:
            pass  # the caller's next write raises the error
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
        # In a forked child, this would change the parent's epoll instance.
        if self._trio.lowlevel.in_trio_task() and os.getpid() == self._pid:
            self._trio.lowlevel.notify_closing(self._fd)

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        # No task is waiting, since a waiting task would keep the stream alive.
        self._closed = True
        raw.close()
