"""Runs code in forked children, and reports their failures."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from support import until

#: Time limit of a child, in seconds.
CHILD_LIMIT = 20


def fork() -> int:
    """``os.fork()``, without the warning about other threads that CPython 3.12 added."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


async def in_child(work: Callable[[], None]) -> None:
    """Runs ``work`` in a forked child; fails with the child's traceback if it raises."""
    read_end, write_end = os.pipe()
    pid = fork()
    if pid == 0:
        signal.alarm(CHILD_LIMIT)
        _end_child(work, write_end)
    os.close(write_end)
    result: list[int] = []

    def exited() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            result.append(os.waitstatus_to_exitcode(status))
        return bool(done)

    try:
        await until(exited, within=2 * CHILD_LIMIT)
        report = os.read(read_end, 1 << 16).decode()
    finally:
        os.close(read_end)
    assert result == [0], report


async def with_loop_running_in_child(
    begin: Callable[[], object], check: Callable[[], object]
) -> None:
    """Runs the current asyncio or uvloop loop in a forked child for half a second, then ``check``.

    Calls ``begin`` in the parent, whose loop is blocked until the child has ended. From Python 3.14
    on, such a loop runs callbacks but does not resume tasks.
    """
    loop = asyncio.get_running_loop()
    read_end, write_end = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            signal.alarm(CHILD_LIMIT)
            loop.call_later(0.5, _end_child, check, write_end)
            await loop.create_future()
        finally:
            os._exit(1)
    os.close(write_end)
    begin()
    report = os.read(read_end, 1 << 16).decode()
    os.close(read_end)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, report


def _end_child(work: Callable[[], object], write_end: int) -> None:
    status, report = 1, ""
    try:
        work()
        status = 0
    except BaseException:
        report = traceback.format_exc()
    finally:
        os.write(write_end, report.encode())
        os._exit(status)


def run_in_thread(backend: Any, work: Callable[[], Awaitable[None]]) -> None:
    """Runs an event loop in a new thread, since in a child the parent's loop occupies this one."""
    errors: list[BaseException] = []

    def target() -> None:
        try:
            anyio.run(work, backend=backend[0], backend_options=backend[1])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    for error in errors:
        raise error
