"""The largest message that a daemon takes, for a client that was given no limit.

The control protocol has no request for it, and a daemon closes the persistent connection on a
larger message. Two sources are safe enough to rely on:

- On Linux, the command line of the process that listens at the daemon's unix socket.
- The limit that the creator of the daemon gave to its client, in this process or in one that it was
  forked from.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["DEFAULT_MAX_MESSAGE_SIZE", "find", "of_command", "remember"]

#: What hivemind's daemon takes unless it is started with another limit, in bytes.
DEFAULT_MAX_MESSAGE_SIZE = 4 << 20

#: The largest message of protobuf, in bytes.
_MAX_PROTOBUF = 2**31 - 1

_FLAG = b"persistentConnMaxMsgSize"

#: The flags of p2pd that take no value as the next argument.
_SWITCHES = frozenset(
    b"q b dht dhtClient dhtServer connManager quic natPortMap pubsub pubsubSign pubsubSignStrict "
    b"relay relayActive relayHop autoRelay relayDiscovery relayService autonat noListenAddrs i "
    b"pprof noise tls forceReachabilityPublic forceReachabilityPrivate".split()
)

#: Limits that clients were given, in bytes, by control address. Forked children inherit it.
_told: dict[str, int] = {}
_MAX_TOLD = 1024


def remember(control_maddr: object, limit: int) -> None:
    """Notes the limit of a daemon, for later clients of this process and of those forked from it.

    Args:
        control_maddr: The daemon's control address.
        limit: Its ``-persistentConnMaxMsgSize``, in bytes.
    """
    key = str(control_maddr)
    _told.pop(key, None)
    while len(_told) >= _MAX_TOLD:
        del _told[next(iter(_told))]
    _told[key] = limit


def find(fd: int, control_maddr: object) -> int | None:
    """The limit of a daemon.

    Args:
        fd: A connection to its control socket.
        control_maddr: The address of that.

    Returns:
        The largest message that it takes, in bytes; None if that cannot be found out.
    """
    found = None
    with suppress(OSError):
        found = _of_peer(fd)
    return found if found is not None else _told.get(str(control_maddr))


def _of_peer(fd: int) -> int | None:
    """From the command line of the process on the other end of a unix socket."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return None
    copy = os.dup(fd)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        if connection.family != socket.AF_UNIX:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, option, struct.calcsize("iII"))
    pid, _, _ = struct.unpack("iII", credentials)
    if pid <= 0:  # of another namespace
        return None
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return of_command(file.read().split(b"\0")[:-1])


def of_command(arguments: Sequence[bytes]) -> int | None:
    """The limit that a command line gives to a daemon.

    Args:
        arguments: The command line, read as Go's ``flag`` package does.

    Returns:
        The limit in bytes; None if this is no command line of p2pd, or is hard to read.
    """
    if not arguments:
        return None
    # Without the flag it is the default one, but only p2pd's.
    limit = DEFAULT_MAX_MESSAGE_SIZE if b"p2pd" in os.path.basename(arguments[0]) else None
    rest = iter(arguments[1:])
    for argument in rest:
        if not argument.startswith(b"-") or argument in (b"-", b"--"):
            break
        name, is_set, value = argument.removeprefix(b"-").removeprefix(b"-").partition(b"=")
        if not is_set and name not in _SWITCHES:
            value = next(rest, b"")
        if name == _FLAG:
            try:
                limit = int(value.decode("ascii"), 0)
            except ValueError:
                return None
    return limit if limit is None or 0 < limit <= _MAX_PROTOBUF else None
