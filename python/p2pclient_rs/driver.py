"""The callback of connections that tasks share (see ``src/python/driver.rs``)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeAlias

from p2pclient_rs._native import PersistentConnection, Pipeline

__all__ = ["WakeUp", "on_readable", "run_ready"]

#: A call to make: with a context and one argument, or without a context and any arguments.
WakeUp: TypeAlias = tuple[Context | None, Callable[..., Any], Any]


def on_readable(connection: PersistentConnection | Pipeline) -> None:
    """Called by the event loop when a connection is readable."""
    ready: list[WakeUp] = []
    try:
        connection.read(ready)
    finally:  # also if a signal handler has raised
        run_ready(connection, ready)


def run_ready(connection: PersistentConnection | Pipeline, ready: list[WakeUp]) -> None:
    """Makes the calls that a read has made ready, then sends the connection's unsent output.

    The calls resume tasks. Python makes them and not Rust, because interpreter finalization may
    stop a thread within a task, and such a thread must not have Rust on its stack.
    """
    failed: BaseException | None = None
    # Whether to send at once. Tasks that are not resumed in place run later, and their messages are
    # then sent together.
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
                # An exception that ends the loop takes precedence.
                if failed is None or isinstance(failed, Exception):
                    failed = error
    finally:
        if ready:
            # A task may keep an exception whose traceback includes this frame.
            context = function = argument = None  # type: ignore[assignment]
            ready.clear()
        try:
            connection.flush(now)
        except BaseException:
            connection.flush(now)  # a signal handler may have interrupted it
            raise
    if failed is not None:
        try:
            raise failed
        finally:
            del failed
