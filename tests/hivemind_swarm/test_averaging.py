"""A group of DecentralizedAveragers, each with its own process and daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from hivemind import DHT, DecentralizedAverager

from hivemind_swarm.processes import dht_swarm, may_be_cut_short

SIZE = 4


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[DHT]]:
    with dht_swarm(SIZE) as nodes:
        yield nodes


def test_group_averages_its_tensors(nodes: list[DHT]) -> None:
    # Each peer reduces several parts of the larger tensor, but the smaller is less than one part.
    tensors = [[torch.randn(1_000_000), torch.randn(3, 41)] for _ in range(SIZE)]
    expected = [torch.stack(same).mean(dim=0) for same in zip(*tensors, strict=True)]
    with ExitStack() as stack:
        averagers = [
            DecentralizedAverager(
                own,
                dht=node,
                prefix="averaged",
                target_group_size=SIZE,
                min_matchmaking_time=15,  # A full group begins earlier.
                start=True,
            )
            for own, node in zip(tensors, nodes, strict=True)
        ]
        for averager in averagers:
            stack.callback(averager.shutdown)
        steps = [
            averager.step(gather={"number": i}, timeout=60, wait=False)
            for i, averager in enumerate(averagers)
        ]
        gathered = {node.peer_id: {"number": i} for i, node in enumerate(nodes)}
        for step in steps:
            assert step.result() == gathered
        for averager in averagers:
            with averager.get_tensors() as averaged:
                for ours, mean in zip(averaged, expected, strict=True):
                    assert torch.allclose(ours, mean, atol=1e-6)


@may_be_cut_short
def test_new_peer_loads_the_state_of_another(nodes: list[DHT]) -> None:
    state = [torch.randn(5_000_000), torch.arange(10.0)]
    with ExitStack() as stack:
        averagers = [
            DecentralizedAverager(
                tensors, dht=node, prefix="state", target_group_size=2, start=True
            )
            for tensors, node in [(state, nodes[0]), ([torch.zeros(1)], nodes[1])]
        ]
        for averager in averagers:
            stack.callback(averager.shutdown)
        averagers[1].allow_state_sharing = False
        _, loaded = averagers[1].load_state_from_peers(timeout=60)
        for ours, theirs in zip(loaded, state, strict=True):
            assert torch.equal(ours, theirs)
