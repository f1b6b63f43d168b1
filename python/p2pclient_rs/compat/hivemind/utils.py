"""Exceptions, and messages on a reader and a writer."""

from __future__ import annotations

import asyncio
from typing import Any

from p2pclient_rs.exceptions import DaemonRefused

from .exceptions import (
    ControlFailure,
    DispatchFailure,
    P2PDaemonError,
    P2PHandlerError,
    of_hivemind,
)

__all__ = [
    "DEFAULT_MAX_BITS",
    "ControlFailure",
    "DispatchFailure",
    "P2PDaemonError",
    "P2PHandlerError",
    "raise_if_failed",
    "read_pbmsg_safe",
    "read_unsigned_varint",
    "write_pbmsg",
    "write_unsigned_varint",
]

DEFAULT_MAX_BITS = 64

#: The most that protobuf can read, in bytes.
_MAX_MESSAGE_BYTES = 2**31 - 1


def _varint(integer: int, max_bits: int = DEFAULT_MAX_BITS) -> bytes:
    if integer < 0:
        raise ValueError(f"negative integer: {integer}")
    if integer >= 1 << max_bits:
        raise ValueError(f"integer too large: {integer}")
    encoded = bytearray()
    while integer > 0x7F:
        encoded.append(integer & 0x7F | 0x80)
        integer >>= 7
    encoded.append(integer)
    return bytes(encoded)


async def write_unsigned_varint(
    stream: asyncio.StreamWriter, integer: int, max_bits: int = DEFAULT_MAX_BITS
) -> None:
    """Writes an unsigned varint.

    Raises:
        ValueError: ``integer`` is negative or takes more than ``max_bits`` bits.
    """
    stream.write(_varint(integer, max_bits))
    await stream.drain()


async def read_unsigned_varint(
    stream: asyncio.StreamReader, max_bits: int = DEFAULT_MAX_BITS
) -> int:
    """Reads an unsigned varint.

    Raises:
        ValueError: It takes more than ``max_bits`` bits.
        asyncio.IncompleteReadError: The stream ended before.
    """
    result = shift = 0
    while True:
        (byte,) = await stream.readexactly(1)
        result |= (byte & 0x7F) << shift
        shift += 7
        if result >= 1 << max_bits or shift > max_bits + 7:
            raise ValueError(f"Varint overflowed: {result}")
        if byte < 0x80:
            return result


def raise_if_failed(response: Any) -> None:
    """Raises ``ControlFailure``, with the daemon's words, if it answered with an error.

    Args:
        response: A ``Response`` message.
    """
    if response.type == response.ERROR:
        raise of_hivemind(DaemonRefused(daemon_message=response.error.msg))


async def write_pbmsg(stream: asyncio.StreamWriter, pbmsg: Any) -> None:
    """Writes a protobuf message and, before it, its length, in one piece."""
    message = pbmsg.SerializeToString()
    stream.write(_varint(len(message)) + message)
    await stream.drain()


async def read_pbmsg_safe(stream: asyncio.StreamReader, pbmsg: Any) -> None:
    """Reads a protobuf message that has its length before it into ``pbmsg``.

    Raises:
        ValueError: The message is longer than protobuf can read.
        asyncio.IncompleteReadError: The stream ended before.
        google.protobuf.message.DecodeError: It is not such a message.
    """
    length = await read_unsigned_varint(stream)
    if length > _MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    pbmsg.ParseFromString(await stream.readexactly(length))
