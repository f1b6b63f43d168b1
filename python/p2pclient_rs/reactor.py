"""Event loops as reactors, whose callbacks serve connections without a task for each."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import weakref
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, Protocol

from p2pclient_rs.loops import call_in_its_thread, current_loop

__all__ = ["Future", "Reactor", "Work", "reactor", "silence"]

logger: logging.Logger = logging.getLogger(__name__)


class Future(Protocol):
    """A result that a task awaits, and that a callback sets once."""

    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: Any, /) -> None: ...
    def done(self) -> bool: ...
    def __await__(self) -> Generator[Any, None, Any]: ...


class Work(Protocol):
    """A task or timer, which can be cancelled."""

    def cancel(self) -> object: ...


class Reactor(Protocol):
    """An event loop that calls back. The methods are asyncio's, unless documented here."""

    @property
    def event_loop(self) -> Any:
        """The object for the native drivers: asyncio's loop, or this reactor."""

    def call_soon(self, callback: Callable[[], object], /) -> object: ...
    def call_later(self, delay: float, callback: Callable[[], object], /) -> Work: ...

    def create_future(self) -> Future: ...
    def is_closed(self) -> bool: ...

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        """Runs ``work``, which must not raise, in a new task with a copy of ``context``."""

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        """Calls ``callback`` when ``work`` has ended, even if it never began.

        Does nothing on trio, where a task always begins and so can do this itself.
        """

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        """Calls ``callback`` in the loop's thread. If the loop has stopped, and in a forked child,
        calls it at once."""


def silence(work: Any) -> None:
    """Keeps asyncio from warning of a task if its loop is closed without cancelling its tasks."""
    if hasattr(work, "_log_destroy_pending"):
        work._log_destroy_pending = False


def reactor() -> Reactor:
    """Returns a reactor of the running event loop.

    Raises:
        RuntimeError: No event loop is running.
    """
    loop = current_loop()
    if isinstance(loop, asyncio.AbstractEventLoop):
        return AsyncioReactor(loop)
    return TrioReactor(loop)


class AsyncioReactor:
    """An asyncio or uvloop loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = loop
        self._pid = os.getpid()
        self.call_soon: Callable[..., object] = loop.call_soon
        self.call_later: Callable[..., Work] = loop.call_later
        self.create_future: Callable[[], Future] = loop.create_future
        self.is_closed: Callable[[], bool] = loop.is_closed

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        loop = self.event_loop
        if loop.get_task_factory() is not None or sys.version_info < (3, 11):
            # A new task copies the current context.
            return context.run(loop.create_task, work)
        # Same as ``create_task``, but faster.
        if sys.version_info >= (3, 12):
            # A handler that does not wait completes here, which saves a loop iteration (1 us).
            return asyncio.Task(work, loop=loop, context=context.copy(), eager_start=True)
        return asyncio.Task(work, loop=loop, context=context.copy())

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        work.add_done_callback(lambda _: callback())

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        if os.getpid() != self._pid:
            callback()
        else:
            call_in_its_thread(self.event_loop, callback)


class TrioReactor:
    """A trio run. Each callback has its own system task, which waits for the descriptor.

    The system tasks end with the run. Futures stay incomplete then, since no task awaits them.
    """

    def __init__(self, token: Any) -> None:
        import trio

        from p2pclient_rs.trio_future import TrioFuture

        self.event_loop: TrioReactor = self
        self.create_future: Callable[[], Future] = TrioFuture
        self._trio: Any = trio  # untyped, since stubs of an older trio may be installed
        # Weak, since the token keeps its pool alive, and the pool keeps this alive.
        self._token = weakref.ref(token)
        self._pid = os.getpid()
        self._scopes: dict[tuple[int, str], Any] = {}
        #: Whether a system task is running a callback, and the calls to make after that.
        self._in_callback = False
        self._soon: list[Callable[[], object]] = []

    def is_closed(self) -> bool:
        token = self._token()
        if token is None:
            return True
        try:
            token.run_sync_soon(_nothing, idempotent=True)
        except self._trio.RunFinishedError:
            return True
        return False

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._add(fd, "wait_readable", callback, args)

    def remove_reader(self, fd: int) -> None:
        self._remove(fd, "wait_readable")

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._add(fd, "wait_writable", callback, args)

    def remove_writer(self, fd: int) -> None:
        self._remove(fd, "wait_writable")

    def call_soon(self, callback: Callable[[], object]) -> None:
        if self._in_callback:
            self._soon.append(callback)
        else:
            token = self._token()
            if token is not None:
                token.run_sync_soon(_log_errors, callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> Work:
        scope = self._trio.CancelScope()

        async def run() -> None:
            with scope:
                await self._trio.sleep(delay)
                _log_errors(callback)

        if self._trio.lowlevel.in_trio_run():
            self._trio.lowlevel.spawn_system_task(run)
        return _TrioWork(scope)

    def spawn(self, work: Coroutine[Any, Any, None], context: Context) -> Work:
        scope = self._trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    await work
            except Exception:
                # What remains of an exception group without its Cancelled must not end the run.
                logger.exception("a handler failed when it was cancelled")

        self._trio.lowlevel.spawn_system_task(run, context=context.copy())
        return _TrioWork(scope)

    def when_ended(self, work: Any, callback: Callable[[], object]) -> None:
        pass  # a system task always begins

    def call_from_anywhere(self, callback: Callable[[], object]) -> None:
        lowlevel, token = self._trio.lowlevel, self._token()
        if (
            token is None
            or os.getpid() != self._pid
            or (lowlevel.in_trio_run() and lowlevel.current_trio_token() is token)
        ):
            callback()
            return
        try:
            token.run_sync_soon(callback)
        except self._trio.RunFinishedError:
            callback()

    def _add(
        self, fd: int, wait: str, callback: Callable[..., object], args: tuple[Any, ...]
    ) -> None:
        scope = self._scopes[fd, wait] = self._trio.CancelScope()
        spawn = self._trio.lowlevel.spawn_system_task
        spawn(self._call_back, scope, getattr(self._trio.lowlevel, wait), fd, callback, args)

    def _remove(self, fd: int, wait: str) -> None:
        scope = self._scopes.pop((fd, wait), None)
        if scope is not None:
            # Unregisters the descriptor at once, so that another task can wait for it.
            scope.cancel()

    async def _call_back(
        self,
        scope: Any,
        wait: Callable[[int], Any],
        fd: int,
        callback: Callable[..., object],
        args: tuple[Any, ...],
    ) -> None:
        try:
            with scope:
                while not scope.cancel_called:
                    await wait(fd)
                    self._in_callback = True
                    try:
                        _log_errors(callback, *args)
                    finally:
                        self._in_callback = False
                    if self._soon:
                        await self._call_soon()
        except self._trio.ClosedResourceError:
            pass
        except OSError:
            # An exception in a system task would end the run.
            logger.exception("cannot wait for a descriptor")

    async def _call_soon(self) -> None:
        # The woken tasks run in the next batch of trio's scheduler, in any order relative to this
        # task. By the batch after that, they have run.
        for _ in range(2):
            await self._trio.lowlevel.cancel_shielded_checkpoint()
        soon, self._soon = self._soon, []
        for callback in soon:
            _log_errors(callback)


def _nothing() -> None:
    pass


def _log_errors(callback: Callable[..., object], *args: Any) -> None:
    # An exception in a system task would end the run.
    try:
        callback(*args)
    except Exception:
        logger.exception("a callback failed")


class _TrioWork:
    def __init__(self, scope: Any) -> None:
        self._scope = scope

    def cancel(self) -> None:
        self._scope.cancel()
