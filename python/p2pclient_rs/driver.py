"""What an event loop calls for a connection that tasks share (see ``src/python/driver.rs``)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeAlias

from p2pclient_rs._native import PersistentConnection, Pipeline

__all__ = ["on_readable", "run_ready"]

#: A call to make: in a context with one argument, or without a context with several.
_WakeUp: TypeAlias = tuple[Context | None, Callable[..., Any], Any]


def on_readable(connection: PersistentConnection | Pipeline) -> None:
    """What an event loop calls when a shared connection is readable."""
    ready: list[_WakeUp] = []
    try:
        connection.read(ready)
    finally:  # also if a signal handler raises as that returns
        run_ready(connection, ready)


def run_ready(connection: PersistentConnection | Pipeline, ready: list[_WakeUp]) -> None:
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
