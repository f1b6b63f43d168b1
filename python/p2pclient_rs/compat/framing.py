"""Protobuf messages with a length prefix, for programs that frame messages on their own streams.

The clients do not use this module: Rust frames their messages.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

__all__ = [
    "DEFAULT_MAX_BITS",
    "MAX_MESSAGE_BYTES",
    "encode_message",
    "encode_varint",
    "read_message",
    "read_varint",
]

DEFAULT_MAX_BITS = 64

#: The size of the largest message that protobuf can parse, in bytes. Messages between programs are
#: not subject to the daemon's limit of 4 MiB.
MAX_MESSAGE_BYTES = 2**31 - 1

#: Reads exactly this many bytes, or raises.
ReadExactly = Callable[[int], Awaitable[bytes]]


def encode_varint(integer: int, max_bits: int = DEFAULT_MAX_BITS) -> bytes:
    """Encodes an unsigned varint.

    Raises:
        ValueError: ``integer`` is negative, or has more than ``max_bits`` bits.
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


async def read_varint(read_exactly: ReadExactly, max_bits: int = DEFAULT_MAX_BITS) -> int:
    """Reads an unsigned varint byte by byte, so that it consumes nothing after it.

    Raises:
        ValueError: The varint has more than ``max_bits`` bits.
    """
    result = shift = 0
    while True:
        (byte,) = await read_exactly(1)
        result |= (byte & 0x7F) << shift
        shift += 7
        if result.bit_length() > max_bits or (byte & 0x80 and shift >= max_bits):
            raise ValueError(f"varint overflowed: it has more than {max_bits} bits")
        if not byte & 0x80:
            return result


def encode_message(message: Any) -> bytes:
    """Encodes a protobuf message with a length prefix.

    Raises:
        google.protobuf.message.EncodeError: A required field is not set.
    """
    payload: bytes = message.SerializeToString()
    return encode_varint(len(payload)) + payload


async def read_message(
    read_exactly: ReadExactly, message: Any, max_bytes: int = MAX_MESSAGE_BYTES
) -> None:
    """Reads a message with a length prefix into ``message``.

    Raises:
        ValueError: The message is longer than ``max_bytes``.
        google.protobuf.message.DecodeError: The bytes are not a valid message.
    """
    length = await read_varint(read_exactly)
    if length > max_bytes:
        raise ValueError(f"a message of {length} bytes: more than {max_bytes}")
    message.ParseFromString(await read_exactly(length))
