"""This package."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from adapters import OurAdapter

from contenders import Contender, StreamHandler, UnaryHandler
from p2pclient_rs import Client, PeerID, Stream, StreamInfo


@asynccontextmanager
async def ours(control: str, peer: str, listen: str) -> AsyncIterator[Contender]:
    peer_id = PeerID(peer)

    async def open(proto: str) -> OurAdapter:
        _, stream = await client.stream_open(peer_id, [proto])
        return OurAdapter(stream)

    async def open_and_close(proto: str, count: int) -> None:
        for _ in range(count):
            _, stream = await client.stream_open(peer_id, [proto])
            await stream.aclose()

    async def serve_streams(proto: str, handler: StreamHandler) -> None:
        async def handle(info: StreamInfo, stream: Stream) -> None:
            await handler(OurAdapter(stream))

        await client.stream_handler(proto, handle)

    async def serve_calls(proto: str, handler: UnaryHandler) -> None:
        await client.add_unary_handler(proto, handler)

    async with Client(control, listen) as client:
        yield Contender(
            client.identify,
            open,
            open_and_close,
            partial(client.call_unary, peer_id),
            serve_calls,
            client.listen,
            serve_streams,
        )
