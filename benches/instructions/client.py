"""A program that uses the Python client, and whose instructions callgrind.py counts.

Usage: client.py DIRECTORY, the directory in which daemon.py listens.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import selectors
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from p2pclient_rs import Client, PeerID, Stream
from p2pclient_rs.compat import hivemind, p2pclient
from p2pclient_rs.compat.hivemind.streams import StreamReader, StreamWriter

#: Performs the given number of operations.
Scenario: TypeAlias = Callable[[int], Awaitable[object]]

PEER = PeerID(b"\x00\x24\x08\x01\x12\x20" + bytes(range(32)))
PARALLEL = 64
KIB = 1 << 10


class Lockstep(selectors.DefaultSelector):
    """Lets the daemon run before each poll."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        #: The order to send to the daemon with its next turn.
        self.order = b""
        self._turns = socket.socket(socket.AF_UNIX)
        self._turns.connect(f"{directory}/turns")

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns.send(self.order + b"\n")
        self.order = b""
        if not self._turns.recv(1):
            raise ConnectionError("the daemon is gone")
        return super().select(timeout)


def calls(client: Client, size: int, parallel: int) -> Scenario:
    """Makes unary calls, ``parallel`` at once."""
    data = bytes(size)

    async def scenario(count: int) -> None:
        for _ in range(count // parallel):
            if parallel == 1:
                await client.call_unary(PEER, "echo", data)
            else:
                await asyncio.gather(
                    *(client.call_unary(PEER, "echo", data) for _ in range(parallel))
                )

    return scenario


def handled(client: Client, daemon: Lockstep, size: int, parallel: int) -> Scenario:
    """Handles incoming unary calls, ``parallel`` at once."""
    proto = f"handled-{parallel}"
    left = 0
    done = asyncio.Event()

    async def handler(data: bytes, _: PeerID) -> bytes:
        nonlocal left
        left -= 1
        if not left:
            done.set()
        return data

    async def scenario(count: int) -> None:
        nonlocal left
        if proto not in client.unary.handlers:
            await client.add_unary_handler(proto, handler)
        left = count
        done.clear()
        daemon.order = f"{proto} {count} {parallel} {size}".encode()
        await done.wait()

    return scenario


async def open_stream(client: Client, proto: str) -> Stream:
    _, stream = await client.stream_open(PEER, [proto])
    return stream


async def scenarios(control: str, daemon: Lockstep) -> dict[str, tuple[int, Scenario]]:
    """Returns the scenarios by name, each with a number of operations that gives a steady count."""
    client = Client(control)
    echo = await open_stream(client, "echo")
    as_p2pclient = p2pclient.Client(control)
    as_hivemind = await hivemind.Client.create(control)
    _, reader, _ = await as_hivemind.stream_open(PEER, ["source"])
    _, _, writer = await as_hivemind.stream_open(PEER, ["sink"])

    async def identify(count: int) -> None:
        for _ in range(count):
            await client.identify()

    async def identify_at_once(count: int) -> None:
        for _ in range(count // PARALLEL):
            await asyncio.gather(*(client.identify() for _ in range(PARALLEL)))

    async def p2pclient_identify(count: int) -> None:
        for _ in range(count):
            await as_p2pclient.identify()

    async def hivemind_call(count: int) -> None:
        data = bytes(KIB)
        for _ in range(count):
            await as_hivemind.call_unary_handler(PEER, "echo", data)

    async def streams(count: int) -> None:
        for _ in range(count):
            stream = await open_stream(client, "echo")
            await stream.aclose()

    async def ping_pong(count: int) -> None:
        ping = bytes(100)
        for _ in range(count):
            await echo.send(ping)
            await echo.readexactly(100)

    return {
        "identify": (200, identify),
        "identify, 64 at once": (320, identify_at_once),
        "unary 1 KiB": (200, calls(client, KIB, 1)),
        "unary 1 KiB, 64 at once": (640, calls(client, KIB, PARALLEL)),
        "unary 64 KiB, 64 at once": (320, calls(client, 64 * KIB, PARALLEL)),
        "unary 1 MiB": (20, calls(client, KIB * KIB, 1)),
        "unary 1 KiB handled": (200, handled(client, daemon, KIB, 1)),
        "unary 1 KiB handled, 64 at once": (640, handled(client, daemon, KIB, PARALLEL)),
        "stream_open and close": (200, streams),
        "ping-pong of 100 B": (200, ping_pong),
        "p2pclient's identify": (200, p2pclient_identify),
        "hivemind's unary 1 KiB": (200, hivemind_call),
        "hivemind's framed 1 MiB, read": (20, lambda count: read_framed(reader, count)),
        "hivemind's framed 1 MiB, written": (20, lambda count: write_framed(writer, count)),
    }


async def read_framed(reader: StreamReader, count: int) -> None:
    """Reads messages as hivemind does in P2P.receive_protobuf and receive_raw_data."""
    for _ in range(count):
        assert await reader.readexactly(1) == b"\0"
        length = int.from_bytes(await reader.readexactly(8), "big")
        await reader.readexactly(length)


async def write_framed(writer: StreamWriter, count: int) -> None:
    """Writes messages as hivemind does in P2P.send_protobuf and send_raw_data."""
    message = bytes(KIB * KIB)
    for _ in range(count):
        writer.write(b"\0")
        writer.write(len(message).to_bytes(8, "big"))
        data = memoryview(message)
        for offset in range(0, len(data), 64 * KIB):
            writer.write(data[offset : offset + 64 * KIB])
        await writer.drain()


async def main(control: str, daemon: Lockstep) -> None:
    for name, (count, scenario) in (await scenarios(control, daemon)).items():
        await scenario(count)
        # Otherwise, when the garbage collector runs depends on the previous scenarios.
        gc.collect()
        gc.disable()
        os.getppid()
        await scenario(count)
        os.getppid()
        gc.enable()
        print(json.dumps({"name": name, "count": count}))


def run(directory: str) -> None:
    daemon = Lockstep(directory)
    loop: Any = asyncio.SelectorEventLoop(daemon)
    loop.run_until_complete(main(f"/unix{directory}/control", daemon))


if __name__ == "__main__":
    run(sys.argv[1])
