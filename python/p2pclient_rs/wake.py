"""Tests whether the tasks of an event loop can be resumed in place (see ``src/python/wake.rs``)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context
from typing import Any

from p2pclient_rs._native import report_first_wake

__all__ = ["first_wake", "shows_callbacks"]

logger: logging.Logger = logging.getLogger(__name__)


def shows_callbacks(loop: object) -> bool:
    """Returns whether the futures of ``loop`` have their callbacks in ``_callbacks``, as asyncio's
    do, and allow removing them. Called once for each type of loop."""
    if not isinstance(loop, asyncio.AbstractEventLoop):
        return False

    def callback(_: object) -> None:
        pass

    try:
        future: Any = loop.create_future()
        future.add_done_callback(callback)
        ((shown, context),) = future._callbacks
        works = (
            shown is callback
            and isinstance(context, Context)
            and future.remove_done_callback(callback) == 1
            and not future._callbacks
        )
    except Exception as error:
        _fall_back(loop, repr(error))
        return False
    if not works:
        _fall_back(loop, "the callbacks of its futures cannot be removed")
    return works


def first_wake(
    loop: asyncio.AbstractEventLoop,
    context: Context,
    callback: Callable[[Any], object],
    future: object,
) -> None:
    """Calls the callback that a task added to its future. Reports whether it resumed the task.

    If it did not, schedules the callback with the loop, as the future would have done.
    """
    task = getattr(callback, "__self__", None)
    context.run(callback, future)
    if not isinstance(task, asyncio.Task):
        return  # not the callback of a task: proves nothing
    if task.done() or getattr(task, "_fut_waiter", future) is not future:
        report_first_wake(loop, True)
    else:
        report_first_wake(loop, False)
        _fall_back(loop, "the callbacks of its futures do not resume tasks")
        loop.call_soon(callback, future, context=context)


def _fall_back(loop: object, reason: str) -> None:
    kind = f"{type(loop).__module__}.{type(loop).__qualname__}"
    logger.debug("tasks of %s are resumed in the ordinary way: %s", kind, reason)
