"""The daemons stopped in turn (SIGSTOP) under load, for two of every four seconds, for two minutes.

Half of the callers use a timeout of half that time: their calls may time out, and fail in no other
way. The other callers wait, as do the streams, and get all replies.
"""

from __future__ import annotations

import itertools
import time

import anyio

from soak.harness import FAILURES, Soak, freeze

#: Seconds.
FULL = 120
FROZEN = 2.0
PATIENT = 32
IMPATIENT = 32
STREAMS = 8
PROTOCOL = "/soak/frames"
#: Upper bound of the number of operations.
MOST = 2_000_000


async def run(soak: Soak) -> None:
    seconds = soak.scaled(FULL, 4)
    frozen = min(FROZEN, seconds / 4)
    numbers = itertools.count()
    timed_out = lost = 0
    over = False

    async def patient(_: int) -> None:
        nonlocal lost
        while not over:
            lost += 1
            await soak.call("soak", next(numbers))
            lost -= 1

    async def impatient(_: int) -> None:
        nonlocal timed_out
        while not over:
            try:
                await soak.call("soak", next(numbers), timeout=frozen / 2)
            except FAILURES as error:
                soak.failed(error)
                timed_out += 1

    async def on_stream(_: int) -> None:
        async with await soak.open_frames(PROTOCOL) as stream:
            while not over:
                await soak.frame(stream, next(numbers))
                await anyio.sleep(0.01)
            await stream.send_eof()
            await stream.read()

    async with soak.ready(expected=MOST):
        await soak.serve("call", "soak")
        await soak.serve("frames", PROTOCOL)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(soak.workers, PATIENT, patient)
            tasks.start_soon(soak.workers, IMPATIENT, impatient)
            tasks.start_soon(soak.workers, STREAMS, on_stream)
            began = time.monotonic()
            for daemon in itertools.cycle((soak.near, soak.far)):
                await anyio.sleep(frozen)
                if time.monotonic() - began > seconds:
                    break
                await freeze(daemon, frozen)
            over = True
        # Handlers of calls that timed out end, too.
        with anyio.move_on_after(10):
            while sum(s["unanswered"] for s in await soak.ask_all("state")):
                await anyio.sleep(0.05)
        [state] = await soak.ask_all("state")
        soak.promise(not state["unanswered"], f"{state['unanswered']} handlers are still running")
        soak.promise(not soak.client.unary.pending_calls, "calls are still pending")
        soak.report.lost += lost
        soak.promise(not lost, f"{lost} calls without a timeout never returned")
        soak.promise(bool(timed_out), "no call timed out, though some should have")
        soak.promise_errors("ControlTimeout")
        soak.promise_deliveries(soak.peers, all_answered=False)
