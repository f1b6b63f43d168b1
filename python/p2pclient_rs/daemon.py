"""Start, watch and stop a libp2p daemon (``p2pd``).

    async with Daemon(dht="server") as daemon, daemon.client() as client:
        print(await client.identify())

What the daemon is given, its process and its files are Rust's (``src/daemon``), for other programs
too; whatever becomes of this process, they do not outlive it. This module waits for it, on any
event loop.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio

from p2pclient_rs._native import (
    DaemonOptions,
    DaemonProcess,
    Identity,
    Multiaddr,
    PeerID,
    find_daemon,
    unused_tcp_port,
)
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import ControlFailure, DaemonNotFound

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Daemon", "unused_tcp_port"]

_processes: weakref.WeakSet[DaemonProcess] = weakref.WeakSet()


def _cut_lifelines() -> None:
    # The janitors would take a forked child that holds them for its parent.
    for process in _processes:
        process.cut_lifeline()


os.register_at_fork(after_in_child=_cut_lifelines)


class Daemon:
    """A libp2p daemon in a process of its own.

    ``async with Daemon() as daemon`` starts it and stops it; ``start()`` and ``stop()`` do so one
    at a time. Runs on asyncio, uvloop and trio. The object belongs to the process that made it: a
    forked child can make clients of the daemon, but its ``stop()`` leaves the daemon alone.

    Args:
        binary: The daemon's binary, a path or a name in ``PATH``. By default the path in the
            environment variable ``P2PD_PATH``, else ``p2pd`` in ``PATH``, else the one of an
            installed hivemind. One named ``jsp2pd`` is given the arguments of the JavaScript
            daemon.
        dht: The DHT. True lets the daemon become a server once it finds itself publicly
            reachable, so that daemons on one machine need ``"server"``.
        relay: Circuit relay; None leaves it to the daemon, which switches it on.
        pubsub: Pubsub; True leaves the router to the daemon.
        connmgr: The connection manager, with the daemon's own limits or with
            ``(low, high, grace)``: when there are over `high` connections, those older than
            `grace` seconds are closed until `low` are left.
        host_addrs: Multiaddrs to listen on for peers. With an empty sequence the daemon chooses,
            which means every interface.
        announce_addrs: Multiaddrs to tell peers instead of those.
        bootstrap_peers: Peers to connect to before the daemon counts as started, each a multiaddr
            that ends in ``/p2p/<peer id>``. One of them must be reachable.
        identity: A file with a private key as libp2p encodes it; by default, a new identity.
        control_maddr: Where to serve the control protocol: a unix or TCP multiaddr; for TCP port
            0, a free port is chosen. By default a unix socket only this user can reach.
        extra_args: More arguments for the daemon, as they are.
        start_timeout: Seconds until a daemon that does not answer is given up.
        stop_timeout: Seconds until a daemon that does not end on SIGTERM is killed.

    Raises:
        ValueError: An address cannot be used as what it is given for, options contradict each
            other, or a timeout is negative.
        TypeError: An option is of another type; a timeout is None, which no daemon is given.
    """

    def __init__(
        self,
        binary: str | os.PathLike[str] | None = None,
        *,
        dht: bool | Literal["client", "server"] = False,
        relay: bool | None = None,
        pubsub: bool | Literal["gossipsub", "floodsub"] = False,
        connmgr: bool | tuple[int, int, float] = False,
        host_addrs: Sequence[Multiaddr | str] = ("/ip4/127.0.0.1/tcp/0",),
        announce_addrs: Sequence[Multiaddr | str] = (),
        bootstrap_peers: Sequence[Multiaddr | str] = (),
        identity: str | os.PathLike[str] | None = None,
        control_maddr: Multiaddr | str | None = None,
        extra_args: Sequence[str] = (),
        start_timeout: float = 30.0,
        stop_timeout: float = 5.0,
    ) -> None:
        self._binary = binary
        self._options = DaemonOptions(
            dht=dht,
            relay=relay,
            pubsub=pubsub,
            connmgr=connmgr,
            host_addrs=_texts(host_addrs),
            announce_addrs=_texts(announce_addrs),
            bootstrap_peers=_texts(bootstrap_peers),
            identity=identity,
            control_maddr=None if control_maddr is None else str(control_maddr),
            extra_args=list(extra_args),
        )
        self._start_timeout = _seconds("start_timeout", start_timeout)
        self._stop_timeout = _seconds("stop_timeout", stop_timeout)

        self._process: DaemonProcess | None = None
        self._finalizer: weakref.finalize[..., Daemon] | None = None
        self._identity: Identity | None = None
        self._control_maddr = None if control_maddr is None else Multiaddr(str(control_maddr))

    def __repr__(self) -> str:
        state = f"pid={self.pid}" if self.running else "not running"
        peer = "" if self._identity is None else f" peer_id={self._identity.peer_id}"
        return f"<Daemon {state}{peer}>"

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> Self:
        """Starts the daemon and returns this object once the daemon answers.

        Raises:
            DaemonNotFound: There is no binary; lists every place looked at.
            DaemonStartError: The daemon ended, at once when it does, or did not answer in
                `start_timeout` seconds. No process and no file is left.
            RuntimeError: It is running.
        """
        process = self._launch()
        try:
            await self._become_ready(process)
        finally:
            if self._identity is None:
                self._end(process)
        return self

    async def stop(self) -> None:
        """Stops the daemon, kills it if it does not stop, and removes its files.

        Does nothing if it is not running, was never started, or belongs to a parent process.
        Not interrupted by cancellation.
        """
        process = self._process
        if process is None or process.ended or not process.owned:
            return
        try:
            with anyio.CancelScope(shield=True), anyio.move_on_after(self._stop_timeout):
                process.terminate()
                await _until_exit(process)
        finally:
            self._end(process)

    def client(self, listen_maddr: Multiaddr | str | None = None) -> Client:
        """Returns a new client of this daemon, to be used with ``async with``.

        Args:
            listen_maddr: Where the client takes inbound streams from the daemon; by default a
                unix socket of its own in the daemon's private directory.

        Raises:
            RuntimeError: The daemon has not been started, or has been stopped.
        """
        process = self._process
        if process is None or process.ended:
            raise RuntimeError("the daemon is not running")
        if listen_maddr is None:
            listen_maddr = process.listen_maddr()
        return Client(process.control_maddr, listen_maddr)

    @property
    def running(self) -> bool:
        """Whether the daemon's process is alive."""
        return self._process is not None and self._process.alive

    @property
    def peer_id(self) -> PeerID:
        """The daemon's peer id. Raises RuntimeError before it has started."""
        return self._identified().peer_id

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """The multiaddrs it listened on for peers when it had started, without its peer id.
        Raises RuntimeError before it has started."""
        return tuple(self._identified().addrs)

    @property
    def control_maddr(self) -> Multiaddr:
        """Where the control protocol is served. Raises RuntimeError before the start, if no
        address was given."""
        if self._control_maddr is None:
            raise RuntimeError("the daemon has not been started")
        return self._control_maddr

    @property
    def pid(self) -> int | None:
        """The process id; None if it is not running."""
        return self._process.pid if self._process is not None and self._process.alive else None

    @property
    def returncode(self) -> int | None:
        """The exit status of the last run, negative for a signal; None while it is running."""
        return None if self._process is None else self._process.poll()

    @property
    def command(self) -> list[str]:
        """The command line of the last start; empty before the first."""
        return [] if self._process is None else self._process.command

    @property
    def logs(self) -> list[str]:
        """The lines of the daemon's output so far, or of the last run; of a long output, the last
        MiB."""
        return [] if self._process is None else self._process.output().splitlines()

    def _identified(self) -> Identity:
        if self._identity is None:
            raise RuntimeError("the daemon has not been started")
        return self._identity

    def _launch(self) -> DaemonProcess:
        """Runs the daemon, without waiting for it."""
        if self._process is not None and not self._process.ended:
            raise RuntimeError("the daemon has been started already")
        binary = _find_binary(self._binary)
        process = DaemonProcess(binary, self._options, tempfile.gettempdir())
        _processes.add(process)
        self._process, self._identity = process, None
        self._control_maddr = process.control_maddr
        self._finalizer = weakref.finalize(self, _abandoned, process)
        try:
            process.spawn()
        except BaseException:
            self._end(process)
            raise
        return process

    async def _become_ready(self, process: DaemonProcess) -> None:
        """Waits for the daemon's answer; raises DaemonStartError if it ends or takes too long."""
        answers: list[Identity] = []
        obstacles: list[str] = []
        with anyio.move_on_after(self._start_timeout):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._ask, process, answers, obstacles)
                # `_ask` may wait long for an answer that never comes, and so cannot do this.
                await _until_exit(process, unless=answers)
                tasks.cancel_scope.cancel()
        if not answers or process.poll() is not None:
            raise process.not_ready(self._start_timeout, obstacles[-1] if obstacles else None)
        self._identity = answers[0]

    async def _ask(
        self, process: DaemonProcess, answers: list[Identity], obstacles: list[str]
    ) -> None:
        """Asks the daemon who it is until it answers and may be believed."""
        pause = _Pause()
        while True:
            try:
                async with Client(process.control_maddr) as client:
                    identity = await client.identify()
            except ControlFailure as failure:
                obstacle = str(failure)
            else:
                doubt = process.doubt(identity.peer_id)
                if doubt is None:
                    answers.append(identity)
                    return
                obstacle = doubt
            obstacles[:] = [obstacle]
            await pause()

    def _end(self, process: DaemonProcess) -> None:
        process.destroy()
        if self._finalizer is not None and process is self._process:
            self._finalizer.detach()


class _Pause:
    """Sleeps for a little longer each time it is awaited: for 1 ms at first, 50 ms at most."""

    def __init__(self) -> None:
        self._seconds = 0.001

    async def __call__(self) -> None:
        await anyio.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, 0.05)


async def _until_exit(process: DaemonProcess, unless: Sequence[object] = ()) -> None:
    """Waits until the daemon has ended, or there is something in `unless`."""
    pause = _Pause()
    while not unless and process.poll() is None:
        await pause()


def _abandoned(process: DaemonProcess) -> None:
    """Ends a daemon whose Daemon object went away, or was there still at the interpreter's end."""
    if process.owned and not process.ended:
        warnings.warn(f"daemon {process.pid} was not stopped", ResourceWarning, stacklevel=2)
        process.destroy()


def _find_binary(wanted: str | os.PathLike[str] | None) -> Path:
    try:
        # Does not import it: that takes seconds, and torch.
        spec = importlib.util.find_spec("hivemind")
    except (ImportError, ValueError):
        spec = None
    hivemind: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    environ = os.environ
    found, looked_at = find_daemon(
        wanted, environ.get("P2PD_PATH"), environ.get("PATH"), list(hivemind)
    )
    if found is None:
        raise DaemonNotFound("no binary of a libp2p daemon to run", looked_at=looked_at)
    return found


def _seconds(option: str, timeout: float) -> float:
    if not isinstance(timeout, Real):
        raise TypeError(f"{option} is a number of seconds, not {timeout!r}")
    if not timeout >= 0:
        raise ValueError(f"{option} cannot be {timeout}")
    return float(timeout)


def _texts(addresses: Sequence[Multiaddr | str]) -> list[str]:
    # A single address is a sequence too, of letters.
    return [str(a) for a in ([addresses] if isinstance(addresses, (str, Multiaddr)) else addresses)]
