"""Protobuf messages on a stream, and free TCP ports."""

from functools import partial

from google.protobuf.message import Message as PBMessage

from p2pclient_rs.compat.framing import MAX_MESSAGE_BYTES, encode_message, read_message
from p2pclient_rs.compat.p2pclient.exceptions import ControlFailure
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2 as p2pd_pb
from p2pclient_rs.compat.p2pclient.serialization import (
    Receiver,
    Sender,
    read_unsigned_varint,
    receive_exactly,
    send,
    write_unsigned_varint,
)
from p2pclient_rs.daemon import unused_tcp_port
from p2pclient_rs.exceptions import DaemonRefused

__all__ = [
    "ControlFailure",
    "PBMessage",
    "get_unused_tcp_port",
    "p2pd_pb",
    "raise_if_failed",
    "read_pbmsg_safe",
    "read_unsigned_varint",
    "receive_exactly",
    "write_pbmsg",
    "write_unsigned_varint",
]


def raise_if_failed(response: p2pd_pb.Response) -> None:
    """Raises `ControlFailure` with the daemon's message if the response is an error."""
    if response.type == p2pd_pb.Response.ERROR:
        raise DaemonRefused(daemon_message=response.error.msg)


async def write_pbmsg(stream: Sender, pbmsg: PBMessage) -> None:
    """Writes a message with a length prefix.

    Raises:
        google.protobuf.message.EncodeError: A required field is not set.
    """
    await send(stream, encode_message(pbmsg))


async def read_pbmsg_safe(
    stream: Receiver, pbmsg: PBMessage, *, max_bytes: int = MAX_MESSAGE_BYTES
) -> None:
    """Reads a message with a length prefix.

    Args:
        stream: The stream to read from.
        pbmsg: The message to fill.
        max_bytes: The maximum length. Longer messages are refused without reading them.

    Raises:
        ValueError: The message is longer than ``max_bytes``.
        anyio.IncompleteRead: The stream ended within the message.
        google.protobuf.message.DecodeError: The bytes are not a valid message.
    """
    await read_message(partial(receive_exactly, stream), pbmsg, max_bytes)


def get_unused_tcp_port() -> int:
    """Returns a TCP port that is free on the loopback interface at the moment."""
    return unused_tcp_port()
