"""A million unary calls, 64 in flight, with payloads of 0 bytes to 64 KiB."""

from __future__ import annotations

from soak.harness import Soak

FULL = 1_000_000
IN_FLIGHT = 64
#: One in this many calls has no payload, and so no number.
EMPTY = 50


async def run(soak: Soak) -> None:
    empty = soak.scaled(FULL / EMPTY, 20)
    numbers = iter(range(empty * (EMPTY - 1)))

    async def work(_: int) -> None:
        for number in numbers:
            await soak.call("soak", number)
            if number % (EMPTY - 1) == 0:
                soak.check_empty(await soak.client.call_unary(soak.peer_id, "soak", b""))

    async with soak.ready(expected=empty * (EMPTY - 1)):
        await soak.serve("call", "soak")
        await soak.workers(IN_FLIGHT, work)
        [state] = await soak.ask_all("state")
        arrived = state["counts"]["empty"]
        soak.promise(arrived == empty, f"{arrived} empty calls arrived, not {empty}")
        soak.promise_deliveries(soak.peers, all_answered=True)
