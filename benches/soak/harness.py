"""Shared by the scenarios: daemons, peers, the outcome of each operation, and the guarantees that
it is checked against."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from p2pclient_rs import (
    Client,
    ControlFailure,
    Daemon,
    DaemonRefused,
    IncompleteRead,
    P2PHandlerError,
    Stream,
)
from p2pclient_rs.daemon import unused_tcp_port
from soak import payloads
from soak.meter import Measured, Meter, resident

#: Maximum growth of a process after the first tenth of its work, in MiB.
GROWTH = 8.0
#: Maximum time for which a process may block its own event loop, in milliseconds.
STALL = 1000.0

#: Defects that a run can cause on purpose, to check that they are detected.
SABOTAGE = ("corrupt", "swallow", "repeat", "leak", "grow", "stall")

# The first two key pairs of RFC 8032, so that a restarted daemon is the same peer.
_KEYS = [
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"
    "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
]


@dataclass
class Report:
    """The outcome of a scenario."""

    scenario: str
    loop: str
    scale: float
    operations: int = 0
    seconds: float = 0.0
    #: Number of failed operations by kind, and an example of each kind.
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    corrupted: int = 0
    repeated: int = 0
    caller: Measured | None = None
    peers: list[dict[str, Any]] = field(default_factory=list)
    #: Resident memory of the daemons at the end, in MiB.
    daemons_rss: list[float] = field(default_factory=list)
    #: Further figures of the scenario.
    figures: dict[str, float] = field(default_factory=dict)
    #: Violated guarantees, as messages.
    broken: list[str] = field(default_factory=list)

    def asdict(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario,
            "loop": self.loop,
            "scale": self.scale,
            "operations": self.operations,
            "seconds": round(self.seconds, 1),
            "rate": round(self.operations / self.seconds, 1) if self.seconds else 0,
            "errors": dict(self.errors),
            "examples": self.examples,
            "lost": self.lost,
            "corrupted": self.corrupted,
            "repeated": self.repeated,
            "caller": self.caller.asdict() if self.caller else None,
            "peers": self.peers,
            "daemons_rss": [round(rss, 1) for rss in self.daemons_rss],
            "figures": {name: round(value, 3) for name, value in self.figures.items()},
            "broken": self.broken,
        }


class PeerProcess:
    """A process that runs ``peer.py``."""

    def __init__(self, loop: str, directory: Path, name: str, sabotage: set[str]) -> None:
        self.name = name
        self._directory = directory
        program = str(Path(__file__).with_name("peer.py"))
        self.process = subprocess.Popen(
            [sys.executable, program, loop, str(directory), name, *sabotage],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._asking = anyio.Lock()

    async def ask(self, command: str, **arguments: object) -> Any:
        """Sends a command; returns the reply."""
        async with self._asking:
            return await anyio.to_thread.run_sync(self._ask, json.dumps([command, arguments]))

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} has ended")
        return json.loads(answer)

    async def start(self, daemon: Daemon, expected: int = 0) -> None:
        """Connects the process to a daemon, and records which of ``expected`` numbers it sees."""
        listen = f"/unix{self._directory}/{self.name}.sock"
        control = str(daemon.control_maddr)
        await self.ask("start", control=control, listen=listen, expected=expected)

    def seen(self) -> bytes:
        """Returns how often the process has seen each number; works after it was killed, too."""
        return (self._directory / f"{self.name}.seen").read_bytes()

    def end(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass


class Soak:
    """A running scenario, from the caller's side.

    Attributes:
        near, far: Daemon of the caller, daemon of the handlers.
        peer_id: Peer id of the far daemon.
        client: Client of the caller.
        peers: Processes of the handlers.
    """

    near: Daemon
    far: Daemon
    client: Client
    meter: Meter

    def __init__(self, scenario: str, scale: float, loop: str, sabotage: set[str]) -> None:
        self.report = Report(scenario, loop, scale)
        self.scale, self.loop, self.sabotage = scale, loop, sabotage
        self.peers: list[PeerProcess] = []
        self._answered = bytearray()
        self._deliveries: tuple[list[PeerProcess], bool] | None = None
        self._kept: list[bytes] = []

    @property
    def figures(self) -> dict[str, float]:
        """Further figures of the scenario."""
        return self.report.figures

    def scaled(self, full: float, least: int = 1) -> int:
        """Returns a number of operations, scaled for this run."""
        return max(least, round(full * self.scale))

    # --- set-up ---

    @asynccontextmanager
    async def ready(self, *, peers: int = 1, expected: int = 0) -> AsyncIterator[None]:
        """Starts daemons, peers of the far daemon, and the client, and measures until the end of
        the block. Then closes everything and checks the guarantees.

        Args:
            expected: Maximum number of numbered operations.
        """
        self._answered = bytearray(expected)
        async with AsyncExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-"))
            self.directory = Path(name)
            self.near = await stack.enter_async_context(self._daemon(0))
            self.far = await stack.enter_async_context(self._daemon(1))
            stack.callback(self._end_peers)
            for number in range(peers):
                peer = self.new_peer(f"peer{number}")
                self.peers.append(peer)
                await peer.start(self.far, expected)
            # The event loop and its threads are initialised by now.
            gc.collect()
            self.meter = Meter()
            async with anyio.create_task_group() as tasks:
                async with self.near.client() as self.client:
                    tasks.start_soon(self.meter.run)
                    await self.client.unary.open()
                    self.peer_id, self._addrs = self.far.peer_id, self.far.addrs
                    await self.connect()
                    began = time.monotonic()
                    yield
                    self.report.seconds = time.monotonic() - began
                    end = self.meter.sample()
                    self._note_daemons()
                tasks.cancel_scope.cancel()
            # hivemind's p2pd exits with its last persistent connection, and the thread that reads
            # its output ends. Restart it, so that descriptors are counted with a running daemon as
            # before.
            await self.near.stop()
            await self.near.start()
            gc.collect()
            self.report.operations = self.meter.operations
            self.report.caller = self.meter.result(end)
            for peer in self.peers:
                self.report.peers.append({"name": peer.name, **await peer.ask("finish")})
            self._judge()

    def _end_peers(self) -> None:
        for peer in self.peers:
            peer.end()

    def new_peer(self, name: str) -> PeerProcess:
        return PeerProcess(self.loop, self.directory, name, self.sabotage)

    def _daemon(self, number: int) -> Daemon:
        key = self.directory / f"key{number}"
        key.write_bytes(b"\x08\x01\x12\x40" + bytes.fromhex(_KEYS[number]))
        return Daemon(
            control_maddr=f"/unix{self.directory}/daemon{number}.sock",
            identity=key,
            host_addrs=[f"/ip4/127.0.0.1/tcp/{unused_tcp_port()}"],
        )

    async def connect(self) -> None:
        """Connects the near daemon to the far one."""
        await self.client.connect(self.peer_id, self._addrs)

    async def serve(self, kind: str, proto: str, *, balanced: bool = False) -> None:
        """Makes every peer serve a protocol."""
        for peer in self.peers:
            await peer.ask("serve", kind=kind, proto=proto, balanced=balanced)

    async def ask_all(self, command: str) -> list[Any]:
        return [await peer.ask(command) for peer in self.peers]

    # --- operations ---

    def done(self) -> None:
        """Counts an operation; causes a defect if the run is to."""
        self.meter.operations += 1
        if self.meter.operations == 10 and "leak" in self.sabotage:
            os.dup(0)
        if self.meter.operations % 20 == 0 and "grow" in self.sabotage:
            self._kept.append(os.urandom(1 << 20))
        if self.meter.operations == 100 and "stall" in self.sabotage:
            # Uses CPU time instead of sleeping, since waiting for the CPU does not count as a
            # stall.
            until = time.thread_time() + 1.5 * STALL / 1e3
            while time.thread_time() < until:
                pass

    async def call(self, proto: str, number: int, *, timeout: float | None = None) -> None:
        """Calls the far peer with a numbered payload, and checks the reply."""
        reply = await self.client.call_unary(
            self.peer_id, proto, payloads.request(number), timeout=timeout
        )
        self.check(number, reply)

    async def frame(self, stream: Stream, number: int) -> None:
        """Like ``call``, with a frame over a stream."""
        request = payloads.request(number)
        await stream.send(b"f" + len(request).to_bytes(4, "little") + request)
        length = int.from_bytes(await stream.readexactly(4), "little")
        self.check(number, await stream.readexactly(length))

    def check(self, number: int, reply: bytes) -> None:
        if reply != payloads.reply(number):
            self.report.corrupted += 1
        self._answered[number] += 1
        self.done()

    def check_empty(self, reply: bytes) -> None:
        """Like ``check``, for a call without a payload."""
        self.report.corrupted += reply != b""
        self.done()

    async def count(self, name: str, expected: int) -> int:
        """Returns a counter's sum over all peers; waits up to 15 s for ``expected``."""
        with anyio.move_on_after(15):
            while True:
                counted: int = sum(s["counts"].get(name, 0) for s in await self.ask_all("state"))
                if counted >= expected:
                    break
                await anyio.sleep(0.05)
        return counted

    async def open_frames(self, proto: str) -> Stream:
        _, stream = await self.client.stream_open(self.peer_id, [proto])
        return stream

    def failed(self, error: Exception) -> str:
        """Counts a failed operation; returns its kind."""
        kind = kind_of(error)
        self.report.errors[kind] += 1
        self.report.examples.setdefault(kind, f"{type(error).__name__}: {error}"[:300])
        return kind

    async def workers(self, many: int, work: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        """Runs ``many`` tasks at once, each with its own number."""
        async with anyio.create_task_group() as tasks:
            for number in range(many):
                tasks.start_soon(work, number)

    # --- guarantees ---

    def promise(self, kept: bool, message: str) -> None:
        if not kept:
            self.report.broken.append(message)

    def promise_errors(self, *kinds: str, most: int | None = None) -> None:
        """Checks that all errors are of these kinds and have a text, and are at most ``most``."""
        for kind, count in self.report.errors.items():
            if kind.partition(" (")[0] not in kinds:
                self.promise(False, f"{count} errors of an unexpected kind, {kind}")
            if not self.report.examples[kind].partition(": ")[2]:
                self.promise(False, f"an error without a text, {kind}")
        total = self.report.errors.total()
        if most is not None and total > most:
            self.promise(False, f"{total} operations failed, more than {most}")

    def promise_deliveries(self, among: list[PeerProcess], *, all_answered: bool) -> None:
        """Checks at the end that each answered operation was carried out exactly once, and every
        other at most once.

        Args:
            among: The peers that may have carried them out.
            all_answered: Whether every operation must have been answered.
        """
        self._deliveries = among, all_answered

    def _judge_deliveries(self, among: list[PeerProcess], all_answered: bool) -> None:
        answered, seen = self._answered, bytearray(len(self._answered))
        for peer in among:
            for number, times in enumerate(peer.seen().rstrip(b"\0")):
                if times:
                    seen[number] = min(seen[number] + times, 255)
        unserved = sum(
            1 for number, a in enumerate(answered.rstrip(b"\0")) if a and not seen[number]
        )
        repeated = len(seen) - seen.count(0) - seen.count(1)
        repeated += len(answered) - answered.count(0) - answered.count(1)
        self.report.repeated += repeated
        self.promise(not repeated, f"{repeated} operations were carried out more than once")
        self.promise(not unserved, f"{unserved} operations were answered by nobody")
        if all_answered:
            self.report.lost += (lost := answered.count(0))
            self.promise(not lost, f"{lost} operations were never answered")

    def _judge(self) -> None:
        """Checks the guarantees of every scenario."""
        report = self.report
        if self._deliveries is not None:
            self._judge_deliveries(*self._deliveries)
        self.promise(not report.corrupted, f"{report.corrupted} replies were wrong")
        assert report.caller is not None
        measured = [("the caller", report.caller)]
        for peer in report.peers:
            measured.append((peer["name"], Measured(**peer["measured"])))
            for message in peer["wrong"]:
                self.promise(False, f"{peer['name']} saw {message}")
        for who, m in measured:
            if m.descriptors_after != m.descriptors_before:
                change = f"{m.descriptors_before} descriptors before, {m.descriptors_after} after"
                self.promise(False, f"{who} has {change}")
            self.promise(m.growth <= GROWTH, f"{who} grew by {m.growth:.1f} MiB")
            if m.own_stall_ms > STALL:
                self.promise(False, f"{who}'s event loop stood still for {m.own_stall_ms:.0f} ms")

    def _note_daemons(self) -> None:
        for daemon in (self.near, self.far):
            if daemon.pid is not None:
                self.report.daemons_rss.append(resident(daemon.pid))


def kind_of(error: Exception) -> str:
    """Returns the kind of a failure, for counting; for a refusal, with part of the daemon's
    message."""
    kind = type(error).__name__
    if not isinstance(error, DaemonRefused):
        return kind
    message = error.daemon_message or ""
    for known in ("failed to dial", "stream reset", "protocols not supported"):
        if known in message:
            return f"{kind} ({known})"
    return kind if message else f"{kind} without a message"


#: Errors that a failed call may raise.
FAILURES = (ControlFailure, P2PHandlerError)
#: Errors that a failed exchange over a stream may raise.
STREAM_FAILURES = (ControlFailure, anyio.BrokenResourceError, anyio.EndOfStream, IncompleteRead)


async def freeze(daemon: Daemon, seconds: float) -> None:
    """Stops a daemon for a number of seconds."""
    assert daemon.pid is not None
    pid = daemon.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        await anyio.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)
