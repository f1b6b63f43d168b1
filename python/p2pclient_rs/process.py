"""Waits for a daemon's process, on any event loop."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import anyio

from p2pclient_rs.readiness import watch

if TYPE_CHECKING:
    from p2pclient_rs._native import DaemonProcess


class Pause:
    """Sleeps for 1 ms at first, then twice as long each time, up to 50 ms."""

    def __init__(self) -> None:
        self._seconds = 0.001

    async def __call__(self) -> None:
        await anyio.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, 0.05)


async def poll_exit(process: DaemonProcess, unless: Sequence[object] = ()) -> None:
    """Waits until the daemon has ended or `unless` is not empty, by polling."""
    pause = Pause()
    while not unless and process.poll() is None:
        await pause()


async def wait_exit(process: DaemonProcess) -> None:
    """Waits until the daemon has ended, without polling where the kernel has pidfds."""
    pid = process.pid
    if pid is not None and process.poll() is None and hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # an old kernel, or no descriptor left
            fd = -1
        if fd != -1:
            watched = watch(fd)
            pause = Pause()
            try:
                while process.poll() is None:
                    await watched.readable()
                    if process.poll() is None:  # spurious wake-up
                        await pause()
            finally:
                watched.close()
                os.close(fd)
    await poll_exit(process)


async def destroy(process: DaemonProcess, reason: BaseException | None = None) -> None:
    """Destroys the process without blocking the event loop. Cancellation does not interrupt it.

    Args:
        reason: The exception that led to this call, if any. After GeneratorExit, KeyboardInterrupt
            or SystemExit the task can no longer wait, so this function blocks.
    """
    if isinstance(reason, (GeneratorExit, KeyboardInterrupt, SystemExit)):
        process.destroy()
        return
    pause = Pause()
    cancelled: BaseException | None = None
    while not process.try_destroy():
        try:
            with anyio.CancelScope(shield=True):
                await pause()
        except anyio.get_cancelled_exc_class() as error:
            cancelled = error  # by asyncio itself: scopes do not shield from it
        except BaseException:
            process.destroy()
            raise
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # breaks a reference cycle: its traceback has this frame
