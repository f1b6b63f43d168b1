"""Peers on different kinds of daemon: streams in both directions, peer ids, the DHT and pubsub.

``--daemon=go`` pairs upstream Go with hivemind's daemon, ``--daemon=js`` JavaScript with both.
daemons/features.py lists the features that do not work between them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import support
from daemons.features import DAEMONS, State, between
from support import DaemonProcess, check_running, eventually, revive, until

import p2pclient_rs
from p2pclient_rs import Client, DaemonRefused, PeerID, Stream, StreamInfo

pytestmark = pytest.mark.anyio

MIB = 1 << 20


def pairs(*, connect: bool) -> list[tuple[str, str]]:
    """Returns the pairs of the tested kind with itself and the kinds before it, in both orders.

    If ``connect``, returns the pairs that can connect; otherwise those that cannot.
    """
    kinds = list(DAEMONS)
    kind = support.DEFAULT_KIND
    others = kinds[: kinds.index(kind)]
    both = [(kind, kind), *((kind, other) for other in others), *((o, kind) for o in others)]
    return [two for two in both if (between(*two, "connect").state is State.SUPPORTED) == connect]


@pytest.fixture
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": False})


@dataclass
class Ends:
    """Clients of two daemons, ``near`` and ``far``."""

    near: Client
    far: Client
    near_daemon: DaemonProcess
    far_daemon: DaemonProcess

    def both_ways(self) -> tuple[tuple[Client, Client, DaemonProcess], ...]:
        """The caller, the server and the server's daemon, for both directions."""
        return (
            (self.near, self.far, self.far_daemon),
            (self.far, self.near, self.near_daemon),
        )

    def entry(self, feature: str) -> Any:
        """Returns the entry in the feature table for a feature between the two kinds."""
        return between(self.near_daemon.kind, self.far_daemon.kind, feature)


def started(kind: str, peer: str) -> DaemonProcess:
    """Starts a daemon with a muxer that its peer's kind supports."""
    muxer = ["-muxer", "mplex"] if (kind, peer) == ("go", "js") else []
    daemon = DaemonProcess("-dhtServer", "-pubsub", *muxer, kind=kind)
    daemon.keep()
    return daemon


@pytest.fixture(scope="module", params=pairs(connect=True), ids="-".join)
def daemon_pair(request: pytest.FixtureRequest) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    near, far = request.param
    with started(near, far) as first, started(far, near) as second:
        yield first, second


@pytest.fixture
async def ends(daemon_pair: tuple[DaemonProcess, DaemonProcess]) -> AsyncIterator[Ends]:
    first, second = daemon_pair
    revive(first, second)
    async with AsyncExitStack() as stack:
        near = await stack.enter_async_context(first.client())
        far = await stack.enter_async_context(second.client())
        await stack.enter_async_context(near.listen())
        await stack.enter_async_context(far.listen())
        await near.connect(second.peer_id, second.addrs)
        yield Ends(near, far, first, second)
    await check_running(first, second)


def unused() -> str:
    return f"/{os.urandom(4).hex()}"


async def test_peers_see_each_others_peer_ids(ends: Ends) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            callers.append((info.peer_id, info.proto))
            await stream.send(b"hello")

    callers: list[tuple[PeerID, str]] = []
    proto = unused()
    await ends.far.stream_handler(proto, handler)
    await ends.near.stream_handler(proto, handler)
    for asks, daemon in ((ends.near, ends.far_daemon), (ends.far, ends.near_daemon)):
        info, stream = await asks.stream_open(daemon.peer_id, [unused(), proto])
        async with stream:
            assert (info.peer_id, info.proto) == (daemon.peer_id, proto)
            assert await stream.read() == b"hello"
    near, far = ends.near_daemon.peer_id, ends.far_daemon.peer_id
    assert callers == [(near, proto), (far, proto)]


@pytest.mark.parametrize("size", [1, 1 << 16, MIB], ids=["1 byte", "64 KiB", "1 MiB"])
async def test_payloads_in_both_directions_at_once_arrive_intact(ends: Ends, size: int) -> None:
    theirs, ours = os.urandom(size), os.urandom(size)
    received = []

    async def talk(stream: Stream, says: bytes, hears: int) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.send, says)
            received.append(await stream.readexactly(hears))

    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            await talk(stream, theirs, size)
            await stream.read()  # waits until the caller has received everything

    proto = unused()
    for asks, serves, daemon in ends.both_ways():
        received.clear()
        await serves.stream_handler(proto, handler)
        _, stream = await asks.stream_open(daemon.peer_id, [proto])
        async with stream:
            await talk(stream, ours, size)
            await until(lambda: len(received) == 2)
        assert sorted(received) == sorted([ours, theirs])


async def test_peer_receives_everything_and_eof_after_send_eof(ends: Ends) -> None:
    async def handler(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            received.append(await stream.read())

    received: list[bytes] = []
    data = os.urandom(MIB)
    proto = unused()
    for asks, serves, daemon in ends.both_ways():
        received.clear()
        await serves.stream_handler(proto, handler)
        _, stream = await asks.stream_open(daemon.peer_id, [proto])
        async with stream:
            await stream.send(data)
            await stream.send_eof()
            await until(lambda: received)
        assert received == [data]


async def test_provider_is_found_by_another_kind_of_daemon(ends: Ends) -> None:
    async def found() -> None:
        cid = b"\x01\x55\x12\x20" + hashlib.sha256(os.urandom(8)).digest()
        await ends.near.dht_provide(cid)
        peers = [info.peer_id for info in await ends.far.dht_find_providers(cid, 5)]
        assert peers == [ends.near_daemon.peer_id]

    await eventually(found)


async def test_public_key_is_returned_by_another_kind_of_daemon(ends: Ends) -> None:
    entry = ends.entry("dht_public_key")
    if entry.state is State.SUPPORTED:
        key = await ends.near.dht_get_public_key(ends.far_daemon.peer_id)
        assert key.peer_id == ends.far_daemon.peer_id
    else:
        with pytest.raises(getattr(p2pclient_rs, entry.error), match=entry.words or None):
            await ends.near.dht_get_public_key(ends.far_daemon.peer_id)
        await until(lambda: ends.near_daemon.process.poll() is not None)
        ends.near_daemon.restart()
        assert (await ends.near.identify()).peer_id == ends.near_daemon.peer_id


async def test_pubsub_message_reaches_another_kind_of_daemon(ends: Ends) -> None:
    topic = unused()
    async with await ends.far.pubsub_subscribe(topic) as subscription:
        message = None
        while message is None or message.data != b"hello":
            await ends.near.pubsub_publish(topic, b"hello")
            with anyio.move_on_after(0.2):
                message = await subscription.receive_message()
    assert message.peer_id == ends.near_daemon.peer_id
    assert message.topic_ids == (topic,)


@pytest.mark.daemons("js")
@pytest.mark.parametrize(("near", "far"), pairs(connect=False))
async def test_connect_without_a_common_muxer_is_refused_at_once(near: str, far: str) -> None:
    entry = between(near, far, "connect")
    with started(near, far) as here, started(far, near) as there:
        async with here.client() as client:
            with anyio.fail_after(5):
                with pytest.raises(DaemonRefused, match=entry.words):
                    await client.connect(there.peer_id, there.addrs)
            assert (await client.identify()).peer_id == here.peer_id
