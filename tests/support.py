"""What the tests share: real daemons, temporary directories and waiting for what has no event."""

from __future__ import annotations

import os
import re
import shutil
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
from daemons.features import RACES

from p2pclient_rs import Client, DaemonRefused, Multiaddr, PeerID
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2
from p2pclient_rs.daemon import unused_tcp_port

T = TypeVar("T")

#: The event loops: parameters for ``anyio.run`` and for anyio's pytest plugin.
BACKENDS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]

#: The kind of daemon that a ``DaemonProcess`` is: conftest sets what ``--daemon`` says.
DEFAULT_KIND = "hivemind"

#: What the JavaScript daemon calls the options of the others. It cannot be had without a DHT, and
#: has no connection manager that could be asked for anything.
_JS_OPTIONS = {"-dhtServer": [], "-connManager": [], "-pubsub": ["--pubsub"]}

#: Every directory the tests made: conftest looks for forgotten sockets there.
DIRECTORIES: list[Path] = []

#: Of the daemons that ended before they were told to: conftest reports them.
LAST_WORDS: list[str] = []


def new_directory() -> Path:
    """A directory whose path is short enough for unix sockets, which conftest removes."""
    directory = Path(tempfile.mkdtemp(prefix="p2p-"))
    DIRECTORIES.append(directory)
    return directory


def unknown_peer() -> PeerID:
    """The id of a peer that nobody has heard of, with an Ed25519 key."""
    return PeerID(b"\x00\x24\x08\x01\x12\x20" + os.urandom(32))


async def eventually(check: Callable[[], Awaitable[T]], within: float = 15.0) -> T:
    """The result of ``check`` once it neither fails an assertion nor is refused by the daemon."""
    deadline = time.monotonic() + within
    while True:
        try:
            return await check()
        except (AssertionError, DaemonRefused):
            if time.monotonic() > deadline:
                raise
        await anyio.sleep(0.01)


async def all_of(calls: Iterable[Awaitable[T]]) -> list[T | Exception]:
    """The results of awaiting all at once, in their order, or the exceptions."""
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


class DaemonProcess:
    """A daemon, started and stopped.

    Args:
        options: Command line options of p2pd, as ``"-dhtServer"``.
        transport: What its control socket is, and what its clients listen at: "unix", "tcp",
            "ip6" or "dns4".
        control_maddr: Its control address, if it is to be a certain one.
        kind: "hivemind", "go" or "js"; by default the one that the tests are run on.
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
        self._launch()

    def _launch(self) -> None:
        # The daemon resolves no names.
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
        """Starts it anew at its address, as another peer, when it has ended."""
        kept = self._kept is not None
        self.stop()
        self._launch()
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
        """Reads what it prints once it can be talked to."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith((b"Peer Addrs:", b"daemon has started")):
                return
        self.stop()
        log = (self.directory / "log").read_text()
        pytest.fail(f"the {self.kind} daemon did not start:\n{log}")

    def _identify(self) -> tuple[PeerID, list[Multiaddr]]:
        """What it says of itself, asked without the client that is to be tested."""
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
        """A new address for a client to listen at."""
        if self.transport == "unix":
            self._clients += 1
            return f"/unix{self.directory}/client{self._clients}.sock"
        hosts = {"tcp": "/ip4/127.0.0.1", "ip6": "/ip6/::1", "dns4": "/dns4/localhost"}
        return f"{hosts[self.transport]}/tcp/0"

    def client(self) -> Client:
        """A new client of it."""
        return Client(self.control_maddr, self.listen_maddr())

    def keep(self) -> None:
        """Has it outlive its last client: hivemind's ends when no persistent connection is left."""
        if self.kind == "hivemind":
            self._kept = self._dial()
            self._kept.sendall(b"\x02\x08\x09")  # Request{PERSISTENT_CONN_UPGRADE}
            assert self._kept.recv(3, socket.MSG_WAITALL) == b"\x02\x08\x00"  # Response{OK}

    def ended_of_a_race(self) -> bool:
        """Whether it has ended of what it is known to end of now and then."""
        words = (self.directory / "log").read_text(errors="replace")
        return self.kind in RACES and re.search(RACES[self.kind], words[-2000:]) is not None

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Ends it and removes the socket file, which a killed daemon leaves."""
        if (code := self.process.poll()) is not None and code not in (0, -9):
            # A test may have meant it to; where not, this is all there is to see.
            log = (self.directory / "log").read_text(errors="replace")
            LAST_WORDS.append(f"{self.directory} ended with {code} and said:\n{log[:8000]}")
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


async def still_there(*daemons: DaemonProcess) -> None:
    """After a test: fails if one of the daemons has ended, which is there again for the next."""
    if any(daemon.kind in RACES for daemon in daemons):
        await anyio.sleep(0.2)  # in which what is to end of a client that is gone does so
    revive(*daemons)


def revive(*daemons: DaemonProcess) -> None:
    """Starts those that have ended anew; fails if that was of more than a race."""
    ended = [daemon for daemon in daemons if daemon.process.poll() is not None]
    expected = [daemon.ended_of_a_race() for daemon in ended]
    for daemon in ended:
        daemon.restart()
    assert all(expected), "the daemon has ended: see below"


def remove_directories() -> list[Path]:
    """Removes every directory the tests made; returns the socket files that were in them."""
    sockets = [
        path for directory in DIRECTORIES for path in directory.rglob("*") if path.is_socket()
    ]
    while DIRECTORIES:
        shutil.rmtree(DIRECTORIES.pop(), ignore_errors=True)
    return sockets


def open_descriptors() -> list[str]:
    """What this process has open, one entry for each descriptor."""
    targets = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listdir used
            targets.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(targets)


def child_processes() -> set[int]:
    """The ids of this process's children."""
    children = set()
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                children.add(int(entry))
    return children
