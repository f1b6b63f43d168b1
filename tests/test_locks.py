"""No lock is held while an exception is created, since that can run code that uses the object."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from support import new_directory

from p2pclient_rs import exceptions
from p2pclient_rs._native import (
    ControlConnection,
    RawListener,
    RawStream,
    Readiness,
    Request,
)

#: The time limit for all cases, in seconds. A case that waits for its own lock never ends.
PATIENCE = 60

#: Called while an exception is created, if set.
reenter: Callable[[], object] | None = None
reentered = 0


def reenter_now() -> None:
    global reenter, reentered
    if (function := reenter) is not None:
        reenter = None  # exceptions raised in it must not recurse
        reentered += 1
        with suppress(Exception):
            function()
        reenter = function


class Garbage:
    """A reference cycle whose collection also calls ``reenter``."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        reenter_now()


@contextmanager
def hooks() -> Iterator[None]:
    """Calls ``reenter`` whenever an exception of the extension module is created."""
    classes: list[Any] = [
        anyio.BrokenResourceError,
        anyio.ClosedResourceError,
        asyncio.LimitOverrunError,
        *(
            getattr(exceptions, name)
            for name in exceptions.__all__
            if isinstance(getattr(exceptions, name), type)
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for cls in classes:
            original = cls.__init__

            def init(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> None:
                reenter_now()
                _original(self, *args, **kwargs)

            patch.setattr(cls, "__init__", init)
        strerror = os.strerror

        def strerror_again(number: int) -> str:
            reenter_now()
            return strerror(number)

        patch.setattr(os, "strerror", strerror_again)
        yield


def stream() -> tuple[RawStream, socket.socket]:
    """Returns a stream and the socket of its peer."""
    path = f"{new_directory()}/s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        connection = ControlConnection.connect(path)
        assert connection is not None
        peer, _ = listening.accept()
    return connection.take_stream(), peer


def connection() -> tuple[ControlConnection, socket.socket]:
    path = f"{new_directory()}/s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        raw = ControlConnection.connect(path)
        assert raw is not None
        peer, _ = listening.accept()
    return raw, peer


def use_stream(raw: RawStream) -> Callable[[], object]:
    """Returns a function that takes the lock of a stream in every possible way."""

    def use() -> None:
        for attempt in (
            lambda: raw.closed,
            lambda: raw.at_eof,
            lambda: raw.buffered,
            lambda: raw.fileno(),
            lambda: raw.try_receive(0),
        ):
            with suppress(Exception):
                attempt()

    return use


def use_connection(raw: ControlConnection) -> Callable[[], object]:
    return lambda: (raw.consumed, raw.reusable, raw.fileno())


def closed_streams() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    operations: dict[str, Callable[[RawStream], object]] = {
        "try_receive": lambda raw: raw.try_receive(1 << 20),
        "a small try_receive": lambda raw: raw.try_receive(1),
        "try_read_exactly": lambda raw: raw.try_read_exactly(1),
        "a large try_read_exactly": lambda raw: raw.try_read_exactly(1 << 20),
        "try_read_until": lambda raw: raw.try_read_until(b"\n", 10),
        "try_read_frame": lambda raw: raw.try_read_frame(10),
        "try_send": lambda raw: raw.try_send(b"a", 0),
        "write": lambda raw: raw.write(b"a"),
        "cork": lambda raw: raw.cork(b"a"),
        "shutdown_write": lambda raw: raw.shutdown_write(),
        "look_ahead": lambda raw: raw.look_ahead(),
        "put_back": lambda raw: raw.put_back(b"a"),
        "duplicate": lambda raw: raw.duplicate(),
        "family": lambda raw: raw.family,
        "local_address": lambda raw: raw.local_address,
        "remote_address": lambda raw: raw.remote_address,
    }
    for name, operation in operations.items():
        raw, _ = stream()
        raw.close()
        yield f"closed: {name}", lambda raw=raw, do=operation: do(raw), use_stream(raw)  # type: ignore[misc]


def broken_streams() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    operations: dict[str, Callable[[RawStream], object]] = {
        "try_receive": lambda raw: raw.try_receive(1 << 20),
        "a small try_receive": lambda raw: raw.try_receive(1),
        "try_read_exactly": lambda raw: raw.try_read_exactly(1),
        "a large try_read_exactly": lambda raw: raw.try_read_exactly(1 << 20),
        "try_read_until": lambda raw: raw.try_read_until(b"\n", 10),
        "try_read_frame": lambda raw: raw.try_read_frame(10),
        "look_ahead": lambda raw: raw.look_ahead(),
        "try_send": lambda raw: raw.try_send(b"a", 0),
        "write": lambda raw: raw.write(b"a"),
        "flush": lambda raw: (raw.cork(b"a"), raw.flush()),
    }
    for name, operation in operations.items():
        raw, peer = stream()
        raw.write(b"unread, so that the peer's close is a reset")
        peer.close()
        yield f"broken: {name}", lambda raw=raw, do=operation: do(raw), use_stream(raw)  # type: ignore[misc]


def refused_streams() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    raw, peer = stream()
    raw.shutdown_write()
    yield "write ended", lambda: raw.write(b"a"), use_stream(raw)
    peer.sendall(b"\x05abc")
    yield "separator not found", lambda: raw.try_read_until(b"\n", 2), use_stream(raw)
    yield "separator beyond", lambda: raw.try_read_until(b"c", 2), use_stream(raw)
    yield "frame too long", lambda: raw.try_read_frame(2), use_stream(raw)
    peer.close()
    yield "end within a frame", lambda: raw.try_read_frame(10), use_stream(raw)


def connections() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    request = Request.identify()
    closed, _ = connection()
    closed.close()
    for name, operation in {
        "start": lambda: closed.start(request),
        "flush": closed.flush,
        "step": closed.step,
        "connected": lambda: closed.connected,
        "stale": lambda: closed.stale,
        "take_stream": closed.take_stream,
    }.items():
        yield f"closed connection: {name}", operation, use_connection(closed)
    for name, answer in {
        "the end": b"",
        "the end within an answer": b"\x05a",
        "a violation": b"\xff" * 20,
    }.items():
        raw, peer = connection()
        raw.start(request)
        peer.sendall(answer)
        peer.recv(100)
        peer.close()
        yield f"an answer that is {name}", raw.step, use_connection(raw)
    raw, peer = connection()
    peer.close()
    yield "a lost connection", lambda: raw.start(request), use_connection(raw)
    reset, peer = connection()
    reset.start(request)
    peer.close()
    yield "a connection that was reset", reset.step, use_connection(reset)
    busy, peer = connection()
    busy.start(request)
    yield "take_stream too early", busy.take_stream, use_connection(busy)
    watched, peer = connection()
    watched.start(request)
    loop = asyncio.new_event_loop()
    readiness = Readiness(loop, watched.fileno(), print, print)
    readiness.close()
    yield "answer of a closed watch", lambda: readiness.answer(watched), lambda: readiness.close()
    loop.close()


def listeners() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    path = f"{new_directory()}/s"
    listener = RawListener(path)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            yield "accept without descriptors", listener.try_accept, listener.fileno
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    listener.close()
    yield "accept on a closed listener", listener.try_accept, listener.fileno
    yield "address of a closed listener", lambda: listener.local_address, listener.fileno


def run() -> None:
    """Runs every case. Prints the name first, so that a case that hangs is the last one printed."""
    global reenter
    gc.collect()
    gc.set_threshold(1)
    with hooks():
        for cases in (closed_streams, broken_streams, refused_streams, connections, listeners):
            for name, operation, use in cases():
                print(name, flush=True)
                Garbage()
                reenter = use
                before = reentered
                try:
                    operation()
                except Exception as error:
                    # Some exceptions are created lazily, on first use.
                    assert str(error)
                else:
                    raise AssertionError("no exception")
                finally:
                    reenter = None
                assert reentered > before, "reenter was not called"
    print("done", flush=True)


def test_code_run_while_an_exception_is_created_may_use_the_object() -> None:
    completed = subprocess.run(
        [sys.executable, __file__],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.endswith("done\n")


if __name__ == "__main__":
    run()
