"""Tensors of 100 MB through streams, to another process and back."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator as Yields, Callable, Iterator
from contextlib import closing
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind recognises streams by it

import pytest
import torch
from hivemind.compression import deserialize_tensor_stream, serialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, ServicerBase
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse
from hivemind.utils.streaming import split_for_streaming

from hivemind_swarm.processes import Peer, may_be_cut_short, serving

pytestmark = pytest.mark.anyio

#: The number of elements, of 4 bytes each.
ELEMENTS = 25_000_000


def digest(data: Any) -> bytes:
    return hashlib.blake2b(data).digest()


def random_tensor() -> Any:
    # Any bit pattern except NaN, which is not equal to itself.
    return torch.randn(ELEMENTS)


class Echo(ServicerBase):
    async def rpc_echo(
        self, requests: AsyncIterator[ExpertRequest], _: P2PContext
    ) -> AsyncIterator[ExpertResponse]:
        """Sends the digest of the received data, and then the tensor."""
        (tensor,) = await deserialize_tensor_stream(r.tensors async for r in requests)
        yield ExpertResponse(metadata=digest(tensor.numpy()))
        for part in split_for_streaming(serialize_torch_tensor(tensor)):
            yield ExpertResponse(tensors=[part])


async def echo_raw(_: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with closing(writer):
        data = await P2P.receive_raw_data(reader)
        await P2P.send_raw_data(digest(data), writer)
        await P2P.send_raw_data(data, writer)
        await reader.read()  # Waits for the caller's close: p2pd may lose data that precedes ours.


async def _register(p2p: P2P) -> None:
    await Echo().add_p2p_handlers(p2p)
    await p2p.add_binary_stream_handler("echo_raw", echo_raw)


@pytest.fixture(scope="module")
def server() -> Iterator[Peer]:
    with serving(_register) as peer:
        yield peer


@pytest.fixture(scope="module")
async def client(server: Peer, anyio_backend: Any) -> Yields[P2P]:
    p2p = await P2P.create(initial_peers=server.maddrs)
    yield p2p
    await p2p.shutdown()


@may_be_cut_short
async def test_tensor_in_parts(
    server: Peer, client: P2P, anyio_backend: Any, report: Callable[[str], None]
) -> None:
    tensor = random_tensor()

    async def parts() -> Yields[ExpertRequest]:
        for part in split_for_streaming(serialize_torch_tensor(tensor)):
            yield ExpertRequest(tensors=[part])

    began = time.perf_counter()
    responses = await Echo.get_stub(client, server.peer_id).rpc_echo(parts())
    arrived = (await responses.__anext__()).metadata
    (returned,) = await deserialize_tensor_stream(r.tensors async for r in responses)
    report(_rate("tensor in parts", anyio_backend, time.perf_counter() - began))
    assert arrived == digest(tensor.numpy())
    assert torch.equal(returned, tensor)


async def test_tensor_as_raw_data(
    server: Peer, client: P2P, anyio_backend: Any, report: Callable[[str], None]
) -> None:
    data = random_tensor().numpy().tobytes()
    began = time.perf_counter()
    _, reader, writer = await client.call_binary_stream_handler(server.peer_id, "echo_raw")
    with closing(writer):
        await P2P.send_raw_data(data, writer)
        arrived = await P2P.receive_raw_data(reader)
        returned = await P2P.receive_raw_data(reader)
    report(_rate("raw tensor", anyio_backend, time.perf_counter() - began))
    assert arrived == digest(data)
    assert returned == data


def _rate(what: str, backend: Any, seconds: float) -> str:
    loop = "uvloop" if backend[1]["use_uvloop"] else "asyncio"
    return f"{what}, 100 MB there and back, caller on {loop}: {seconds:.2f} s"
