# Stubs of the daemon's process and its supervision in `_native`. No module has this name.

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
    """Finds the daemon's binary. Returns its path; or None, the places searched, each with the
    reason for its rejection, and a hint for the user.

    Takes the requested binary, the values of P2PD_PATH and PATH, and the package directories of
    hivemind."""

def before_fork() -> None:
    """For ``os.register_at_fork``: blocks other threads from using any daemon, and ends the
    threads that store the daemons' output."""

def after_fork_in_parent() -> None:
    """Undoes ``before_fork``, if that has run."""

def after_fork_in_child() -> None:
    """Lets other threads use daemons again, and closes the child's pipes to the watchdogs."""

def unused_tcp_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port that is free at an address or name of this machine.

    The port is below the ephemeral range, so that no other program gets it by chance before it is
    used. Raises OSError if there is no such address, or no free port."""

@final
class DaemonProcess:
    """A daemon's process, its watchdog and its files. Needs no event loop: only `destroy` waits.

    The daemon and its files never outlive this process, even if this process is killed. The object
    belongs to this process: in a forked child it sends no signals and removes no files.

    Args:
        binary: The daemon's binary.
        options: Its options.
        parent: The parent of its private directory, unless paths there are too long for sockets.
        watchdog: The kind of process that cleans up if this one is killed: "shell" or "forked". By
            default "shell", or "forked" if there is no shell.

    Raises ValueError for options that this kind of daemon does not support, and DaemonStartError if
    a file or process cannot be created."""

    def __new__(
        cls,
        binary: str | PathLike[str],
        options: DaemonOptions,
        parent: str,
        *,
        watchdog: str | None = None,
    ) -> Self: ...
    def without_bootstrap(self) -> DaemonProcess:
        """Returns a second process with the same options, but without bootstrap peers."""

    def bootstrap_peers(self) -> list[tuple[str, PeerID, list[Multiaddr]]]:
        """Returns the bootstrap peers, each with its address as given."""

    def background_peers(self) -> list[tuple[str, PeerID, list[Multiaddr]]]:
        """Returns the bootstrap peers to which the supervisor connects instead of the daemon."""

    def supervision(self) -> Supervision | None:
        """The decisions of a supervisor for this daemon; None if it needs no supervisor."""

    @property
    def restart_limit(self) -> int:
        """Deaths in a row after which the supervisor gives up; 0 if it never restarts."""

    def set_supervised(self, supervised: bool) -> None:
        """Sets whether a supervisor restarts the daemon when it ends."""

    @property
    def finished(self) -> bool:
        """Whether the daemon has ended and no supervisor will restart it."""

    def spawn(self) -> None:
        """Starts the daemon, or starts it again if it has ended. Raises DaemonStartError if the
        binary cannot be executed."""

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
        """The file with the daemon's latest output, at most 1 MiB. Up to 1 MiB of earlier output is
        in a file with the suffix ".1". `destroy` removes them."""

    @property
    def pid(self) -> int | None:
        """The id of the daemon's process and process group; None before its first start."""

    @property
    def watchdog_pid(self) -> int: ...
    @property
    def owned(self) -> bool:
        """Whether this is the process that started the daemon."""

    @property
    def ended(self) -> bool:
        """Whether `destroy` has begun. Files or processes may remain."""

    @property
    def destroyed(self) -> bool:
        """Whether `destroy` is complete: no file or process remains."""

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
        """Does the next step of `destroy` without waiting. Returns whether `destroy` is complete.
        The caller repeats this every few milliseconds until then, for about 10 s at most."""

    def destroy(self) -> None:
        """Ends the daemon and removes its files. The exit status and the output stay available.
        Releases the GIL while it waits: milliseconds, or some seconds if a process cannot be
        interrupted."""

    def why_not_ready(self, peer_id: PeerID) -> str | None:
        """Returns why an IDENTIFY reply with this peer id does not prove that the daemon is ready;
        None if it does."""

    def not_ready(
        self, timeout: float, reason: str | None, reasons: list[tuple[str, str]] = ...
    ) -> Exception:
        """Returns the DaemonStartError for a daemon that ended, or that was not ready after
        `timeout` seconds because of `reason`. `reasons` has the unreachable bootstrap peers, each
        with the reason."""

    @property
    def unconnected(self) -> bool:
        """Whether the daemon ended because it reached none of its bootstrap peers."""

    def died(self) -> Exception:
        """Returns the DaemonStartError for a daemon that died after it was ready."""

@final
class Supervision:
    """Decides when to restart a daemon, when to connect it to its bootstrap peers, and what to log.
    Times are in seconds of any monotonic clock.

    The driver calls a method for each event, carries out the actions of ``poll`` until that returns
    None, and calls ``timeout`` at ``deadline``. ``DaemonProcess.supervision`` creates it."""

    REGISTER_TIMEOUT: float
    def poll(self) -> SupervisionAction | None:
        """Returns the next action, or None."""

    @property
    def deadline(self) -> float | None:
        """When to call ``timeout``; None if nothing is scheduled."""

    @property
    def finished(self) -> bool:
        """Whether supervision has ended: no event leads to another action."""

    def started(self, now: float) -> None:
        """Reports that the daemon is ready, after the caller or a "start" action started it."""

    def start_failed(self, now: float) -> None:
        """Reports that "start" failed, and that no process is left."""

    def died(self, now: float) -> None:
        """Reports that the process of a daemon that was ready has ended."""

    def connected(self, peer: int, now: float) -> None:
        """Reports that "connect" to this bootstrap peer succeeded."""

    def connect_failed(self, peer: int, reason: str, daemon_lost: bool, now: float) -> None:
        """Reports that "connect" to this bootstrap peer failed. `daemon_lost` means that the daemon
        was unreachable, so the failure says nothing about the peer."""

    def timeout(self, now: float) -> None:
        """Call this when ``deadline`` may have passed."""

    def stopped(self, now: float) -> None:
        """Reports that the caller stops the daemon, so it must not be restarted."""

@final
class SupervisionAction:
    """An action for the driver of a ``Supervision``. Fields that do not apply to its kind are 0 or
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
        """Seconds until the daemon is restarted."""

    @property
    def deaths(self) -> int:
        """Deaths in a row after which the supervisor gives up."""

    @property
    def reason(self) -> str:
        """Why the connection to a bootstrap peer failed."""

@final
class Startup:
    """Decides when to probe a spawned daemon, and when to stop waiting for it. Times are in seconds
    of any monotonic clock; `limit` may be infinite."""

    EXPLAIN_TIMEOUT: float
    def __new__(cls, now: float, limit: float) -> Self: ...
    def step(self, now: float) -> tuple[Literal["probe", "wait", "ready", "failed"], float]:
        """Returns what to do next, and for "wait" until when."""

    def probed(self, reason: str | None, now: float) -> None:
        """Reports the outcome of a probe: None if the daemon is ready, otherwise the reason."""

    def ended(self) -> None:
        """Reports that the process has ended, even if it was ready a moment ago."""

    @property
    def deadline(self) -> float:
        """When to stop waiting for the reply to a probe."""

    @property
    def reason(self) -> str | None:
        """Why the last probe did not find the daemon ready."""

@final
class Reconnection:
    """Decides when to reconnect to a peer, and which outcomes to log."""

    TIMEOUT: float
    def __new__(cls) -> Self: ...
    def connected(self) -> tuple[float, bool]:
        """Reports that the peer is connected. Returns the pause before the next CONNECT, in
        seconds, and whether to log the connection."""

    def failed(self, reason: str) -> tuple[float, bool]:
        """Reports that connecting to the peer failed. Returns the pause before the next CONNECT, in
        seconds, and whether to log the failure."""
