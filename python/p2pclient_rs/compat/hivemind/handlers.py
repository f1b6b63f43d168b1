"""The tasks of stream handlers, kept alive for as long as asyncio's servers keep theirs."""

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

#: The shortest interval between checks of the sockets before partial collections, in seconds.
_CHECK_INTERVAL = 1.0

#: The pause before the event loop reads ahead again, in seconds.
_READ_INTERVAL = 0.05

#: How often ``stop`` cancels tasks that do not end, in seconds.
_CANCEL_INTERVAL = 1.0


class HandlerTasks:
    """The tasks of one listener.

    asyncio keeps a stream handler's task alive while the event loop watches the stream's socket,
    that is, until the end of the input or until 128 KiB of input are unread. After that, the
    garbage collector ends the task, unless something else holds a reference with which to wake it.

    This class does the same: before a garbage collection, it drops its references to the tasks
    whose sockets are no longer watched. If a handler does not read, the socket's buffer fills up,
    with small messages long before 128 KiB. The daemon can then deliver neither the rest of the
    input nor the end of the stream. So each check also makes the event loop read up to 128 KiB
    ahead for handlers that do not read.
    """

    def __init__(self) -> None:
        self._tasks: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._held: dict[asyncio.Task[None], RawStream] = {}
        #: The stream of each task whose handler has been called.
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
        # A weak reference, so that the stream is closed when its handler drops it.
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
        """Stops keeping the tasks alive, for callers that cannot await ``stop``.

        Tasks that something else can wake continue.
        """
        _remove_callback(self._before_collection)
        self._held.clear()

    def _release(self, generation: int) -> None:
        # Collections of the youngest generation never check, as stuck tasks soon leave it. Full
        # collections, such as ``gc.collect()``, always check.
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
        # Schedules the read, because a collection can run in any thread. It can also run after a
        # task's attempt to read and before its wait, which would then miss the input.
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
    """Reads ahead again from streams that had input and have not been used since."""
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
