"""One contender of a bench, in its own process: runs and times rounds on command.

Usage: contender.py KIND LOOP CONTROL_MADDR PEER_ID

Prints `ready`, then reads commands and prints one line for each. The reply to a round is a JSON
object with `wall` and `cpu` in seconds and `peak`, the peak resident memory in bytes. COUNT is the
number of operations. The default for PROTO is a protocol of the mock daemon.
  identify COUNT PARALLEL
  unary COUNT SIZE PARALLEL [PROTO]   calls an echo handler
  handler COUNT SIZE PARALLEL         the mock daemon calls, and measures `wall`
  stall COUNT SIZE PARALLEL           likewise, with `stall`: the longest delay of the event loop
  stream-open COUNT
  ping-pong COUNT [PROTO]
  readexactly COUNT SIZE
  framed-read COUNT SIZE, framed-write COUNT SIZE
  framed-echo COUNT SIZE PROTO        sends messages and reads them back
  bulk-read SIZE, bulk-write SIZE     SIZE is in bytes
  memory COUNT                        opens idle streams; `memory` is the growth of the process
  serve NAME                          echoes calls of NAME, and streams of NAME/echo and
                                      NAME/framed; prints `ready`
  cpu                                 prints the process's CPU time so far, in seconds
"""

import asyncio
import gc
import itertools
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
from adapters import BODY, StreamAdapter
from contenders import Contender, contender

PING = b"p" * 100
#: Size of the data that checks an echo before its first measurement, in bytes.
SAMPLE = 1 << 20
#: Interval at which the event loop's delay is measured, in seconds.
TICK = 0.001

Answer = dict[str, float]


class Rounds:
    """The scenarios, run by one contender."""

    def __init__(self, contender: Contender, stack: AsyncExitStack) -> None:
        self.contender, self.stack = contender, stack
        self.checked: set[str] = set()

    async def answer(self, name: str, *arguments: str) -> str:
        if name == "cpu":
            return str(time.process_time())
        if name == "serve":
            await self.serve(*arguments)
            return "ready"
        numbers = [int(word) for word in arguments if word.isdecimal()]
        protocol = [word for word in arguments if not word.isdecimal()]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        method: Callable[..., Awaitable[Answer]] = getattr(self, name.replace("-", "_"))
        result = await method(*numbers, *protocol)
        return json.dumps(result | {"peak": memory("VmHWM")})

    def first_time(self, what: str) -> bool:
        known = what in self.checked
        self.checked.add(what)
        return not known

    # --- requests ---

    async def identify(self, count: int, parallel: int) -> Answer:
        identify = self.contender.identify

        async def some() -> None:
            for _ in range(count // parallel):
                await identify()

        return await timed(at_once(some, parallel))

    async def stream_open(self, count: int) -> Answer:
        await self.check_stream("/echo")
        return await timed(self.contender.open_and_close("/echo", count))

    # --- unary calls ---

    async def unary(self, count: int, size: int, parallel: int, proto: str = "echo") -> Answer:
        call, data = self.call, BODY * size

        async def some() -> None:
            for _ in range(count // parallel):
                if len(await call(proto, data)) != size:
                    raise SystemExit("the echo is wrong")

        async def one() -> None:
            # Each payload is different.
            data = next(numbers).to_bytes(8, "big") + random
            if await call(proto, data) != data:
                raise SystemExit("the echo is wrong")

        if self.first_time(f"unary {size} {parallel} {proto}"):
            numbers, random = itertools.count(), os.urandom(size - 8)
            await at_once(one, parallel)
        return await timed(at_once(some, parallel))

    async def handler(self, count: int, size: int, parallel: int) -> Answer:
        """The mock daemon checks the replies."""
        load = f"{await self.own_handler()} {size} {parallel} {count}".encode()
        seconds = b""

        async def work() -> None:
            nonlocal seconds
            seconds = await self.call("load", load)

        return await timed(work()) | {"wall": float(seconds)}

    async def stall(self, count: int, size: int, parallel: int) -> Answer:
        late = 0.0

        async def watch() -> None:
            nonlocal late
            while True:
                begun = time.perf_counter()
                await anyio.sleep(TICK)
                late = max(late, time.perf_counter() - begun - TICK)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            answer = await self.handler(count, size, parallel)
            await anyio.sleep(2 * TICK)  # records the last delay
            tasks.cancel_scope.cancel()
        return answer | {"stall": late}

    @property
    def call(self) -> Callable[[str, bytes], Awaitable[bytes]]:
        assert self.contender.call is not None
        return self.contender.call

    async def own_handler(self) -> str:
        assert self.contender.serve_calls is not None
        name = f"handler-{os.getpid()}"
        if self.first_time(name):
            await self.contender.serve_calls(name, echo_call)
        return name

    # --- streams ---

    async def ping_pong(self, count: int, proto: str = "/echo") -> Answer:
        await self.check_stream(proto)
        stream = await self.contender.open(proto)
        back = b""

        async def work() -> None:
            nonlocal back
            back = await stream.exchange(PING, count)

        answer = await timed(work())
        if back != PING:
            raise SystemExit("the echo is wrong")
        await stream.aclose()
        return answer

    async def readexactly(self, count: int, size: int) -> Answer:
        stream = await self.contender.open("/source")
        data = b""

        async def work() -> None:
            nonlocal data
            for _ in range(count):
                data = await stream.readexactly(size)

        answer = await timed(work())
        if data != bytes(size):
            raise SystemExit("what was read is wrong")
        await stream.aclose()
        return answer

    async def bulk_read(self, size: int) -> Answer:
        stream = await self.contender.open("/source")
        answer = await timed(stream.read_bulk(size))
        await stream.aclose()
        return answer

    async def bulk_write(self, size: int) -> Answer:
        stream = await self.contender.open("/framed-sink")

        async def work() -> None:
            await stream.send(b"\x01" + size.to_bytes(8, "big"))
            await stream.write_bulk(size)
            await wait_received(stream, size)

        answer = await timed(work())
        await stream.aclose()
        return answer

    async def framed_read(self, count: int, size: int) -> Answer:
        stream = await self.contender.open(f"/framed-source/{size}")
        body = b""

        async def work() -> None:
            nonlocal body
            for _ in range(count):
                body = await stream.receive_message()
                if len(body) != size:
                    raise SystemExit("what was read is wrong")

        answer = await timed(work())
        if body != BODY * size:
            raise SystemExit("what was read is wrong")
        await stream.aclose()
        return answer

    async def framed_write(self, count: int, size: int) -> Answer:
        await self.check_stream("/echo")
        stream = await self.contender.open("/framed-sink")
        body = BODY * size

        async def work() -> None:
            for _ in range(count - 1):
                await stream.send_message(body, b"\x00")
            await stream.send_message(body, b"\x01")
            await wait_received(stream, count * size)

        answer = await timed(work())
        await stream.aclose()
        return answer

    async def framed_echo(self, count: int, size: int, proto: str) -> Answer:
        stream = await self.contender.open(proto)
        body, back = os.urandom(size), b""

        async def work() -> None:
            nonlocal back
            for _ in range(count):
                await stream.send_message(body, b"\x00")
                back = await stream.receive_message()

        answer = await timed(work())
        if back != body:
            raise SystemExit("the echo is wrong")
        await stream.aclose()
        return answer

    async def check_stream(self, proto: str) -> None:
        """Sends a message to an echo handler while reading it back, and compares the two."""
        if not self.first_time(f"stream {proto}"):
            return
        stream = await self.contender.open(proto)
        body = os.urandom(SAMPLE)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send_message, body, b"\x00")
            if await stream.receive_message() != body:
                raise SystemExit("the echo is wrong")
        await stream.aclose()

    async def memory(self, count: int) -> Answer:
        await self.contender.open_and_close("/echo", 16)
        gc.collect()
        before = memory("VmRSS")
        streams = [await self.contender.open("/echo") for _ in range(count)]
        gc.collect()
        grown = memory("VmRSS") - before
        if await streams[-1].exchange(PING, 1) != PING:
            raise SystemExit("the echo is wrong")
        return {"memory": grown}

    # --- the server ---

    async def serve(self, name: str) -> None:
        contender = self.contender
        assert contender.serve_calls is not None
        assert contender.listen is not None and contender.serve_streams is not None
        await contender.serve_calls(name, echo_call)
        await self.stack.enter_async_context(contender.listen())
        await contender.serve_streams(f"{name}/echo", echo_stream)
        await contender.serve_streams(f"{name}/framed", echo_messages)


async def echo_call(data: bytes, peer_id: object) -> bytes:
    return data


async def echo_stream(stream: StreamAdapter) -> None:
    while data := await stream.receive():
        await stream.send(data)
    await stream.aclose()


async def echo_messages(stream: StreamAdapter) -> None:
    try:
        while True:
            await stream.send_message(await stream.receive_message(), b"\x00")
    except asyncio.IncompleteReadError:
        await stream.aclose()


async def wait_received(stream: StreamAdapter, size: int) -> None:
    """Waits until the mock daemon confirms that it has received ``size`` bytes."""
    if int.from_bytes(await stream.readexactly(8), "big") != size:
        raise SystemExit("not all of it arrived")


async def at_once(work: Callable[[], Coroutine[Any, Any, None]], parallel: int) -> None:
    if parallel == 1:
        await work()
        return
    async with anyio.create_task_group() as tasks:
        for _ in range(parallel):
            tasks.start_soon(work)


async def timed(work: Awaitable[None]) -> Answer:
    wall, cpu = time.perf_counter(), time.process_time()
    await work
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def memory(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(f"{field}:"))
    return int(line.split()[1]) << 10


async def main(kind: str, control: str, peer: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            listen = f"/unix{folder}/listen.sock"
            made = await stack.enter_async_context(contender(kind, control, peer, listen))
            rounds = Rounds(made, stack)
            print("ready", flush=True)
            while line := await anyio.to_thread.run_sync(sys.stdin.readline):
                print(await rounds.answer(*line.split()), flush=True)


if __name__ == "__main__":
    # Some scenarios open many streams.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    kind, loop, control, peer = sys.argv[1:]
    options = {"use_uvloop": loop == "uvloop"} if loop != "trio" else {}
    backend = "trio" if loop == "trio" else "asyncio"
    anyio.run(main, kind, control, peer, backend=backend, backend_options=options)
