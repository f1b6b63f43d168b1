"""Daemons as child processes, each with a client: for tests of programs that use p2pclient.

`p2pclient_rs.Daemon` is the class for everything else.
"""

from __future__ import annotations

import abc
import os
import subprocess
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import anyio
from multiaddr import Multiaddr

from p2pclient_rs.exceptions import DaemonStartError, DaemonUnreachable
from p2pclient_rs.p2pclient.p2pclient import Client
from p2pclient_rs.p2pclient.utils import get_unused_tcp_port

__all__ = [
    "Client",
    "Daemon",
    "DaemonTuple",
    "GoDaemon",
    "JsDaemon",
    "TIMEOUT_DURATION",
    "get_unused_tcp_port",
    "make_p2pd_pair",
    "make_p2pd_pair_ip4",
    "make_p2pd_pair_unix",
    "try_until_success",
]

TIMEOUT_DURATION = 30  # seconds

_EXIT_SECONDS = 5.0
_POLL_SECONDS = 0.01
_LOG_LINES = 20


async def try_until_success(
    coro_func: Callable[[], Awaitable[bool]], timeout: float = TIMEOUT_DURATION
) -> None:
    """Calls a function again and again until its result is true.

    Args:
        coro_func: The function; it is called without arguments.
        timeout: For how long, in seconds. A call that is under way then is waited for.

    Raises:
        AssertionError: It was not true in time.
    """
    deadline = time.monotonic() + timeout
    while not await coro_func():
        if time.monotonic() >= deadline:
            raise AssertionError(f"{coro_func} still failed after {timeout} seconds")
        await anyio.sleep(_POLL_SECONDS)


class Daemon(abc.ABC):
    """A daemon that runs from the moment the object is made until `close`.

    Args:
        daemon_executable: The binary, by name or path.
        control_maddr: Where it is to listen for clients.
        enable_control: Does nothing: there is no daemon without.
        enable_connmgr: Whether it limits its connections: to 1 after 2 have been reached.
        enable_dht: Whether it serves the DHT.
        enable_pubsub: Whether it speaks gossipsub.

    Attributes:
        proc_daemon: The process.
        log_filename: The file that has its output, for as long as this object lives.
        is_closed: Whether `close` was called.
    """

    control_maddr: Multiaddr
    proc_daemon: subprocess.Popen[bytes]
    log_filename: str = ""
    f_log: BinaryIO | None = None
    is_closed: bool

    def __init__(
        self,
        daemon_executable: str,
        control_maddr: Multiaddr,
        enable_control: bool,
        enable_connmgr: bool,
        enable_dht: bool,
        enable_pubsub: bool,
    ) -> None:
        self.daemon_executable = daemon_executable
        self.control_maddr = control_maddr
        self.enable_control = enable_control
        self.enable_connmgr = enable_connmgr
        self.enable_dht = enable_dht
        self.enable_pubsub = enable_pubsub
        self.is_closed = False
        self._start_logging()
        self._run(daemon_executable)

    def _start_logging(self) -> None:
        fd, self.log_filename = tempfile.mkstemp(prefix="log_p2pd_", suffix=".txt")
        self.f_log = open(fd, "wb")
        weakref.finalize(self, Path(self.log_filename).unlink, missing_ok=True)

    @abc.abstractmethod
    def _make_command_line_options(self) -> list[str]:
        """The arguments that make the daemon what the constructor's said."""

    @abc.abstractmethod
    def _terminate(self) -> None:
        """Tells the process to end."""

    def _run(self, daemon_executable: str) -> None:
        self.proc_daemon = subprocess.Popen(
            [daemon_executable, *self._make_command_line_options()],
            stdin=subprocess.DEVNULL,
            stdout=self.f_log,
            stderr=self.f_log,
        )

    async def wait_until_ready(self) -> None:
        """Waits until the daemon answers on its control socket.

        Raises:
            DaemonStartError: It ended, or did not answer within `TIMEOUT_DURATION`.
        """
        client = Client(self.control_maddr)
        with anyio.move_on_after(TIMEOUT_DURATION):
            while self.proc_daemon.poll() is None:
                try:
                    await client.identify()
                except DaemonUnreachable:
                    await anyio.sleep(_POLL_SECONDS)
                else:
                    await client.close()
                    return
        returncode = self.proc_daemon.poll()
        raise DaemonStartError(
            f"no answer from the daemon in {TIMEOUT_DURATION} seconds"
            if returncode is None
            else f"the daemon ended with status {returncode}",
            command=[self.daemon_executable, *self._make_command_line_options()],
            returncode=returncode,
            logs=Path(self.log_filename).read_text(errors="replace").splitlines()[-_LOG_LINES:],
        )

    def close(self) -> None:
        """Ends the daemon and waits for that. Once is enough; more does nothing."""
        if self.is_closed:
            return
        self._terminate()
        try:
            self.proc_daemon.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.proc_daemon.kill()
            self.proc_daemon.wait()
        if self.f_log is not None:
            self.f_log.close()
        self.is_closed = True


class GoDaemon(Daemon):
    """The Go daemon, p2pd, or one with its options."""

    def _make_command_line_options(self) -> list[str]:
        options = [f"-listen={self.control_maddr}", "-hostAddrs=/ip4/127.0.0.1/tcp/0"]
        if self.enable_connmgr:
            options += ["-connManager=true", "-connLo=1", "-connHi=2", "-connGrace=0"]
        if self.enable_dht:
            options += ["-dhtServer=true"]
        if self.enable_pubsub:
            options += ["-pubsub=true", "-pubsubRouter=gossipsub"]
        return options

    def _terminate(self) -> None:
        self.proc_daemon.terminate()


class JsDaemon(Daemon):
    """The JavaScript daemon, jsp2pd."""

    def _make_command_line_options(self) -> list[str]:
        options = [f"--listen={self.control_maddr}"]
        if self.enable_connmgr:
            options += ["--connManager=true", "--connLo=1", "--connHi=2", "--connGrace=0"]
        if self.enable_dht:
            options += ["--dht=true"]
        if self.enable_pubsub:
            options += ["--pubsub=true", "--pubsubRouter=gossipsub"]
        return options

    def _terminate(self) -> None:
        # Told to terminate, it may stay for as long as it has connections.
        self.proc_daemon.kill()


class DaemonTuple(NamedTuple):
    """A daemon and a listening client of it."""

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
    """`make_p2pd_pair` on unix sockets, in a private directory."""
    with tempfile.TemporaryDirectory(prefix="p2pclient-") as directory:
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
    """`make_p2pd_pair` on TCP ports of the loopback interface."""
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
    """Starts a daemon and a client of it that listens; both end with the context.

    Args:
        daemon_executable: The binary: the Go daemon if it is called ``p2pd``, else the JavaScript
            one.
        control_maddr: Where the daemon is to listen for clients.
        listen_maddr: Where the client is to listen for inbound streams.
        enable_control, enable_connmgr, enable_dht, enable_pubsub: As for `Daemon`.

    Raises:
        OSError: The binary cannot be run.
        DaemonStartError: The daemon ended, or did not answer within `TIMEOUT_DURATION`.
    """
    daemon_class = GoDaemon if os.path.basename(daemon_executable) == "p2pd" else JsDaemon
    daemon = daemon_class(
        daemon_executable=daemon_executable,
        control_maddr=control_maddr,
        enable_control=enable_control,
        enable_connmgr=enable_connmgr,
        enable_dht=enable_dht,
        enable_pubsub=enable_pubsub,
    )
    try:
        await daemon.wait_until_ready()
        client = Client(control_maddr=control_maddr, listen_maddr=listen_maddr)
        async with client.listen():
            try:
                yield DaemonTuple(daemon=daemon, client=client)
            finally:
                # Before the listener ends, so that handlers see their streams end.
                daemon.close()
    finally:
        daemon.close()
