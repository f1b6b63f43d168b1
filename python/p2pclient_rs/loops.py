"""The running event loop, asyncio's, uvloop's or trio's."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = [
    "UnlessClosed",
    "UnlessClosedAsync",
    "call_in_its_thread",
    "current_loop",
    "in_trio_task",
    "is_current",
]

T = TypeVar("T")


def current_loop() -> Any:
    """Returns the running event loop: asyncio's loop, or trio's token.

    Raises:
        RuntimeError: No event loop is running.
    """
    # Check for trio first, since in guest mode it runs inside an asyncio loop.
    if in_trio_task():
        return sys.modules["trio"].lowlevel.current_trio_token()
    return asyncio.get_running_loop()


def is_current(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Returns whether ``loop`` is the running event loop. Cheaper than ``current_loop``."""
    if asyncio._get_running_loop() is not loop:
        return False
    # In guest mode, trio runs inside the asyncio loop.
    return "trio" not in sys.modules or not in_trio_task()


def in_trio_task() -> bool:
    """Returns whether a trio task is running."""
    trio_module = sys.modules.get("trio")
    return trio_module is not None and bool(trio_module.lowlevel.in_trio_task())


def call_in_its_thread(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Calls ``callback`` in the thread of ``loop``, or at once if the loop has stopped.

    For finalizers, which run in any thread.
    """
    if asyncio._get_running_loop() is loop or not loop.is_running():
        callback()
        return
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:  # closed in the meantime
        callback()


class UnlessClosed(Generic[T]):
    """Exits a context at the end of a ``with`` block, unless the coroutine is closed there.

    The garbage collector or the end of the event loop closes a coroutine with ``GeneratorExit``. By
    then its task, and perhaps its loop, no longer exists, so anyio's scopes and locks cannot be
    exited and nothing can be awaited. The context's objects are collected with the coroutine.
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
