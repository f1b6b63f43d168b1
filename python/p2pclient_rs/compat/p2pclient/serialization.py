"""Unsigned varints on a stream: what every message is preceded by.

For programs that read and write protobuf messages on their own streams. The client does not use
it: its messages are framed in Rust.

A stream may be one of anyio's, or have only the methods of anyio 1 that p2pclient 0.2 called:
``receive_exactly`` and ``send_all``.
"""

from typing import Any, Protocol

import anyio

__all__ = [
    "DEFAULT_MAX_BITS",
    "read_unsigned_varint",
    "receive_exactly",
    "write_unsigned_varint",
]

DEFAULT_MAX_BITS = 64


class Receiver(Protocol):
    """The one method of ``anyio.abc.ByteReceiveStream`` that reading needs."""

    async def receive(self, max_bytes: int, /) -> bytes: ...


class Sender(Protocol):
    """The one method of ``anyio.abc.ByteSendStream`` that writing needs."""

    async def send(self, item: bytes, /) -> object: ...


async def receive_exactly(stream: Receiver, n: int) -> bytes:
    """Reads ``n`` bytes.

    Raises:
        anyio.IncompleteRead: The stream ended before.
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
    """Writes all of some bytes."""
    if hasattr(stream, "send"):
        await stream.send(data)
    else:
        await _anyio_1(stream).send_all(data)


def _anyio_1(stream: object) -> Any:
    return stream


def encode_unsigned_varint(integer: int, max_bits: int = DEFAULT_MAX_BITS) -> bytes:
    """The bytes of an unsigned varint.

    Raises:
        ValueError: The number is negative, or has more than ``max_bits`` bits.
    """
    if integer < 0:
        raise ValueError(f"negative integer: {integer}")
    if integer.bit_length() > max_bits:
        raise ValueError(f"integer too large: {integer} has more than {max_bits} bits")
    encoded = bytearray()
    while integer > 0x7F:
        encoded.append(0x80 | integer & 0x7F)
        integer >>= 7
    encoded.append(integer)
    return bytes(encoded)


async def write_unsigned_varint(
    stream: Sender, integer: int, max_bits: int = DEFAULT_MAX_BITS
) -> None:
    """Writes a number, in one piece.

    Raises:
        ValueError: It is negative, or has more than ``max_bits`` bits.
    """
    await send(stream, encode_unsigned_varint(integer, max_bits))


async def read_unsigned_varint(stream: Receiver, max_bits: int = DEFAULT_MAX_BITS) -> int:
    """Reads a number, byte by byte so as not to take what follows it.

    Raises:
        ValueError: It has more than ``max_bits`` bits.
        anyio.IncompleteRead: The stream ended before.
    """
    result = shift = 0
    while True:
        (byte,) = await receive_exactly(stream, 1)
        result |= (byte & 0x7F) << shift
        shift += 7
        if result.bit_length() > max_bits or (byte & 0x80 and shift >= max_bits):
            raise ValueError(f"varint overflowed: it has more than {max_bits} bits")
        if not byte & 0x80:
            return result
