"""hivemind's bindings: the original ones, and this package's after ``install()``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import incumbents
from adapters import AsyncioAdapter

from contenders import Contender, StreamHandler, UnaryHandler


@asynccontextmanager
async def hivemind(control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    incumbents.load_hivemind()
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID
    from hivemind.p2p.p2p_daemon_bindings.p2pclient import Client
    from hivemind.utils.multiaddr import Multiaddr

    peer_id = PeerID.from_base58(peer)

    async def open(proto: str) -> AsyncioAdapter:
        _, reader, writer = await client.stream_open(peer_id, [proto])
        return AsyncioAdapter(reader, writer)

    async def open_and_close(proto: str, count: int) -> None:
        for _ in range(count):
            _, _, writer = await client.stream_open(peer_id, [proto])
            writer.close()
            await writer.wait_closed()

    async def serve_streams(proto: str, handler: StreamHandler) -> None:
        async def handle(info: Any, reader: Any, writer: Any) -> None:
            await handler(AsyncioAdapter(reader, writer))

        await client.stream_handler(proto, handle)

    async def serve_calls(proto: str, handler: UnaryHandler) -> None:
        await client.add_unary_handler(proto, handler)

    client = await Client.create(Multiaddr(control), Multiaddr(listen))
    yield Contender(
        client.identify,
        open,
        open_and_close,
        partial(client.call_unary_handler, peer_id),
        serve_calls,
        client.listen,
        serve_streams,
    )
    client.close()


@asynccontextmanager
async def ours_as_hivemind(control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    import p2pclient_rs

    p2pclient_rs.install(p2pclient=False)
    async with hivemind(control, peer, listen) as contender:
        yield contender
