"""The Python side of python_peer.rs: serves, and does what it is told, a JSON object a line.

Usage: python_peer.py CONTROL_MADDR LISTEN_MADDR

A command is ``{"id": …, "do": …, …}``; what comes of it is printed as ``[id, result]``, in which an
exception is the list of its class and its words. What happens unasked is printed as a string.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from p2pclient_rs import Client, PeerID, Stream, StreamInfo


def say(thing: object) -> None:
    print(json.dumps(thing), flush=True)


def pattern(size: int, seed: int) -> bytes:
    """Bytes that are easy to tell from others, as in common/mod.rs."""
    return bytes((place * 31 + seed) >> 3 & 0xFF for place in range(size))


async def stream_echo(info: StreamInfo, stream: Stream) -> None:
    async with stream:
        async for chunk in stream:
            await stream.send(chunk)


async def unary_echo(data: bytes, caller: PeerID) -> bytes:
    return data


async def fail(data: bytes, caller: PeerID) -> bytes:
    raise ValueError(f"{data.decode()} from {caller}")


async def endless(data: bytes, caller: PeerID) -> bytes:
    say("begun")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        say("cancelled")
        raise
    return b""


async def say_python(data: bytes, caller: PeerID) -> bytes:
    return b"Python"


class Peer:
    """What the commands do, by their names."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, name: str) -> bool:
        """Serves everything there is, under names of one's own."""
        await self.client.stream_handler(f"/python/{name}", stream_echo)
        for handler in (unary_echo, fail, endless, say_python):
            await self.client.add_unary_handler(
                f"{handler.__name__}.{name}", handler, balanced=handler is say_python
            )
        return True

    async def stream(self, peer: str, protocol: str, size: int) -> bool:
        """Whether what is sent to an echo comes back."""
        payload = pattern(size, 1)
        _, stream = await self.client.stream_open(peer, [protocol])
        async with stream:
            sending = asyncio.ensure_future(stream.send(payload))
            received = await stream.readexactly(size)
            await sending
        return received == payload

    async def echo(self, peer: str, handler: str, size: int) -> bool:
        """Whether what an echo is called with comes back."""
        payload = pattern(size, 2)
        return await self.client.call_unary(peer, handler, payload) == payload

    async def call(self, peer: str, handler: str, text: str) -> str:
        return (await self.client.call_unary(peer, handler, text.encode())).decode()

    async def cancel(self, call: int) -> bool:
        return self.tasks[call].cancel()

    async def publish(self, topic: str, text: str) -> None:
        await self.client.pubsub_publish(topic, text.encode())

    async def hear(self, topic: str, text: str) -> str:
        """Subscribes until that is published; by whom."""
        async with await self.client.pubsub_subscribe(topic) as subscription:
            say("subscribed")
            async for message in subscription:
                if message.data == text.encode():
                    return str(message.peer_id)
        raise EOFError("the subscription has ended")

    async def carry_out(self, number: int, do: Callable[..., Awaitable[Any]], **how: Any) -> None:
        try:
            result = await do(**how)
        except asyncio.CancelledError:
            result = ["CancelledError", ""]
        except Exception as error:
            result = [type(error).__name__, str(error)]
        say([number, result])


async def main() -> None:
    control, listen = sys.argv[1:]
    commands = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(commands)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    async with Client(control, listen) as client, client.listen():
        peer = Peer(client)
        while line := await commands.readline():
            command = json.loads(line)
            number, do = command.pop("id"), getattr(peer, command.pop("do"))
            peer.tasks[number] = asyncio.create_task(peer.carry_out(number, do, **command))


if __name__ == "__main__":
    asyncio.run(main())
