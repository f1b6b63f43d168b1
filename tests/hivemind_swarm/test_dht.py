"""A DHT of eight nodes, each with its own process and daemon."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hivemind import DHT
from hivemind.dht import DHTNode
from hivemind.utils import get_dht_time

from hivemind_swarm.processes import dht_swarm

SIZE = 8


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[DHT]]:
    with dht_swarm(SIZE, chain=True) as nodes:
        yield nodes


def test_each_node_gets_the_values_of_every_node(nodes: list[DHT]) -> None:
    expiration = get_dht_time() + 300
    stores = [
        node.store(f"key {i}", {"from": i}, expiration, return_future=True)
        for i, node in enumerate(nodes)
    ]
    assert [store.result() for store in stores] == [True] * SIZE
    gets = [[node.get(f"key {i}", return_future=True) for i in range(SIZE)] for node in nodes]
    for row in gets:
        assert [get.result() for get in row] == [({"from": i}, expiration) for i in range(SIZE)]


def test_each_node_gets_every_subkey(nodes: list[DHT]) -> None:
    expiration = get_dht_time() + 300
    for i, node in enumerate(nodes):
        assert node.store("members", f"value {i}", expiration + i, subkey=f"node {i}")
    expected = {f"node {i}": (f"value {i}", expiration + i) for i in range(SIZE)}
    for node in nodes:
        value, _ = node.get("members", latest=True)
        assert {name: (v, t) for name, (v, t) in value.items()} == expected


def test_newer_value_replaces_an_older_one_on_every_node(nodes: list[DHT]) -> None:
    now = get_dht_time()
    assert nodes[1].store("changing", "old", now + 100)
    assert nodes[6].store("changing", "new", now + 200)
    assert not nodes[3].store("changing", "older still", now + 50)
    for node in nodes:
        assert node.get("changing", latest=True) == ("new", now + 200)


def large_value() -> bytes:
    return random.Random(0).randbytes(1 << 20)


async def store_large(_: DHT, node: DHTNode) -> object:
    return await node.store("large", large_value(), get_dht_time() + 300)


async def get_large(_: DHT, node: DHTNode) -> bool:
    return bool((await node.get("large")).value == large_value())


def test_value_of_a_megabyte_arrives_intact(nodes: list[DHT]) -> None:
    # The nodes' processes create the value: hivemind's pipe to them may break above 16 KiB.
    assert nodes[0].run_coroutine(store_large) is True
    assert [node.run_coroutine(get_large) for node in nodes] == [True] * SIZE


def test_unknown_key_is_not_found(nodes: list[DHT]) -> None:
    assert [node.get("nobody stored this") for node in nodes] == [None] * SIZE
