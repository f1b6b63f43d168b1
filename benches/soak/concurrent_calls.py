"""Ten thousand calls running at once, in the handlers of three processes; ten rounds."""

from __future__ import annotations

import anyio

from soak.harness import Soak

FULL = 10_000
ROUNDS = 10
#: A client runs 4096 calls before it applies back-pressure.
PEERS = 3


async def run(soak: Soak) -> None:
    calls = soak.scaled(FULL, 300)

    async with soak.ready(peers=PEERS, expected=ROUNDS * calls):
        await soak.serve("held call", "soak", balanced=True)
        for turn in range(ROUNDS):

            async def work(number: int, first: int = turn * calls) -> None:
                await soak.call("soak", first + number)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(soak.workers, calls, work)
                with anyio.move_on_after(60):
                    while sum(s["held"] for s in await soak.ask_all("state")) < calls:
                        await anyio.sleep(0.05)
                held = sum(s["held"] for s in await soak.ask_all("state"))
                pending = soak.client.unary.pending_calls
                soak.figures["calls running at once"] = held
                soak.promise(held == calls, f"{held} calls ran at once, not {calls}")
                soak.promise(pending == calls, f"{pending} calls were pending, not {calls}")
                await soak.ask_all("release")
        soak.promise_deliveries(soak.peers, all_answered=True)
