# The daemon's process and its supervision in `_native`, typed: a stub without a module of its own.

from os import PathLike
from pathlib import Path
from typing import Literal, final

from typing_extensions import Self

from p2pclient_rs._native_values import Multiaddr, PeerID

@final
class DaemonOptions:
    """A daemon's options, validated. Raises ValueError if they contradict each other."""

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
    """Lets other threads use daemons again, and closes the child's pipes to the watchdogs."""

def unused_tcp_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port that is free at an address or name of this machine.

    The port is below the ephemeral range, so that no other program gets it by chance before it is
    used. Raises OSError if there is no such address, or no free port."""

@final
class DaemonProcess:
    """A daemon's process, its watchdog and its files. Knows no event loop: only `destroy` waits.

    The daemon and its files never outlive this process, even if it is killed. The object belongs to
    this process: in a forked child it signals and removes nothing.

    Args:
        binary: The daemon's binary.
        options: Its options.
        parent: The parent of its private directory, unless paths there are too long for sockets.
        watchdog: The kind of process that cleans up if this one is killed: "shell" or "forked". By
            default "shell", or "forked" where there is no shell.

    Raises ValueError for options that this kind of daemon does not support, DaemonStartError if a
    file or process could not be created."""

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
        """Returns the bootstrap peers, each with its address as it was given."""

    def background_peers(self) -> list[tuple[str, PeerID, list[Multiaddr]]]:
        """Returns the bootstrap peers that the supervisor connects to, not the daemon."""

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
        """The address at which the daemon serves the control protocol."""

    def listen_maddr(self) -> Multiaddr:
        """Returns a new address in the private directory, for a client to listen on."""

    @property
    def log(self) -> str:
        """The file with the daemon's newest output, at most 1 MiB; `destroy` removes it. Up to
        1 MiB of earlier output is in the file with the same name and ".1"."""

    @property
    def pid(self) -> int | None:
        """The id of the daemon's process and process group; None before it ran."""

    @property
    def watchdog_pid(self) -> int: ...
    @property
    def owned(self) -> bool:
        """Whether this is the process that started the daemon."""

    @property
    def ended(self) -> bool:
        """Whether `destroy` has begun. Some files or processes may still exist."""

    @property
    def destroyed(self) -> bool:
        """Whether it was destroyed, with all files and processes."""

    @property
    def alive(self) -> bool:
        """Whether the daemon is running. Also works in a forked child."""

    def poll(self) -> int | None:
        """Returns the exit status, negative for a signal; None if the daemon is running, or in a
        forked child."""

    def terminate(self) -> None:
        """Sends SIGTERM to the daemon and its children, if it is running."""

    def kill(self) -> None:
        """Kills the daemon and its children, if it is running."""

    def output(self) -> str:
        """Returns the last MiB of the daemon's output."""

    def try_destroy(self) -> bool:
        """Does the next step of `destroy` without waiting. Returns whether it is complete. The
        caller repeats it every few milliseconds until then, for about 10 s at most."""

    def destroy(self) -> None:
        """Ends the daemon and removes its files. The exit status and the output stay available.
        Waits with the interpreter released: milliseconds, or some seconds for a process that
        cannot be interrupted."""

    def doubt(self, peer_id: PeerID) -> str | None:
        """Returns why an IDENTIFY reply with this peer id may come from another daemon; None if it
        comes from this one."""

    def not_ready(
        self, timeout: float, obstacle: str | None, reasons: list[tuple[str, str]] = ...
    ) -> Exception:
        """Returns the DaemonStartError of a daemon that ended, or was not ready within this many
        seconds because of this obstacle. `reasons` has the unreachable bootstrap peers, each with
        the reason."""

    @property
    def unconnected(self) -> bool:
        """Whether it ended because it reached none of its bootstrap peers."""

    def died(self) -> Exception:
        """Returns the DaemonStartError of a daemon that was ready and died."""

@final
class Supervision:
    """When to start a daemon again, when to connect it to its bootstrap peers, and what to report.
    Times are in seconds of any monotonic clock.

    The driver calls a method for each event, carries out the actions of ``poll`` until that returns
    None, and calls ``timeout`` at ``deadline``.

    Args:
        restart_limit: Deaths in a row, within 10 seconds of the start each, after which the daemon
            is given up; 0 if it is never started again.
        peers: The number of bootstrap peers."""

    REGISTER_TIMEOUT: float
    def __new__(cls, restart_limit: int, peers: int) -> Self: ...
    def poll(self) -> SupervisionAction | None:
        """Returns the next action, or None."""

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
    """An action for the driver of a ``Supervision``. Fields that its kind does not use are 0 or
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
    """When to probe a spawned daemon, and when to stop waiting for it. Times are in seconds of any
    monotonic clock; `limit` may be infinite."""

    EXPLAIN_TIMEOUT: float
    def __new__(cls, now: float, limit: float) -> Self: ...
    def step(self, now: float) -> tuple[Literal["probe", "wait", "ready", "failed"], float]:
        """What to do next, and until when for "wait"."""

    def probed(self, obstacle: str | None, now: float) -> None:
        """Takes the outcome of a probe: None if the daemon is ready, otherwise the obstacle."""

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
