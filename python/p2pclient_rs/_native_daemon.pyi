# The daemon's process and its supervision in `_native`, typed: a stub without a module of its own.

from os import PathLike
from pathlib import Path
from typing import Literal, final

from typing_extensions import Self

from p2pclient_rs._native_values import Multiaddr, PeerID

@final
class DaemonOptions:
    """A daemon's options, checked. Raises ValueError when they contradict each other."""

    def __new__(
        cls,
        *,
        dht: bool | str,
        relay: bool | None,
        pubsub: bool | str,
        connmgr: bool | tuple[int, int, float],
        host_addrs: list[str],
        announce_addrs: list[str],
        bootstrap_peers: list[str],
        bootstrap: str,
        identity: str | PathLike[str] | None,
        control_maddr: Multiaddr | str | None,
        extra_args: list[str],
        restart: bool | int,
    ) -> Self: ...

def find_daemon(
    explicit: str | PathLike[str] | None,
    variable: str | None,
    path: str | None,
    hivemind: list[str],
) -> tuple[Path | None, list[str], str | None]:
    """Returns the daemon's binary; or None, the places searched, each with the reason why it was
    rejected, and a hint for the user.

    Takes the binary asked for, the values of P2PD_PATH and PATH, and the package directories of
    hivemind."""

def before_fork() -> None:
    """For ``os.register_at_fork``: keeps other threads out of all daemons, and ends the threads
    that store their output."""

def after_fork_in_parent() -> None:
    """Undoes ``before_fork``. Does nothing if that did not run."""

def after_fork_in_child() -> None:
    """Lets other threads use daemons again, and has the watchdogs not take the child for its
    parent."""

def unused_tcp_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago, at an address or name of this machine.

    It is none of those that the system gives to whoever asks for any, or connects: one of these
    could be gone before it is used. Raises OSError if there is no such address, or no port."""

@final
class DaemonProcess:
    """A daemon's process, its watchdog and its files. Knows no event loop: only `destroy` waits.

    Whatever becomes of this process, neither the daemon nor its files outlive it. It belongs to
    this process: in a forked child nothing is signalled or removed.

    Args:
        binary: The daemon's binary.
        options: Its options.
        parent: Where its private directory is made, if that gives paths short enough for sockets.
        watchdog: The kind of process that clears up if this one is killed: "shell" or "forked". By
            default "shell", or "forked" where there is no shell.

    Raises ValueError for what this kind of daemon cannot do, DaemonStartError if something could
    not be made."""

    def __new__(
        cls,
        binary: str | PathLike[str],
        options: DaemonOptions,
        parent: str,
        *,
        watchdog: str | None = None,
    ) -> Self: ...
    def without_bootstrap(self) -> DaemonProcess:
        """The same daemon in a process of its own, which does not connect to its bootstrap
        peers."""

    def bootstrap_peers(self) -> list[tuple[str, PeerID, list[Multiaddr]]]:
        """Each with its address as it was given."""

    def background_peers(self) -> list[tuple[str, PeerID, list[Multiaddr]]]:
        """Those that are not for the daemon itself to connect to."""

    def supervision(self) -> Supervision | None:
        """The decisions of a supervisor for this daemon; None if it needs no supervisor."""

    @property
    def restart_limit(self) -> int:
        """Deaths in a row after which the daemon is given up; 0 if it is never started again."""

    def set_supervised(self, supervised: bool) -> None:
        """Sets whether a supervisor starts the daemon again when it ends."""

    @property
    def finished(self) -> bool:
        """Whether the daemon has ended, and no supervisor starts it again."""

    def spawn(self) -> None:
        """Runs the daemon; again, if it has ended. Raises DaemonStartError if it cannot be
        executed."""

    @property
    def command(self) -> list[str]:
        """The command line."""

    @property
    def control_maddr(self) -> Multiaddr:
        """Where the daemon is to serve the control protocol."""

    def listen_maddr(self) -> Multiaddr:
        """A new address for a client to listen at, in the private directory."""

    @property
    def log(self) -> str:
        """The file with its newest output, at most a MiB, which goes with `destroy`. Up to a MiB
        more from before is in the file with ".1" at the end of its name."""

    @property
    def pid(self) -> int | None:
        """The daemon's process id, which is its process group's too; None before it ran."""

    @property
    def watchdog_pid(self) -> int: ...
    @property
    def owned(self) -> bool:
        """Whether this is the process that started the daemon."""

    @property
    def ended(self) -> bool:
        """Whether it was destroyed, though some of its files or processes may be there still."""

    @property
    def destroyed(self) -> bool:
        """Whether it was destroyed and nothing is left of it."""

    @property
    def alive(self) -> bool:
        """Whether the daemon is running; a forked child can tell too."""

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None if the daemon is running, or if only its
        parent can tell."""

    def terminate(self) -> None:
        """Asks the daemon and its children to end, if it is running."""

    def kill(self) -> None:
        """Kills the daemon and its children, if it is running."""

    def output(self) -> str:
        """The end of what the daemon has printed: the last MiB."""

    def try_destroy(self) -> bool:
        """Does the next step of `destroy` without waiting. Returns whether nothing is left. The
        caller repeats it every few milliseconds until then, for about ten seconds at most."""

    def destroy(self) -> None:
        """Ends all of it now; status and output can still be had. Waits, with the interpreter
        released: milliseconds, or some seconds for a process that cannot be interrupted."""

    def doubt(self, peer_id: PeerID) -> str | None:
        """Why the answer to IDENTIFY with this peer id is not to be believed yet; None if it is."""

    def not_ready(
        self, timeout: float, obstacle: str | None, reasons: list[tuple[str, str]] = ...
    ) -> Exception:
        """The DaemonStartError of a daemon that ended, or was not ready in this many seconds, its
        last answer being none because of this obstacle. `reasons` says why which bootstrap peer
        could not be reached."""

    @property
    def unconnected(self) -> bool:
        """Whether it ended since it reached none of its bootstrap peers."""

    def died(self) -> Exception:
        """The DaemonStartError of a daemon that was ready, and died."""

@final
class Supervision:
    """When to start a daemon again, when to connect it to its bootstrap peers, and what to report.
    Times are seconds of any clock that does not go back.

    The driver calls a method for each event, does what ``poll`` returns until that is None, and
    calls ``timeout`` at ``deadline``.

    Args:
        restart_limit: Deaths in a row, within 10 seconds of the start each, after which the daemon
            is given up; 0 if it is never started again.
        peers: The number of bootstrap peers."""

    REGISTER_TIMEOUT: float
    def __new__(cls, restart_limit: int, peers: int) -> Self: ...
    def poll(self) -> SupervisionAction | None:
        """The next thing to do, until there is nothing more."""

    @property
    def deadline(self) -> float | None:
        """When to call ``timeout``; None if no pause is in progress."""

    @property
    def finished(self) -> bool:
        """Whether supervision has ended: no event leads to another action."""

    def started(self, now: float) -> None:
        """The daemon is ready: it was started by the caller, or by "start"."""

    def start_failed(self, now: float) -> None:
        """ "start" failed, and nothing is left of the process."""

    def died(self, now: float) -> None:
        """The process of a daemon that was ready has ended."""

    def connected(self, peer: int, now: float) -> None:
        """ "connect" to this bootstrap peer succeeded."""

    def connect_failed(self, peer: int, reason: str, daemon_lost: bool, now: float) -> None:
        """ "connect" to this bootstrap peer failed. `daemon_lost` if the daemon was unreachable, so
        that this says nothing about the peer."""

    def timeout(self, now: float) -> None:
        """``deadline`` may have passed."""

    def stopped(self, now: float) -> None:
        """The caller stops the daemon. It is not started again."""

@final
class SupervisionAction:
    """What the driver of a ``Supervision`` has to do. Fields that its kind does not use are 0 or
    empty."""

    @property
    def kind(
        self,
    ) -> Literal[
        "watch",
        "connect",
        "register",
        "abort",
        "start",
        "give up",
        "report restarting",
        "report restarted",
        "report connected",
        "report unreachable",
    ]: ...
    @property
    def peer(self) -> int:
        """The index of a bootstrap peer."""

    @property
    def pause(self) -> float:
        """Seconds until the daemon is started again."""

    @property
    def deaths(self) -> int:
        """Deaths in a row of a daemon that is given up."""

    @property
    def reason(self) -> str:
        """Why a bootstrap peer could not be connected to."""

@final
class Startup:
    """When to probe a daemon that was spawned, and when to give it up. Times are seconds of any
    clock that does not go back; `limit` may be infinite."""

    EXPLAIN_TIMEOUT: float
    def __new__(cls, now: float, limit: float) -> Self: ...
    def step(self, now: float) -> tuple[Literal["probe", "wait", "ready", "failed"], float]:
        """What to do next, and until when for "wait"."""

    def probed(self, obstacle: str | None, now: float) -> None:
        """Takes the outcome of a probe: None if the daemon is ready, else what speaks against
        that."""

    def ended(self) -> None:
        """The process has ended, even if it was ready a moment ago."""

    @property
    def deadline(self) -> float:
        """When to stop waiting for the reply to a probe."""

    @property
    def obstacle(self) -> str | None:
        """Why the last probe did not find the daemon ready."""

@final
class Reconnection:
    """When to connect to a peer again, and which outcomes to report."""

    TIMEOUT: float
    def __new__(cls) -> Self: ...
    def connected(self) -> tuple[float, bool]:
        """The peer is connected. Returns the pause before the next CONNECT, in seconds, and
        whether to report the connection."""

    def failed(self, reason: str) -> tuple[float, bool]:
        """The peer could not be connected to. Returns the pause before the next CONNECT, in
        seconds, and whether to report the failure."""
