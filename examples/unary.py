"""Unary calls between two peers: two servers on one daemon answer in turn.

Usage: unary.py [asyncio|trio]. Needs hivemind's p2pd: other daemons have no unary calls.
"""

import sys

import anyio

from p2pclient_rs import Daemon, P2PHandlerError
from p2pclient_rs.unary import UnaryHandler


def server(name: str) -> UnaryHandler:
    async def square(request: bytes, caller: object) -> bytes:
        return f"{int(request) ** 2} (says {name})".encode()

    return square


async def main() -> None:
    async with Daemon() as a, Daemon() as b, a.client() as client:
        async with b.client() as one, b.client() as two:
            await one.add_unary_handler("square", server("one"), balanced=True)
            await two.add_unary_handler("square", server("two"), balanced=True)

            await client.connect(b.peer_id, b.addrs)
            for number in (b"2", b"3"):
                reply = await client.call_unary(b.peer_id, "square", number)
                print(number.decode(), "->", reply.decode())
            try:
                await client.call_unary(b.peer_id, "square", b"four")
            except P2PHandlerError as error:
                print("four ->", error)


if __name__ == "__main__":
    anyio.run(main, backend=sys.argv[1] if len(sys.argv) > 1 else "asyncio")
