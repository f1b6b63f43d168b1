"""Many stores and gets from many nodes at once, as in hivemind's own DHT benchmark."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hivemind import DHT
from hivemind.utils import get_dht_time

from hivemind_swarm.processes import dht_swarm

NODES = 10
WORKERS = 8
ROUNDS = 8
#: The number of nodes that store, and of nodes that get, in each round.
AT_ONCE = 5


@dataclass
class Tally:
    """Counts the results of stores and gets, with the duration of each round in seconds."""

    stores: int = 0
    refused: int = 0
    gets: int = 0
    missing: int = 0
    wrong: int = 0
    store_times: list[float] = field(default_factory=list)
    get_times: list[float] = field(default_factory=list)

    async def work(self, nodes: list[DHT], worker: int) -> None:
        """In each round, stores a new key through some nodes, and gets it through others."""
        choice = random.Random(worker)
        for number in range(ROUNDS):
            key = f"worker {worker} round {number}"
            expiration = get_dht_time() + 300
            values = {f"subkey {i}": choice.randbytes(64) for i in range(AT_ONCE)}

            began = time.perf_counter()
            stored = await asyncio.gather(
                *(
                    node.store(key, value, expiration, subkey=subkey, return_future=True)
                    for node, (subkey, value) in zip(
                        choice.sample(nodes, AT_ONCE), values.items(), strict=True
                    )
                )
            )
            self.store_times.append(time.perf_counter() - began)
            self.stores += len(stored)
            self.refused += stored.count(False)

            began = time.perf_counter()
            found = await asyncio.gather(
                *(
                    node.get(key, latest=True, return_future=True)
                    for node in choice.sample(nodes, AT_ONCE)
                )
            )
            self.get_times.append(time.perf_counter() - began)
            self.gets += len(found)
            for result in found:
                got = {} if result is None else {k: v.value for k, v in result.value.items()}
                self.wrong += any(values.get(subkey) != value for subkey, value in got.items())
                self.missing += got.keys() != values.keys()


def test_no_store_or_get_is_lost_under_load(report: Callable[[str], None]) -> None:
    tally = Tally()

    async def load(nodes: list[DHT]) -> None:
        await asyncio.gather(*(tally.work(nodes, worker) for worker in range(WORKERS)))

    with dht_swarm(NODES) as nodes:
        began = time.perf_counter()
        asyncio.run(load(nodes))
        took = time.perf_counter() - began

    report(
        f"load: {tally.stores} stores ({tally.refused} refused) and {tally.gets} gets "
        f"({tally.missing} incomplete, {tally.wrong} wrong) in {took:.2f} s; "
        f"{AT_ONCE} stores {_mean(tally.store_times)}, {AT_ONCE} gets {_mean(tally.get_times)}"
    )
    assert (tally.stores, tally.gets) == (WORKERS * ROUNDS * AT_ONCE,) * 2
    assert (tally.refused, tally.missing, tally.wrong) == (0, 0, 0)


def _mean(times: list[float]) -> str:
    return f"{1000 * sum(times) / len(times):.0f} ms (max {1000 * max(times):.0f})"
