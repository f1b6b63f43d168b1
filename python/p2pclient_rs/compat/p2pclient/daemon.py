"""Daemons that start when they are constructed, and clients of them, for programs' tests.

They are based on `p2pclient_rs.Daemon`. Use that class for everything else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import anyio

from p2pclient_rs import daemon
from p2pclient_rs._native import DaemonProcess
from p2pclient_rs.compat.p2pclient._multiaddr import Multiaddr
from p2pclient_rs.compat.p2pclient.p2pclient import Client
from p2pclient_rs.compat.p2pclient.utils import get_unused_tcp_port

__all__ = [
    "TIMEOUT_DURATION",
    "Client",
    "Daemon",
    "DaemonTuple",
    "GoDaemon",
    "JsDaemon",
    "get_unused_tcp_port",
    "make_p2pd_pair",
    "make_p2pd_pair_ip4",
    "make_p2pd_pair_unix",
    "try_until_success",
]

TIMEOUT_DURATION = 30  # seconds


async def try_until_success(
    coro_func: Callable[[], Awaitable[bool]], timeout: float = TIMEOUT_DURATION
) -> None:
    """Calls a function repeatedly until its result is true.

    Args:
        coro_func: The function, which takes no arguments.
        timeout: The time in seconds after which it makes no further call.

    Raises:
        AssertionError: The result was not true in time.
    """
    deadline = time.monotonic() + timeout
    while not await coro_func():
        if time.monotonic() >= deadline:
            raise AssertionError(f"{coro_func} still failed after {timeout} seconds")
        await anyio.sleep(0.01)


class Process:
    """A daemon's process, with the methods of ``subprocess.Popen``.

    It is not a ``Popen``, since that would reap the process.
    """

    def __init__(self, process: DaemonProcess) -> None:
        self._process = process
        self.args: list[str] = process.command

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while it is running."""
        return self._process.poll()

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None while it is running."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Waits until the process has ended, and returns its exit status.

        Raises:
            subprocess.TimeoutExpired: It is still running after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._process.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.005)
        return status

    def send_signal(self, sig: int) -> None:
        """Sends a signal to the process, if it is running."""
        if self._process.poll() is None:
            os.kill(self.pid, sig)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Daemon(daemon.Daemon):
    """A daemon that runs from the construction of the object until `close`.

    Args:
        daemon_executable: The binary's path or name. `p2pclient_rs.Daemon` describes the search for
            a plain ``p2pd``. A binary named ``jsp2pd`` is the JavaScript daemon.
        control_maddr: The address of the control socket.
        enable_control: Has no effect: every daemon has a control socket.
        enable_connmgr: Whether to trim connections to 1 when there are more than 2.
        enable_dht: Whether to run a DHT server.
        enable_pubsub: Whether to run gossipsub.

    Raises:
        DaemonNotFound: There is no such binary.
        DaemonStartError: The binary cannot be executed.
    """

    def __init__(
        self,
        daemon_executable: str,
        control_maddr: Multiaddr,
        enable_control: bool,
        enable_connmgr: bool,
        enable_dht: bool,
        enable_pubsub: bool,
    ) -> None:
        super().__init__(
            None if daemon_executable == "p2pd" else daemon_executable,
            control_maddr=str(control_maddr),
            connmgr=enable_connmgr and (1, 2, 0),
            dht="server" if enable_dht else False,
            pubsub="gossipsub" if enable_pubsub else False,
            start_timeout=TIMEOUT_DURATION,
        )
        self.daemon_executable = daemon_executable
        self.enable_control = enable_control
        self.enable_connmgr = enable_connmgr
        self.enable_dht = enable_dht
        self.enable_pubsub = enable_pubsub
        self._ecosystem_maddr = control_maddr
        self._running = self._spawn()
        self._popen = Process(self._running)

    @property
    def control_maddr(self) -> Multiaddr:  # type: ignore[override]
        """The address of the control socket."""
        return self._ecosystem_maddr

    @property
    def proc_daemon(self) -> Process:
        """The daemon's process."""
        return self._popen

    @property
    def log_filename(self) -> str:
        """The file with the daemon's output. `close` removes it; ``logs`` keeps its contents."""
        return self._running.log

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._running.ended

    async def wait_until_ready(self) -> None:
        """Waits until the daemon answers on its control socket.

        Raises:
            DaemonStartError: The daemon ended, or did not answer within `TIMEOUT_DURATION`.
        """
        await self._become_ready(self._running)

    def close(self) -> None:
        """Stops the daemon, waits until it has ended, and removes its files."""
        if self.is_closed:
            return
        self._running.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.proc_daemon.wait(self._stop_timeout)
        self._end_now(self._running)


class GoDaemon(Daemon):
    """The Go daemon, p2pd."""


class JsDaemon(Daemon):
    """The JavaScript daemon, jsp2pd."""


class DaemonTuple(NamedTuple):
    """A daemon, and a client of it that listens."""

    daemon: Daemon
    client: Client


@asynccontextmanager
async def make_p2pd_pair_unix(
    daemon_executable: str,
    enable_control: bool,
    enable_connmgr: bool,
    enable_dht: bool,
    enable_pubsub: bool,
) -> AsyncIterator[DaemonTuple]:
    """Calls `make_p2pd_pair` with unix sockets in a private directory."""
    with tempfile.TemporaryDirectory(prefix="p2pd-") as directory:
        async with make_p2pd_pair(
            daemon_executable=daemon_executable,
            control_maddr=Multiaddr(f"/unix{directory}/control.sock"),
            listen_maddr=Multiaddr(f"/unix{directory}/listen.sock"),
            enable_control=enable_control,
            enable_connmgr=enable_connmgr,
            enable_dht=enable_dht,
            enable_pubsub=enable_pubsub,
        ) as pair:
            yield pair


@asynccontextmanager
async def make_p2pd_pair_ip4(
    daemon_executable: str,
    enable_control: bool,
    enable_connmgr: bool,
    enable_dht: bool,
    enable_pubsub: bool,
) -> AsyncIterator[DaemonTuple]:
    """Calls `make_p2pd_pair` with TCP ports on the loopback interface."""
    async with make_p2pd_pair(
        daemon_executable=daemon_executable,
        control_maddr=Multiaddr(f"/ip4/127.0.0.1/tcp/{get_unused_tcp_port()}"),
        listen_maddr=Multiaddr(f"/ip4/127.0.0.1/tcp/{get_unused_tcp_port()}"),
        enable_control=enable_control,
        enable_connmgr=enable_connmgr,
        enable_dht=enable_dht,
        enable_pubsub=enable_pubsub,
    ) as pair:
        yield pair


@asynccontextmanager
async def make_p2pd_pair(
    daemon_executable: str,
    control_maddr: Multiaddr,
    listen_maddr: Multiaddr,
    enable_control: bool,
    enable_connmgr: bool,
    enable_dht: bool,
    enable_pubsub: bool,
) -> AsyncIterator[DaemonTuple]:
    """Starts a daemon, and a client of it that listens. Stops both when the context exits.

    Args:
        daemon_executable: The binary, as for `Daemon`.
        control_maddr: The address of the daemon's control socket.
        listen_maddr: The address of the client's listener.
        enable_control, enable_connmgr, enable_dht, enable_pubsub: As for `Daemon`.

    Raises:
        DaemonNotFound: There is no such binary.
        DaemonStartError: The daemon ended, or did not answer within `TIMEOUT_DURATION`.
    """
    is_js = Path(daemon_executable).name == "jsp2pd"
    p2pd = (JsDaemon if is_js else GoDaemon)(
        daemon_executable=daemon_executable,
        control_maddr=control_maddr,
        enable_control=enable_control,
        enable_connmgr=enable_connmgr,
        enable_dht=enable_dht,
        enable_pubsub=enable_pubsub,
    )
    try:
        await p2pd.wait_until_ready()
        client = Client(control_maddr=control_maddr, listen_maddr=listen_maddr)
        async with client.listen():
            yield DaemonTuple(daemon=p2pd, client=client)
        await client.close()
    finally:
        p2pd.close()
