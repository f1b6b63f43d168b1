"""Helpers for the tests: real daemons, temporary directories, and waiting by polling."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import anyio
import get_daemon
import pytest
from daemons.features import PANICS, RACES

from p2pclient_rs import Client, DaemonRefused, Multiaddr, PeerID
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2
from p2pclient_rs.daemon import unused_tcp_port

T = TypeVar("T")

#: Event loops, as parameters for ``anyio.run`` and for anyio's pytest plugin.
BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]

#: Default kind of a ``DaemonProcess``; set by conftest from ``--daemon``.
DEFAULT_KIND = "hivemind"

#: jsp2pd's equivalents of p2pd options. Its DHT is always on, and it has no connection manager.
_JS_OPTIONS = {"-dhtServer": [], "-connManager": [], "-pubsub": ["--pubsub"]}

#: Every directory the tests have created; conftest checks them for leftover sockets.
DIRECTORIES: list[Path] = []

#: Output of daemons that ended unexpectedly; reported by conftest.
CRASH_REPORTS: list[str] = []


def new_directory() -> Path:
    """Creates a directory with a path short enough for unix sockets; conftest removes it."""
    directory = Path(tempfile.mkdtemp(prefix="p2p-"))
    DIRECTORIES.append(directory)
    return directory


def unknown_peer() -> PeerID:
    """Returns the id of a peer that does not exist, with an Ed25519 key."""
    return PeerID(b"\x00\x24\x08\x01\x12\x20" + os.urandom(32))


async def eventually(check: Callable[[], Awaitable[T]], within: float = 15.0) -> T:
    """Repeats ``check`` while it raises AssertionError or DaemonRefused; returns its result."""
    deadline = time.monotonic() + within
    while True:
        try:
            return await check()
        except (AssertionError, DaemonRefused):
            if time.monotonic() > deadline:
                raise
        await anyio.sleep(0.01)


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T | Exception]:
    """Awaits all calls at once; returns their results or exceptions, in order."""
    results: dict[int, T | Exception] = {}

    async def note(number: int, call: Awaitable[T]) -> None:
        try:
            results[number] = await call
        except Exception as error:
            results[number] = error

    async with anyio.create_task_group() as tasks:
        for number, call in enumerate(calls):
            tasks.start_soon(note, number, call)
    return [results[number] for number in range(len(results))]


async def until(condition: Callable[[], object], within: float = 15.0) -> None:
    """Waits until ``condition()`` is true."""

    async def check() -> None:
        assert condition()

    await eventually(check, within)


async def suspend(pid: int) -> None:
    """Stops a process, and waits until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    stat = Path(f"/proc/{pid}/stat")
    await until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", within=20)


class DaemonProcess:
    """Starts a daemon, and stops it at the end of the block.

    Args:
        options: Command line options of p2pd, for example ``"-dhtServer"``.
        transport: The kind of address of its control socket and of its clients' listeners: "unix",
            "tcp", "ip6" or "dns4".
        control_maddr: Control address; by default a new one.
        kind: "hivemind", "go", "js" or "native"; by default the tested kind.
    """

    def __init__(
        self,
        *options: str,
        transport: str = "unix",
        control_maddr: str | None = None,
        kind: str | None = None,
    ) -> None:
        self.kind = kind or DEFAULT_KIND
        self.transport = transport
        self.directory = new_directory()
        self.control_maddr = control_maddr or self._control_maddr()
        self._options = options
        self._clients = 0
        self._kept: socket.socket | None = None
        self._spawn()

    def _spawn(self) -> None:
        # The daemon does not resolve names.
        listen = self.control_maddr.replace("/dns4/localhost", "/ip4/127.0.0.1")
        command = [str(get_daemon.fetch(self.kind)), "--listen", listen]
        command += ["--hostAddrs", "/ip4/127.0.0.1/tcp/0"]
        if self.kind == "js":
            command += ["--no-nat", *(js for go in self._options for js in _JS_OPTIONS[go])]
        else:
            command += ["-bootstrapPeers", "", *self._options]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        self._wait_for_banner()
        self.peer_id, self.addrs = self._identify()

    def restart(self) -> None:
        """Restarts an ended daemon at the same address, as another peer."""
        kept = self._kept is not None
        self.stop()
        self._spawn()
        if kept:
            self.keep()

    def _control_maddr(self) -> str:
        if self.transport == "unix":
            return f"/unix{self.directory}/control.sock"
        if self.transport == "ip6":
            return f"/ip6/::1/tcp/{unused_tcp_port('::1')}"
        host = {"tcp": "/ip4/127.0.0.1", "dns4": "/dns4/localhost"}[self.transport]
        return f"{host}/tcp/{unused_tcp_port()}"

    def _wait_for_banner(self) -> None:
        """Reads the output until the daemon reports that it is ready."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith((b"Peer Addrs:", b"daemon has started")):
                return
        self.stop()
        log = (self.directory / "log").read_text()
        pytest.fail(f"the {self.kind} daemon did not start:\n{log}")

    def _identify(self) -> tuple[PeerID, list[Multiaddr]]:
        """Sends IDENTIFY over a plain socket, without the client under test."""
        with self._dial() as connection, connection.makefile("rb") as answers:
            connection.sendall(b"\x02\x08\x00")  # Request{IDENTIFY}
            length = 0
            for shift in range(0, 21, 7):
                (byte,) = answers.read(1)
                length |= (byte & 0x7F) << shift
                if byte < 0x80:
                    break
            identity = p2pd_pb2.Response.FromString(answers.read(length)).identify
        addrs = [Multiaddr(addr) for addr in identity.addrs]
        return PeerID(identity.id), [addr for addr in addrs if str(addr).startswith("/ip4/")]

    def _dial(self) -> socket.socket:
        if self.transport == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(self.control_maddr.removeprefix("/unix"))
            return connection
        _, _, host, _, port = self.control_maddr.split("/")
        return socket.create_connection((host, int(port)))

    def listen_maddr(self) -> str:
        """Returns a new listen address for a client."""
        if self.transport == "unix":
            self._clients += 1
            return f"/unix{self.directory}/client{self._clients}.sock"
        hosts = {"tcp": "/ip4/127.0.0.1", "ip6": "/ip6/::1", "dns4": "/dns4/localhost"}
        return f"{hosts[self.transport]}/tcp/0"

    def client(self) -> Client:
        """Returns a new client of the daemon."""
        return Client(self.control_maddr, self.listen_maddr())

    def keep(self) -> None:
        """Keeps the daemon alive: hivemind's exits when its last persistent connection closes."""
        if self.kind == "hivemind":
            self._kept = self._dial()
            self._kept.sendall(b"\x02\x08\x09")  # Request{PERSISTENT_CONN_UPGRADE}
            assert self._kept.recv(3, socket.MSG_WAITALL) == b"\x02\x08\x00"  # Response{OK}

    def ended_by_known_race(self) -> bool:
        """Returns whether the daemon has ended because of one of its known race conditions."""
        output = (self.directory / "log").read_text(errors="replace")
        patterns = (RACES.get(self.kind), PANICS.get(self.kind))
        return any(pattern and re.search(pattern, output[-8000:]) for pattern in patterns)

    def kill(self) -> None:
        """Kills the daemon, like a crash."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stops the daemon and removes the socket file, which a killed daemon leaves behind."""
        if (code := self.process.poll()) is not None and code not in (0, -9):
            # Some tests end daemons on purpose. Otherwise this is the only trace of a crash.
            log = (self.directory / "log").read_text(errors="replace")
            CRASH_REPORTS.append(f"{self.directory} ended with {code} and said:\n{log[:8000]}")
        self.kill()
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        if self.process.stdout is not None:
            self.process.stdout.close()
        if self.control_maddr.startswith("/unix"):
            Path(self.control_maddr.removeprefix("/unix")).unlink(missing_ok=True)

    def __enter__(self) -> DaemonProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


async def check_running(*daemons: DaemonProcess) -> None:
    """Fails a test after which a daemon has ended, and restarts the daemon."""
    if any(daemon.kind in RACES for daemon in daemons):
        await anyio.sleep(0.2)  # time for a daemon to end because of a closed client
    revive(*daemons)


def revive(*daemons: DaemonProcess) -> bool:
    """Restarts ended daemons; fails unless they ended because of a known race.

    Returns whether there were any.
    """
    ended = [daemon for daemon in daemons if daemon.process.poll() is not None]
    expected = [daemon.ended_by_known_race() for daemon in ended]
    for daemon in ended:
        daemon.restart()
    assert all(expected), "the daemon has ended: see below"
    return bool(ended)


def remove_directories() -> list[Path]:
    """Removes the tests' directories; returns the socket files that were in them."""
    sockets = [
        path for directory in DIRECTORIES for path in directory.rglob("*") if path.is_socket()
    ]
    while DIRECTORIES:
        shutil.rmtree(DIRECTORIES.pop(), ignore_errors=True)
    return sockets


def open_descriptors() -> list[str]:
    """Returns the targets of this process's open descriptors."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # for the descriptor that listdir used
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(targets)


def child_processes() -> set[int]:
    """Returns the process ids of this process's children."""
    children = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.add(int(entry))
    return children


def resident_memory() -> int:
    """Returns the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def is_closed(sock: socket.socket) -> bool:
    """Returns whether the other end of a non-blocking socket has closed it."""
    try:
        return sock.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def connect_to_listener(client: Client) -> socket.socket:
    """Connects to a client's listener, as the daemon would."""
    _, kind, *rest = str(client.control.listen_maddr).split("/")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect("/" + "/".join(rest))
        return sock
    return socket.create_connection((rest[0], int(rest[2])))
