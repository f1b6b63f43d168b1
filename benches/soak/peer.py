"""The far end: handlers in their own process, controlled over a pipe.

Usage: peer.py LOOP DIRECTORY NAME [SABOTAGE …]

Each line of input is a command in JSON, ``[command, {argument: value}]``; each gets one line in
reply."""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import anyio
from anyio.abc import TaskGroup

from p2pclient_rs import Client, ControlFailure, IncompleteRead, P2PHandlerError, Stream, StreamInfo
from soak import payloads
from soak.meter import Meter

#: Numbers of the operations to sabotage.
VICTIMS = {"corrupt": 7, "swallow": 8, "repeat": 9}


class Peer:
    """The handlers of this process, and the numbers they have seen."""

    def __init__(self, tasks: TaskGroup, directory: str, name: str, sabotage: set[str]) -> None:
        self._tasks = tasks
        self._directory, self._name = directory, name
        #: Kind of sabotage, by number of the operation.
        self._sabotage = {VICTIMS[harm]: harm for harm in sabotage if harm in VICTIMS}
        self._meter: Meter
        self._soft = 0
        self._stack = AsyncExitStack()
        self._counts: Counter[str] = Counter()
        self._wrong: list[str] = []
        #: How often each number was seen, in a file that survives if the process is killed.
        self._seen: mmap.mmap | None = None
        self._streams: dict[str, Callable[[StreamInfo, Stream], Awaitable[None]]] = {}
        self._held = 0
        self._release = anyio.Event()
        self._attached = anyio.CancelScope()

    async def start(self, control: str, listen: str, expected: int) -> None:
        """Connects to a daemon."""
        if expected:
            with open(Path(self._directory) / f"{self._name}.seen", "wb+") as file:
                file.truncate(expected)
                self._seen = mmap.mmap(file.fileno(), expected)
        # The map keeps a descriptor open, so count descriptors from here on.
        self._meter = Meter()
        self._tasks.start_soon(self._meter.run)
        self._client = await self._stack.enter_async_context(Client(control, listen))
        await self._stack.enter_async_context(self._client.listen())
        await self._client.unary.open()
        self._tasks.start_soon(self._register_again)

    async def serve(self, kind: str, proto: str, balanced: bool = False) -> None:
        """Registers a handler."""
        calls: dict[str, Callable[[bytes, Any], Awaitable[bytes]]] = {
            "call": self._call,
            "held call": self._held_call,
            "echo": self._echo,
        }
        streams: dict[str, Callable[[StreamInfo, Stream], Awaitable[None]]] = {
            "frames": self._frames,
            "slow reader": self._slow_reader,
            "fast writer": self._fast_writer,
            "slow writer": self._slow_writer,
        }
        if kind in calls:
            await self._client.add_unary_handler(proto, calls[kind], balanced=balanced)
        else:
            self._streams[proto] = streams[kind]
            await self._client.stream_handler(proto, streams[kind], balanced=balanced)

    async def connect(self, peer: str, addrs: list[str]) -> None:
        await self._client.connect(peer, addrs)

    async def load(self, peer: str, proto: str) -> None:
        """Calls a handler forever, as a caller that will be killed."""

        async def call() -> None:
            number = 0
            while True:
                number += 1
                try:
                    await self._client.call_unary(peer, proto, payloads.request(number), timeout=5)
                except (ControlFailure, P2PHandlerError):
                    await anyio.sleep(0.05)

        for _ in range(8):
            self._tasks.start_soon(call)

    async def state(self) -> dict[str, Any]:
        return {
            "counts": dict(self._counts),
            "wrong": self._wrong[:10],
            "held": self._held,
            "unanswered": self._client.unary.unanswered_calls,
            "cpu": time.process_time(),
        }

    async def release(self) -> None:
        """Releases held calls; later calls are held again."""
        self._release.set()
        self._release = anyio.Event()

    async def limit(self, more: int | None) -> None:
        """Limits the process to ``more`` descriptors in addition to its own; None restores the
        limit."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if more is None:
            soft = self._soft
        else:
            self._soft, soft = soft, max(map(int, os.listdir("/proc/self/fd"))) + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async def finish(self) -> dict[str, Any]:
        """Closes everything and returns the measurements."""
        end = self._meter.sample()
        state = await self.state()
        self._attached.cancel()
        await self._stack.aclose()
        gc.collect()
        return {**state, "measured": self._meter.result(end).asdict()}

    # --- handlers ---

    async def _call(self, data: bytes, caller: object) -> bytes:
        self._meter.operations += 1
        if not data:
            self._counts["empty"] += 1
            return b""
        number = self._record(data)
        return self._reply(number)

    async def _echo(self, data: bytes, caller: object) -> bytes:
        return data

    async def _held_call(self, data: bytes, caller: object) -> bytes:
        self._held += 1
        try:
            await self._release.wait()
            return await self._call(data, caller)
        finally:
            self._held -= 1

    async def _frames(self, info: StreamInfo, stream: Stream) -> None:
        """Answers frames. Ends the stream when the caller asks for it or has ended its side."""
        try:
            async with stream:
                while (head := await stream.read(1)) == b"f":
                    length = int.from_bytes(await stream.readexactly(4), "little")
                    number = self._record(await stream.readexactly(length))
                    reply = self._reply(number)
                    await stream.send(len(reply).to_bytes(4, "little") + reply)
                    self._meter.operations += 1
                if head == b"e":
                    # The caller has everything and asks this side to end the stream.
                    await stream.send_eof()
                    head = await stream.read()
                if head:
                    self._wrong.append(f"{head[:20]!r} instead of EOF")
                self._counts["ended"] += 1
        except (anyio.BrokenResourceError, IncompleteRead):
            self._counts["broken"] += 1

    async def _slow_reader(self, info: StreamInfo, stream: Stream) -> None:
        """Reads 1 MiB per second, checks it, and records how far it has come."""
        offset, began = 0, time.monotonic()
        async with stream:
            try:
                while data := await stream.read(64 << 10):
                    if data != payloads.stretch(offset, len(data)):
                        self._wrong.append(f"wrong bytes at {offset} of a stream")
                    offset += len(data)
                    self._meter.operations += 1
                    self._counts["slowly read"] = offset
                    await anyio.sleep(max(0.0, offset / (1 << 20) - (time.monotonic() - began)))
            except anyio.BrokenResourceError:
                self._counts["broken"] += 1

    async def _fast_writer(self, info: StreamInfo, stream: Stream) -> None:
        """Writes as fast as it can until the caller leaves."""
        offset = 0
        async with stream:
            try:
                while True:
                    data = payloads.stretch(offset, 64 << 10)
                    stream.write(data)
                    await stream.drain()
                    offset += len(data)
                    self._counts["written fast"] = offset
            except anyio.BrokenResourceError:
                pass

    async def _slow_writer(self, info: StreamInfo, stream: Stream) -> None:
        """Writes 100 bytes ten times a second until the caller leaves."""
        offset = 0
        async with stream:
            try:
                while True:
                    await stream.send(payloads.stretch(offset, 100))
                    offset += 100
                    await anyio.sleep(0.1)
            except anyio.BrokenResourceError:
                pass

    def _record(self, data: bytes) -> int:
        number = payloads.number_of(data)
        if number is None:
            self._wrong.append(f"a request of {len(data)} bytes is malformed")
            raise ValueError("malformed request")
        if self._seen is not None and number < len(self._seen):
            times = {"swallow": 0, "repeat": 2}.get(self._sabotage.get(number, ""), 1)
            self._seen[number] = min(self._seen[number] + times, 255)
        return number

    def _reply(self, number: int) -> bytes:
        reply = payloads.reply(number)
        if self._sabotage.get(number) == "corrupt":
            return reply[:-1] + bytes([reply[-1] ^ 1])
        return reply

    async def _register_again(self) -> None:
        """Registers stream handlers again after a daemon restart. Unary handlers are registered
        again automatically."""
        served = True
        with self._attached:
            while True:
                await anyio.sleep(0.1)
                served &= self._client.unary.connected
                if served or not self._client.unary.connected:
                    continue
                try:
                    for proto, handler in self._streams.items():
                        await self._client.stream_handler(proto, handler)
                except ControlFailure:
                    continue
                served = True


async def main(directory: str, name: str, *sabotage: str) -> None:
    async with anyio.create_task_group() as tasks:
        peer = Peer(tasks, directory, name, set(sabotage))
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            command, arguments = json.loads(line)
            answer = await getattr(peer, command)(**arguments)
            print(json.dumps(answer), flush=True)
        # The controlling process is gone; no clean exit is needed.
        os._exit(0)


def run(loop: str, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Runs an async function on one of the event loops."""
    options = {} if loop == "trio" else {"use_uvloop": loop == "uvloop"}
    backend = "trio" if loop == "trio" else "asyncio"
    return anyio.run(function, *arguments, backend=backend, backend_options=options)


if __name__ == "__main__":
    run(sys.argv[1], main, *sys.argv[2:])
