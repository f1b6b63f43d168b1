"""An echo server and a caller, each with its own daemon, in one program, on asyncio or trio.

Usage: echo.py [asyncio|trio]
"""

import sys

import anyio

from p2pclient_rs import Daemon, DaemonRefused, Stream, StreamInfo


async def echo(info: StreamInfo, stream: Stream) -> None:
    """Echoes everything until the caller closes the stream."""
    async with stream:
        async for chunk in stream:
            await stream.send(chunk)


async def main() -> None:
    async with Daemon() as server_daemon, Daemon() as caller_daemon:
        async with server_daemon.client() as server, server.listen():
            await server.stream_handler("/echo/1", echo)
            async with caller_daemon.client() as caller:
                await caller.connect(server_daemon.peer_id, server_daemon.addrs)
                _, stream = await caller.stream_open(server_daemon.peer_id, ["/echo/1"])
                async with stream:
                    await stream.send(b"hello, libp2p")
                    print(await stream.receive())
                try:
                    await caller.stream_open(server_daemon.peer_id, ["/unknown/1"])
                except DaemonRefused as error:
                    print("refused:", error.daemon_message)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
