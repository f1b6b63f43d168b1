"""A slow reader and slow writers, for two minutes.

One stream is sent to a handler that reads 1 MiB per second, with ``send``. One comes from a handler
that writes as fast as it can, with ``write`` and ``drain``, and is read at the same rate. One comes
from a handler that writes 1 kB per second. Every byte is checked. Buffers between writer and reader
must stay bounded, and the writer must wait.
"""

from __future__ import annotations

import time

import anyio

from soak import payloads
from soak.harness import Soak
from soak.meter import MIB

#: Seconds.
FULL = 120
#: Maximum of unread bytes: buffers of sockets and daemons, and yamux's window.
MAX_UNREAD = 48 * MIB
PACE = 1 * MIB
CHUNK = 64 << 10


async def run(soak: Soak) -> None:
    seconds = soak.scaled(FULL, 3)
    sent = received = most_between = 0
    waited = 0.0

    async def into_slow_reader() -> None:
        nonlocal sent, waited
        _, stream = await soak.client.stream_open(soak.peer_id, ["/soak/slow-reader"])
        with anyio.move_on_after(seconds):
            while True:
                began = time.monotonic()
                await stream.send(payloads.stretch(sent, CHUNK))
                waited = max(waited, time.monotonic() - began)
                sent += CHUNK
                soak.done()
        stream.abort()

    async def from_fast_writer() -> None:
        nonlocal received
        _, stream = await soak.client.stream_open(soak.peer_id, ["/soak/fast-writer"])
        began = time.monotonic()
        with anyio.move_on_after(seconds):
            while data := await stream.read(CHUNK):
                if data != payloads.stretch(received, len(data)):
                    soak.report.corrupted += 1
                received += len(data)
                soak.done()
                await anyio.sleep(max(0.0, received / PACE - (time.monotonic() - began)))
        stream.abort()

    async def from_slow_writer() -> None:
        offset = 0
        _, stream = await soak.client.stream_open(soak.peer_id, ["/soak/slow-writer"])
        with anyio.move_on_after(seconds):
            while True:
                data = await stream.readexactly(250)
                if data != payloads.stretch(offset, 250):
                    soak.report.corrupted += 1
                offset += 250
                soak.done()
        stream.abort()
        soak.promise(offset >= seconds * 500, f"only {offset} bytes of the slow writer arrived")

    async def watch() -> None:
        nonlocal most_between
        while True:
            await anyio.sleep(0.5)
            [state] = await soak.ask_all("state")
            counts = state["counts"]
            into = sent - counts.get("slowly read", 0)
            out = counts.get("written fast", 0) - received
            most_between = max(most_between, into, out)

    async with soak.ready():
        await soak.serve("slow reader", "/soak/slow-reader")
        await soak.serve("fast writer", "/soak/fast-writer")
        await soak.serve("slow writer", "/soak/slow-writer")
        async with anyio.create_task_group() as watching:
            watching.start_soon(watch)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(into_slow_reader)
                tasks.start_soon(from_fast_writer)
                tasks.start_soon(from_slow_writer)
            watching.cancel_scope.cancel()
        soak.figures.update(
            {
                "MiB sent to the slow reader": sent / MIB,
                "MiB read slowly here": received / MIB,
                "most MiB between writer and reader": most_between / MIB,
                "longest wait of the sender, s": waited,
            }
        )
        soak.promise(
            most_between <= MAX_UNREAD, f"{most_between / MIB:.0f} MiB between writer and reader"
        )
        read = seconds * PACE
        soak.promise(received >= read / 3, f"only {received} bytes were read in {seconds} s")
        soak.promise(sent <= read + MAX_UNREAD, "the writer did not wait for the slow reader")
