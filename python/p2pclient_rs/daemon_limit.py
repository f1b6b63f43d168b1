"""Finds the largest message that a daemon accepts, for a client without an explicit limit.

The control protocol has no request for this limit, and a daemon closes the persistent connection
when a message exceeds it. There are two reliable sources:

- On Linux, the command line of the process that listens at the daemon's unix socket.
- The limit that the program gave to an earlier client of the daemon, in this process or in one from
  which this process was forked.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["DEFAULT_MAX_MESSAGE_SIZE", "find", "of_command", "remember"]

#: The default limit of hivemind's daemon, in bytes.
DEFAULT_MAX_MESSAGE_SIZE = 4 << 20

#: The largest message of protobuf, in bytes.
_MAX_PROTOBUF = 2**31 - 1

_FLAG = b"persistentConnMaxMsgSize"

#: The flags of p2pd whose value, if any, is not the next argument.
_SWITCHES = frozenset(
    b"q b dht dhtClient dhtServer connManager quic natPortMap pubsub pubsubSign pubsubSignStrict "
    b"relay relayActive relayHop autoRelay relayDiscovery relayService autonat noListenAddrs i "
    b"pprof noise tls forceReachabilityPublic forceReachabilityPrivate".split()
)

#: The limits given to clients, in bytes, by control address. Forked children inherit them.
_told: dict[str, int] = {}
_MAX_TOLD = 1024


def remember(control_maddr: object, limit: int) -> None:
    """Records the limit of a daemon, for later clients of this process and of its forked children.

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
    """Finds the limit of a daemon.

    Args:
        fd: The descriptor of a connection to its control socket.
        control_maddr: The daemon's control address.

    Returns:
        The largest message that the daemon accepts, in bytes, or None if it is unknown.
    """
    found = None
    with suppress(OSError):
        found = _of_peer(fd)
    return found if found is not None else _told.get(str(control_maddr))


def _of_peer(fd: int) -> int | None:
    """Reads the command line of the process at the other end of a unix socket."""
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
    if pid <= 0:  # a process in another namespace
        return None
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return of_command(file.read().split(b"\0")[:-1])


def of_command(arguments: Sequence[bytes]) -> int | None:
    """Finds the limit in the command line of a daemon.

    Args:
        arguments: The command line, which is parsed as by Go's ``flag`` package.

    Returns:
        The limit in bytes, or None if this is not a command line of p2pd, or is invalid.
    """
    if not arguments:
        return None
    # Without the flag, p2pd uses its default.
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
