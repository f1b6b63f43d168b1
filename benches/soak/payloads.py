"""Payloads derived from a number, so that both ends can check every byte."""

from __future__ import annotations

import random
import struct

#: Size of the largest payload, in bytes.
LARGEST = 64 << 10

_HEAD = struct.Struct("<QI")
SMALLEST = _HEAD.size
_BLOCK = random.Random(20231121).randbytes(4 * LARGEST)
#: Distinguishes replies from requests.
_REPLY = 1 << 63


def size(number: int) -> int:
    """Returns a payload's size: mostly small, the largest for one in a hundred."""
    mixed = (number * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    share, spread = mixed >> 56, (mixed >> 24) & 0xFFFF
    if share < 180:
        return SMALLEST + spread % 244
    if share < 232:
        return 256 + spread % 3840
    if share < 253:
        return 4096 + spread % 12288
    return LARGEST


def request(number: int) -> bytes:
    """Returns the request with a number below 2**63."""
    return _payload(number, size(number))


def reply(number: int) -> bytes:
    """Returns the reply to a request, with other bytes and mostly another size."""
    return _payload(number | _REPLY, size(number ^ 0x2A5A5A5A))


def number_of(data: bytes) -> int | None:
    """Returns the number of a request, or None unless every byte of it is right."""
    if len(data) < SMALLEST:
        return None
    number, _ = _HEAD.unpack_from(data)
    return number if data == request(number) else None


def _payload(number: int, length: int) -> bytes:
    start = (number * 7919) % (3 * LARGEST)
    body = _BLOCK[start : start + length - SMALLEST]
    return _HEAD.pack(number, length) + body


def stretch(offset: int, length: int) -> bytes:
    """Returns a part of an endless sequence of bytes."""
    start = offset % len(_BLOCK)
    return (_BLOCK[start:] + _BLOCK * (length // len(_BLOCK) + 1))[:length]
