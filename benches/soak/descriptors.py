"""The limit on descriptors reached and released, by the caller and by the listener; ten times each.

While the caller is at its limit, each new stream is refused at once with the system's message, and
open streams keep working. While the listener is at its limit, new streams wait, and are served once
descriptors are free again.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from p2pclient_rs import ControlFailure, Stream
from soak.harness import Soak

FULL = 10
#: Free descriptors when the limit is set.
LEFT = 20
#: Streams to open: more than there are descriptors.
TRIED = 60
PROTOCOL = "/soak/frames"


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Limits this process to ``more`` descriptors in addition to those it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def is_precise(error: BaseException | None) -> bool:
    """Whether text and cause of the error name the lack of descriptors."""
    if "Too many open files" not in str(error):
        return False
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__
    return False


async def run(soak: Soak) -> None:
    cycles = soak.scaled(FULL)
    numbers = iter(range(cycles * 10 * TRIED))
    slowest = 0.0

    async def fill() -> list[Stream]:
        """Opens streams until there are no descriptors left, and expects the rest to fail."""
        nonlocal slowest
        streams = []
        for _ in range(TRIED):
            began = time.monotonic()
            try:
                stream = await soak.open_frames(PROTOCOL)
            except ControlFailure as error:
                soak.failed(error)
                soak.promise(is_precise(error), f"imprecise error: {error!r}")
            else:
                streams.append(stream)
                await soak.frame(stream, next(numbers))
            slowest = max(slowest, time.monotonic() - began)
        soak.promise(0 < len(streams) < TRIED, f"{len(streams)} of {TRIED} streams were opened")
        return streams

    async def end(stream: Stream) -> None:
        async with stream:
            await stream.send_eof()
            await stream.read()

    async def caller() -> None:
        with at_most(LEFT):
            streams = await fill()
            for stream in streams:  # still usable
                await soak.frame(stream, next(numbers))
            await soak.call("soak", next(numbers))
            for stream in streams:
                await end(stream)
            # Descriptors given back can be used again.
            again = await fill()
            soak.promise(len(again) >= len(streams) - 2, f"{len(again)} after {len(streams)}")
            for stream in again:
                await end(stream)
        async with await soak.open_frames(PROTOCOL) as stream:
            await soak.frame(stream, next(numbers))
            await end(stream)

    async def listener() -> None:
        [peer] = soak.peers
        await peer.ask("limit", more=LEFT)
        before = (await peer.ask("state"))["cpu"]
        streams = [await soak.open_frames(PROTOCOL) for _ in range(TRIED)]
        served = 0

        async def use(stream: Stream, number: int) -> None:
            nonlocal served
            await soak.frame(stream, number)
            served += 1

        async with anyio.create_task_group() as tasks:
            for stream in streams:
                tasks.start_soon(use, stream, next(numbers))
            await anyio.sleep(1)
            soak.promise(0 < served < TRIED, f"{served} of {TRIED} streams were served")
            await soak.call("soak", next(numbers))
            used = (await peer.ask("state"))["cpu"] - before
            soak.figures["CPU seconds in a second at the listener's limit"] = used
            soak.promise(used < 0.5, f"the waiting listener used {used:.2f} s of CPU")
            await peer.ask("limit", more=None)
        soak.promise(served == TRIED, f"{served} of {TRIED} streams were served in the end")
        for stream in streams:
            await end(stream)

    async with soak.ready(expected=cycles * 10 * TRIED):
        await soak.serve("frames", PROTOCOL)
        await soak.serve("call", "soak")
        for _ in range(cycles):
            await caller()
            await listener()
        soak.figures["slowest refusal, s"] = slowest
        soak.promise(slowest < 5, f"a stream took {slowest:.1f} s to open or fail")
        soak.promise(bool(soak.report.errors), "the limit was never reached")
        soak.promise_errors("DaemonUnreachable")
        soak.promise_deliveries(soak.peers, all_answered=False)
