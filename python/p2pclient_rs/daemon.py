"""Start, watch and stop a libp2p daemon (``p2pd``).

    async with Daemon(dht="server") as daemon, daemon.client() as client:
        print(await client.identify())

What the daemon is given is decided in Rust (``src/daemon``). This module runs the process: its
sockets and its output are in a private directory, and whatever becomes of this process, neither
the daemon nor that directory outlives it.
"""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import anyio

from p2pclient_rs._native import (
    DaemonOptions,
    Identity,
    Multiaddr,
    PeerID,
    daemon_startup,
    diagnose_daemon,
    endpoint,
    excerpt_daemon_output,
    find_daemon,
)
from p2pclient_rs.client import Client
from p2pclient_rs.exceptions import (
    ControlFailure,
    DaemonNotFound,
    DaemonStartError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["Daemon"]

# The kernel's limit on the path of a unix socket, where it is lowest (macOS: 104 with the NUL).
_SOCKET_PATH_LIMIT = 103
_LONGEST_SOCKET_NAME = "client-4194304-9999999.sock"
# How much of the end of the daemon's output is kept, in bytes.
_OUTPUT_LIMIT = 1 << 20
_ERROR_LINES = 20

# Reads lines until the process that writes them has gone, the last line being the daemon's
# process group, or 0 when that has ended. Then ends the daemon and removes its files.
_JANITOR = """
group=0
while read -r line; do group=$line; done
if [ "$group" -gt 0 ]; then
    kill -s TERM -- "-$group"
    tries=0
    while [ "$tries" -lt 50 ] && kill -s 0 -- "-$group"; do
        sleep 0.1
        tries=$((tries + 1))
    done
    kill -s KILL -- "-$group"
fi
rm -rf -- "$@"
"""

# The write ends of the janitors' pipes. A forked child must not hold them open: the janitors
# would take it for its parent.
_lifelines: set[int] = set()


def _close_lifelines() -> None:
    for lifeline in _lifelines:
        os.close(lifeline)
    _lifelines.clear()


os.register_at_fork(after_in_child=_close_lifelines)


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
        ValueError: An address cannot be used as what it is given for, or options contradict each
            other.
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
            extra_args=list(extra_args),
        )
        self._wanted_control = None if control_maddr is None else Multiaddr(str(control_maddr))
        if self._wanted_control is not None:
            endpoint(self._wanted_control)
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        # An answer on a private socket can only be this daemon's, and means that it is ready. On
        # an address that others may serve, or where a daemon answers before it has reached its
        # bootstrap peers (upstream's does), it must also have said so in its output.
        quiet = {"-q", "--quiet"}.intersection(extra_args)
        self._must_say_so = bool(control_maddr or bootstrap_peers) and not quiet

        self._process: _Process | None = None
        self._finalizer: weakref.finalize[..., Daemon] | None = None
        self._identity: Identity | None = None
        self._control_maddr = self._wanted_control
        self._command: list[str] = []
        self._client_numbers = itertools.count()

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
                process.send(signal.SIGTERM)
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
            # The process id, for a forked child counts from the same number as its parent.
            name = f"client-{os.getpid()}-{next(self._client_numbers)}.sock"
            listen_maddr = Multiaddr(f"/unix{process.directory}/{name}")
        return Client(self.control_maddr, listen_maddr)

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
        return list(self._command)

    @property
    def logs(self) -> list[str]:
        """The lines of the daemon's output so far, or of the last run; of a long output, the last
        MiB."""
        return [] if self._process is None else self._process.output().splitlines()

    def _identified(self) -> Identity:
        if self._identity is None:
            raise RuntimeError("the daemon has not been started")
        return self._identity

    def _launch(self) -> _Process:
        """Runs the daemon, without waiting for it."""
        if self._process is not None and not self._process.ended:
            raise RuntimeError("the daemon has been started already")
        binary = _find_binary(self._binary)
        control, directory = self._wanted_control, _make_private_directory()
        if control is None:
            control = Multiaddr(f"/unix{directory}/control.sock")
        try:
            control = _with_free_port(control)
            self._command = [str(binary), *self._options.arguments(binary, str(control))]
        except BaseException:
            os.rmdir(directory)
            raise
        self._control_maddr, self._identity = control, None
        process = self._process = _Process(directory, _socket_file(control))
        self._finalizer = weakref.finalize(self, _abandoned, process)
        try:
            self._spawn(process)
        except BaseException:
            self._end(process)
            raise
        return process

    def _spawn(self, process: _Process) -> None:
        try:
            process.spawn(self._command)
        except OSError as error:
            # The operating system's words are the shell's, which the diagnosis knows.
            reason = error.strerror or str(error)
            cause = diagnose_daemon(reason, None, []) or reason
            message = "the daemon could not be run"
            raise DaemonStartError(message, command=self._command, cause=cause) from error

    async def _become_ready(self, process: _Process) -> None:
        """Waits for the daemon's answer; raises DaemonStartError if it ends or takes too long."""
        answers: list[Identity] = []
        obstacles: list[str] = []
        with anyio.move_on_after(self._start_timeout):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._ask, process, answers, obstacles)
                # `_ask` may wait long for an answer that never comes, and so cannot do this.
                await _until_exit(process, unless=answers)
                tasks.cancel_scope.cancel()
        status = process.poll()
        if answers and status is None:
            self._identity = answers[0]
            return
        output = process.output()
        cause = diagnose_daemon(output, status, self._command[1:])
        if status is None:
            message = f"the daemon was not ready in {self._start_timeout:g} seconds"
            cause = cause or (obstacles[-1] if obstacles else None)
        else:
            message = f"the daemon {_describe(status)} before it was ready"
        logs = excerpt_daemon_output(output, _ERROR_LINES)
        if not logs:
            message += " and printed nothing"
        raise DaemonStartError(
            message, command=self._command, returncode=status, logs=logs, cause=cause
        )

    async def _ask(self, process: _Process, answers: list[Identity], obstacles: list[str]) -> None:
        """Asks the daemon who it is until it answers and may be believed."""
        pause = _Pause()
        while True:
            try:
                async with Client(self.control_maddr) as client:
                    identity = await client.identify()
            except ControlFailure as failure:
                obstacle = str(failure)
            else:
                started, peer_id = daemon_startup(process.output())
                if peer_id not in (None, str(identity.peer_id)):
                    obstacle = f"another daemon, {identity.peer_id}, answers in its place"
                elif self._must_say_so and not started:
                    obstacle = "it answers, but has not printed that it has started"
                else:
                    answers.append(identity)
                    return
            obstacles[:] = [obstacle]
            await pause()

    def _end(self, process: _Process) -> None:
        process.destroy()
        if self._finalizer is not None and process is self._process:
            self._finalizer.detach()


class _Process:
    """The daemon's process, its janitor and its files. Knows no event loop."""

    def __init__(self, directory: str, socket_file: str | None) -> None:
        self.directory = directory
        self.ended = False
        self._owner = os.getpid()
        self.log = os.path.join(directory, "log")
        self._last_output: str | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._reaped = False
        self._files = [directory]
        if socket_file is not None:
            _remove_stale_socket(socket_file)
            if not os.path.lexists(socket_file):
                self._files.append(socket_file)
        reader, self._lifeline = os.pipe()
        _lifelines.add(self._lifeline)
        try:
            # Before the daemon, so that there is no time at which nobody would clear up.
            self._janitor = subprocess.Popen(
                ["/bin/sh", "-c", _JANITOR, "p2pd-janitor", *self._files],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": os.pathsep.join((os.environ.get("PATH", ""), os.defpath))},
                start_new_session=True,
            )
        except BaseException:
            self._cut_lifeline()
            os.rmdir(directory)
            raise
        finally:
            os.close(reader)

    def spawn(self, command: list[str]) -> None:
        """Runs the daemon. Raises OSError if it cannot be executed."""
        with open(self.log, "xb") as log:
            self._daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C must reach Python alone, which then stops the daemon; and a wrapper script
                # and what it runs are signalled together.
                start_new_session=True,
                umask=0o077,
            )
        self._tell_janitor(self._daemon.pid)

    @property
    def owned(self) -> bool:
        """Whether this is the process that started the daemon."""
        return self._owner == os.getpid()

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        """The process itself. Raises RuntimeError before it was spawned."""
        if self._daemon is None:
            raise RuntimeError("the daemon has not been started")
        return self._daemon

    @property
    def pid(self) -> int | None:
        """The daemon's process id, which is its process group's too."""
        return None if self._daemon is None else self._daemon.pid

    @property
    def alive(self) -> bool:
        """Whether the daemon is running; a forked child can tell too."""
        if self._daemon is None or self.poll() is not None:
            return False
        return self.owned or _is_alive(self._daemon.pid)

    def poll(self) -> int | None:
        """The exit status; None if the daemon is running, or if only its parent can tell."""
        if self._daemon is None:
            return None
        status = self._daemon.poll() if self.owned else self._daemon.returncode
        if status is not None and self.owned and not self._reaped:
            # A wrapper script may have left the real daemon behind. After this the group's number
            # may become another's.
            self._reaped = True
            _signal_group(self._daemon.pid, signal.SIGKILL)
            self._tell_janitor(0)
        return status

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the daemon and its children, if it is running."""
        if self._daemon is not None and self.poll() is None:
            _signal_group(self._daemon.pid, number)

    def output(self) -> str:
        """The end of what the daemon has printed."""
        if self._last_output is not None:
            return self._last_output
        try:
            with open(self.log, "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _OUTPUT_LIMIT))
                return log.read(_OUTPUT_LIMIT).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def destroy(self) -> None:
        """Ends all of it now; status and output can still be had."""
        if self.ended or not self.owned:
            return
        self.send(signal.SIGKILL)
        if self._daemon is not None:
            self._daemon.wait()
            self.poll()
        self._last_output = self.output()
        self.ended = True
        self._janitor.kill()
        self._janitor.wait()
        self._cut_lifeline()
        for file in self._files:
            if file == self.directory:
                shutil.rmtree(file, ignore_errors=True)
            else:
                Path(file).unlink(missing_ok=True)

    def _tell_janitor(self, group: int) -> None:
        with suppress(BrokenPipeError):  # somebody killed it
            os.write(self._lifeline, b"%d\n" % group)

    def _cut_lifeline(self) -> None:
        _lifelines.discard(self._lifeline)
        os.close(self._lifeline)


class _Pause:
    """Sleeps for a little longer each time it is awaited: for 1 ms at first, 50 ms at most."""

    def __init__(self) -> None:
        self._seconds = 0.001

    async def __call__(self) -> None:
        await anyio.sleep(self._seconds)
        self._seconds = min(2 * self._seconds, 0.05)


async def _until_exit(process: _Process, unless: Sequence[object] = ()) -> None:
    """Waits until the daemon has ended, or there is something in `unless`."""
    pause = _Pause()
    while not unless and process.poll() is None:
        await pause()


def _abandoned(process: _Process) -> None:
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


def _make_private_directory() -> str:
    parent = tempfile.gettempdir()
    longest = os.path.join(parent, "p2pd-XXXXXXXX", _LONGEST_SOCKET_NAME)
    if len(os.fsencode(longest)) > _SOCKET_PATH_LIMIT:
        parent = "/tmp"
    return tempfile.mkdtemp(prefix="p2pd-", dir=parent)


def _texts(addresses: Sequence[Multiaddr | str]) -> list[str]:
    # A single address is a sequence too, of letters.
    return [str(a) for a in ([addresses] if isinstance(addresses, (str, Multiaddr)) else addresses)]


def _socket_file(control: Multiaddr) -> str | None:
    kind, path, _ = endpoint(control)
    return path if kind == "unix" else None


def _remove_stale_socket(path: str) -> None:
    """Removes a unix socket that nobody listens on: left behind, it would keep a daemon out."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass  # it is not there, is busy, or the daemon will say what is wrong with it


def _with_free_port(control: Multiaddr) -> Multiaddr:
    """Replaces TCP port 0: not every daemon says which port it was given."""
    kind, host, port = endpoint(control)
    if kind not in ("ip4", "ip6") or port != 0:
        return control
    return Multiaddr(f"/{kind}/{host}/tcp/{unused_tcp_port(host)}")


def unused_tcp_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago, at an IP address of this machine.

    It is none of those that the system gives to whoever asks for any, or connects: one of these
    could be gone before it is used.

    Raises:
        OSError: There is no such address, or no port.
    """
    for _ in range(100):
        port = secrets.randbelow(12_000) + 20_000
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
    raise OSError(errno.EADDRINUSE, f"no port is free at {host}")


def _signal_group(group: int, number: signal.Signals) -> None:
    # It may have ended; macOS says EPERM of a group of which only zombies are left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _describe(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
