"""A user's program that mypy checks with ``--strict``, and pyright with its defaults. Never runs.

Each grouped method and its flat twin return the same type, and no value is ``Any``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pclient_rs import (
    Client,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    Daemon,
    DaemonStartError,
    Identity,
    Multiaddr,
    OpenedStream,
    P2PHandlerError,
    PeerID,
    PeerInfo,
    PublicKey,
    PubsubMessage,
    Results,
    Stream,
    StreamInfo,
    Subscription,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type


async def peers(client: Client, peer: PeerID) -> None:
    assert_type(await client.identify(), Identity)
    assert_type(await client.control.identify(timeout=1), Identity)
    peer_id, addrs = await client.identify()
    assert_type(peer_id, PeerID)
    assert_type(addrs, tuple[Multiaddr, ...])
    await client.connect(peer, addrs)
    await client.connect(str(peer), ["/ip4/127.0.0.1/tcp/4001"])
    await client.connect(peer.to_bytes(), (addr.to_bytes() for addr in addrs))
    assert_type(await client.list_peers(), tuple[PeerInfo, ...])
    assert_type(await client.control.list_peers(), tuple[PeerInfo, ...])


async def streams(client: Client, peer: PeerID) -> None:
    opened = await client.stream_open(peer, ["/echo/1"])
    assert_type(opened, OpenedStream[StreamInfo])
    assert_type(await client.control.stream_open(peer, ["/echo/1"]), OpenedStream[StreamInfo])
    info, stream = opened
    assert_type(info, StreamInfo)
    assert_type(stream, Stream)
    assert_type(opened.info, StreamInfo)
    assert_type(stream.info, StreamInfo)
    assert_type(await opened.receive(), bytes)
    async for chunk in stream:
        assert_type(chunk, bytes)

    async def with_info(info: StreamInfo, stream: Stream) -> None:
        await stream.send(info.proto.encode())

    async def with_stream(stream: Stream) -> None:
        await stream.send(stream.info.proto.encode())

    await client.stream_handler("/echo/1", with_info)
    await client.control.stream_handler("/echo/1", with_stream, balanced=True, linger=None)
    async with client.listen() as listening:
        assert_type(listening, Client)
    assert_type(await client.listen(), Client)
    client.control.listen_maddr = "/unix/tmp/listen.sock"
    assert_type(client.control.listen_maddr, Multiaddr)
    client.control.daemon_connector.control_maddr = Multiaddr("/unix/tmp/p2pd.sock")
    assert_type(client.control.daemon_connector.control_maddr, Multiaddr)
    assert_type(client.control.stats.accepted, int)


async def dht(client: Client, peer: PeerID) -> None:
    assert_type(await client.dht.find_peer(peer), PeerInfo)
    assert_type(await client.dht_find_peer(peer), PeerInfo)
    assert_type(client.dht.find_providers(b"", 1), Results[PeerInfo])
    assert_type(client.dht_find_providers(b"", 1), Results[PeerInfo])
    async for provider in client.dht.find_providers(b"", 1):
        assert_type(provider, PeerInfo)
    async with client.dht_get_closest_peers(b"") as closest:
        async for found in closest:
            assert_type(found, PeerID)
    assert_type(await client.dht.find_peers_connected_to_peer(peer), tuple[PeerInfo, ...])
    assert_type(await client.dht_find_peers_connected_to_peer(peer), tuple[PeerInfo, ...])
    assert_type(await client.dht.find_providers(b"", 1), tuple[PeerInfo, ...])
    assert_type(await client.dht_find_providers(b"", 1), tuple[PeerInfo, ...])
    assert_type(await client.dht.get_closest_peers(b""), tuple[PeerID, ...])
    assert_type(await client.dht_get_closest_peers(b""), tuple[PeerID, ...])
    assert_type(await client.dht.get_public_key(peer), PublicKey)
    assert_type(await client.dht_get_public_key(peer), PublicKey)
    assert_type(await client.dht.get_value(b""), bytes)
    assert_type(await client.dht_get_value(b""), bytes)
    assert_type(await client.dht.search_value(b""), tuple[bytes, ...])
    assert_type(await client.dht_search_value(b""), tuple[bytes, ...])
    await client.dht.put_value(b"", b"")
    await client.dht_put_value(b"", b"")
    await client.dht.provide(b"")
    await client.dht_provide(b"")


async def others(client: Client, peer: PeerID) -> None:
    assert_type(await client.connmgr.tag_peer(peer, "tag", 1), None)
    assert_type(await client.connmgr_tag_peer(peer, "tag", 1), None)
    assert_type(await client.peerstore.get_protocols(peer), tuple[str, ...])
    assert_type(await client.peerstore_get_protocols(peer), tuple[str, ...])
    assert_type(await client.peerstore.get_peer_info(peer), PeerInfo)
    assert_type(await client.peerstore_get_peer_info(peer), PeerInfo)
    assert_type(await client.pubsub.get_topics(), tuple[str, ...])
    assert_type(await client.pubsub_get_topics(), tuple[str, ...])
    assert_type(await client.pubsub.list_peers("news"), tuple[PeerID, ...])
    assert_type(await client.pubsub_list_peers("news"), tuple[PeerID, ...])
    assert_type(await client.pubsub.subscribe("news"), Subscription)
    assert_type(await client.pubsub_subscribe("news"), Subscription)
    async for message in await client.pubsub_subscribe("news"):
        assert_type(message, PubsubMessage)
        assert_type(message.peer_id, PeerID | None)


async def unary(client: Client, peer: PeerID) -> None:
    async def double(request: bytes, caller: PeerID) -> bytes:
        return 2 * request

    await client.unary.add_handler("double", double)
    await client.add_unary_handler("double", double, balanced=True)
    assert_type(await client.unary.call(peer, "double", b"2", timeout=1), bytes)
    assert_type(await client.call_unary(peer, "double", bytearray(b"2")), bytes)


async def errors(client: Client) -> None:
    try:
        await client.identify()
    except ConnectionLost as error:
        assert_type(error.errno, int | None)
        assert_type(error.unexecuted, bool)
    except ControlTimeout:
        pass
    except ControlFailure as error:
        assert_type(error.request, str | None)
        assert_type(error.peer_id, PeerID | None)
        assert_type(error.daemon_message, str | None)
    except P2PHandlerError as error:
        assert_type(error.protocol, str | None)


async def daemon() -> None:
    try:
        async with Daemon(dht="server", pubsub=True) as running, running.client() as client:
            assert_type(running.peer_id, PeerID)
            assert_type(client, Client)
    except DaemonStartError as error:
        assert_type(error.command, list[str])
