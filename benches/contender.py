"""One contender of a bench, in a process of its own: does rounds as it is told to, and times them.

Usage: contender.py KIND LOOP CONTROL_MADDR PEER_ID

Reads lines `SCENARIO COUNT` and answers each with `WALL CPU`: seconds for COUNT operations.
"""

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import incumbents

PING = b"p" * 100


class Contender:
    """What a scenario needs of a client."""

    def __init__(
        self,
        identify: Callable[[], Awaitable[Any]],
        open_echo: Callable[[], Awaitable[Callable[[bytes], Awaitable[bytes]]]],
    ) -> None:
        self.identify = identify
        #: Opens a stream to the echo; what it gives sends a message and reads that much back.
        self.open_echo = open_echo


@asynccontextmanager
async def ours(control: str, peer: str) -> AsyncIterator[Contender]:
    from p2pclient_rs import Client

    async def open_echo() -> Callable[[bytes], Awaitable[bytes]]:
        _, stream = await client.stream_open(peer, ["echo"])

        async def ping(data: bytes) -> bytes:
            await stream.send(data)
            return await stream.readexactly(len(data))

        return ping

    async with Client(control) as client:
        yield Contender(client.identify, open_echo)


@asynccontextmanager
async def p2pclient(control: str, peer: str) -> AsyncIterator[Contender]:
    incumbents.load_p2pclient()
    from multiaddr import Multiaddr
    from p2pclient import Client
    from p2pclient.libp2p_stubs.peer.id import ID

    async def open_echo() -> Callable[[bytes], Awaitable[bytes]]:
        _, stream = await client.stream_open(ID.from_base58(peer), ["echo"])

        async def ping(data: bytes) -> bytes:
            await stream.send(data)
            back = b""
            while len(back) < len(data):
                back += await stream.receive(len(data) - len(back))
            return back

        return ping

    client = Client(control_maddr=Multiaddr(control))
    yield Contender(client.identify, open_echo)


@asynccontextmanager
async def hivemind(control: str, peer: str) -> AsyncIterator[Contender]:
    incumbents.load_hivemind()
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
    from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
    from multiaddr import Multiaddr

    async def open_echo() -> Callable[[bytes], Awaitable[bytes]]:
        _, reader, writer = await client.stream_open(PeerID.from_base58(peer), ["echo"])

        async def ping(data: bytes) -> bytes:
            writer.write(data)
            await writer.drain()
            back: bytes = await reader.readexactly(len(data))
            return back

        return ping

    client = await Client.create(Multiaddr(control), Multiaddr("/unix/tmp/unused.sock"))
    yield Contender(client.identify, open_echo)
    client.close()


async def identify(contender: Contender, count: int) -> None:
    for _ in range(count):
        await contender.identify()


async def identify_64(contender: Contender, count: int) -> None:
    async def some() -> None:
        for _ in range(count // 64):
            await contender.identify()

    async with anyio.create_task_group() as tasks:
        for _ in range(64):
            tasks.start_soon(some)


async def main(kind: str, control: str, peer: str) -> None:
    async with KINDS[kind](control, peer) as contender:
        ping = await contender.open_echo()

        async def ping_pong(contender: Contender, count: int) -> None:
            for _ in range(count):
                if await ping(PING) != PING:
                    raise SystemExit("the echo is wrong")

        scenarios = {"identify": identify, "identify-64": identify_64, "ping-pong": ping_pong}
        print("ready", flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            name, number = line.split()
            wall, cpu = time.perf_counter(), time.process_time()
            await scenarios[name](contender, int(number))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(wall, cpu, flush=True)


KINDS = {"ours": ours, "p2pclient": p2pclient, "hivemind": hivemind}

if __name__ == "__main__":
    kind, loop, control, peer = sys.argv[1:]
    options = {"use_uvloop": loop == "uvloop"} if loop != "trio" else {}
    backend = "trio" if loop == "trio" else "asyncio"
    anyio.run(main, kind, control, peer, backend=backend, backend_options=options)
