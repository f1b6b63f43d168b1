"""Runs code in forked children, and reports their failures."""

from __future__ import annotations

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


async def in_child(work: Callable[[], None]) -> None:
    """Runs ``work`` in a forked child; fails with the child's traceback if it raises."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 warns about forking a process with threads
        pid = os.fork()
    if pid == 0:
        status, report = 1, ""
        try:
            signal.alarm(CHILD_LIMIT)
            work()
            status = 0
        except BaseException:
            report = traceback.format_exc()
        finally:
            os.write(write_end, report.encode())
            os._exit(status)
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
