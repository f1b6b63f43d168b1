"""A daemon restarted every three seconds under load, as the same peer, for three minutes.
Alternates between both daemons, and between SIGKILL and SIGTERM.

Each call ends in its reply or in an error that names the cause, and is carried out at most once.
Calls are answered again soon after each restart."""

from __future__ import annotations

import itertools
import os
import signal
import time

import anyio

from p2pclient_rs import ControlFailure, Daemon
from soak.harness import FAILURES, STREAM_FAILURES, Soak

#: Seconds.
FULL = 180
EVERY = 3.0
CALLERS = 32
STREAMS = 8
PROTOCOL = "/soak/frames"
MOST = 1_000_000
#: Time limit for a reply after a restart, in seconds.
BACK = 15.0
#: Call timeout. A killed daemon can leave a call unanswered at the other daemon.
PATIENCE = 10.0


async def run(soak: Soak) -> None:
    seconds = soak.scaled(FULL, 5)
    numbers = itertools.count()
    over = False
    restarts = 0
    longest = 0.0

    async def call(_: int) -> None:
        while not over:
            try:
                await soak.call("soak", next(numbers), timeout=PATIENCE)
            except FAILURES as error:
                soak.failed(error)
                await anyio.sleep(0.05)

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
                await anyio.sleep(0.05)

    async def restart(daemon: Daemon, number: signal.Signals) -> None:
        nonlocal longest, restarts
        assert daemon.pid is not None
        os.kill(daemon.pid, number)
        await daemon.stop()
        await daemon.start()
        restarts += 1
        began = time.monotonic()
        while True:
            try:
                await soak.connect()
                await soak.call("soak", next(numbers), timeout=1)
                break
            except FAILURES as error:
                if time.monotonic() - began > BACK:
                    soak.promise(False, f"no call was answered {BACK:g} s after a restart: {error}")
                    return
                await anyio.sleep(0.02)
        longest = max(longest, time.monotonic() - began)

    async with soak.ready(expected=MOST):
        await soak.serve("call", "soak")
        await soak.serve("frames", PROTOCOL)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(soak.workers, CALLERS, call)
            tasks.start_soon(soak.workers, STREAMS, on_stream)
            began = time.monotonic()
            ways = itertools.cycle(
                (daemon, how)
                for how in (signal.SIGKILL, signal.SIGTERM)
                for daemon in (soak.near, soak.far)
            )
            for daemon, how in ways:
                await anyio.sleep(min(EVERY, seconds / 4))
                if time.monotonic() - began > seconds:
                    break
                await restart(daemon, how)
            over = True
        # Without further restarts everything works as before.
        for _ in range(100):
            try:
                await soak.call("soak", next(numbers), timeout=5)
            except ControlFailure as error:
                soak.promise(False, f"a call failed afterwards: {error}")
                break
        try:
            async with await soak.open_frames(PROTOCOL) as stream:
                await soak.frame(stream, next(numbers))
        except STREAM_FAILURES as error:
            soak.promise(False, f"a stream failed afterwards: {error}")
        soak.figures.update({"restarts": restarts, "longest until a reply, s": longest})
        soak.promise(restarts >= 2, f"only {restarts} restarts")
        soak.promise(not soak.client.unary.pending_calls, "calls are still pending")
        soak.promise_errors(
            "ConnectionLost",
            "DaemonUnreachable",
            "ControlTimeout",
            "TimeoutError",
            "BrokenResourceError",
            "IncompleteRead",
            "DaemonRefused",
        )
        soak.promise_deliveries(soak.peers, all_answered=False)
