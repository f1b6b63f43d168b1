"""The event loop that is running: waiting for a socket on asyncio, uvloop or trio."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import Context
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import anyio

from p2pclient_rs._native import (
    ControlConnection,
    PersistentConnection,
    Pipeline,
    RawStream,
    Readiness,
)

__all__ = [
    "Promise",
    "Reactor",
    "UnlessClosed",
    "UnlessClosedAsync",
    "Watch",
    "Work",
    "call_in_its_thread",
    "current_loop",
    "in_trio_task",
    "is_current",
    "on_readable",
    "reactor",
    "run_ready",
    "watch",
]

logger: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What is to be called: in a context with one argument, or without one with several.
_Call: TypeAlias = tuple[Context | None, Callable[..., Any], Any]


class UnlessClosed(Generic[T]):
    """Leaves a context at the end of a ``with`` block, unless the coroutine is closed there.

    The garbage collector, or the end of the event loop, closes a coroutine with ``GeneratorExit``.
    Its task, and perhaps its loop, are gone then: anyio's scopes and locks cannot be left, and
    nothing can be awaited. What the context refers to is collected with the coroutine.
    """

    def __init__(self, context: AbstractContextManager[T, bool | None]) -> None:
        self._context = context

    def __enter__(self) -> T:
        return self._context.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if kind is GeneratorExit:
            return None
        return self._context.__exit__(kind, error, traceback)


class UnlessClosedAsync(Generic[T]):
    """As ``UnlessClosed``, for ``async with``."""

    def __init__(self, context: AbstractAsyncContextManager[T, bool | None]) -> None:
        self._context = context

    async def __aenter__(self) -> T:
        return await self._context.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        if kind is GeneratorExit:
            return None
        return await self._context.__aexit__(kind, error, traceback)


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

    def abandon(self, raw: RawStream | ControlConnection | Pipeline) -> None:
        """Closes a socket that nobody holds any more, in whichever thread or forked child that is
        found."""


def current_loop() -> Any:
    """What identifies the running event loop: the loop itself, or trio's token.

    Raises:
        RuntimeError: None is running.
    """
    # Trio first: as a guest it runs inside an asyncio loop.
    if in_trio_task():
        return sys.modules["trio"].lowlevel.current_trio_token()
    return asyncio.get_running_loop()


def is_current(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Whether ``loop`` is the running event loop: a short way to ask for what is asked often."""
    if asyncio._get_running_loop() is not loop:
        return False
    # Trio as a guest runs inside it.
    return "trio" not in sys.modules or not in_trio_task()


def in_trio_task() -> bool:
    """Whether a trio task is running."""
    trio_module = sys.modules.get("trio")
    return trio_module is not None and bool(trio_module.lowlevel.in_trio_task())


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

    def abandon(self, raw: RawStream | ControlConnection | Pipeline) -> None:
        if os.getpid() != self._pid:
            self._close_both(raw)
        else:
            call_in_its_thread(self._loop, functools.partial(self._close_both, raw))

    def _close_both(self, raw: RawStream | ControlConnection | Pipeline) -> None:
        try:
            self.close()
        finally:
            raw.close()


def call_in_its_thread(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Calls back here if this is the thread of ``loop`` or that has stopped; otherwise there."""
    # A finalizer can run in any thread, and a loop is not to be touched from another.
    if asyncio._get_running_loop() is loop or not loop.is_running():
        callback()
        return
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # it was closed meanwhile
        callback()


def _on_readable(readiness: Readiness) -> None:
    # A task is resumed here and now, not by a callback that schedules it: the loop would make a
    # system call in between, which costs more than the rest.
    ready: list[_Call] = []
    try:
        readiness.read_ready(ready)
    finally:  # also if a signal handler raises as that returns
        _run_first(ready)


def _on_writable(readiness: Readiness) -> None:
    ready: list[_Call] = []
    try:
        readiness.write_ready(ready)
    finally:
        try:
            _run_first(ready)
        finally:
            readiness.remove_idle_writer()


def _run_first(ready: list[_Call]) -> None:
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

    def abandon(self, raw: RawStream | ControlConnection | Pipeline) -> None:
        # A task that waited would hold the stream, so none does.
        self._closed = True
        raw.close()


class Promise(Protocol):
    """Something to await that is set from outside, once."""

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Any, /) -> None: ...
    def done(self) -> bool: ...
    def __await__(self) -> Generator[Any, None, Any]: ...


class Work(Protocol):
    """A task of its own, which can be cancelled."""

    def cancel(self) -> object: ...


class Reactor(Protocol):
    """An event loop as something that calls back, for what is served without a task that waits."""

    @property
    def event_loop(self) -> Any:
        """What the native drivers call: asyncio's loop, or this, which has the same methods."""

    def add_reader(self, fd: int, callback: Callable[..., object], /, *args: Any) -> object: ...
    def remove_reader(self, fd: int, /) -> object: ...
    def add_writer(self, fd: int, callback: Callable[..., object], /, *args: Any) -> object: ...
    def remove_writer(self, fd: int, /) -> object: ...
    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_later(self, delay: float, callback: Callable[[], object], /) -> object: ...

    def create_future(self) -> Promise:
        """Something new to wait for."""

    def is_closed(self) -> bool:
        """Whether the loop is no more."""

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        """Runs ``work``, which raises nothing, in a task of its own, in a copy of ``context``."""

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        """Calls back when work that was cancelled has ended, if it may never have begun."""

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        """Calls back in the loop's thread, now or soon, or here if the loop has stopped."""


def reactor() -> Reactor:
    """The running event loop.

    Raises:
        RuntimeError: None is running.
    """
    loop = current_loop()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return AsyncioReactor(loop)
    return TrioReactor(loop)


class AsyncioReactor:
    """An asyncio or uvloop loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.event_loop: asyncio.AbstractEventLoop = loop
        self.add_reader: Callable[..., None] = loop.add_reader
        self.remove_reader: Callable[[int], bool] = loop.remove_reader
        self.add_writer: Callable[..., None] = loop.add_writer
        self.remove_writer: Callable[[int], bool] = loop.remove_writer
        self.call_soon: Callable[..., object] = loop.call_soon
        self.call_later: Callable[..., object] = loop.call_later
        self.create_future: Callable[[], Promise] = loop.create_future
        self.is_closed: Callable[[], bool] = loop.is_closed

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        loop = self._loop
        if loop.get_task_factory() is not None or sys.version_info < (3, 11):
            # A new task copies the context that it is made in.
            return context.run(loop.create_task, work)
        # As the loop would do it, without the detour.
        if sys.version_info >= (3, 12):
            # It ends here and now if it can, which is 1 us less than another turn of the loop.
            return asyncio.Task(work, loop=loop, context=context.copy(), eager_start=True)
        return asyncio.Task(work, loop=loop, context=context.copy())

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        work.add_done_callback(lambda _: callback())

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        call_in_its_thread(self._loop, callback)


class TrioReactor:
    """A trio run, whose system tasks do the calling back.

    They end with the run, without a word to whoever is waited for: nobody is left to wait then.
    """

    def __init__(self, token: Any) -> None:
        import trio

        self.event_loop = self
        self._trio: Any = trio
        self._token = token
        self._watches: dict[tuple[int, str], tuple[Any, Any]] = {}

    def is_closed(self) -> bool:
        try:
            self._token.run_sync_soon(lambda: None, idempotent=True)
        except self._trio.RunFinishedError:
            return True
        return False

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._add(fd, "wait_readable", functools.partial(callback, *args))

    def remove_reader(self, fd: int) -> None:
        self._remove(fd, "wait_readable")

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._add(fd, "wait_writable", functools.partial(callback, *args))

    def remove_writer(self, fd: int) -> None:
        self._remove(fd, "wait_writable")

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._token.run_sync_soon(callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        async def run() -> None:
            await self._trio.sleep(delay)
            _logged(callback)

        if self._trio.lowlevel.in_trio_run():
            self._trio.lowlevel.spawn_system_task(run)

    def create_future(self) -> Promise:
        return _TrioPromise(self._trio)

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        scope = self._trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    await work
            except Exception:
                # What is left of a group with Cancelled in it: it must not end the whole run.
                logger.exception("a handler failed when it was cancelled")

        self._trio.lowlevel.spawn_system_task(run, context=context.copy())
        return _TrioWork(scope)

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        pass  # it always begins, and ends by itself

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        trio = self._trio
        if trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token:
            callback()
            return
        try:
            self._token.run_sync_soon(callback)
        except trio.RunFinishedError:
            callback()

    def _add(self, fd: int, wait: str, callback: Callable[[], object]) -> None:
        _, before = self._watches.get((fd, wait), (None, None))
        scope, ended = self._trio.CancelScope(), self._trio.Event()
        self._watches[fd, wait] = scope, ended

        async def run() -> None:
            try:
                with scope:
                    if before is not None:
                        # Trio lets one task wait for a descriptor: the last must be off it.
                        await before.wait()
                    while not scope.cancel_called:
                        await getattr(self._trio.lowlevel, wait)(fd)
                        _logged(callback)
            except self._trio.ClosedResourceError:
                pass
            finally:
                ended.set()

        self._trio.lowlevel.spawn_system_task(run)

    def _remove(self, fd: int, wait: str) -> None:
        scope, _ = self._watches.get((fd, wait), (None, None))
        if scope is not None:
            scope.cancel()


def on_readable(connection: PersistentConnection | Pipeline) -> None:
    """What an event loop calls when a shared connection is readable."""
    ready: list[_Call] = []
    try:
        connection.read(ready)
    finally:  # also if a signal handler raises as that returns
        run_ready(connection, ready)


def run_ready(connection: PersistentConnection | Pipeline, ready: list[_Call]) -> None:
    """Makes the calls that what came over a connection has made ready, then has it send what waits.

    Python makes them, not Rust: they resume tasks, which can do anything, and a thread that the end
    of the interpreter stops there must not have Rust on its stack.
    """
    failed: BaseException | None = None
    # If nobody is resumed here, the woken tasks run later, and what they send goes out together.
    now = bool(ready)
    try:
        for context, function, argument in ready:
            try:
                if context is not None:
                    context.run(function, argument)
                else:
                    now = False
                    function(*argument)
            except BaseException as error:  # does not stop the batch
                # An exception that ends the loop must not be lost behind one that does not.
                if failed is None or isinstance(failed, Exception):
                    failed = error
    finally:
        if ready:
            # A task may keep an exception whose frames reach this one.
            context = function = argument = None  # type: ignore[assignment]
            ready.clear()
        try:
            connection.flush(now)
        except BaseException:
            connection.flush(now)  # a signal handler may have raised before it was done
            raise
    if failed is not None:
        try:
            raise failed
        finally:
            del failed


def _logged(callback: Callable[[], object]) -> None:
    # An exception in a system task would end the run.
    try:
        callback()
    except Exception:
        logger.exception("a callback failed")


class _TrioWork:
    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def cancel(self) -> None:
        self._scope.cancel()


class _TrioPromise:
    def __init__(self, trio: Any) -> None:
        self._set = trio.Event()
        self._result: Any = None
        self._exception: BaseException | None = None

    def set_result(self, result: Any) -> None:
        self._result = result
        self._set.set()

    def set_exception(self, exception: Any) -> None:
        self._exception = exception
        self._set.set()

    def done(self) -> bool:
        return bool(self._set.is_set())

    def __await__(self) -> Generator[Any, None, Any]:
        yield from self._set.wait().__await__()
        if self._exception is not None:
            raise self._exception
        return self._result
