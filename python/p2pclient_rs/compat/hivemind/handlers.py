"""The tasks of stream handlers, each kept alive as long as asyncio's servers would keep it."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import weakref
from collections.abc import Coroutine
from typing import Any

from p2pclient_rs._native import RawStream
from p2pclient_rs.loops import current_loop
from p2pclient_rs.stream import Stream

__all__ = ["HandlerTasks"]

#: The shortest interval between checks of the sockets by partial collections, in seconds.
_CHECK_INTERVAL = 1.0

#: The pause before the event loop reads ahead again, in seconds.
_READ_INTERVAL = 0.05

#: The interval at which tasks that do not end are cancelled again, in seconds.
_CANCEL_INTERVAL = 1.0


class HandlerTasks:
    """The tasks of one listener.

    asyncio keeps a stream handler's task alive while the event loop watches the stream's socket:
    until the end of its input, or until 128 KiB of input are unread. After that, the garbage
    collector ends the task unless something else holds a reference to wake it.

    This class does the same: before a collection it releases the tasks of such streams. A daemon
    that cannot deliver input does not report the peer's end of stream behind it either, and small
    messages fill a socket buffer long before 128 KiB. So where a handler does not read, each check
    also makes the event loop read up to 128 KiB ahead.
    """

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._held: dict[asyncio.Task[None], RawStream] = {}
        #: The streams whose handlers have been called.
        self._streams: weakref.WeakKeyDictionary[
            asyncio.Task[None], weakref.ReferenceType[Stream]
        ] = weakref.WeakKeyDictionary()
        self._loop: asyncio.AbstractEventLoop = current_loop()
        #: Whether a call of `_read_ahead` is scheduled.
        self._reads_ahead = False
        self._pid = os.getpid()
        self._released = 0.0
        # A weak reference, so that ``gc.callbacks`` does not keep the tasks alive.
        release = weakref.WeakMethod(self._release)

        def before_collection(phase: str, info: dict[str, int]) -> None:
            if phase == "start" and (bound := release()) is not None:
                bound(info["generation"])

        self._before_collection = before_collection
        gc.callbacks.append(before_collection)
        weakref.finalize(self, _remove_callback, before_collection).atexit = False

    def start(self, work: Coroutine[Any, Any, None], raw: RawStream) -> None:
        """Runs ``work``, which serves the stream ``raw``, in a task."""
        task = asyncio.get_running_loop().create_task(work)
        if task.done():  # The loop starts tasks eagerly.
            return
        self._tasks.add(task)
        self._held[task] = raw
        held = self._held

        def forget(task: asyncio.Task[None]) -> None:
            held.pop(task, None)

        task.add_done_callback(forget)

    def set_stream(self, stream: Stream) -> None:
        """Records that the current task is about to call the handler of ``stream``."""
        task = asyncio.current_task()
        # A weak reference: the stream is closed when its handler drops it.
        if task is not None:
            self._streams[task] = weakref.ref(stream)

    async def stop(self) -> None:
        """Cancels the tasks and waits until they have ended."""
        _remove_callback(self._before_collection)
        this = asyncio.current_task()
        while pending := {task for task in self._tasks if not task.done() and task is not this}:
            for task in pending:
                task.cancel()
            await asyncio.wait(pending, timeout=_CANCEL_INTERVAL)

    def release_all(self) -> None:
        """Stops keeping the tasks alive, where nothing can be awaited. Those that something else
        can wake continue."""
        _remove_callback(self._before_collection)
        self._held.clear()

    def _release(self, generation: int) -> None:
        # A stuck task soon leaves the youngest generation. Full collections, such as by
        # ``gc.collect()``, always check.
        now = time.monotonic()
        recently = generation < 2 and now - self._released < _CHECK_INTERVAL
        if generation == 0 or recently or os.getpid() != self._pid:
            return
        self._released = now
        for task, raw in list(self._held.items()):
            if raw.is_unwatched():
                self._held.pop(task, None)
        if self._held and not self._reads_ahead:
            self._read_ahead_soon()

    def _read_ahead_soon(self) -> None:
        # Not here: a collection can run in any thread, and between a task's attempt to read and its
        # wait, which would then miss the input.
        read_ahead = weakref.WeakMethod(self._read_ahead)

        def call() -> None:
            if (bound := read_ahead()) is not None:
                bound()

        self._reads_ahead = True
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # The loop is closed.
            self._reads_ahead = False

    def _read_ahead(self) -> None:
        """Reads ahead from the streams whose handlers do not read."""
        self._reads_ahead = False
        if os.getpid() != self._pid:
            return
        unfinished = [
            (reference, stream._raw.operations)
            for task in list(self._held)
            if (reference := self._streams.get(task)) is not None
            and (stream := reference()) is not None
            and not stream._reading
            and stream._raw.prefetch()
        ]
        if unfinished:
            self._loop.call_later(_READ_INTERVAL, _read_on, unfinished)


def _read_on(streams: list[tuple[weakref.ReferenceType[Stream], int]]) -> None:
    """Continues to read ahead from streams that had input, unless they were used meanwhile."""
    unfinished = [
        (reference, operations)
        for reference, operations in streams
        if (stream := reference()) is not None
        and not stream._reading
        and stream._raw.operations == operations
        and stream._raw.prefetch()
    ]
    if unfinished:
        asyncio.get_running_loop().call_later(_READ_INTERVAL, _read_on, unfinished)


def _remove_callback(callback: Any) -> None:
    if callback in gc.callbacks:
        gc.callbacks.remove(callback)
