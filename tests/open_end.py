"""Opens everything that a client can open, and exits without closing any of it.

Usage: open_end.py CONTROL_MADDR LISTEN_MADDR LOOP HOW, where LOOP is asyncio, uvloop or trio, and
HOW is return, forget, exit, raise, thread or stop.

With ``thread``, the event loop keeps running in a daemon thread. With ``stop``, the loop is stopped
and never run again. Prints a word for each kind of thing that is open.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from fake_daemon import PEER

from p2pclient_rs import Client, PeerID, Stream, StreamInfo

Start = Callable[..., object]

kept: list[Any] = []


async def open_all(control: str, listen: str, start: Start | None) -> None:
    """Opens everything, and starts tasks that use it if ``start`` is given."""
    client = Client(control, listen)
    kept.append(client)
    await client.identify()
    print("idle")

    async def forever(*_: object) -> bytes:
        await anyio.sleep_forever()
        raise AssertionError

    called = anyio.Event()

    async def handler(data: bytes, peer: PeerID) -> bytes:
        called.set()
        # Without ``start`` it must end: asyncio warns of a pending task that is dropped.
        return data if start is None else await forever()

    await client.add_unary_handler("handler", handler)
    await called.wait()
    print("unary")

    _, stream = await client.stream_open(PEER, ["/echo"])
    kept.append(stream)
    stream.write(bytes(4 << 20))
    assert stream._raw.buffered
    subscription = await client.pubsub_subscribe("topic")
    kept.append(subscription)
    print("streams")

    if start is None:
        return
    start(client.dht_get_value, b"key")
    start(client.call_unary, PEER, "echo", b"data")
    start(stream.receive)
    start(subscription.receive_message)

    accepted = anyio.Event()

    async def serve(info: StreamInfo, inbound: Stream) -> None:
        kept.append(inbound)
        accepted.set()
        await forever()

    async def listening() -> None:
        async with client.listen():
            # The daemon then opens a stream to the handler.
            await client.stream_handler("/served", serve)
            await forever()

    start(listening)
    await accepted.wait()
    print("tasks")


async def main(control: str, listen: str, how: str, ready: threading.Event) -> None:
    if how in ("exit", "raise", "stop"):
        # No task group, which would raise an ExceptionGroup.
        await open_all(control, listen, None)
        if how == "exit":
            sys.exit(3)
        if how == "raise":
            raise KeyError("meant")
        return
    async with anyio.create_task_group() as tasks:
        await open_all(control, listen, tasks.start_soon)
        ready.set()
        if how == "thread":
            await anyio.sleep_forever()
        if how == "forget":
            kept.clear()
        tasks.cancel_scope.cancel()


def run(work: Callable[[], Awaitable[None]], loop: str) -> None:
    if loop == "trio":
        anyio.run(work, backend="trio")
    else:
        anyio.run(work, backend="asyncio", backend_options={"use_uvloop": loop == "uvloop"})


def stopped(work: Callable[[], Awaitable[None]], loop: str) -> None:
    import uvloop

    event_loop = uvloop.new_event_loop() if loop == "uvloop" else asyncio.new_event_loop()
    kept.append(event_loop)
    event_loop.run_until_complete(work())


if __name__ == "__main__":
    control, listen, loop, how = sys.argv[1:]
    ready = threading.Event()

    async def work() -> None:
        await main(control, listen, how, ready)

    if how == "thread":
        threading.Thread(target=run, args=(work, loop), daemon=True).start()
        assert ready.wait(20)
    elif how == "stop":
        stopped(work, loop)
    else:
        run(work, loop)
