"""The tasks of stream handlers, each held for as long as asyncio's servers would hold it."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import weakref
from collections.abc import Coroutine
from typing import Any

from p2pclient_rs._native import RawStream

__all__ = ["HandlerTasks"]

#: How often partial collections check the sockets at most, in seconds.
_INTERVAL = 1.0

#: How long an end that was asked for may take before the tasks are cancelled again, in seconds.
_PATIENCE = 1.0


class HandlerTasks:
    """The tasks of one listener.

    asyncio holds the task of a stream's handler while the event loop watches the stream's socket:
    up to the end of its input, or until its reader is full. From then on the task lives only if
    something else can wake it; if nothing can, the garbage collector ends it. Here too: before a
    collection, tasks are released whose peer has ended its input or whose input is unread. (asyncio
    would read up to 128 KiB first. But small messages fill a socket with much less, and a daemon
    that cannot deliver them does not tell of the peer's end.)
    """

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._held: dict[asyncio.Task[None], RawStream] = {}
        self._pid = os.getpid()
        self._released = 0.0
        # Weakly: ``gc.callbacks`` must not hold the tasks.
        release = weakref.WeakMethod(self._release)

        def before_collection(phase: str, info: dict[str, int]) -> None:
            if phase == "start" and (bound := release()) is not None:
                bound(info["generation"])

        self._before_collection = before_collection
        gc.callbacks.append(before_collection)
        weakref.finalize(self, _forget, before_collection).atexit = False

    def start(self, work: Coroutine[Any, Any, None], raw: RawStream) -> None:
        """Runs ``work``, which serves a stream, in a task."""
        task = asyncio.get_running_loop().create_task(work)
        if task.done():  # where tasks start eagerly
            return
        self._tasks.add(task)
        self._held[task] = raw
        held = self._held
        task.add_done_callback(lambda task: held.pop(task, None) and None)

    async def stop(self) -> None:
        """Cancels the tasks and waits for their end."""
        _forget(self._before_collection)
        this = asyncio.current_task()
        while pending := {task for task in self._tasks if not task.done() and task is not this}:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_PATIENCE)

    def abandon(self) -> None:
        """Stops holding the tasks, which go on for as long as something else can wake them: for
        where nothing can be awaited."""
        _forget(self._before_collection)
        self._held.clear()

    def _release(self, generation: int) -> None:
        # A stuck task soon leaves the youngest generation. Full collections, such as those of
        # ``gc.collect()``, always check.
        now = time.monotonic()
        recently = generation < 2 and now - self._released < _INTERVAL
        if generation == 0 or recently or os.getpid() != self._pid:
            return
        self._released = now
        for task, raw in list(self._held.items()):
            if raw.is_unwatched():
                self._held.pop(task, None)


def _forget(callback: Any) -> None:
    if callback in gc.callbacks:
        gc.callbacks.remove(callback)
