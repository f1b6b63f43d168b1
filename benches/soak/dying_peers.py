"""Peer processes killed at random under load, one per second, for two minutes: of six processes
that share the handlers, and of two callers.

Each call ends in its reply or in an error that names the cause, and is carried out at most once.
Calls of a dead caller do not keep running."""

from __future__ import annotations

import itertools
import random
import time

import anyio

from p2pclient_rs import ControlFailure, Daemon
from soak.harness import FAILURES, STREAM_FAILURES, PeerProcess, Soak

#: Seconds.
FULL = 120
EVERY = 1.0
#: At full scale; two are enough at a small scale.
HANDLERS = 6
VICTIMS = 2
CALLERS = 32
STREAMS = 8
PROTOCOL = "/soak/frames"
MOST = 1_000_000
#: Call timeout. hivemind's daemon never answers a call given to a handler that was then killed.
PATIENCE = 3.0


async def run(soak: Soak) -> None:
    seconds = soak.scaled(FULL, 4)
    handlers = soak.scaled(HANDLERS, 2)
    numbers = itertools.count()
    choice = random.Random(5)
    over = False
    names = itertools.count(handlers)
    deaths = 0
    all_peers: list[PeerProcess] = []

    async def call(_: int) -> None:
        while not over:
            try:
                await soak.call("soak", next(numbers), timeout=PATIENCE)
            except FAILURES as error:
                soak.failed(error)

    async def on_stream(_: int) -> None:
        while not over:
            try:
                with anyio.fail_after(PATIENCE):
                    async with await soak.open_frames(PROTOCOL) as stream:
                        for _ in range(20):
                            await soak.frame(stream, next(numbers))
                        await stream.send_eof()
                        await stream.read()
            except (*STREAM_FAILURES, TimeoutError) as error:
                soak.failed(error)

    async def start_peer(name: str, daemon: Daemon, expected: int) -> PeerProcess:
        peer = soak.new_peer(name)
        await peer.start(daemon, expected)
        return peer

    async def handler() -> PeerProcess:
        peer = await start_peer(f"peer{next(names)}", soak.far, MOST)
        await peer.ask("serve", kind="call", proto="soak", balanced=True)
        await peer.ask("serve", kind="echo", proto="victims", balanced=True)
        await peer.ask("serve", kind="frames", proto=PROTOCOL, balanced=True)
        return peer

    async def victim() -> PeerProcess:
        peer = await start_peer(f"victim{next(names)}", soak.near, 0)
        await peer.ask("load", peer=str(soak.peer_id), proto="victims")
        return peer

    async with soak.ready(peers=handlers, expected=MOST):
        all_peers += soak.peers
        await soak.serve("call", "soak", balanced=True)
        await soak.serve("echo", "victims", balanced=True)
        await soak.serve("frames", PROTOCOL, balanced=True)
        victims = [await victim() for _ in range(VICTIMS)]
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(soak.workers, CALLERS, call)
                tasks.start_soon(soak.workers, STREAMS, on_stream)
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    await anyio.sleep(EVERY)
                    deaths += 1
                    if choice.random() < 0.3:
                        place = choice.randrange(VICTIMS)
                        victims[place].end()
                        victims[place] = await victim()
                    else:
                        place = choice.randrange(handlers)
                        soak.peers[place].end()
                        soak.peers[place] = await handler()
                        all_peers.append(soak.peers[place])
                over = True
        finally:
            for peer in victims:
                peer.end()
        # The daemon may have kept a stream handler of a dead peer, so check calls only.
        for _ in range(100):
            try:
                await soak.call("soak", next(numbers), timeout=5)
            except ControlFailure as error:
                soak.promise(False, f"a call failed afterwards: {error}")
                break
        with anyio.move_on_after(10):
            while sum(s["unanswered"] for s in await soak.ask_all("state")):
                await anyio.sleep(0.05)
        unanswered = sum(s["unanswered"] for s in await soak.ask_all("state"))
        soak.promise(not unanswered, f"{unanswered} handlers still run for dead callers")
        soak.promise(not soak.client.unary.pending_calls, "calls are still pending")
        soak.figures["processes killed"] = deaths
        soak.promise_errors(
            "ControlTimeout",
            "TimeoutError",
            "BrokenResourceError",
            "IncompleteRead",
            "DaemonRefused",
        )
        soak.promise_deliveries(all_peers, all_answered=False)
