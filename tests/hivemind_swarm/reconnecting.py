"""A peer whose only bootstrap peer dies and restarts: reconnecting.py on|off p2p|forked|dht

Prints p2pclient_rs's log, and finally whether the two are connected. The peer makes no calls in the
meantime.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hivemind import DHT
from hivemind.p2p import P2P

from p2pclient_rs import install
from p2pclient_rs.daemon import unused_tcp_port

#: Longer than two intervals between checks of the connections, in seconds.
LONG_ENOUGH = 35.0

RECONNECTS = sys.argv[1] == "on"


async def bootstrap_peer(identity: Path, port: int) -> P2P:
    maddrs = [f"/ip4/127.0.0.1/tcp/{port}"]
    return await P2P.create(identity_path=str(identity), host_maddrs=maddrs)


async def until_peers(p2p: P2P, connected: bool, within: float) -> bool:
    """Waits until a daemon has peers, or has none. Returns whether that happened in time."""
    deadline = time.monotonic() + within
    while bool(await p2p.list_peers()) != connected:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


def peer_in_a_process(maddrs: list[Any]) -> Any:
    def serve() -> None:
        async def main() -> None:
            await P2P.create(initial_peers=maddrs)
            await asyncio.Event().wait()

        asyncio.run(main())

    process = mp.get_context("fork").Process(target=serve, daemon=True)
    process.start()
    return process


async def main(log: Path) -> None:
    folder = log.parent
    port = unused_tcp_port()
    first = await bootstrap_peer(folder / "identity", port)
    maddrs = await first.get_visible_maddrs()
    peer: Any
    match sys.argv[2]:
        case "p2p":
            peer = await P2P.create(initial_peers=maddrs)
        case "forked":
            peer = peer_in_a_process(maddrs)
        case "dht":
            peer = DHT(initial_peers=maddrs, start=True, ensure_bootstrap_success=False)
    assert await until_peers(first, True, within=15)

    os.kill(first._child.pid, signal.SIGKILL)
    await first.shutdown()
    if RECONNECTS:
        while "cannot connect to its bootstrap peers" not in log.read_text():
            await asyncio.sleep(0.1)
    second = await bootstrap_peer(folder / "identity", port)
    assert second.peer_id == first.peer_id
    connected = await until_peers(second, True, within=60 if RECONNECTS else LONG_ENOUGH)
    if RECONNECTS:
        while not any(line in log.read_text() for line in ("is reconnected", "has peers again")):
            await asyncio.sleep(0.1)

    match sys.argv[2]:
        case "p2p":
            await peer.shutdown()
            await asyncio.sleep(0)
            tasks = [repr(task.get_coro()) for task in asyncio.all_tasks()]
            assert not any("_Watchdog" in task for task in tasks), tasks
        case "forked":
            peer.kill()
            peer.join()
        case "dht":
            peer.shutdown()
    await second.shutdown()
    print(log.read_text(), end="")
    print("connected" if connected else "isolated")


if __name__ == "__main__":
    if not any(type(finder).__module__ == "p2pclient_rs.compat.finder" for finder in sys.meta_path):
        install(reconnect=RECONNECTS)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        logger = logging.getLogger("p2pclient_rs.compat.hivemind")
        logger.addHandler(logging.FileHandler(log))
        logger.setLevel(logging.INFO)
        asyncio.run(main(log))
