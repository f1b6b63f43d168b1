"""p2pclient from PyPI. It has no unary calls, and cannot serve streams on hivemind's daemon."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import incumbents
from adapters import AnyioAdapter

from contenders import Contender


@asynccontextmanager
async def p2pclient(control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    incumbents.load_p2pclient()
    from multiaddr import Multiaddr
    from p2pclient import Client
    from p2pclient.libp2p_stubs.peer.id import ID
    from p2pclient.serialization import receive_exactly

    peer_id = ID.from_base58(peer)

    async def open(proto: str) -> AnyioAdapter:
        _, stream = await client.stream_open(peer_id, [proto])
        return AnyioAdapter(stream, receive_exactly)

    async def open_and_close(proto: str, count: int) -> None:
        for _ in range(count):
            _, stream = await client.stream_open(peer_id, [proto])
            await stream.aclose()

    client = Client(control_maddr=Multiaddr(control))
    yield Contender(client.identify, open, open_and_close)
