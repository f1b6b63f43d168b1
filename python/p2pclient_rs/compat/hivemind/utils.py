"""Exceptions, and protobuf messages on a reader and a writer."""

from __future__ import annotations

import asyncio
from typing import Any

from p2pclient_rs.compat.framing import (
    DEFAULT_MAX_BITS,
    encode_message,
    encode_varint,
    read_message,
    read_varint,
)
from p2pclient_rs.exceptions import DaemonRefused

from .exceptions import (
    ControlFailure,
    DispatchFailure,
    P2PDaemonError,
    P2PHandlerError,
    to_hivemind,
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


async def write_unsigned_varint(
    stream: asyncio.StreamWriter, integer: int, max_bits: int = DEFAULT_MAX_BITS
) -> None:
    """Writes an unsigned varint.

    Raises:
        ValueError: ``integer`` is negative, or has more than ``max_bits`` bits.
    """
    stream.write(encode_varint(integer, max_bits))
    await stream.drain()


async def read_unsigned_varint(
    stream: asyncio.StreamReader, max_bits: int = DEFAULT_MAX_BITS
) -> int:
    """Reads an unsigned varint.

    Raises:
        ValueError: The varint has more than ``max_bits`` bits.
        asyncio.IncompleteReadError: The stream ended within the varint.
    """
    return await read_varint(stream.readexactly, max_bits)


def raise_if_failed(response: Any) -> None:
    """Raises ``ControlFailure`` with the daemon's message if the response is an error.

    Args:
        response: A ``Response`` message.
    """
    if response.type == response.ERROR:
        raise to_hivemind(DaemonRefused(daemon_message=response.error.msg))


async def write_pbmsg(stream: asyncio.StreamWriter, pbmsg: Any) -> None:
    """Writes a protobuf message with a length prefix."""
    stream.write(encode_message(pbmsg))
    await stream.drain()


async def read_pbmsg_safe(stream: asyncio.StreamReader, pbmsg: Any) -> None:
    """Reads a protobuf message with a length prefix into ``pbmsg``.

    Raises:
        ValueError: The message is longer than protobuf can parse.
        asyncio.IncompleteReadError: The stream ended within the message.
        google.protobuf.message.DecodeError: The bytes are not a valid message.
    """
    await read_message(stream.readexactly, pbmsg)
