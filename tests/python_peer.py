"""The Python peer of python_peer.rs: runs handlers, and executes commands from standard input.

Usage: python_peer.py CONTROL_MADDR LISTEN_MADDR

Each line of input is a JSON object ``{"id": …, "do": …, …}``. The reply is a line ``[id, result]``.
If the command raised an exception, the result is a list of its class and message. Each event is
printed as a JSON string.
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
    """Returns a recognisable sequence of bytes, the same as in common/mod.rs."""
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
    """The commands, each a method of the same name."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, name: str) -> bool:
        """Registers all handlers, under protocols that contain ``name``."""
        await self.client.stream_handler(f"/python/{name}", stream_echo)
        for handler in (unary_echo, fail, endless, say_python):
            await self.client.add_unary_handler(
                f"{handler.__name__}.{name}", handler, balanced=handler is say_python
            )
        return True

    async def stream(self, peer: str, protocol: str, size: int) -> bool:
        """Sends data over a stream to an echo handler; returns whether it came back unchanged."""
        payload = pattern(size, 1)
        _, stream = await self.client.stream_open(peer, [protocol])
        async with stream:
            sending = asyncio.ensure_future(stream.send(payload))
            received = await stream.readexactly(size)
            await sending
        return received == payload

    async def echo(self, peer: str, handler: str, size: int) -> bool:
        """Calls an echo handler; returns whether the reply is correct."""
        payload = pattern(size, 2)
        return await self.client.call_unary(peer, handler, payload) == payload

    async def call(self, peer: str, handler: str, text: str) -> str:
        return (await self.client.call_unary(peer, handler, text.encode())).decode()

    async def cancel(self, call: int) -> bool:
        return self.tasks[call].cancel()

    async def publish(self, topic: str, text: str) -> None:
        await self.client.pubsub_publish(topic, text.encode())

    async def hear(self, topic: str, text: str) -> str:
        """Subscribes until ``text`` is published; returns the publisher."""
        async with await self.client.pubsub_subscribe(topic) as subscription:
            say("subscribed")
            async for message in subscription:
                if message.data == text.encode():
                    return str(message.peer_id)
        raise EOFError("the subscription has ended")

    async def execute(self, number: int, do: Callable[..., Awaitable[Any]], **how: Any) -> None:
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
            peer.tasks[number] = asyncio.create_task(peer.execute(number, do, **command))


if __name__ == "__main__":
    asyncio.run(main())
