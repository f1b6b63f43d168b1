"""The event loop that is running: waiting for a socket on asyncio, uvloop or trio."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable
from typing import Any, Protocol

import anyio

from p2pclient_rs._native import ControlConnection, RawStream, Readiness

__all__ = ["Watch", "current_loop", "watch"]


class Watch(Protocol):
    """The wait of one event loop for one file descriptor.

    Waits can end early; what is done then must be tried, and waited for, again.
    """

    #: How many operations may find their data ready before the loop gets a turn.
    turns: int
    #: Whether the loop runs callbacks by itself, without a task that waits.
    runs_callbacks: bool

    def readable(self) -> Awaitable[object]:
        """Waits until the socket may be readable."""

    def writable(self) -> Awaitable[object]:
        """Waits until the socket may be writable."""

    def close(self) -> None:
        """Ends every wait, for the descriptor is about to be closed."""

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        """Closes a socket that nobody holds any more, in whichever thread or forked child that is
        found."""


def current_loop() -> Any:
    """What identifies the running event loop: the loop itself, or trio's token.

    Raises:
        RuntimeError: None is running.
    """
    # Trio first: as a guest it runs inside an asyncio loop.
    trio_module = sys.modules.get("trio")
    if trio_module is not None and trio_module.lowlevel.in_trio_task():
        return trio_module.lowlevel.current_trio_token()
    return asyncio.get_running_loop()


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
        readiness = Readiness(loop, fd)
        self.readable = readiness.readable
        self.writable = readiness.writable
        self.close = readiness.close

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        # A finalizer can run in any thread, and a loop is not to be touched from another.
        in_thread = asyncio._get_running_loop() is self._loop or not self._loop.is_running()
        if in_thread or os.getpid() != self._pid:
            self._close_both(raw)
        else:
            self._loop.call_soon_threadsafe(self._close_both, raw)

    def _close_both(self, raw: RawStream | ControlConnection) -> None:
        self.close()
        raw.close()


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

    async def readable(self) -> None:
        try:
            await self._trio.lowlevel.wait_readable(self._fd)
        except self._trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None

    async def writable(self) -> None:
        if self._writing is not None:
            # Trio lets one task wait for a descriptor; several may drain the same stream.
            await self._writing.wait()
            return
        self._writing = self._trio.Event()
        try:
            await self._trio.lowlevel.wait_writable(self._fd)
        except self._trio.ClosedResourceError:
            raise anyio.ClosedResourceError from None
        finally:
            self._writing.set()
            self._writing = None

    def close(self) -> None:
        # In a forked child trio's epoll is the parent's too.
        if self._trio.lowlevel.in_trio_task() and os.getpid() == self._pid:
            self._trio.lowlevel.notify_closing(self._fd)

    def abandon(self, raw: RawStream | ControlConnection) -> None:
        # Whoever waited would hold the stream: there is nobody to tell.
        raw.close()
