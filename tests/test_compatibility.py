"""Every entry of the table of features (daemons/features.py), compared with the daemon's behaviour.

A supported feature must work. A missing one must fail at once with the error of its entry, and the
next call must work, after a restart of the daemon if necessary.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import get_daemon
import pytest
import support
from daemons.features import DOCUMENT, FEATURES, State, render
from support import DaemonProcess, check_running, eventually, revive, unknown_peer, until

import p2pclient_rs
from p2pclient_rs import (
    Client,
    ControlFailure,
    Daemon,
    DaemonRefused,
    IncompleteRead,
    NotSupported,
    PeerID,
    Stream,
    StreamInfo,
)

pytestmark = pytest.mark.anyio

FULL = ("-dhtServer", "-pubsub", "-connManager")

#: The time limit for failing "at once", in seconds; less than the timeout of any daemon.
PROMPT = 10.0

#: The time limit for a supported feature, in seconds. Some features propagate from peer to peer.
PATIENCE = 20.0


class Differs(Exception):
    """The daemon reported no error, but did something other than the request."""


# One event loop is enough, as the client is the same on each; only the daemons differ.
@pytest.fixture
def anyio_backend() -> Any:
    return ("asyncio", {"use_uvloop": False})


@pytest.fixture(scope="module")
def fleet() -> Iterator[tuple[DaemonProcess, ...]]:
    """Runs two daemons with all features enabled, and one with none."""
    with DaemonProcess(*FULL) as near, DaemonProcess(*FULL) as far, DaemonProcess() as bare:
        for daemon in (near, far, bare):
            daemon.keep()
        yield near, far, bare


@dataclass
class Scene:
    """The arguments of a probe: connected daemons and their clients."""

    near: Client
    far: Client
    other: Client  # A second client of the near daemon.
    near_daemon: DaemonProcess
    far_daemon: DaemonProcess
    bare_daemon: DaemonProcess


Probe = Callable[[Scene], Awaitable[None]]
PROBES: dict[str, Probe] = {}


def probe(test: Probe) -> Probe:
    """Registers a probe, which raises nothing if the daemon has the feature of that name."""
    PROBES[test.__name__] = test
    return test


def unused() -> str:
    """Returns a name that no other test has used on the shared daemons."""
    return f"/{os.urandom(4).hex()}"


async def echo(info: StreamInfo, stream: Stream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def answered(client: Client, daemon: DaemonProcess, proto: str) -> bytes:
    """Sends a line to a peer, and returns its reply."""
    _, stream = await client.stream_open(daemon.peer_id, [proto])
    async with stream:
        await stream.send(b"hello\n")
        return await stream.readline()


@probe
async def manager(scene: Scene) -> None:
    binary = get_daemon.fetch(scene.near_daemon.kind)
    async with Daemon(binary) as daemon, daemon.client() as client:
        assert (await client.identify()).peer_id == daemon.peer_id != scene.near_daemon.peer_id


# --- peers ---


@probe
async def connect(scene: Scene) -> None:
    assert (await scene.near.identify()).peer_id == scene.near_daemon.peer_id
    await scene.near.connect(scene.far_daemon.peer_id, scene.far_daemon.addrs)


@probe
async def list_peers(scene: Scene) -> None:
    (info,) = set(info.peer_id for info in await scene.far.list_peers())
    assert info == scene.near_daemon.peer_id


@probe
async def list_peers_always(scene: Scene) -> None:
    with pytest.raises(DaemonRefused):
        await scene.near.connect(unknown_peer(), ["/ip4/127.0.0.1/tcp/1"])
    await scene.near.list_peers()


@probe
async def disconnect(scene: Scene) -> None:
    await scene.near.disconnect(unknown_peer())


# --- streams ---


@probe
async def stream_open(scene: Scene) -> None:
    proto = unused()
    await scene.far.stream_handler(proto, echo)
    assert await answered(scene.near, scene.far_daemon, proto) == b"hello\n"


@probe
async def stream_handler(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, echo)
    assert await answered(scene.far, scene.near_daemon, proto) == b"hello\n"


@probe
async def stream_handler_again(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, echo)
    for _ in range(3):
        if await answered(scene.far, scene.near_daemon, proto) != b"hello\n":
            raise Differs("the stream ended")


@probe
async def many_streams(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, echo)
    begun: list[int] = []
    answers: list[bytes] = []

    async def talk(number: int) -> None:
        try:
            _, stream = await scene.far.stream_open(scene.near_daemon.peer_id, [proto])
            async with stream:
                begun.append(number)
                await until(lambda: len(begun) == 200)
                await stream.send(b"hello\n")
                answers.append(await stream.readexactly(6))
        except (ControlFailure, IncompleteRead, anyio.BrokenResourceError):
            if number not in begun:
                begun.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(talk, number)
    if len(answers) < 200:
        raise Differs("streams were reset")


@probe
async def backpressure(scene: Scene) -> None:
    async def ignore(info: StreamInfo, stream: Stream) -> None:
        await anyio.sleep_forever()

    proto = unused()
    await scene.far.stream_handler(proto, ignore)
    _, stream = await scene.near.stream_open(scene.far_daemon.peer_id, [proto])
    try:
        for _ in range(20):
            with anyio.move_on_after(2) as scope:
                await stream.send(bytes(1 << 20))
            if scope.cancelled_caught:
                return
    finally:
        stream.abort()
    raise Differs("all was taken")


@probe
async def half_close(scene: Scene) -> None:
    async def answer(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            received.append(await stream.read())
            try:
                await stream.send(b"answer")
            except anyio.BrokenResourceError:
                pass

    received: list[bytes] = []
    proto = unused()
    await scene.near.stream_handler(proto, answer)
    _, stream = await scene.far.stream_open(scene.near_daemon.peer_id, [proto])
    async with stream:
        await stream.send(b"question")
        await stream.send_eof()
        got = await stream.read()
    await until(lambda: received)
    assert received == [b"question"]
    if got != b"answer":
        raise Differs("the answer did not come")


def teller(name: bytes) -> Any:
    """Makes a handler that answers each stream with a name."""

    async def tell(info: StreamInfo, stream: Stream) -> None:
        async with stream:
            await stream.readline()
            await stream.send(name + b"\n")

    return tell


@probe
async def handler_taken(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, teller(b"first"))
    try:
        await scene.other.stream_handler(proto, teller(b"second"))
    except DaemonRefused as error:
        assert error.daemon_message == f"handler for protocol {proto} already set"
    if await answered(scene.far, scene.near_daemon, proto) == b"second\n":
        raise Differs("the other serves it now")


@probe
async def balanced(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, teller(b"first"), balanced=True)
    await scene.other.stream_handler(proto, teller(b"second"), balanced=True)
    names = {await answered(scene.far, scene.near_daemon, proto) for _ in range(2)}
    if names != {b"first\n", b"second\n"}:
        raise Differs("one serves alone")


@probe
async def remove_stream_handler(scene: Scene) -> None:
    proto = unused()
    await scene.near.stream_handler(proto, echo)
    await scene.near.remove_stream_handler(proto)


# --- unary calls ---


@probe
async def unary(scene: Scene) -> None:
    async def double(data: bytes, peer_id: Any) -> bytes:
        return data * 2

    proto = unused()
    with pytest.raises(DaemonRefused):  # Every daemon refuses this.
        await scene.near.call_unary(scene.far_daemon.peer_id, proto, b"ab")
    await scene.far.add_unary_handler(proto, double)
    assert await scene.near.call_unary(scene.far_daemon.peer_id, proto, b"ab") == b"abab"


# --- DHT ---


@probe
async def dht_off(scene: Scene) -> None:
    async with scene.bare_daemon.client() as client:
        try:
            await client.dht_get_closest_peers(b"key")
        except NotSupported as error:
            assert error.daemon_message == "DHT not enabled"
        else:
            raise Differs("it has a DHT")


@probe
async def dht_find_peer(scene: Scene) -> None:
    info = await scene.near.dht_find_peer(scene.far_daemon.peer_id)
    assert info.peer_id == scene.far_daemon.peer_id
    assert set(scene.far_daemon.addrs) <= set(info.addrs)


@probe
async def dht_find_peers_connected_to_peer(scene: Scene) -> None:
    await scene.near.dht_find_peers_connected_to_peer(scene.far_daemon.peer_id)


@probe
async def dht_closest_peers(scene: Scene) -> None:
    async def found() -> None:
        assert scene.far_daemon.peer_id in await scene.near.dht_get_closest_peers(b"key")

    await eventually(found)


def new_cid() -> bytes:
    return b"\x01\x55\x12\x20" + hashlib.sha256(os.urandom(8)).digest()


@probe
async def dht_providers(scene: Scene) -> None:
    cid = new_cid()

    async def provided() -> None:
        await scene.near.dht_provide(cid)
        (info,) = await scene.far.dht_find_providers(cid, 5)
        assert info.peer_id == scene.near_daemon.peer_id

    await eventually(provided)


@probe
async def dht_no_providers(scene: Scene) -> None:
    assert await scene.near.dht_find_providers(new_cid(), 5) == ()


@probe
async def dht_values(scene: Scene) -> None:
    # The peer id of an Ed25519 key contains the public key.
    peer_id = unknown_peer()
    name, record = b"/pk/" + peer_id.to_bytes(), peer_id.to_bytes()[2:]
    await eventually(lambda: scene.near.dht_get_closest_peers(b"key"))
    await scene.near.dht_put_value(name, record)
    assert await scene.near.dht_get_value(name) == record


@probe
async def dht_validation(scene: Scene) -> None:
    try:
        await scene.near.dht_put_value(b"/other/key", b"value")
    except DaemonRefused:
        return
    raise Differs("it was taken")


@probe
async def dht_search_value(scene: Scene) -> None:
    assert await scene.near.dht_search_value(b"/pk/" + unknown_peer().to_bytes()) == ()


@probe
async def dht_public_key(scene: Scene) -> None:
    key = await scene.near.dht_get_public_key(scene.far_daemon.peer_id)
    assert key.peer_id == scene.far_daemon.peer_id


@probe
async def dht_no_public_key(scene: Scene) -> None:
    with pytest.raises(DaemonRefused):
        await scene.near.dht_get_public_key(PeerID(b"\x12\x20" + os.urandom(32)), timeout=2)


@probe
async def dht_bad_cid(scene: Scene) -> None:
    with pytest.raises(DaemonRefused, match="invalid cid"):
        await scene.near.dht_provide(b"no cid")


# --- connection manager ---


@probe
async def connmgr(scene: Scene) -> None:
    peer_id = scene.far_daemon.peer_id
    calls: list[Callable[[], Awaitable[None]]] = [
        lambda: scene.near.connmgr_tag_peer(peer_id, "friend", 1),
        lambda: scene.near.connmgr_untag_peer(peer_id, "friend"),
        scene.near.connmgr_trim,
    ]
    errors = []
    for call in calls:
        try:
            await call()
        except NotSupported as error:
            errors.append(error)
    if errors:
        assert len(errors) == len(calls)
        raise errors[0]


# --- pubsub ---


async def heard(subscription: Any, publisher: Client, topic: str) -> Any:
    """Publishes from a client of another daemon, and returns the received message."""
    while True:
        await publisher.pubsub_publish(topic, b"from afar")
        with anyio.move_on_after(0.1):
            message = await subscription.receive_message()
            if message.data == b"from afar":
                return message


@probe
async def pubsub(scene: Scene) -> None:
    topic = unused()
    async with await scene.near.pubsub_subscribe(topic) as subscription:
        assert topic in await scene.near.pubsub_get_topics()
        message = await heard(subscription, scene.far, topic)
    assert (message.data, message.topic_ids) == (b"from afar", (topic,))
    assert message.peer_id == scene.far_daemon.peer_id
    assert message.seqno


@probe
async def pubsub_own(scene: Scene) -> None:
    topic = unused()
    async with await scene.near.pubsub_subscribe(topic) as subscription:
        await scene.near.pubsub_publish(topic, b"from here")
        with anyio.move_on_after(1):
            message = await subscription.receive_message()
            assert (message.data, message.peer_id) == (b"from here", scene.near_daemon.peer_id)
            return
        # There was enough time for it, since this later message arrives.
        await heard(subscription, scene.far, topic)
        raise Differs("nothing came")


@probe
async def pubsub_unsubscribe(scene: Scene) -> None:
    async def unsubscribed() -> None:
        assert topic not in await scene.near.pubsub_get_topics()

    topic = unused()
    await (await scene.near.pubsub_subscribe(topic)).aclose()
    try:
        await eventually(unsubscribed, within=2)
    except AssertionError:
        raise Differs("still subscribed") from None


@probe
async def pubsub_list_peers(scene: Scene) -> None:
    topic = unused()
    assert await scene.near.pubsub_list_peers(topic) == ()


@probe
async def pubsub_off(scene: Scene) -> None:
    async with scene.bare_daemon.client() as client:
        with pytest.raises(NotSupported, match="PubSub not enabled"):
            await client.pubsub_get_topics()


# --- peerstore ---


@probe
async def peerstore_get_protocols(scene: Scene) -> None:
    await scene.near.peerstore_get_protocols(scene.far_daemon.peer_id)

    async def known() -> None:
        # Peers exchange their protocols after they have connected.
        protocols = await scene.near.peerstore_get_protocols(scene.far_daemon.peer_id)
        assert "/ipfs/id/1.0.0" in protocols

    await eventually(known)


@probe
async def peerstore_unknown(scene: Scene) -> None:
    try:
        await scene.near.peerstore_get_protocols(unknown_peer())
    except DaemonRefused as error:
        if isinstance(error, NotSupported):
            raise


@probe
async def peerstore_get_peer_info(scene: Scene) -> None:
    info = await scene.near.peerstore_get_peer_info(scene.far_daemon.peer_id)
    assert set(scene.far_daemon.addrs) <= set(info.addrs)


# --- the table ---


@pytest.mark.parametrize("name", FEATURES)
async def test_daemon_behaves_as_the_table_says(
    name: str, fleet: tuple[DaemonProcess, ...]
) -> None:
    entry = FEATURES[name].of(support.DEFAULT_KIND)
    near, far, bare = fleet
    revive(*fleet)
    outcome: Exception | None = None
    async with (
        near.client() as client,
        near.client() as other,
        far.client() as peer,
        client.listen(),
        other.listen(),
        peer.listen(),
    ):
        await client.connect(far.peer_id, far.addrs)
        try:
            with anyio.fail_after(PATIENCE if entry.state is State.SUPPORTED else PROMPT):
                await PROBES[name](Scene(client, peer, other, near, far, bare))
        except Exception as error:
            outcome = error
        within = 2 if entry.ends else 0.05
        ended = [daemon for daemon in fleet if await has_ended(daemon, within)]
        for daemon in ended:
            daemon.restart()
        assert (await client.identify()).peer_id == near.peer_id
    await check_running(*fleet)
    if entry.state is State.SUPPORTED and outcome is not None:
        raise outcome
    if entry.state is not State.SUPPORTED:
        assert outcome is not None, f"it works now: {entry}"
        expected = Differs if entry.error == "Differs" else getattr(p2pclient_rs, entry.error)
        assert type(outcome) is expected, repr(outcome)
        assert re.search(entry.words, str(outcome))
    if entry.ends is not None:
        assert len(ended) == entry.ends


async def has_ended(daemon: DaemonProcess, within: float) -> bool:
    """Returns whether a daemon has ended, or ends within this many seconds."""
    with anyio.move_on_after(within):
        while daemon.process.poll() is None:
            await anyio.sleep(0.01)
    return daemon.process.poll() is not None


@pytest.mark.independent
def test_every_feature_has_a_probe() -> None:
    assert list(PROBES) == list(FEATURES)


@pytest.mark.independent
def test_document_matches_the_table() -> None:
    assert DOCUMENT.read_text() == render(), "run `make compatibility`"
