"""Processes of the swarms: peers started and stopped, and what is left of them."""

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

#: Helpers that torch and multiprocessing start once and keep for as long as the process lives.
KEPT = ("torch_shm_manager", "multiprocessing.resource_tracker")

#: For tests of streams that a handler closes right after it wrote: with any bindings, p2pd cuts the
#: end of one in some hundred or two that are long (docs/defects.md). What is wrong otherwise is not
#: repeated.
may_be_cut_short = pytest.mark.flaky(reruns=2, rerun_except=["AssertionError"])

_fork = mp.get_context("fork")


def until(condition: Callable[[], object], within: float = 15.0) -> None:
    """Waits until ``condition()`` is true, for at most so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not true after {within} s")
        time.sleep(0.02)


def living_descendants() -> dict[int, str]:
    """The command line of every living process that this one started, or that those started."""
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
            if not any(name in command for name in KEPT):
                commands[pid] = command
    return commands


def kill(pid: int) -> None:
    """Ends a process at once, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Peer:
    """A ``P2P`` that another process serves with.

    Attributes:
        pid: Of the process.
        peer_id: Of the daemon.
        maddrs: Where the daemon can be reached.
        control_maddr: What ``P2P.replicate`` takes.
    """

    pid: int
    peer_id: Any
    maddrs: list[Any]
    control_maddr: Any


@contextmanager
def serving(setup: Callable[[P2P], Awaitable[None]], *, replicate: Any = None) -> Iterator[Peer]:
    """Another process that serves until the end of the block.

    Args:
        setup: Registers the handlers. It runs in that process.
        replicate: The ``control_maddr`` of the daemon to serve on; None for one of its own.
    """
    ours, theirs = _fork.Pipe()
    process = _fork.Process(target=_serve, args=(theirs, setup, replicate))
    process.start()
    theirs.close()
    try:
        yield ours.recv()  # raises EOFError if it died; its traceback is in our stderr
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
    """DHT nodes, each with a process and a daemon of its own, shut down at the end of the block.

    Args:
        size: How many.
        chain: Whether each knows only the one before it at first, and not the first one.
        options: Of each ``hivemind.DHT``.
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
