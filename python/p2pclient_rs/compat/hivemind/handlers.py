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
from p2pclient_rs.loops import current_loop
from p2pclient_rs.streams import Stream

__all__ = ["HandlerTasks"]

#: How often partial collections check the sockets at most, in seconds.
_INTERVAL = 1.0

#: How long after a read the event loop reads ahead again, in seconds.
_READ_INTERVAL = 0.05

#: How long an end that was asked for may take before the tasks are cancelled again, in seconds.
_PATIENCE = 1.0


class HandlerTasks:
    """The tasks of one listener.

    asyncio holds the task of a stream's handler while the event loop watches the stream's socket:
    up to the end of its input, or until 128 KiB of input are unread. From then on the task lives
    only if something else can wake it; if nothing can, the garbage collector ends it.

    This class does the same: before a collection it releases the tasks of such streams. A daemon
    that cannot deliver input does not tell of the peer's end behind it, and small messages fill a
    socket long before 128 KiB. So each check also has the event loop read up to 128 KiB ahead,
    where the handler does not read.
    """

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._held: dict[asyncio.Task[None], RawStream] = {}
        #: The streams whose handlers were called.
        self._streams: weakref.WeakKeyDictionary[
            asyncio.Task[None], weakref.ReferenceType[Stream]
        ] = weakref.WeakKeyDictionary()
        self._loop: asyncio.AbstractEventLoop = current_loop()
        #: Whether the event loop is to read ahead.
        self._reads_ahead = False
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

        def forget(task: asyncio.Task[None]) -> None:
            held.pop(task, None)

        task.add_done_callback(forget)

    def handling(self, stream: Stream) -> None:
        """The current task, one of these, is about to call the handler of ``stream``."""
        task = asyncio.current_task()
        # Weakly: the stream is closed when its handler drops it.
        if task is not None:
            self._streams[task] = weakref.ref(stream)

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
        if self._held and not self._reads_ahead:
            self._read_ahead_soon()

    def _read_ahead_soon(self) -> None:
        # Not here: a collection can come in any thread, and between the attempt of a task to read
        # and its wait, which would then miss the input.
        read_ahead = weakref.WeakMethod(self._read_ahead)

        def call() -> None:
            if (bound := read_ahead()) is not None:
                bound()

        self._reads_ahead = True
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed
            self._reads_ahead = False

    def _read_ahead(self) -> None:
        """Reads the input of handlers that do not read."""
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
    """Goes on reading ahead from streams that had input, unless they were used since."""
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


def _forget(callback: Any) -> None:
    if callback in gc.callbacks:
        gc.callbacks.remove(callback)
