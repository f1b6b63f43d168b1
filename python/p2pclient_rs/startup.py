"""Waits until a spawned daemon is ready, or finds out why it is not. ``Startup`` decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

from p2pclient_rs._native import Startup
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import ControlFailure, DaemonStartError, DaemonUnreachable
from p2pclient_rs.process import destroy, poll_exit

if TYPE_CHECKING:
    from p2pclient_rs._native import DaemonProcess, Identity, Multiaddr, PeerID


async def ready(process: DaemonProcess, timeout: float) -> Identity:
    """Waits until the daemon is ready.

    Raises:
        DaemonStartError: The daemon ended, or was not ready in `timeout` seconds.
    """
    startup = Startup(anyio.current_time(), timeout)
    async with anyio.create_task_group() as tasks:
        # Another task probes and this one only polls, since a cancelled task can keep the caller's
        # `Daemon` alive for a moment longer.
        outcome: list[Identity | None] = []
        tasks.start_soon(_probe_until_ready, process, startup, outcome)
        await poll_exit(process, unless=outcome)
        tasks.cancel_scope.cancel()
    if process.poll() is not None:
        startup.ended()
    identity = outcome[0] if outcome and startup.step(anyio.current_time())[0] == "ready" else None
    if identity is None:
        reasons = await _unreachable_peers(process) if process.unconnected else []
        raise process.not_ready(timeout, startup.reason, reasons)
    return identity


async def _probe_until_ready(
    process: DaemonProcess, startup: Startup, outcome: list[Identity | None]
) -> None:
    """Appends the daemon's identity to `outcome` once it is ready, or None if time runs out."""
    identity: Identity | None = None
    while True:
        step, until = startup.step(anyio.current_time())
        if step == "probe":
            with anyio.CancelScope(deadline=startup.deadline):
                failure = None
                try:
                    identity = await _probe(process)
                except _NotReady as error:
                    failure = str(error)
                startup.probed(failure, anyio.current_time())
        elif step == "wait":
            await anyio.sleep_until(until)
        else:
            outcome.append(identity)
            return


class _NotReady(Exception):
    """A probe did not find the daemon ready, for the reason in the message."""


async def _probe(process: DaemonProcess) -> Identity:
    """Sends IDENTIFY to the daemon and returns its identity."""
    try:
        async with Client(process.control_maddr) as client:
            identity = await client.identify()
    except ControlFailure as failure:
        raise _NotReady(_message(failure)) from failure
    why = process.why_not_ready(identity.peer_id)
    if why is not None:
        raise _NotReady(why)
    return identity


async def _unreachable_peers(process: DaemonProcess) -> list[tuple[str, str]]:
    """Returns each bootstrap peer with the reason why it could not be reached.

    Starts a second daemon to find the reasons: the one that ended printed none.
    """
    timeout = Startup.EXPLAIN_TIMEOUT
    peers = process.bootstrap_peers()
    reasons = {address: f"no answer within {timeout:g} s" for address, _, _ in peers}

    async def connect(client: Client, address: str, peer: PeerID, addrs: list[Multiaddr]) -> None:
        try:
            await client.connect(peer, addrs)
            reasons[address] = "it can be reached now"
        except ControlFailure as failure:
            reasons[address] = reason(failure)

    try:
        other = process.without_bootstrap()
    except (DaemonStartError, ValueError):
        return []
    try:
        other.spawn()
        with anyio.move_on_after(timeout):
            await ready(other, timeout)
            async with (
                Client(other.control_maddr) as client,
                anyio.create_task_group() as tasks,
            ):
                for peer in peers:
                    tasks.start_soon(connect, client, *peer)
    except DaemonStartError:
        reasons.clear()
    except BaseException as error:
        await destroy(other, error)
        raise
    await destroy(other)
    return list(reasons.items())


def reason(failure: ControlFailure) -> str:
    """Returns a failure's reason in one line: the daemon's message, if it has one."""
    return " ".join((failure.daemon_message or _message(failure)).split())


def _message(failure: ControlFailure) -> str:
    """Returns the failure's message without the hint to start a daemon, which is starting."""
    return str(failure.args[0] if isinstance(failure, DaemonUnreachable) else failure)
