"""``stream_open`` returns an ``OpenedStream``, both a stream and the tuple ``(info, stream)``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import anyio
import pytest
from anyio.abc import ByteStream, SocketAttribute
from typing_extensions import assert_type

from p2pclient_rs import OpenedStream, Stream, StreamAttribute, StreamInfo

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio


async def echo(stream: Stream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def opened(pair: Pair) -> OpenedStream[StreamInfo]:
    await pair.bob.stream_handler("/echo", echo)
    return await pair.alice.stream_open(pair.bob_daemon.peer_id, ["/echo"])


async def test_unpacks_into_info_and_stream(pair: Pair) -> None:
    result = await opened(pair)
    info, stream = result
    assert_type(info, StreamInfo)
    assert_type(stream, Stream)
    assert_type(result.info, StreamInfo)
    assert isinstance(result, tuple) and len(result) == 2
    assert type(stream) is Stream and isinstance(info, StreamInfo)
    assert (result[0], result[1]) == (info, stream) == result
    assert result.info is info is stream.info and result.stream is stream
    assert info.proto == "/echo" and info.peer_id == pair.bob_daemon.peer_id
    await stream.aclose()


async def test_supports_the_asyncio_stream_methods(pair: Pair) -> None:
    stream = await opened(pair)
    await stream.write(b"ping")
    assert await stream.read(1024) == b"ping"
    stream.write(b"a line\nand more;")
    await stream.drain()
    assert await stream.readline() == b"a line\n"
    assert await stream.readuntil(b";") == b"and more;"
    stream.writelines([b"12", b"34"])
    await stream.drain()
    assert await stream.readexactly(4) == b"1234"
    assert not stream.at_eof() and not stream.is_closing() and stream.can_write_eof()
    assert stream.get_extra_info("peername") == stream.extra(SocketAttribute.remote_address)
    await stream.close()
    assert stream.is_closing()
    await stream.wait_closed()
    with pytest.raises(anyio.ClosedResourceError):
        await stream.read(1)


async def test_supports_the_anyio_byte_stream_methods(pair: Pair) -> None:
    async with await opened(pair) as stream:
        assert isinstance(stream, OpenedStream) and isinstance(stream, ByteStream)
        await stream.send(b"ping")
        assert await stream.receive() == b"ping"
        assert stream.extra(StreamAttribute.stream_info) is stream.info
        assert stream.extra(SocketAttribute.remote_port, 5) is not None
        assert set(stream.extra_attributes) == set(stream.stream.extra_attributes)
        await stream.send(b"last")
        received = b""
        async for data in stream:
            received += data
            if received == b"last":
                break
        await stream.send_eof()
    with pytest.raises(anyio.ClosedResourceError):
        await stream.send(b"a")


async def test_supports_the_anyio_1_names(pair: Pair) -> None:
    stream = await opened(pair)
    await stream.send_all(b"one,two,three")
    assert await stream.receive_exactly(2) == b"on"
    assert await stream.receive_until(b",", 10) == b"e"
    async for chunk in stream.receive_delimited_chunks(b",", 10):
        assert chunk == b"two"
        break
    async for chunk in stream.receive_chunks(5):
        assert chunk == b"three"
        break
    await stream.send_all(b"four")
    assert await stream.receive_some(4) == b"four"
    assert stream.buffered_data == b""
    assert stream.peer_address == stream.stream.peer_address
    assert stream.address == stream.stream.address
    stream.abort()


def public(owner: type) -> dict[str, Any]:
    names = [name for name in dir(owner) if not name.startswith("_")]
    special = ["__aenter__", "__aexit__", "__aiter__", "__anext__"]
    return {name: inspect.getattr_static(owner, name) for name in (*names, *special)}


@pytest.mark.independent
@pytest.mark.parametrize("name", public(Stream))
def test_has_every_public_member_of_stream(name: str) -> None:
    theirs, ours = public(Stream)[name], public(OpenedStream).get(name)
    assert ours is not None and name in vars(OpenedStream)  # defined here, not inherited from tuple
    if isinstance(theirs, property):
        assert isinstance(ours, property)
    elif name not in ("extra", "__aexit__"):
        assert parameters(ours) == parameters(theirs)
        assert inspect.iscoroutinefunction(ours) == inspect.iscoroutinefunction(theirs)


def parameters(function: Any) -> list[str]:
    signature = inspect.signature(function)
    return [str(p.replace(annotation=p.empty)) for p in signature.parameters.values()]
