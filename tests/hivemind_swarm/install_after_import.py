"""Imports hivemind, and with ``on`` then calls ``install()``: install_after_import.py on|off"""

from __future__ import annotations

import asyncio
import sys

from hivemind import DHT
from hivemind.p2p import P2P, P2PContext, ServicerBase, p2p_daemon
from hivemind.proto.test_pb2 import TestRequest as Request, TestResponse as Response
from hivemind.utils import get_dht_time


class Square(ServicerBase):
    async def rpc_square(self, request: Request, _: P2PContext) -> Response:
        return Response(number=request.number**2)


async def call() -> int:
    server = await P2P.create()
    client = await P2P.create(initial_peers=await server.get_visible_maddrs())
    await Square().add_p2p_handlers(server)
    stub = Square.get_stub(client, server.peer_id)
    response = await stub.rpc_square(Request(number=12))
    await client.shutdown()
    await server.shutdown()
    return int(response.number)


def store_and_get() -> object:
    first = DHT(start=True)
    second = DHT(initial_peers=first.get_visible_maddrs(), start=True)
    first.store("key", "value", get_dht_time() + 60)
    value = second.get("key").value
    second.shutdown()
    first.shutdown()
    return value


def main() -> None:
    if sys.argv[1] == "on":
        import p2pclient_rs

        p2pclient_rs.install()
    print(p2p_daemon.p2pclient.Client.__module__.partition(".")[0])
    print(asyncio.run(call()))
    print(store_and_get())


if __name__ == "__main__":
    main()
