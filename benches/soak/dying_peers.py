"""Processes of peers killed at random, one a second, under load, for two minutes: of six that
serve the same handlers in turn, and of two callers.

Each call ends in its reply or in an error that says what happened, and is carried out at most
once. What a dead caller has asked for does not stay at work.
"""

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
#: At full scale; two are as good for a try.
HANDLERS = 6
VICTIMS = 2
CALLERS = 32
STREAMS = 8
PROTOCOL = "/soak/frames"
MOST = 1_000_000
#: hivemind's daemon never answers a call that it gave to a handler which was killed.
PATIENCE = 3.0


async def run(soak: Soak) -> None:
    seconds = soak.scaled(FULL, 4)
    handlers = soak.scaled(HANDLERS, 2)
    numbers = itertools.count()
    choice = random.Random(5)
    over = False
    names = itertools.count(handlers)
    deaths = 0
    ever: list[PeerProcess] = []

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

    async def begin(name: str, daemon: Daemon, expected: int) -> PeerProcess:
        peer = soak.new_peer(name)
        await peer.start(daemon, expected)
        return peer

    async def handler() -> PeerProcess:
        peer = await begin(f"peer{next(names)}", soak.far, MOST)
        await peer.ask("serve", kind="call", proto="soak", balanced=True)
        await peer.ask("serve", kind="echo", proto="victims", balanced=True)
        await peer.ask("serve", kind="frames", proto=PROTOCOL, balanced=True)
        return peer

    async def victim() -> PeerProcess:
        peer = await begin(f"victim{next(names)}", soak.near, 0)
        await peer.ask("load", peer=str(soak.peer_id), proto="victims")
        return peer

    async with soak.ready(peers=handlers, expected=MOST):
        ever += soak.peers
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
                        ever.append(soak.peers[place])
                over = True
        finally:
            for peer in victims:
                peer.end()
        # hivemind's daemon may have kept a stream handler of the dead: what matters is the calls.
        for _ in range(100):
            try:
                await soak.call("soak", next(numbers), timeout=5)
            except ControlFailure as error:
                soak.promise(False, f"a call failed when all was over: {error}")
                break
        with anyio.move_on_after(10):
            while sum(s["unanswered"] for s in await soak.ask_all("state")):
                await anyio.sleep(0.05)
        unanswered = sum(s["unanswered"] for s in await soak.ask_all("state"))
        soak.promise(not unanswered, f"{unanswered} handlers are at work for the dead")
        soak.promise(not soak.client.unary.pending_calls, "calls are still awaited")
        soak.figures["processes killed"] = deaths
        soak.promise_errors(
            "ControlTimeout",
            "TimeoutError",
            "BrokenResourceError",
            "IncompleteRead",
            "DaemonRefused",
        )
        soak.promise_deliveries(ever, all_answered=False)
