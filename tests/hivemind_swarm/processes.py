"""Starts and stops the processes of a swarm, and lists those that remain."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hivemind import DHT
from hivemind.p2p import P2P

#: Helper processes that torch and multiprocessing start once and keep until the program exits.
HELPERS = ("torch_shm_manager", "multiprocessing.resource_tracker")

#: Repeats a test whose handler closes a stream right after writing, unless an assertion has failed.
#: With any bindings, p2pd loses the end of about one in 150 long streams (docs/defects.md).
may_be_cut_short = pytest.mark.flaky(reruns=2, rerun_except=["AssertionError"])

_fork = mp.get_context("fork")


def until(condition: Callable[[], object], within: float = 15.0) -> None:
    """Waits until ``condition()`` is true.

    Args:
        condition: The condition.
        within: The timeout, in seconds.

    Raises:
        TimeoutError: The condition is not true in time.
    """
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not true after {within} s")
        time.sleep(0.02)


def living_descendants() -> dict[int, str]:
    """Returns the command lines of all living descendants of this process, by process id."""
    parents: dict[int, int] = {}
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry)] = int(parent)
    family = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    commands = {}
    for pid in family - {os.getpid()}:
        with suppress(FileNotFoundError, ProcessLookupError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            if not any(name in command for name in HELPERS):
                commands[pid] = command
    return commands


def kill(pid: int) -> None:
    """Kills a process, if it is still running."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Peer:
    """A ``P2P`` in another process.

    Attributes:
        pid: The process id.
        peer_id: The daemon's peer id.
        maddrs: The daemon's addresses for peers.
        control_maddr: The argument for ``P2P.replicate``.
    """

    pid: int
    peer_id: Any
    maddrs: list[Any]
    control_maddr: Any


@contextmanager
def serving(setup: Callable[[P2P], Awaitable[None]], *, replicate: Any = None) -> Iterator[Peer]:
    """Runs another process with a ``P2P`` until the end of the block.

    Args:
        setup: Registers the handlers. It runs in the other process.
        replicate: The ``control_maddr`` of the daemon to use; None to start a new daemon.
    """
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(theirs, setup, replicate))
    process.start()
    theirs.close()
    try:
        yield ours.recv()  # EOFError if the process died; its traceback is in our stderr.
    finally:
        with suppress(BrokenPipeError):
            ours.send(None)
        ours.close()
        process.join(15)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(pipe: Connection, setup: Callable[[P2P], Awaitable[None]], replicate: Any) -> None:
    async def main() -> None:
        p2p = await (P2P.create() if replicate is None else P2P.replicate(replicate))
        try:
            await setup(p2p)
            stop = asyncio.Event()
            asyncio.get_running_loop().add_reader(pipe.fileno(), stop.set)
            maddrs = await p2p.get_visible_maddrs()
            pipe.send(Peer(os.getpid(), p2p.peer_id, maddrs, p2p.daemon_listen_maddr))
            await stop.wait()
            asyncio.get_running_loop().remove_reader(pipe.fileno())
        finally:
            await p2p.shutdown()

    asyncio.run(main())


@contextmanager
def dht_swarm(size: int, *, chain: bool = False, **options: Any) -> Iterator[list[DHT]]:
    """Runs DHT nodes, each with its own process and daemon, until the end of the block.

    Args:
        size: The number of nodes.
        chain: Whether each node's initial peer is the node before it instead of the first node.
        options: The options of each ``hivemind.DHT``.
    """
    nodes: list[DHT] = []
    try:
        for _ in range(size):
            known = nodes[-1 if chain else 0].get_visible_maddrs() if nodes else None
            wait = chain or not nodes
            nodes.append(DHT(initial_peers=known, start=True, await_ready=wait, **options))
        for node in nodes:
            node.wait_until_ready()
        yield nodes
    finally:
        for node in nodes:
            node.shutdown()
