"""Unsigned varints on a stream, for programs that frame protobuf messages on their own streams.

The stream is an anyio stream, or has the anyio 1 methods that p2pclient 0.2 called:
``receive_exactly`` and ``send_all``.
"""

from functools import partial
from typing import Any, Protocol

import anyio

from p2pclient_rs.compat.framing import DEFAULT_MAX_BITS, encode_varint, read_varint

__all__ = [
    "DEFAULT_MAX_BITS",
    "read_unsigned_varint",
    "receive_exactly",
    "write_unsigned_varint",
]


class Receiver(Protocol):
    """The method of ``anyio.abc.ByteReceiveStream`` that reading needs."""

    async def receive(self, max_bytes: int, /) -> bytes: ...


class Sender(Protocol):
    """The method of ``anyio.abc.ByteSendStream`` that writing needs."""

    async def send(self, item: bytes, /) -> object: ...


async def receive_exactly(stream: Receiver, n: int) -> bytes:
    """Reads exactly ``n`` bytes.

    Raises:
        anyio.IncompleteRead: The stream ended before that.
    """
    if not hasattr(stream, "receive"):
        data: bytes = await _anyio_1(stream).receive_exactly(n)
        if len(data) < n:
            raise anyio.IncompleteRead
        return data
    buffer = bytearray()
    while len(buffer) < n:
        try:
            chunk = await stream.receive(n - len(buffer))
        except anyio.EndOfStream as error:
            raise anyio.IncompleteRead from error
        if not chunk:
            raise anyio.IncompleteRead
        buffer += chunk
    return bytes(buffer)


async def send(stream: Sender, data: bytes) -> None:
    """Writes all of ``data``."""
    if hasattr(stream, "send"):
        await stream.send(data)
    else:
        await _anyio_1(stream).send_all(data)


def _anyio_1(stream: object) -> Any:
    return stream


async def write_unsigned_varint(
    stream: Sender, integer: int, max_bits: int = DEFAULT_MAX_BITS
) -> None:
    """Writes an unsigned varint.

    Raises:
        ValueError: ``integer`` is negative, or has more than ``max_bits`` bits.
    """
    await send(stream, encode_varint(integer, max_bits))


async def read_unsigned_varint(stream: Receiver, max_bits: int = DEFAULT_MAX_BITS) -> int:
    """Reads an unsigned varint, and nothing after it.

    Raises:
        ValueError: The varint has more than ``max_bits`` bits.
        anyio.IncompleteRead: The stream ended within the varint.
    """
    return await read_varint(partial(receive_exactly, stream), max_bits)
