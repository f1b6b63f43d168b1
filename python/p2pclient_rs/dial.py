"""Connects to a daemon's control socket."""

from __future__ import annotations

import errno

import anyio

from p2pclient_rs._native import ControlConnection, Multiaddr, endpoint
from p2pclient_rs.exceptions import DaemonUnreachable, from_os_error
from p2pclient_rs.pool import PooledConnection
from p2pclient_rs.readiness import watch

__all__ = ["dial", "resolve"]

#: Errors of a connection attempt that are not about the control socket.
_NOT_ABOUT_THE_SOCKET = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))


async def dial(maddr: Multiaddr, max_message_size: int | None) -> PooledConnection:
    """Connects to a control address.

    Args:
        maddr: The address.
        max_message_size: The largest message to accept from the daemon, in bytes.

    Raises:
        DaemonUnreachable: No daemon listens there, or connecting failed for another reason.
    """
    path = None
    try:
        addresses = await resolve(maddr)
        for attempt, address in enumerate(addresses, 1):
            path = address if isinstance(address, str) else None
            try:
                return await _connect(address, max_message_size)
            except OSError:
                if attempt == len(addresses):
                    raise
        raise OSError(errno.EADDRNOTAVAIL, "the name has no address")
    except OSError as error:
        if error.errno in _NOT_ABOUT_THE_SOCKET:
            path = None
        raise _unreachable(error, maddr, path) from error


async def _connect(
    address: str | tuple[str, int], max_message_size: int | None
) -> PooledConnection:
    delay = 0.001
    while (raw := ControlConnection.connect(address, max_message_size)) is None:
        # The daemon's accept queue is full. There is no event for room in it, so poll.
        await anyio.sleep(delay)
        delay = min(2 * delay, 0.05)
    connection = PooledConnection(raw, watch(raw.fileno()))
    try:
        if not raw.connected:
            await connection.watch.writable()
            raw.finish_connect()
    except BaseException:
        connection.close()
        raise
    return connection


def _unreachable(error: OSError, maddr: Multiaddr, path: str | None) -> DaemonUnreachable:
    message = f"no connection to the daemon's control socket at {maddr}: {error}"
    unreachable = from_os_error(DaemonUnreachable, message, error, path)
    unreachable.hint = _hint(error, maddr)
    return unreachable


def _hint(error: OSError, maddr: Multiaddr) -> str | None:
    """Suggests a fix for a failed connection to a control socket."""
    if error.errno == errno.ENOENT:
        return "start a daemon with p2pclient_rs.Daemon(), or pass another control_maddr"
    if error.errno == errno.ECONNREFUSED:
        if str(maddr).startswith("/unix"):
            return "nothing listens at this file: start the daemon again"
        return "no daemon listens there: start one, or pass another control_maddr"
    if error.errno == errno.EACCES:
        return (
            "this user may not connect to it: check the permissions of the socket and of its "
            "directories"
        )
    return None


async def resolve(maddr: Multiaddr) -> list[str | tuple[str, int]]:
    """Returns the socket addresses of a control or listen address."""
    kind, host, port = endpoint(maddr)
    if kind == "unix":
        return [host]
    if kind in ("ip4", "ip6"):
        return [(host, port)]
    import socket

    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    found = await anyio.getaddrinfo(
        host, port, family=families.get(kind, 0), type=socket.SOCK_STREAM
    )
    return list(dict.fromkeys((str(address[0]), port) for *_, address in found))
