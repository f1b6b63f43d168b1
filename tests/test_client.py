"""Every request against real daemons: control, the DHT, the connection manager, pubsub."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import multiaddr as py_multiaddr
import pytest
from support import DaemonProcess, eventually, new_directory, unknown_peer, until

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlClient,
    ControlTimeout,
    DaemonConnector,
    DaemonRefused,
    DaemonUnreachable,
    Identity,
    InvalidMultiaddr,
    InvalidPeerID,
    Multiaddr,
    NotSupported,
    PeerID,
    PeerInfo,
    PubsubMessage,
    Stream,
    StreamInfo,
    Subscription,
)

if TYPE_CHECKING:
    from conftest import Pair

pytestmark = pytest.mark.anyio


class HasBytes:
    """A peer id or multiaddr of another library."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def to_bytes(self) -> bytes:
        return self.data


def greeter(name: bytes) -> Callable[[Any, Stream], Awaitable[None]]:
    """Returns a stream handler that sends ``name`` and closes the stream."""

    async def greet(info: Any, stream: Stream) -> None:
        async with stream:
            await stream.send(name)

    return greet


async def greeting(client: Client, peer_id: PeerID, protocol: str) -> bytes:
    """Opens a stream and returns what the greeter sends."""
    _, stream = await client.stream_open(peer_id, [protocol])
    async with stream:
        return await stream.read()


@pytest.fixture(scope="module")
def plain_daemons(transport: str) -> Iterator[tuple[DaemonProcess, DaemonProcess]]:
    """Two daemons that do not connect to peers by themselves, since they have no DHT."""
    with (
        DaemonProcess(transport=transport) as first,
        DaemonProcess(transport=transport) as second,
    ):
        yield first, second


async def disconnect_and_wait(near: Client, far: Client, far_daemon: DaemonProcess) -> None:
    """Disconnects the daemons of two clients, and waits until both list no peers."""

    async def parted() -> None:
        await near.disconnect(far_daemon.peer_id)
        assert await near.list_peers() == await far.list_peers() == ()

    await eventually(parted)


# --- control: identity ---


async def test_identify_returns_the_peer_id_and_addresses_that_the_daemon_printed(
    pair: Pair,
) -> None:
    identity = await pair.alice.identify()
    peer_id, addrs = identity
    assert isinstance(identity, Identity)
    assert peer_id == identity.peer_id == identity.id == pair.alice_daemon.peer_id
    assert addrs == identity.addrs == tuple(pair.alice_daemon.addrs)
    assert isinstance(peer_id, PeerID) and isinstance(addrs[0], Multiaddr)
    assert (await pair.bob.identify(timeout=5)).peer_id == pair.bob_daemon.peer_id != peer_id


@pytest.mark.parametrize(
    ("control", "listen"),
    [
        ("ip6", "/ip6/::1/tcp/0"),
        ("dns4", "/dns4/localhost/tcp/0"),
        ("unix", "/ip4/127.0.0.1/tcp/0"),
    ],
)
async def test_control_and_listen_addresses_of_every_kind_work(control: str, listen: str) -> None:
    with DaemonProcess(transport=control) as one, DaemonProcess() as other:
        kind = listen.split("/")[1].replace("dns4", "ip4")
        async with Client(one.control_maddr, listen) as near, other.client() as far, near.listen():
            assert (await near.identify()).peer_id == one.peer_id
            assert str(near.control.listen_maddr).startswith(f"/{kind}/")
            assert not str(near.control.listen_maddr).endswith("/tcp/0")
            await near.stream_handler("/greet", greeter(b"hello"))
            await far.connect(one.peer_id, one.addrs)
            assert await greeting(far, one.peer_id, "/greet") == b"hello"
        assert str(near.control.listen_maddr) == listen


async def test_addresses_are_accepted_in_every_form(bare_daemon: DaemonProcess) -> None:
    text = bare_daemon.control_maddr
    for form in (text, Multiaddr(text), Multiaddr(text).to_bytes(), py_multiaddr.Multiaddr(text)):
        async with Client(form, form) as client:
            assert (await client.identify()).peer_id == bare_daemon.peer_id
            assert client.control.listen_maddr == Multiaddr(text)


async def test_default_addresses_are_p2pds_and_a_private_socket() -> None:
    client = Client()
    assert str(client.control.daemon_connector.control_maddr) == "/unix/tmp/p2pd.sock"
    assert str(client.control.listen_maddr).endswith("/listen.sock")
    assert str(client.control.listen_maddr) != str(Client().control.listen_maddr)
    assert repr(client) == "<Client /unix/tmp/p2pd.sock>"


async def test_concurrent_queries_get_their_own_replies(pair: Pair) -> None:
    alice, answers = pair.alice, dict[int, Any]()
    identity, topics = await alice.identify(), await alice.pubsub_get_topics()

    async def query(number: int) -> None:
        request = (alice.identify, alice.list_peers, alice.pubsub_get_topics)[number % 3]
        answers[number] = await request()

    async with anyio.create_task_group() as tasks:
        for number in range(300):
            tasks.start_soon(query, number)
    assert [answers[number] for number in range(0, 300, 3)] == [identity] * 100
    for number in range(1, 300, 3):
        assert pair.bob_daemon.peer_id in [info.peer_id for info in answers[number]]
    assert [answers[number] for number in range(2, 300, 3)] == [topics] * 100


# --- control: connections ---


@pytest.mark.needs("disconnect")
async def test_connected_peers_list_each_other(
    plain_daemons: tuple[DaemonProcess, DaemonProcess],
) -> None:
    local, remote = plain_daemons
    async with local.client() as near, remote.client() as far:
        await disconnect_and_wait(near, far, remote)
        await near.connect(remote.peer_id, remote.addrs)
        (info,) = await near.list_peers()
        assert isinstance(info, PeerInfo)
        assert (info.peer_id, info.addrs) == (remote.peer_id, remote.addrs)

        async def listed() -> None:
            assert [info.peer_id for info in await far.list_peers()] == [local.peer_id]

        await eventually(listed)
        await near.connect(remote.peer_id, remote.addrs)  # connecting again is harmless
        assert await near.list_peers() == (info,)


PEER_ID_FORMS: dict[str, Callable[[PeerID], Any]] = {
    "PeerID": lambda peer_id: peer_id,
    "base58": str,
    "CID": PeerID.to_cid,
    "bytes": bytes,
    "bytearray": lambda peer_id: bytearray(bytes(peer_id)),
    "to_bytes": lambda peer_id: HasBytes(bytes(peer_id)),
}


@pytest.mark.needs("disconnect")
@pytest.mark.parametrize("form", PEER_ID_FORMS.values(), ids=PEER_ID_FORMS)
async def test_connect_and_disconnect_accept_peer_ids_and_addresses_in_every_form(
    plain_daemons: tuple[DaemonProcess, DaemonProcess], form: Callable[[PeerID], Any]
) -> None:
    local, remote = plain_daemons
    peer_id = form(remote.peer_id)
    (addr,) = remote.addrs
    async with local.client() as near, remote.client() as far:
        for addrs in (
            [str(addr)],
            (addr,),
            [addr.to_bytes()],
            iter([HasBytes(addr.to_bytes())]),
            [py_multiaddr.Multiaddr(str(addr))],
            ["/ip4/127.0.0.1/tcp/1", str(addr)],
        ):
            await disconnect_and_wait(near, far, remote)
            await near.connect(peer_id, addrs)
            assert [info.peer_id for info in await near.list_peers()] == [remote.peer_id]
            await near.disconnect(peer_id)
            assert await near.list_peers() == ()


async def test_connect_without_addresses_requires_a_connected_peer(pair: Pair) -> None:
    await pair.alice.connect(pair.bob_daemon.peer_id, [])
    with pytest.raises(DaemonRefused):
        await pair.alice.connect(unknown_peer(), [])


async def test_connect_is_refused_if_another_peer_answers(pair: Pair) -> None:
    unknown = unknown_peer()
    with pytest.raises(DaemonRefused) as error:
        await pair.alice.connect(unknown, pair.bob_daemon.addrs)
    refused = error.value
    assert type(refused) is DaemonRefused
    assert (refused.request, refused.peer_id, refused.protocol) == ("CONNECT", unknown, None)
    assert refused.daemon_message is not None
    assert re.search("peer id mismatch|Peer ID doesn't match", refused.daemon_message)
    for part in ("CONNECT", str(unknown), refused.daemon_message):
        assert part in str(refused)


@pytest.mark.parametrize("addr", ["/ip4/127.0.0.1/tcp/1", "/unix/tmp/nowhere", "/ip4/127.0.0.1"])
async def test_connect_to_an_unusable_address_is_refused(pair: Pair, addr: str) -> None:
    with pytest.raises(DaemonRefused) as error:
        await pair.alice.connect(unknown_peer(), [addr])
    assert error.value.request == "CONNECT"
    assert error.value.daemon_message
    assert (await pair.alice.identify()).peer_id == pair.alice_daemon.peer_id


@pytest.mark.needs("disconnect")
async def test_disconnect_from_an_unconnected_peer_succeeds(pair: Pair) -> None:
    before = await pair.alice.list_peers()
    await pair.alice.disconnect(unknown_peer())
    assert set(before) <= set(await pair.alice.list_peers())


@pytest.mark.needs("disconnect")
async def test_peer_id_invalid_to_the_daemon_is_refused(pair: Pair) -> None:
    with pytest.raises(DaemonRefused, match="buffer") as error:
        await pair.alice.disconnect(b"\x01\x02")
    assert error.value.peer_id == PeerID(b"\x01\x02")


# --- control: streams and handlers ---


async def test_stream_open_selects_the_first_protocol_that_the_peer_speaks(pair: Pair) -> None:
    # The daemon prefers protocols that it knows the peer supports, so use new names.
    first, second, third = (f"/{os.urandom(4).hex()}" for _ in range(3))
    for name in (second, third):
        await pair.bob.stream_handler(name, greeter(name.encode()))
    peer_id = pair.bob_daemon.peer_id
    info, stream = await pair.alice.stream_open(peer_id, (first, second, third))
    async with stream:
        assert isinstance(info, StreamInfo)
        addr = str(info.addr).removesuffix(f"/p2p/{peer_id}")  # jsp2pd adds the peer id
        assert (info.peer_id, addr) == (peer_id, str(pair.bob_daemon.addrs[0]))
        assert info.proto == second
        assert stream.info is info
        assert await stream.read() == second.encode()


async def test_handler_receives_peer_and_protocol_of_the_stream(pair: Pair) -> None:
    seen: list[StreamInfo] = []

    async def handler(info: StreamInfo, stream: Stream) -> None:
        seen.append(info)
        await stream.aclose()

    await pair.bob.stream_handler("/who", handler)
    assert await greeting(pair.alice, pair.bob_daemon.peer_id, "/who") == b""
    assert [(info.peer_id, info.proto) for info in seen] == [(pair.alice_daemon.peer_id, "/who")]
    assert str(seen[0].addr).startswith("/ip4/127.0.0.1/tcp/")


async def test_protocol_unknown_to_the_peer_is_refused(pair: Pair) -> None:
    peer_id = pair.bob_daemon.peer_id
    with pytest.raises(DaemonRefused) as error:
        await pair.alice.stream_open(peer_id, ["/nobody", "/speaks"])
    refused = error.value
    assert (refused.request, refused.peer_id) == ("STREAM_OPEN", peer_id)
    assert refused.protocol == "/nobody, /speaks"
    assert refused.daemon_message is not None
    assert re.search("protocols not supported|selection failed", refused.daemon_message)
    with pytest.raises(DaemonRefused, match="no protocols specified|must be specified"):
        await pair.alice.stream_open(peer_id, [])


async def test_stream_to_an_unknown_peer_is_refused(pair: Pair) -> None:
    unknown = unknown_peer()
    with pytest.raises(DaemonRefused, match="protocol /greet") as error:
        await pair.alice.stream_open(unknown, ["/greet"], timeout=10)
    assert (error.value.peer_id, error.value.protocol) == (unknown, "/greet")


async def test_single_protocol_instead_of_a_sequence_raises_type_error(pair: Pair) -> None:
    with pytest.raises(TypeError, match="protocols is a sequence"):
        await pair.alice.stream_open(pair.bob_daemon.peer_id, "/greet")
    with pytest.raises(TypeError):
        await pair.alice.stream_open(pair.bob_daemon.peer_id, [b"/greet"])  # type: ignore[list-item]


async def test_registering_a_protocol_again_replaces_the_handler(pair: Pair) -> None:
    await pair.bob.stream_handler("/again", greeter(b"old"))
    assert await greeting(pair.alice, pair.bob_daemon.peer_id, "/again") == b"old"
    await pair.bob.stream_handler("/again", greeter(b"new"))
    assert await greeting(pair.alice, pair.bob_daemon.peer_id, "/again") == b"new"


@pytest.mark.needs("handler_taken")
async def test_protocol_of_another_client_is_refused(pair: Pair) -> None:
    await pair.bob.stream_handler("/taken", greeter(b"first"))
    async with pair.bob_daemon.client() as other, other.listen():
        with pytest.raises(DaemonRefused) as error:
            await other.stream_handler("/taken", greeter(b"other"))
        assert (error.value.request, error.value.protocol) == ("STREAM_HANDLER", "/taken")
        assert error.value.daemon_message == "handler for protocol /taken already set"
        assert other.control.handlers == {}
    assert await greeting(pair.alice, pair.bob_daemon.peer_id, "/taken") == b"first"


@pytest.mark.needs("balanced")
async def test_balanced_handlers_of_two_clients_are_served_round_robin(pair: Pair) -> None:
    async with pair.bob_daemon.client() as other, other.listen():
        await pair.bob.stream_handler("/shared", greeter(b"one"), balanced=True)
        await other.stream_handler("/shared", greeter(b"two"), balanced=True)
        greetings = [
            await greeting(pair.alice, pair.bob_daemon.peer_id, "/shared") for _ in range(6)
        ]
        assert greetings in ([b"one", b"two"] * 3, [b"two", b"one"] * 3)
        await other.remove_stream_handler("/shared")
        for _ in range(3):
            assert await greeting(pair.alice, pair.bob_daemon.peer_id, "/shared") == b"one"


@pytest.mark.needs("remove_stream_handler")
async def test_removed_handler_is_no_longer_found(pair: Pair) -> None:
    alice, bob, peer_id = pair.alice, pair.bob, pair.bob_daemon.peer_id
    await bob.stream_handler("/passing", greeter(b"here"))
    assert await greeting(alice, peer_id, "/passing") == b"here"
    await bob.remove_stream_handler("/passing")
    assert "/passing" not in bob.control.handlers

    try:
        # Until alice's daemon learns of the removal, it opens the stream without asking.
        assert await greeting(alice, peer_id, "/passing") == b""
    except (DaemonRefused, anyio.BrokenResourceError):
        pass
    with pytest.raises(DaemonRefused, match="does not exist") as error:
        await bob.remove_stream_handler("/passing")
    assert (error.value.request, error.value.protocol) == ("REMOVE_STREAM_HANDLER", "/passing")


@pytest.mark.needs("remove_stream_handler")
async def test_leaving_listen_removes_the_handlers(pair: Pair) -> None:
    async with pair.bob_daemon.client() as client:
        for _ in range(2):  # the second registration fails if the first one remains
            async with client.listen():
                await client.stream_handler("/for-a-while", greeter(b"hello"))
                assert (
                    await greeting(pair.alice, pair.bob_daemon.peer_id, "/for-a-while") == b"hello"
                )
            assert client.control.handlers == {}


# --- the DHT ---


@pytest.mark.needs("dht_values", "dht_public_key")
async def test_public_key_record_put_by_one_peer_is_found_by_another(dht_pair: Pair) -> None:
    alice, bob, peer_id = dht_pair.alice, dht_pair.bob, dht_pair.alice_daemon.peer_id
    key = await bob.dht_get_public_key(peer_id)
    assert key.peer_id == peer_id
    name, record = b"/pk/" + peer_id.to_bytes(), key.serialize()
    await alice.dht_put_value(name, record)
    assert await bob.dht_get_value(name) == record
    assert await alice.dht_get_value(name, timeout=10) == record
    values = await bob.dht_search_value(name)
    assert set(values) == {record}


@pytest.mark.needs("dht_values", "dht_search_value")
async def test_missing_value_is_refused_or_empty(dht_pair: Pair) -> None:
    name = b"/pk/" + unknown_peer().to_bytes()
    with pytest.raises(DaemonRefused) as error:
        await dht_pair.alice.dht_get_value(name)
    assert error.value.request == "DHT GET_VALUE"
    assert error.value.daemon_message == "routing: not found"
    assert await dht_pair.alice.dht_search_value(name) == ()


@pytest.mark.needs("dht_validation")
async def test_only_valid_records_can_be_put(dht_pair: Pair) -> None:
    with pytest.raises(DaemonRefused, match="invalid record keytype") as error:
        await dht_pair.alice.dht_put_value(b"/other/key", b"value")
    assert error.value.request == "DHT PUT_VALUE"
    with pytest.raises(DaemonRefused):
        await dht_pair.alice.dht_put_value(
            b"/pk/" + dht_pair.alice_daemon.peer_id.to_bytes(), b"no public key"
        )


@pytest.mark.needs("dht_no_providers")
async def test_provider_is_found(dht_pair: Pair) -> None:
    cid = b"\x01\x55\x12\x20" + hashlib.sha256(os.urandom(8)).digest()
    assert await dht_pair.bob.dht_find_providers(cid, 5) == ()
    await dht_pair.alice.dht_provide(cid)

    async def found() -> None:
        (info,) = await dht_pair.bob.dht_find_providers(cid, 5, timeout=10)
        assert isinstance(info, PeerInfo)
        assert info.peer_id == dht_pair.alice_daemon.peer_id

    await eventually(found)


@pytest.mark.needs("dht_bad_cid")
async def test_invalid_cid_is_refused(dht_pair: Pair) -> None:
    for name, call in (
        ("DHT PROVIDE", lambda: dht_pair.alice.dht_provide(b"no cid")),
        ("DHT FIND_PROVIDERS", lambda: dht_pair.alice.dht_find_providers(b"no cid", 1)),
    ):
        with pytest.raises(DaemonRefused, match="invalid cid") as error:
            await call()
        assert error.value.request == name


async def test_closest_peers_are_peer_ids(dht_pair: Pair) -> None:
    peers = await dht_pair.alice.dht_get_closest_peers(b"some key")
    assert dht_pair.bob_daemon.peer_id in peers
    assert {type(peer) for peer in peers} == {PeerID}


async def test_find_peer_returns_addresses(dht_pair: Pair) -> None:
    remote = dht_pair.bob_daemon
    info = await dht_pair.alice.dht_find_peer(remote.peer_id)
    assert info == PeerInfo(remote.peer_id, remote.addrs)
    unknown = unknown_peer()
    with pytest.raises(DaemonRefused) as error:
        await dht_pair.alice.dht_find_peer(unknown)
    assert (error.value.request, error.value.peer_id) == ("DHT FIND_PEER", unknown)


@pytest.mark.needs("dht_no_public_key")
async def test_get_public_key_fails_if_the_peer_id_is_a_hash_of_an_unknown_key(
    dht_pair: Pair,
) -> None:
    hashed = PeerID(b"\x12\x20" + os.urandom(32))
    with pytest.raises(DaemonRefused) as error:
        await dht_pair.alice.dht_get_public_key(hashed, timeout=10)
    assert (error.value.request, error.value.peer_id) == ("DHT GET_PUBLIC_KEY", hashed)


async def test_find_peers_connected_to_peer_is_not_supported(
    dht_pair: Pair,
) -> None:
    peer_id = dht_pair.bob_daemon.peer_id
    with pytest.raises(NotSupported) as error:
        await dht_pair.alice.dht_find_peers_connected_to_peer(peer_id)
    assert error.value.daemon_message in ("not supported", "ERR_INVALID_REQUEST_TYPE")
    assert error.value.request == "DHT FIND_PEERS_CONNECTED_TO_PEER"
    assert isinstance(error.value, DaemonRefused)


@pytest.mark.needs("dht_off")
async def test_without_a_dht_every_query_is_not_supported(bare_daemon: DaemonProcess) -> None:
    peer = unknown_peer()
    async with bare_daemon.client() as client:
        for name, call in {
            "FIND_PEER": lambda: client.dht_find_peer(peer),
            "FIND_PEERS_CONNECTED_TO_PEER": lambda: client.dht_find_peers_connected_to_peer(peer),
            "FIND_PROVIDERS": lambda: client.dht_find_providers(b"cid", 1),
            "GET_CLOSEST_PEERS": lambda: client.dht_get_closest_peers(b"key"),
            "GET_PUBLIC_KEY": lambda: client.dht_get_public_key(peer),
            "GET_VALUE": lambda: client.dht_get_value(b"key"),
            "SEARCH_VALUE": lambda: client.dht_search_value(b"key"),
            "PUT_VALUE": lambda: client.dht_put_value(b"key", b"value"),
            "PROVIDE": lambda: client.dht_provide(b"cid"),
        }.items():
            with pytest.raises(NotSupported, match="DHT not enabled") as error:
                await call()  # type: ignore[no-untyped-call]
            assert error.value.request == f"DHT {name}"


# --- the connection manager ---


@pytest.mark.needs("connmgr")
async def test_peers_can_be_tagged_and_untagged(pair: Pair) -> None:
    for peer in (pair.bob_daemon.peer_id, unknown_peer()):
        await pair.alice.connmgr_tag_peer(peer, "friend", 7)
        await pair.alice.connmgr_untag_peer(peer, "friend")
        await pair.alice.connmgr_untag_peer(peer, "friend")
    await pair.alice.connmgr_trim()  # trims nothing below the low-water mark
    assert pair.bob_daemon.peer_id in [info.peer_id for info in await pair.alice.list_peers()]


@pytest.mark.needs("connmgr")
async def test_trim_keeps_the_peer_with_the_highest_weight() -> None:
    options = ("-connManager", "-connLo", "1", "-connHi", "50", "-connGrace", "0s")
    with (
        DaemonProcess(*options) as hub,
        DaemonProcess() as one,
        DaemonProcess() as two,
        DaemonProcess() as three,
    ):
        async with hub.client() as client:
            for spoke in (one, two, three):
                await client.connect(spoke.peer_id, spoke.addrs)
            await client.connmgr_tag_peer(one.peer_id, "friend", 10)
            await client.connmgr_tag_peer(two.peer_id, "friend", 100)
            await client.connmgr_tag_peer(three.peer_id, "friend", 20)
            await client.connmgr_untag_peer(two.peer_id, "friend")
            assert len(await client.list_peers()) == 3
            await client.connmgr_trim()

            async def trimmed() -> None:
                assert [info.peer_id for info in await client.list_peers()] == [three.peer_id]

            await eventually(trimmed)


async def test_tag_that_cannot_be_encoded_is_refused_by_the_client(pair: Pair) -> None:
    with pytest.raises(OverflowError):
        await pair.alice.connmgr_tag_peer(unknown_peer(), "tag", 1 << 63)
    with pytest.raises(TypeError):
        await pair.alice.connmgr_tag_peer(unknown_peer(), b"tag", 1)  # type: ignore[arg-type]


# --- pubsub ---


@pytest.fixture
def topic() -> str:
    """A topic that no other test has used on the shared daemons."""
    return f"topic-{os.urandom(4).hex()}"


async def wait_for_subscribers(client: Client, topic: str) -> tuple[PeerID, ...]:
    async def known() -> tuple[PeerID, ...]:
        peers = await client.pubsub_list_peers(topic)
        assert peers
        return peers

    return await eventually(known)


async def first_message(subscription: Subscription, data: bytes) -> PubsubMessage:
    """Returns the first message with this data."""
    while (message := await subscription.receive_message()).data != data:
        pass
    return message


@pytest.mark.needs("pubsub_own", "pubsub_list_peers")
async def test_messages_reach_the_subscribers_of_both_daemons(pair: Pair, topic: str) -> None:
    async with (
        await pair.alice.pubsub_subscribe(topic) as near,
        await pair.alice.pubsub_subscribe(topic) as also_near,
        await pair.bob.pubsub_subscribe(topic) as far,
    ):
        assert topic in await pair.alice.pubsub_get_topics()
        assert await wait_for_subscribers(pair.alice, topic) == (pair.bob_daemon.peer_id,)
        # A subscribed daemon sends only to its gossip mesh, and the other daemon joins that late.
        heard = False
        while not heard:
            await pair.alice.pubsub_publish(topic, b"anybody there?")
            with anyio.move_on_after(0.1):
                heard = (await far.receive_message()).data == b"anybody there?"
        await pair.alice.pubsub_publish(topic, b"one")
        messages = [await first_message(each, b"one") for each in (near, also_near, far)]
        for message in messages:
            assert isinstance(message, PubsubMessage)
            assert message.peer_id == pair.alice_daemon.peer_id
            assert (message.data, message.topic_ids) == (b"one", (topic,))
            assert len(message.seqno) == 8
            assert message.signature
        assert messages[0] == messages[1] == messages[2]


@pytest.mark.needs("pubsub_list_peers")
async def test_subscription_is_an_async_iterator_of_messages(pair: Pair, topic: str) -> None:
    sent = [b"%d" % number for number in range(20)]
    received = []
    async with await pair.bob.pubsub_subscribe(topic) as subscription:
        await wait_for_subscribers(pair.alice, topic)
        for data in sent:
            await pair.alice.pubsub_publish(topic, data)
        async for message in subscription:
            received.append(message.data)
            if len(received) == len(sent):
                break
    assert sorted(received) == sorted(sent)


@pytest.mark.needs("pubsub_own")
async def test_subscription_can_be_read_as_raw_frames(pair: Pair, topic: str) -> None:
    async with await pair.alice.pubsub_subscribe(topic) as subscription:
        await pair.alice.pubsub_publish(topic, b"framed")
        message = await subscription.receive_frame()
        # PSMessage: from = 1, data = 2, topicIDs = 4
        peer_id = pair.alice_daemon.peer_id.to_bytes()
        assert message.startswith(b"\x0a" + bytes([len(peer_id)]) + peer_id + b"\x12\x06framed")
        assert b"\x22" + bytes([len(topic)]) + topic.encode() in message
        await pair.alice.pubsub_publish(topic, b"raw")
        length = (await subscription.readexactly(2))[
            0
        ]  # a varint of two bytes, since the message has 128 to 255 bytes
        assert length & 0x80
        assert b"\x12\x03raw" in await subscription.receive()


@pytest.mark.needs("pubsub_unsubscribe", "pubsub_list_peers")
async def test_closing_a_subscription_unsubscribes(pair: Pair, topic: str) -> None:
    subscription = await pair.bob.pubsub_subscribe(topic)
    await wait_for_subscribers(pair.alice, topic)
    await subscription.aclose()

    async def unsubscribed() -> None:
        assert topic not in await pair.bob.pubsub_get_topics()
        assert await pair.alice.pubsub_list_peers(topic) == ()

    await eventually(unsubscribed)
    with pytest.raises(anyio.ClosedResourceError):
        await subscription.receive_message()


@pytest.mark.needs("pubsub_own")
async def test_message_of_one_mebibyte_arrives(pair: Pair, topic: str) -> None:
    data = os.urandom(1 << 20)
    async with await pair.alice.pubsub_subscribe(topic) as subscription:
        await pair.alice.pubsub_publish(topic, data)
        assert (await subscription.receive_message()).data == data


@pytest.mark.needs("pubsub_list_peers")
async def test_message_of_one_mebibyte_with_its_envelope_reaches_other_daemons(
    pair: Pair, topic: str
) -> None:
    data = os.urandom((1 << 20) - 1024)  # gossipsub's limit is 1 MiB in all
    async with await pair.bob.pubsub_subscribe(topic) as subscription:
        await wait_for_subscribers(pair.alice, topic)
        await pair.alice.pubsub_publish(topic, data)
        assert (await subscription.receive_message()).data == data


@pytest.mark.needs("pubsub_own")
async def test_empty_messages_and_non_ascii_topics_work(pair: Pair) -> None:
    name = f"Thema – 主题 {os.urandom(4).hex()}"
    async with await pair.alice.pubsub_subscribe(name) as subscription:
        assert name in await pair.alice.pubsub_get_topics()
        await pair.alice.pubsub_publish(name, b"")
        message = await subscription.receive_message()
        assert (message.data, message.topic_ids) == (b"", (name,))


@pytest.mark.needs("pubsub_own")
async def test_cancelled_receive_message_loses_no_message(pair: Pair, topic: str) -> None:
    async with await pair.alice.pubsub_subscribe(topic) as subscription:
        with anyio.move_on_after(0.05) as scope:
            await subscription.receive_message()
        assert scope.cancelled_caught
        await pair.alice.pubsub_publish(topic, b"after")
        assert (await subscription.receive_message()).data == b"after"


@pytest.mark.needs("pubsub_off")
async def test_without_pubsub_every_request_is_not_supported(bare_daemon: DaemonProcess) -> None:
    async with bare_daemon.client() as client:
        for name, call in {
            "GET_TOPICS": client.pubsub_get_topics,
            "LIST_PEERS": lambda: client.pubsub_list_peers("topic"),
            "PUBLISH": lambda: client.pubsub_publish("topic", b"data"),
            "SUBSCRIBE": lambda: client.pubsub_subscribe("topic"),
        }.items():
            with pytest.raises(NotSupported, match="PubSub not enabled") as error:
                await call()  # type: ignore[operator]
            assert error.value.request == f"PUBSUB {name}"


# --- invalid arguments ---


async def test_malformed_peer_ids_are_refused_without_a_request() -> None:
    client = Client(f"/unix{new_directory()}/missing.sock")
    calls: list[Callable[[Any], Awaitable[Any]]] = [
        lambda peer: client.connect(peer, []),
        client.disconnect,
        lambda peer: client.stream_open(peer, ["/greet"]),
        client.dht_find_peer,
        client.dht_find_peers_connected_to_peer,
        client.dht_get_public_key,
        lambda peer: client.connmgr_tag_peer(peer, "tag", 1),
        lambda peer: client.connmgr_untag_peer(peer, "tag"),
        client.peerstore_get_protocols,
        client.peerstore_get_peer_info,
    ]
    for call in calls:
        for wrong in ("", "0OIl", "Qm123", "/ip4/127.0.0.1/tcp/1"):
            with pytest.raises(InvalidPeerID):
                await call(wrong)
        for wrong_type in (None, 5, ["Qm"]):
            with pytest.raises(TypeError):
                await call(wrong_type)


async def test_malformed_addresses_are_refused_without_a_request() -> None:
    client = Client(f"/unix{new_directory()}/missing.sock")
    for wrong in ("", "127.0.0.1:80", "/ip4/1.2.3", "/nonsense/1", b"\xff"):
        with pytest.raises(InvalidMultiaddr):
            await client.connect(unknown_peer(), ["/ip4/127.0.0.1/tcp/1", wrong])
        for addresses in ((wrong, None), (None, wrong)):
            with pytest.raises(InvalidMultiaddr):
                Client(*addresses)
    with pytest.raises(TypeError, match="iterable of multiaddrs"):
        await client.connect(unknown_peer(), "/ip4/127.0.0.1/tcp/1")


@pytest.mark.parametrize(
    "addr", ["/ip4/127.0.0.1", "/ip4/127.0.0.1/udp/5", "/tcp/80", "/ip4/127.0.0.1/tcp/1/ws"]
)
async def test_address_that_is_not_a_socket_is_named_on_use(addr: str) -> None:
    with pytest.raises(InvalidMultiaddr, match=addr):
        await Client(addr).identify()
    with pytest.raises(InvalidMultiaddr, match=addr):
        async with Client(None, addr).listen():
            pass


# --- timeouts ---


class BlackHole:
    """A listener that never sends anything, so that a daemon's CONNECT to it hangs."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._accepted: list[socket.socket] = []
        self.addr = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"

    def connections(self) -> int:
        """Returns the number of accepted connections."""
        with suppress(BlockingIOError):
            while True:
                self._accepted.append(self._listener.accept()[0])
        return len(self._accepted)

    def close(self) -> None:
        while self._accepted:
            self._accepted.pop().close()


@pytest.fixture
def black_hole() -> Iterator[BlackHole]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        hole = BlackHole(listener)
        yield hole
        hole.close()


async def test_call_times_out_and_the_next_one_works(pair: Pair, black_hole: BlackHole) -> None:
    unknown = unknown_peer()
    start = time.monotonic()
    with pytest.raises(ControlTimeout) as error:
        await pair.alice.connect(unknown, [black_hole.addr], timeout=0.3)
    assert 0.29 <= time.monotonic() - start < 1.3  # uvloop's timers round to milliseconds
    assert (error.value.request, error.value.peer_id) == ("CONNECT", unknown)
    assert isinstance(error.value, TimeoutError)
    assert str(error.value) == f"no answer within 0.3 s (request CONNECT, peer {unknown})"
    assert (await pair.alice.identify(timeout=5)).peer_id == pair.alice_daemon.peer_id


async def test_slow_calls_do_not_delay_others(pair: Pair, black_hole: BlackHole) -> None:
    async def hang() -> None:
        with pytest.raises(ControlTimeout):
            await pair.alice.connect(unknown_peer(), [black_hole.addr], timeout=1.0)

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(hang)
        for _ in range(20):
            start = time.monotonic()
            await pair.alice.identify()
            assert time.monotonic() - start < 0.5


async def test_timeout_that_is_not_reached_has_no_effect(pair: Pair) -> None:
    for timeout in (5, 5.5, float("inf")):
        await pair.alice.connect(pair.bob_daemon.peer_id, pair.bob_daemon.addrs, timeout=timeout)


# --- missing, dying and restarted daemons ---


async def test_missing_daemon_raises_daemon_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for addr in (f"/unix{new_directory()}/missing.sock", f"/ip4/127.0.0.1/tcp/{port}"):
        client = Client(addr)
        with pytest.raises(DaemonUnreachable) as error:
            await client.identify(timeout=5)
        assert isinstance(error.value, ConnectionError)
        assert isinstance(error.value.__cause__, OSError)
        assert error.value.__cause__.errno in (errno.ENOENT, errno.ECONNREFUSED)
        assert error.value.request == "IDENTIFY"
        assert addr in str(error.value)
        with pytest.raises(DaemonUnreachable, match="peer Qm"):
            await client.connect("QmS5QmciTXXnCUCyxud5eWFenUMAmvAWSDa1c7dvdXRMZ7", [])
        with pytest.raises(DaemonUnreachable):
            await DaemonConnector(addr).open_connection()


async def test_unknown_host_raises_daemon_unreachable() -> None:
    with pytest.raises(DaemonUnreachable, match="/dns4/nowhere.invalid/tcp/1"):
        await Client("/dns4/nowhere.invalid/tcp/1").identify(timeout=20)


@pytest.mark.parametrize("transport_of_daemon", ["unix", "tcp"])
async def test_killed_daemon_fails_every_pending_call_at_once(
    transport_of_daemon: str, black_hole: BlackHole
) -> None:
    ended = []
    with DaemonProcess("-pubsub", transport=transport_of_daemon) as daemon:
        async with daemon.client() as client:
            subscription = await client.pubsub_subscribe("topic")

            async def call(number: int) -> None:
                with pytest.raises(ConnectionLost) as error:
                    await client.connect(unknown_peer(), [black_hole.addr])
                assert error.value.request == "CONNECT"
                ended.append(number)

            async def listen() -> None:
                with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                    await subscription.receive_message()
                ended.append(-1)

            async with anyio.create_task_group() as tasks:
                for number in range(10):
                    tasks.start_soon(call, number)
                tasks.start_soon(listen)
                await until(lambda: black_hole.connections() == 10)
                daemon.kill()
                start = time.monotonic()
            assert time.monotonic() - start < 1
            assert len(ended) == 11
            await subscription.aclose()
            with pytest.raises(DaemonUnreachable):
                await client.identify()


async def test_daemon_restarted_at_its_address_is_used_transparently(
    transport: str,
) -> None:
    first = DaemonProcess(transport=transport)
    async with first.client() as client:
        for _ in range(3):
            assert (await client.identify()).peer_id == first.peer_id
        first.stop()
        with DaemonProcess(transport=transport, control_maddr=first.control_maddr) as second:
            assert second.peer_id != first.peer_id
            assert (await client.identify()).peer_id == second.peer_id


# --- sub-clients ---


@pytest.mark.needs("connmgr", "list_peers_always")
async def test_sub_clients_share_the_connections_of_the_client(pair: Pair) -> None:
    client = pair.alice
    assert client.control.daemon_connector is client.dht.daemon_connector
    assert client.connmgr.daemon_connector is client.pubsub.daemon_connector
    assert await client.control.identify() == await client.identify()
    assert await client.control.list_peers() == await client.list_peers()
    await client.connmgr.tag_peer(pair.bob_daemon.peer_id, "tag", 1)
    assert await client.pubsub.get_topics() == await client.pubsub_get_topics()
    alone = ControlClient(DaemonConnector(pair.alice_daemon.control_maddr))
    assert await alone.identify() == await client.identify()
    await alone.close()


async def test_client_shows_the_attributes_of_its_sub_clients(pair: Pair) -> None:
    client = pair.alice
    assert str(client.control_maddr) == pair.alice_daemon.control_maddr
    assert client.listen_maddr == client.control.listen_maddr
    assert client.listener_stats == client.control.stats
    assert client.unary_handlers == {}


@pytest.mark.needs("unary")
async def test_register_again_registers_the_handlers_of_streams_and_of_unary_calls() -> None:
    async def echo(request: bytes, caller: PeerID) -> bytes:
        return request

    with DaemonProcess() as daemon, DaemonProcess() as other:
        async with daemon.client() as client, client.listen(), daemon.client() as rival:
            for proto in ("/taken", "/free"):
                await client.stream_handler(proto, greeter(b"first"))
            await client.add_unary_handler("echo", echo)
            assert set(client.unary_handlers) == {"echo"}
            daemon.restart()
            async with rival.listen(), other.client() as caller:
                await rival.stream_handler("/taken", greeter(b"second"))
                with pytest.raises(DaemonRefused) as error:
                    await client.register_again()
                assert error.value.protocol == "/taken"
                await caller.connect(daemon.peer_id, daemon.addrs)
                assert await greeting(caller, daemon.peer_id, "/free") == b"first"
                assert await greeting(caller, daemon.peer_id, "/taken") == b"second"
                assert await caller.call_unary(daemon.peer_id, "echo", b"hello") == b"hello"
