"""One contender of a bench, in a process of its own: does rounds as it is told to, and times them.

Usage: contender.py KIND LOOP CONTROL_MADDR PEER_ID

Reads lines, and answers each with one:
  SCENARIO COUNT                    `WALL CPU`: seconds for COUNT operations
  unary COUNT PROTO SIZE PARALLEL   likewise, for calls of the peer's echo, so many at once
  serve PROTO                       adds an echo, and answers `ready`
  cpu                               the process's CPU time so far, in seconds
"""

import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio
import incumbents

PING = b"p" * 100

Echo: TypeAlias = Callable[[bytes], Awaitable[bytes]]


@dataclass
class Contender:
    """What a scenario needs of a client."""

    identify: Callable[[], Awaitable[Any]]
    #: Opens a stream to the echo; what it gives sends a message and reads that much back.
    open_echo: Callable[[], Awaitable[Echo]]
    #: Calls a protocol of the peer.
    call: Callable[[str, bytes], Awaitable[bytes]] | None = None
    #: Has calls of a protocol answered with their data.
    serve: Callable[[str], Awaitable[None]] | None = None


async def unary_echo(data: bytes, peer_id: object) -> bytes:
    return data


@asynccontextmanager
async def ours(control: str, peer: str) -> AsyncIterator[Contender]:
    from p2pclient_rs import Client, PeerID

    peer_id = PeerID(peer)

    async def open_echo() -> Echo:
        _, stream = await client.stream_open(peer_id, ["echo"])

        async def ping(data: bytes) -> bytes:
            await stream.send(data)
            return await stream.readexactly(len(data))

        return ping

    async def call(proto: str, data: bytes) -> bytes:
        return await client.call_unary(peer_id, proto, data)

    async def serve(proto: str) -> None:
        await client.add_unary_handler(proto, unary_echo)

    async with Client(control) as client:
        yield Contender(client.identify, open_echo, call, serve)


@asynccontextmanager
async def p2pclient(control: str, peer: str) -> AsyncIterator[Contender]:
    incumbents.load_p2pclient()
    from multiaddr import Multiaddr
    from p2pclient import Client
    from p2pclient.libp2p_stubs.peer.id import ID

    async def open_echo() -> Echo:
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

    peer_id = PeerID.from_base58(peer)

    async def open_echo() -> Echo:
        _, reader, writer = await client.stream_open(peer_id, ["echo"])

        async def ping(data: bytes) -> bytes:
            writer.write(data)
            await writer.drain()
            back: bytes = await reader.readexactly(len(data))
            return back

        return ping

    async def call(proto: str, data: bytes) -> bytes:
        result: bytes = await client.call_unary_handler(peer_id, proto, data)
        return result

    async def serve(proto: str) -> None:
        await client.add_unary_handler(proto, unary_echo)

    client = await Client.create(Multiaddr(control), Multiaddr("/unix/tmp/unused.sock"))
    yield Contender(client.identify, open_echo, call, serve)
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


class Pinger:
    """Messages over one stream, which is opened for the first."""

    def __init__(self) -> None:
        self._ping: Echo | None = None

    async def run(self, contender: Contender, count: int) -> None:
        ping = self._ping = self._ping or await contender.open_echo()
        for _ in range(count):
            if await ping(PING) != PING:
                raise SystemExit("the echo is wrong")


async def unary(contender: Contender, count: int, proto: str, size: int, parallel: int) -> None:
    assert contender.call is not None
    call, data = contender.call, bytes(size)

    async def some() -> None:
        for _ in range(count // parallel):
            if len(await call(proto, data)) != size:
                raise SystemExit("the echo is wrong")

    async with anyio.create_task_group() as tasks:
        for _ in range(parallel):
            tasks.start_soon(some)


async def check(contender: Contender, proto: str, size: int, parallel: int) -> None:
    """Ends the process if what comes back is not what was sent."""
    assert contender.call is not None
    call = contender.call

    async def one() -> None:
        data = os.urandom(size)
        if await call(proto, data) != data:
            raise SystemExit("the echo is wrong")

    async with anyio.create_task_group() as tasks:
        for _ in range(parallel):
            tasks.start_soon(one)


async def main(kind: str, control: str, peer: str) -> None:
    scenarios: dict[str, Callable[[Contender, int], Coroutine[Any, Any, None]]] = {
        "identify": identify,
        "identify-64": identify_64,
        "ping-pong": Pinger().run,
    }

    async def answer(name: str, *arguments: str) -> str:
        if name == "cpu":
            return str(time.process_time())
        if name == "serve":
            assert contender.serve is not None
            await contender.serve(*arguments)
            return "ready"
        count = int(arguments[0])
        if name == "unary":
            proto, size, parallel = arguments[1], int(arguments[2]), int(arguments[3])
            await check(contender, proto, size, parallel)
            work = unary(contender, count, proto, size, parallel)
        else:
            work = scenarios[name](contender, count)
        wall, cpu = time.perf_counter(), time.process_time()
        await work
        return f"{time.perf_counter() - wall} {time.process_time() - cpu}"

    async with KINDS[kind](control, peer) as contender:
        print("ready", flush=True)
        while line := await anyio.to_thread.run_sync(sys.stdin.readline):
            print(await answer(*line.split()), flush=True)


KINDS = {"ours": ours, "p2pclient": p2pclient, "hivemind": hivemind}

if __name__ == "__main__":
    kind, loop, control, peer = sys.argv[1:]
    options = {"use_uvloop": loop == "uvloop"} if loop != "trio" else {}
    backend = "trio" if loop == "trio" else "asyncio"
    anyio.run(main, kind, control, peer, backend=backend, backend_options=options)
