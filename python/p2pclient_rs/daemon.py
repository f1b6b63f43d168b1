"""Start, watch and stop a libp2p daemon (``p2pd``).

    async with Daemon(dht="server") as daemon, daemon.client() as client:
        print(await client.identify())

Rust (``src/manager``) chooses the daemon's arguments and owns its process and its files, which do
not outlive this process, however it ends. This module waits for the daemon, on any event loop.
"""

from __future__ import annotations

import errno
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
    after_fork_in_child,
    after_fork_in_parent,
    before_fork,
    find_daemon,
    unused_tcp_port,
)
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import DaemonNotFound, DaemonStartError
from p2pclient_rs.process import Pause, destroy, poll_exit, wait_exit
from p2pclient_rs.startup import ready
from p2pclient_rs.supervisor import Supervisor

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Daemon", "unused_tcp_port"]

os.register_at_fork(
    before=before_fork,
    after_in_parent=after_fork_in_parent,
    after_in_child=after_fork_in_child,
)


class Daemon:
    """A libp2p daemon in a process of its own.

    ``async with Daemon() as daemon`` starts and stops it, as ``start()`` and ``stop()`` do. Runs on
    asyncio, uvloop and trio. The object belongs to the process that created it: a forked child can
    create clients of the daemon, but its ``stop()`` does nothing.

    Args:
        binary: The daemon's binary, a path or a name in ``PATH``. By default the path in the
            environment variable ``P2PD_PATH``, else ``p2pd`` in ``PATH``, else the one inside an
            installed hivemind. A binary named ``jsp2pd`` gets the arguments of the JavaScript
            daemon.
        dht: The DHT. With True, the daemon becomes a server once it finds itself publicly
            reachable; daemons on one machine need ``"server"``.
        relay: Circuit relay. None means the daemon's default, which is on.
        pubsub: Pubsub. True means the daemon's default router.
        connmgr: The connection manager, with the daemon's default limits or with
            ``(low, high, grace)``: above `high` connections, it closes those older than `grace`
            seconds until `low` are left.
        host_addrs: Multiaddrs to listen on for peers. With an empty sequence, the daemon listens on
            every interface.
        announce_addrs: Multiaddrs to announce to peers instead of ``host_addrs``.
        bootstrap_peers: Peers to join the network through, each a multiaddr that ends in
            ``/p2p/<peer id>``.
        bootstrap: With ``"required"``, the daemon connects to the bootstrap peers before it is
            ready, and one of them must be reachable. With ``"background"`` none need be: once the
            daemon is ready, its supervisor connects to each with a backoff of 1 to 60 seconds, and
            again every 15 seconds in case the connection was lost. Failures are logged to
            ``p2pclient_rs.daemon``, with the peer and the reason.
        identity: A file with a private key in libp2p's encoding; by default, a new identity.
        control_maddr: The address at which to serve the control protocol, a unix or TCP multiaddr;
            TCP port 0 is replaced by an unused port. The default is a unix socket that only this
            user can reach.
        extra_args: Further arguments for the daemon, passed unchanged.
        restart: Whether to restart a daemon that dies by itself, with a backoff of 0.1 to 30
            seconds: with the same options and control address, the same identity (without a file,
            a temporary one) and the same TCP ports. After 10 deaths in a row, each within 10
            seconds of the start, the supervisor gives up; a number sets another limit. It registers
            the handlers of clients made by ``client()`` again, logs restarts to
            ``p2pclient_rs.daemon``, and runs on the event loop on which the daemon was started.
        start_timeout: Seconds within which the daemon must be ready.
        stop_timeout: Seconds within which the daemon must end after SIGTERM, before it is killed.

    Raises:
        ValueError: An address is invalid, options contradict each other, or a timeout is negative.
        TypeError: An option has the wrong type; a timeout cannot be None.

    Example:
        async with Daemon(dht="server", pubsub=True) as daemon, daemon.client() as client:
            print(await client.identify())
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
        bootstrap: Literal["required", "background"] = "required",
        identity: str | os.PathLike[str] | None = None,
        control_maddr: Multiaddr | str | None = None,
        extra_args: Sequence[str] = (),
        restart: bool | int = False,
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
            bootstrap=bootstrap,
            identity=identity,
            control_maddr=None if control_maddr is None else str(control_maddr),
            extra_args=list(extra_args),
            restart=restart,
        )
        self._start_timeout = _seconds("start_timeout", start_timeout)
        self._stop_timeout = _seconds("stop_timeout", stop_timeout)

        self._process: DaemonProcess | None = None
        self._finalizer: weakref.finalize[..., Daemon] | None = None
        self._identity: Identity | None = None
        self._supervisor: Supervisor | None = None
        self._clients: weakref.WeakSet[Client] = weakref.WeakSet()
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
        """Starts the daemon and returns this object once the daemon is ready.

        Raises:
            DaemonNotFound: No binary was found; the error lists every place searched.
            ValueError: This kind of daemon lacks an option.
            DaemonStartError: The daemon ended (raised at once), was not ready within
                `start_timeout` seconds, or the operating system refused something that the start
                needs. In the last case it is also an OSError with the ``errno``, and ``cause``
                names the file or the operation. No process and no file is left.
            RuntimeError: The daemon is running, or being stopped.
        """
        process = self._prepare()
        try:
            process.spawn()
            await self._become_ready(process)
        except BaseException as error:
            await self._end(process, error)
            raise
        return self

    async def stop(self) -> None:
        """Stops the daemon, kills it if it does not stop, and removes its files.

        Does nothing if the daemon is not running, was never started, or belongs to a parent
        process. Cancelling an anyio or trio scope does not interrupt it. asyncio's own cancellation
        (``task.cancel()``, ``asyncio.timeout()``) skips the rest of `stop_timeout`: the daemon is
        killed at once, and the ``CancelledError`` is raised once nothing is left.
        """
        process = self._process
        if process is None or process.destroyed or not process.owned:
            return
        try:
            with anyio.CancelScope(shield=True):
                if self._supervisor is not None:
                    # With a timeout, as the supervisor's event loop may no longer be running.
                    with anyio.move_on_after(self._stop_timeout):
                        await self._supervisor.stop()
                with anyio.move_on_after(self._stop_timeout):
                    process.terminate()
                    await poll_exit(process)
        except BaseException as error:
            await self._end(process, error)
            raise
        await self._end(process)

    async def wait(self) -> int:
        """Waits until the daemon has ended, and returns its exit status, negative for a signal.

        With ``restart``, waits until the daemon is stopped or the supervisor gives up (see
        ``failure``). Any number of tasks may wait.

        Raises:
            RuntimeError: The daemon has not been started, or belongs to a parent process.
        """
        process = self._process
        if process is None or not process.owned:
            raise RuntimeError("the daemon has not been started by this process")
        pause = Pause()
        while not process.finished:
            if self._supervisor is not None and self._supervisor.loop_closed:
                process.set_supervised(False)
            await wait_exit(process)
            if not process.finished:  # it is being restarted
                await pause()
        return process.poll() or 0

    def client(self, listen_maddr: Multiaddr | str | None = None) -> Client:
        """Returns a new client of this daemon, to be used with ``async with``.

        Args:
            listen_maddr: The address at which the client listens for inbound streams; by default a
                new unix socket in the daemon's private directory.

        Raises:
            RuntimeError: The daemon has not been started, or has been stopped.
        """
        process = self._process
        if process is None or process.ended:
            raise RuntimeError("the daemon is not running")
        if listen_maddr is None:
            listen_maddr = process.listen_maddr()
        client = Client(process.control_maddr, listen_maddr)
        self._clients.add(client)
        return client

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
        """The multiaddrs on which it listened for peers after its last start, without its peer id.
        Raises RuntimeError before it has started."""
        return tuple(self._identified().addrs)

    @property
    def control_maddr(self) -> Multiaddr:
        """The address at which it serves the control protocol. Raises RuntimeError before the start
        if no address was given."""
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
    def failure(self) -> DaemonStartError | None:
        """Why the supervisor gave up restarting the daemon; None if it did not."""
        return None if self._supervisor is None else self._supervisor.failure

    @property
    def command(self) -> list[str]:
        """The command line of the last start; empty before the first."""
        return [] if self._process is None else self._process.command

    @property
    def logs(self) -> list[str]:
        """The lines of the daemon's output, at most its last MiB; also after it was stopped."""
        return [] if self._process is None else self._process.output().splitlines()

    def _identified(self) -> Identity:
        if self._identity is None:
            raise RuntimeError("the daemon has not been started")
        restarted = self._supervisor and self._supervisor.identity
        return restarted or self._identity

    def _prepare(self) -> DaemonProcess:
        """Creates the process object without starting the process."""
        if self._process is not None and not self._process.destroyed:
            raise RuntimeError("the daemon has been started already")
        binary = _find_binary(self._binary)
        process = DaemonProcess(binary, self._options, _temporary_directory())
        self._process, self._identity, self._supervisor = process, None, None
        self._control_maddr = process.control_maddr
        self._finalizer = weakref.finalize(self, _abandoned, process)
        return process

    def _spawn(self) -> DaemonProcess:
        """Spawns the daemon without waiting until it is ready. Needs no event loop."""
        process = self._prepare()
        try:
            process.spawn()
        except BaseException:
            self._end_now(process)
            raise
        return process

    def _end_now(self, process: DaemonProcess) -> None:
        """Destroys the process. Blocks."""
        process.destroy()
        if self._finalizer is not None and process is self._process:
            self._finalizer.detach()

    async def _become_ready(self, process: DaemonProcess) -> None:
        """Waits until the daemon is ready, and starts its supervisor, if it needs one."""
        self._identity = await ready(process, self._start_timeout)
        supervision = process.supervision()
        if supervision is not None:
            self._supervisor = Supervisor(process, supervision, self._clients, self._start_timeout)

    async def _end(self, process: DaemonProcess, reason: BaseException | None = None) -> None:
        try:
            await destroy(process, reason)
        finally:
            if process.destroyed and process is self._process and self._finalizer is not None:
                self._finalizer.detach()


def _abandoned(process: DaemonProcess) -> None:
    """Destroys the process if its Daemon was garbage-collected or the interpreter exits."""
    if process.owned and not process.ended:
        warnings.warn(f"daemon {process.pid} was not stopped", ResourceWarning, stacklevel=2)
        process.destroy()


def _find_binary(wanted: str | os.PathLike[str] | None) -> Path:
    failure: OSError | None = None
    try:
        # Finds hivemind without importing it, which would take seconds and need torch.
        spec = importlib.util.find_spec("hivemind")
    except (ImportError, ValueError):
        spec = None
    except OSError as error:  # from a directory in sys.path
        spec, failure = None, error
    hivemind: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    environ = os.environ
    found, looked_at, hint = find_daemon(
        wanted, environ.get("P2PD_PATH"), environ.get("PATH"), list(hivemind)
    )
    if found is None:
        if failure is not None:
            looked_at.append(f"hivemind: the search failed: {failure}")
        message = "no binary of a libp2p daemon to run"
        raise DaemonNotFound(message, looked_at=looked_at, hint=hint) from failure
    return found


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except OSError as error:
        cause = error.strerror or str(error)
        hint = "set TMPDIR to a directory that exists and that this user can write to"
        refused = _refusal_to_open()
        if refused is not None:
            error, hint = refused, "raise the limit on open files (ulimit -n), or close some"
            cause = f"cannot look for a temporary directory: {error.strerror}"
        raise DaemonStartError._of_errno(error.errno)(
            "the daemon's start could not be prepared", cause=cause, hint=hint, errno=error.errno
        ) from error


def _refusal_to_open() -> OSError | None:
    """Returns the error if no descriptor is left, None otherwise.

    ``tempfile`` then reports that no directory is usable, and hides the reason.
    """
    try:
        os.close(os.open("/", os.O_RDONLY))
    except OSError as error:
        return error if error.errno in (errno.EMFILE, errno.ENFILE) else None
    return None


def _seconds(option: str, timeout: float) -> float:
    if not isinstance(timeout, Real):
        raise TypeError(f"{option} is a number of seconds, not {timeout!r}")
    if not timeout >= 0:
        raise ValueError(f"{option} cannot be {timeout}")
    return float(timeout)


def _texts(addresses: Sequence[Multiaddr | str]) -> list[str]:
    # A single address is also a sequence, of characters.
    return [str(a) for a in ([addresses] if isinstance(addresses, (str, Multiaddr)) else addresses)]
