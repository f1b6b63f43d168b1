"""Start, watch and stop a libp2p daemon (``p2pd``).

    async with Daemon(dht="server") as daemon, daemon.client() as client:
        print(await client.identify())

What the daemon is given, its process and its files are Rust's (``src/manager``), for other programs
too; whatever becomes of this process, they do not outlive it. This module waits for it, on any
event loop.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextvars import copy_context
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
    Reconnection,
    after_fork_in_child,
    after_fork_in_parent,
    before_fork,
    find_daemon,
    unused_tcp_port,
)
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import (
    ControlFailure,
    DaemonNotFound,
    DaemonStartError,
    DaemonUnreachable,
)
from p2pclient_rs.loops import reactor, watch

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Daemon", "unused_tcp_port"]

logger = logging.getLogger(__name__)

#: How long it may take to find out why no bootstrap peer could be reached, in seconds.
_EXPLAINING = 10.0
#: How long the registrations of a client may take when the daemon was started again, in seconds.
_REGISTERING = 30.0

os.register_at_fork(
    before=before_fork,
    after_in_parent=after_fork_in_parent,
    after_in_child=after_fork_in_child,
)


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
        bootstrap_peers: Peers to join others through, each a multiaddr that ends in
            ``/p2p/<peer id>``.
        bootstrap: With ``"required"``, the daemon connects to the bootstrap peers before it counts
            as started, and one of them must be reachable. With ``"background"`` none need be: they
            are connected to once it has started, again and again, with pauses that grow from a
            second to a minute, and are looked after every 15 seconds from then on. Failures, with
            the peer and the reason, are logged to ``p2pclient_rs.daemon``.
        identity: A file with a private key as libp2p encodes it; by default, a new identity.
        control_maddr: Where to serve the control protocol: a unix or TCP multiaddr; for TCP port
            0, a free port is chosen. By default a unix socket only this user can reach.
        extra_args: More arguments for the daemon, as they are.
        restart: Whether a daemon that dies by itself is started again: with the same options and
            control address, the same identity (without a file, a temporary one) and, of TCP, the
            same ports. The pauses before that grow from 0.1 to 30 seconds. It is given up after
            10 deaths in a row within 10 seconds of the start, or, with a number, after so many.
            Clients made by ``client()`` have their handlers registered again. Restarts are logged
            to ``p2pclient_rs.daemon``, and happen as long as the event loop runs on which it was
            started.
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
        self._keeper: _Keeper | None = None
        self._failure: DaemonStartError | None = None
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
        """Starts the daemon and returns this object once the daemon answers.

        Raises:
            DaemonNotFound: There is no binary; lists every place looked at.
            ValueError: This kind of daemon has no such option.
            DaemonStartError: The daemon ended, at once when it does, or did not answer in
                `start_timeout` seconds. Or the operating system refused something that the start
                needs: then this is an OSError too, with its ``errno``, and ``cause`` names the
                file or the operation. No process and no file is left.
            RuntimeError: It is running, or being stopped.
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

        Does nothing if it is not running, was never started, or belongs to a parent process.
        Cancelling a scope does not interrupt it. asyncio's own cancellation (``task.cancel()``,
        ``asyncio.timeout()``) leaves the daemon no `stop_timeout`: it is killed at once, and the
        cancellation goes on once all is gone.
        """
        process = self._process
        if process is None or process.destroyed or not process.owned:
            return
        try:
            with anyio.CancelScope(shield=True):
                if self._keeper is not None:
                    # Its event loop may be another, that does not run.
                    with anyio.move_on_after(self._stop_timeout):
                        await self._keeper.stop()
                with anyio.move_on_after(self._stop_timeout):
                    process.terminate()
                    await _until_exit(process)
        except BaseException as error:
            await self._end(process, error)
            raise
        await self._end(process)

    async def wait(self) -> int:
        """Waits until the daemon has ended, and returns its exit status, negative for a signal.

        One that is started again (``restart``) has ended when it was stopped, or given up: see
        ``failure``. Any number of tasks may wait.

        Raises:
            RuntimeError: The daemon has not been started, or belongs to a parent process.
        """
        process = self._process
        if process is None or not process.owned:
            raise RuntimeError("the daemon has not been started by this process")
        pause = _Pause()
        while not process.over:
            if self._keeper is not None and self._keeper.ended:
                process.keep(False)  # its event loop is no more
            await _exit(process)
            if not process.over:  # it is being started again
                await pause()
        return process.poll() or 0

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
    def failure(self) -> DaemonStartError | None:
        """Why a daemon that is started again (``restart``) was given up; None if it was not."""
        return self._failure

    @property
    def command(self) -> list[str]:
        """The command line of the last start; empty before the first."""
        return [] if self._process is None else self._process.command

    @property
    def logs(self) -> list[str]:
        """The lines of the daemon's output so far, or until it was stopped; of a long output, the
        last MiB."""
        return [] if self._process is None else self._process.output().splitlines()

    def _identified(self) -> Identity:
        if self._identity is None:
            raise RuntimeError("the daemon has not been started")
        return self._identity

    def _prepare(self) -> DaemonProcess:
        """Makes what the daemon needs to run."""
        if self._process is not None and not self._process.destroyed:
            raise RuntimeError("the daemon has been started already")
        binary = _find_binary(self._binary)
        process = DaemonProcess(binary, self._options, _temporary_directory())
        self._process, self._identity, self._failure = process, None, None
        self._control_maddr = process.control_maddr
        self._finalizer = weakref.finalize(self, _abandoned, process)
        return process

    def _launch(self) -> DaemonProcess:
        """Runs the daemon, without waiting for it, and without an event loop."""
        process = self._prepare()
        try:
            process.spawn()
        except BaseException:
            self._end_now(process)
            raise
        return process

    def _end_now(self, process: DaemonProcess) -> None:
        """Ends all of it, and blocks until then."""
        process.destroy()
        if self._finalizer is not None and process is self._process:
            self._finalizer.detach()

    async def _become_ready(self, process: DaemonProcess) -> None:
        """Waits for the daemon's answer, and has it looked after from then on."""
        self._identity = await _ready(process, self._start_timeout)
        if process.restarts() is not None or process.background_peers():
            self._keeper = _Keeper(self, process)

    async def _end(self, process: DaemonProcess, reason: BaseException | None = None) -> None:
        try:
            await _destroy(process, reason)
        finally:
            if process.destroyed and process is self._process and self._finalizer is not None:
                self._finalizer.detach()


class _Keeper:
    """Keeps a daemon's bootstrap peers connected and starts it again when it dies, in a task of
    its own, until it is stopped, given up or forgotten."""

    def __init__(self, daemon: Daemon, process: DaemonProcess) -> None:
        # Not the Daemon itself, whose end it would put off.
        self._daemon = weakref.ref(daemon)
        self._process = process
        self._start_timeout = daemon._start_timeout
        self._ended = anyio.Event()
        self._reactor = reactor()
        # From now on, though the task may not have begun.
        process.keep(process.restarts() is not None)
        self._work = self._reactor.spawn(self._run(), copy_context())
        self._reactor.when_ended(self._work, self._over)

    @property
    def ended(self) -> bool:
        """Whether its event loop is no more."""
        return self._reactor.ended

    async def stop(self) -> None:
        self._process.keep(False)
        if not self.ended:
            self._reactor.call_from_anywhere(self._work.cancel)
            await self._ended.wait()

    def _over(self) -> None:
        self._process.keep(False)
        self._ended.set()

    async def _run(self) -> None:
        process, restarts = self._process, self._process.restarts()
        try:
            lived = await self._live()
            while restarts is not None and not process.ended:
                failure = process.died()
                assert isinstance(failure, DaemonStartError)
                while (pause := restarts.died(lived)) is not None:
                    logger.warning("%s; it is started again in %.1f s", _brief(failure), pause)
                    await anyio.sleep(pause)
                    if process.ended:  # it was forgotten
                        return
                    try:
                        await self._start_again()
                        break
                    except DaemonStartError as error:
                        failure, lived = error, 0.0
                        process.kill()
                        await _until_exit(process)
                if pause is None:
                    return self._give_up(failure, restarts.deaths)
                logger.info("the daemon was started again as process %s", process.pid)
                lived = await self._live(again=True)
        except Exception:
            logger.exception("the daemon is no longer looked after")
        finally:
            self._over()

    async def _live(self, again: bool = False) -> float:
        """Returns, at the daemon's end, for how many seconds it has lived."""
        begun = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for peer in self._process.background_peers():
                tasks.start_soon(_stay_connected, self._process, *peer)
            daemon = self._daemon()
            for client in list(daemon._clients) if daemon is not None and again else ():
                tasks.start_soon(_register_again, client)
            del daemon
            await _exit(self._process)
            tasks.cancel_scope.cancel()
        return anyio.current_time() - begun

    async def _start_again(self) -> None:
        self._process.spawn()
        identity = await _ready(self._process, self._start_timeout)
        daemon = self._daemon()
        if daemon is not None:
            daemon._identity = identity

    def _give_up(self, failure: DaemonStartError, deaths: int) -> None:
        logger.error("the daemon has died %d times in a row and is given up: %s", deaths, failure)
        daemon = self._daemon()
        if daemon is not None:
            daemon._failure = failure


async def _stay_connected(
    process: DaemonProcess, address: str, peer_id: PeerID, addrs: Sequence[Multiaddr]
) -> None:
    """Connects a daemon to a bootstrap peer, and again when that is lost."""
    schedule = Reconnection()
    async with Client(process.control_maddr) as client:
        while True:
            try:
                await client.connect(peer_id, addrs, timeout=schedule.TIMEOUT)
            except ControlFailure as failure:
                reason = _reason(failure)
                pause, news = schedule.failed(reason)
                # A ConnectionError is the daemon's end, and not the peer's fault.
                if news and not isinstance(failure, ConnectionError):
                    logger.warning("cannot connect to the bootstrap peer %s: %s", address, reason)
            else:
                pause, news = schedule.connected()
                if news:
                    logger.info("connected to the bootstrap peer %s", address)
            await anyio.sleep(pause)


async def _register_again(client: Client) -> None:
    for register_again in (client.control.register_again, client.unary.register_again):
        try:
            with anyio.fail_after(_REGISTERING):
                await register_again()
        except (ControlFailure, TimeoutError) as error:
            logger.warning("the handlers of %r were not registered again: %s", client, error)


async def _ready(process: DaemonProcess, timeout: float) -> Identity:
    """Waits for the daemon's answer; raises DaemonStartError if it ends or takes too long."""
    answers: list[Identity] = []
    obstacles: list[str] = []
    with anyio.move_on_after(timeout):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_ask, process, answers, obstacles)
            # `_ask` may wait long for an answer that never comes, and so cannot do this.
            await _until_exit(process, unless=answers)
            tasks.cancel_scope.cancel()
    if not answers or process.poll() is not None:
        reasons = await _unreachable(process) if process.unconnected else []
        raise process.not_ready(timeout, obstacles[-1] if obstacles else None, reasons)
    return answers[0]


async def _ask(process: DaemonProcess, answers: list[Identity], obstacles: list[str]) -> None:
    """Asks the daemon who it is until it answers and may be believed."""
    pause = _Pause()
    while True:
        try:
            async with Client(process.control_maddr) as client:
                identity = await client.identify()
        except ControlFailure as failure:
            obstacle = _words(failure)
        else:
            doubt = process.doubt(identity.peer_id)
            if doubt is None:
                answers.append(identity)
                return
            obstacle = doubt
        obstacles[:] = [obstacle]
        await pause()


async def _unreachable(process: DaemonProcess) -> list[tuple[str, str]]:
    """Why which bootstrap peer could not be reached, in the words of another such daemon: the one
    that ended has only said that none could."""
    peers = process.bootstrap_peers()
    reasons = {address: f"no answer within {_EXPLAINING:g} s" for address, _, _ in peers}

    async def connect(client: Client, address: str, peer: PeerID, addrs: list[Multiaddr]) -> None:
        try:
            await client.connect(peer, addrs)
            reasons[address] = "it can be reached now"
        except ControlFailure as failure:
            reasons[address] = _reason(failure)

    try:
        other = process.without_bootstrap()
    except (DaemonStartError, ValueError):
        return []
    try:
        other.spawn()
        with anyio.move_on_after(_EXPLAINING):
            await _ready(other, _EXPLAINING)
            async with (
                Client(other.control_maddr) as client,
                anyio.create_task_group() as tasks,
            ):
                for peer in peers:
                    tasks.start_soon(connect, client, *peer)
    except DaemonStartError:
        reasons.clear()
    except BaseException as error:
        await _destroy(other, error)
        raise
    await _destroy(other)
    return list(reasons.items())


def _reason(failure: ControlFailure) -> str:
    """The daemon's words, in one line."""
    return " ".join((failure.daemon_message or _words(failure)).split())


def _words(failure: ControlFailure) -> str:
    """The failure without the hint to start a daemon, which is being started."""
    if isinstance(failure, DaemonUnreachable) and failure._without_hint is not None:
        return failure._without_hint
    return str(failure)


def _brief(error: DaemonStartError) -> str:
    """Without the command line and the output."""
    return f"{error.args[0]}: {error.cause}" if error.cause else str(error.args[0])


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


async def _exit(process: DaemonProcess) -> None:
    """Waits until the daemon has ended, without looking again and again where that can be."""
    pid = process.pid
    if pid is not None and process.poll() is None and hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(pid)
        except OSError:  # a kernel without, or no descriptor left
            fd = -1
        if fd != -1:
            watched = watch(fd)
            pause = _Pause()
            try:
                while process.poll() is None:
                    await watched.readable()
                    if process.poll() is None:  # waits can end early
                        await pause()
            finally:
                watched.close()
                os.close(fd)
    await _until_exit(process)


async def _destroy(process: DaemonProcess, reason: BaseException | None = None) -> None:
    """Ends all of a daemon, without blocking the event loop. Not interrupted by cancellation.

    `reason` is the exception because of which it is ended. After some, the caller's task can no
    longer wait, and this blocks.
    """
    if isinstance(reason, (GeneratorExit, KeyboardInterrupt, SystemExit)):
        process.destroy()
        return
    pause = _Pause()
    cancelled: BaseException | None = None
    while not process.try_destroy():
        try:
            with anyio.CancelScope(shield=True):
                await pause()
        except anyio.get_cancelled_exc_class() as error:
            cancelled = error  # by asyncio's own means, from which a scope does not shield
        except BaseException:
            process.destroy()
            raise
    if cancelled is not None:
        try:
            raise cancelled
        finally:
            cancelled = None  # its traceback leads to this frame


def _abandoned(process: DaemonProcess) -> None:
    """Ends a daemon whose Daemon object went away, or was there still at the interpreter's end."""
    if process.owned and not process.ended:
        warnings.warn(f"daemon {process.pid} was not stopped", ResourceWarning, stacklevel=2)
        process.destroy()


def _find_binary(wanted: str | os.PathLike[str] | None) -> Path:
    failure: OSError | None = None
    try:
        # Does not import it: that takes seconds, and torch.
        spec = importlib.util.find_spec("hivemind")
    except (ImportError, ValueError):
        spec = None
    except OSError as error:  # of a directory in sys.path
        spec, failure = None, error
    hivemind: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    environ = os.environ
    found, looked_at, hint = find_daemon(
        wanted, environ.get("P2PD_PATH"), environ.get("PATH"), list(hivemind)
    )
    if found is None:
        if failure is not None:
            looked_at.append(f"hivemind: cannot be looked for: {failure}")
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
    """The error, if no file at all can be opened: for lack of a descriptor, every directory seems
    unusable to ``tempfile``, which does not say so."""
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
    # A single address is a sequence too, of letters.
    return [str(a) for a in ([addresses] if isinstance(addresses, (str, Multiaddr)) else addresses)]
