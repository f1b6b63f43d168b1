"""The client: all requests to a daemon, in one object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from p2pclient_rs._native import Identity, Multiaddr, PeerID, PeerInfo, PublicKey, StreamInfo
from p2pclient_rs.connector import DaemonConnector, MultiaddrLike, PeerIDLike
from p2pclient_rs.connmgr import ConnectionManagerClient
from p2pclient_rs.control import ControlClient, StreamHandler
from p2pclient_rs.dht import DHTClient
from p2pclient_rs.exceptions import DaemonRefused
from p2pclient_rs.handlers import DEFAULT_LINGER
from p2pclient_rs.listening import ListenerStats, Listening
from p2pclient_rs.opened_stream import OpenedStream
from p2pclient_rs.peerstore import PeerstoreClient
from p2pclient_rs.pubsub import PubSubClient
from p2pclient_rs.results import Results
from p2pclient_rs.subscription import Subscription
from p2pclient_rs.unary import (
    DEFAULT_HOLD,
    DEFAULT_MAX_UNANSWERED,
    DEFAULT_MAX_UNANSWERED_BYTES,
    UnaryClient,
    UnaryHandler,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["Client"]


class Client:
    """A client of one libp2p daemon, for asyncio, uvloop and trio.

    Requests are grouped by family (``client.dht.find_peer``), and each is also a method of the
    client itself (``client.dht_find_peer``). The client opens control connections when it needs
    them and reuses them. Peer ids and addresses may be given as text.

    Every ``timeout`` is in seconds and bounds the whole call. Without one, the daemon's own limit
    applies: 60 s for requests that ask other peers, none for others. A request that fails raises a
    subclass of ``ControlFailure``; see ``p2pclient_rs.exceptions``.

    Args:
        control_maddr: The address of the daemon's control socket: ``/unix/PATH`` or
            ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``. The default is ``/unix/tmp/p2pd.sock``.
        listen_maddr: The address, of the same form, at which the client listens for inbound
            streams. The default is a unix socket in a new directory that only this user can read.
            A daemon that runs as another user or on another machine needs an address that it can
            reach.
        persistent_conn_max_msg_size: The largest message of a unary call, in bytes. It must not
            exceed the limit that the daemon was started with. None means the daemon's limit if the
            client can determine it, and 4 MiB otherwise.
        max_unanswered, max_unanswered_bytes, hold: The limits for peers' unary calls in progress,
            and how long, in seconds, peers wait before calls over the limit are refused; see
            ``UnaryClient``.

    Attributes:
        control: Peers, connections and streams.
        dht: The DHT.
        connmgr: The connection manager.
        peerstore: The peerstore, which only the JavaScript daemon has.
        pubsub: Topics: publishing and subscribing.
        unary: Unary calls, which only hivemind's daemon supports.

    Raises:
        InvalidMultiaddr: An address is not a multiaddr (a ValueError).

    A client belongs to the process that created it. Using it in a forked child raises
    ``ForkedClientError``.

    Example:
        async with Client(control_maddr) as client:
            peer_id, addrs = await client.identify()
            print(f"daemon {peer_id} listens on {addrs}")
    """

    control: ControlClient
    dht: DHTClient
    connmgr: ConnectionManagerClient
    peerstore: PeerstoreClient
    pubsub: PubSubClient
    unary: UnaryClient

    def __init__(
        self,
        control_maddr: MultiaddrLike | None = None,
        listen_maddr: MultiaddrLike | None = None,
        *,
        persistent_conn_max_msg_size: int | None = None,
        max_unanswered: int | None = DEFAULT_MAX_UNANSWERED,
        max_unanswered_bytes: int | None = DEFAULT_MAX_UNANSWERED_BYTES,
        hold: float | None = DEFAULT_HOLD,
    ) -> None:
        connector = DaemonConnector(control_maddr)
        self.control = ControlClient(connector, listen_maddr)
        self.dht = DHTClient(connector)
        self.connmgr = ConnectionManagerClient(connector)
        self.peerstore = PeerstoreClient(connector)
        self.pubsub = PubSubClient(connector)
        self.unary = UnaryClient(
            connector,
            max_message_size=persistent_conn_max_msg_size,
            max_unanswered=max_unanswered,
            max_unanswered_bytes=max_unanswered_bytes,
            hold=hold,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.control.daemon_connector.control_maddr}>"

    @property
    def control_maddr(self) -> Multiaddr:
        """The address of the daemon's control socket."""
        return self.control.daemon_connector.control_maddr

    @property
    def listen_maddr(self) -> Multiaddr:
        """The address at which the client listens for inbound streams, or will listen."""
        return self.control.listen_maddr

    @property
    def listener_stats(self) -> ListenerStats:
        """The numbers of accepted and refused inbound streams since the client was created."""
        return self.control.stats

    @property
    def unary_handlers(self) -> Mapping[str, UnaryHandler]:
        """The unary handlers by name, as a read-only copy."""
        return self.unary.handlers

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def listen(self) -> Listening[Self]:
        """Accepts inbound streams and calls their handlers. See ``ControlClient.listen``.

        ``async with client.listen():`` listens until the block ends, ``await client.listen()``
        until ``close()``. Both return the client.

        Raises:
            ControlFailure: The client is already listening.
            OSError: The address cannot be listened on.

        Example:
            async with client.listen():
                await client.stream_handler("/echo/1", echo)
        """
        return Listening(self._listen_within, self._listen_from_now_on)

    @asynccontextmanager
    async def _listen_within(self) -> AsyncIterator[Self]:
        async with self.control.listen():
            yield self

    async def _listen_from_now_on(self) -> Self:
        await self.control.listen()
        return self

    async def close(self) -> None:
        """Stops listening, cancels running handlers, and closes idle connections.

        Streams and subscriptions stay open. Later requests open connections again.
        """
        self.unary.close()
        await self.control.close()

    # --- control ---

    async def identify(self, *, timeout: float | None = None) -> Identity:
        """Returns the daemon's peer id and addresses; unpacks as ``(peer_id, addrs)``."""
        return await self.control.identify(timeout=timeout)

    async def connect(
        self,
        peer_id: PeerIDLike,
        maddrs: Iterable[MultiaddrLike],
        *,
        timeout: float | None = None,
    ) -> None:
        """Connects to a peer. See ``ControlClient.connect``.

        Args:
            peer_id: The peer.
            maddrs: Its addresses. One that works is enough.
            timeout: In seconds.

        Raises:
            DaemonRefused: The peer cannot be reached, or another peer answers there.

        Example:
            await client.connect(peer_id, ["/ip4/127.0.0.1/tcp/4001"], timeout=10)
        """
        await self.control.connect(peer_id, maddrs, timeout=timeout)

    async def disconnect(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> None:
        """Closes all connections to a peer. Does nothing if there are none."""
        await self.control.disconnect(peer_id, timeout=timeout)

    async def list_peers(self, *, timeout: float | None = None) -> tuple[PeerInfo, ...]:
        """Returns the connected peers, one entry for each connection."""
        return await self.control.list_peers(timeout=timeout)

    async def stream_open(
        self, peer_id: PeerIDLike, protocols: Sequence[str], *, timeout: float | None = None
    ) -> OpenedStream[StreamInfo]:
        """Opens a stream to a peer. See ``ControlClient.stream_open``.

        Args:
            peer_id: The peer.
            protocols: Protocol ids, the preferred one first.
            timeout: In seconds.

        Returns:
            The stream; it also unpacks as ``(info, stream)``.

        Raises:
            DaemonRefused: The peer cannot be reached or supports none of the protocols.

        Example:
            async with await client.stream_open(peer_id, ["/echo/1"]) as stream:
                await stream.send(b"hello")
                print(await stream.receive())
        """
        return await self.control.stream_open(peer_id, protocols, timeout=timeout)

    async def stream_handler(
        self,
        proto: str,
        handler_cb: StreamHandler,
        *,
        balanced: bool = False,
        replace: bool = True,
        linger: float | None = DEFAULT_LINGER,
        timeout: float | None = None,
    ) -> None:
        """Registers a handler for inbound streams. See ``ControlClient.stream_handler``.

        Example:
            async def echo(info: StreamInfo, stream: Stream) -> None:
                async for chunk in stream:
                    await stream.send(chunk)

            await client.stream_handler("/echo/1", echo)
        """
        await self.control.stream_handler(
            proto, handler_cb, balanced=balanced, replace=replace, linger=linger, timeout=timeout
        )

    async def remove_stream_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Removes a handler for inbound streams. See ``ControlClient.remove_stream_handler``."""
        await self.control.remove_stream_handler(proto, timeout=timeout)

    # --- unary calls ---

    def call_unary(
        self, peer_id: PeerIDLike, proto: str, data: Buffer, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, bytes]:
        """Calls a peer's unary handler; awaiting the result returns the reply. See
        ``UnaryClient.call``.

        Example:
            reply = await client.call_unary(peer_id, "square", b"12", timeout=5)
        """
        return self.unary.call(peer_id, proto, data, timeout=timeout)

    async def add_unary_handler(
        self,
        proto: str,
        handler: UnaryHandler,
        *,
        balanced: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Registers a handler for peers' unary calls. See ``UnaryClient.add_handler``.

        Example:
            async def square(request: bytes, caller: PeerID) -> bytes:
                return b"%d" % (int(request) ** 2)

            await client.add_unary_handler("square", square)
        """
        await self.unary.add_handler(proto, handler, balanced=balanced, timeout=timeout)

    async def remove_unary_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Removes a handler for unary calls. See ``UnaryClient.remove_handler``."""
        await self.unary.remove_handler(proto, timeout=timeout)

    async def open_unary(self, *, timeout: float | None = None) -> None:
        """Opens the connection for unary calls now instead of at the first call. See
        ``UnaryClient.open``."""
        await self.unary.open(timeout=timeout)

    async def register_again(self, *, timeout: float | None = None) -> None:
        """Registers the handlers of streams and unary calls at a restarted daemon.

        ``Daemon(restart=...)`` does this for the clients that it created. Stream handlers are
        registered only while the client listens.

        Args:
            timeout: For each handler, in seconds.

        Raises:
            DaemonRefused: Another client has taken a protocol. All other handlers are registered.
        """
        try:
            await self.control.register_again(timeout=timeout)
        except DaemonRefused:
            await self.unary.register_again()
            raise
        await self.unary.register_again()

    # --- connection manager ---

    async def connmgr_tag_peer(
        self, peer_id: PeerIDLike, tag: str, weight: int, *, timeout: float | None = None
    ) -> None:
        """Tags a peer; its connections are kept longer the higher the total weight of its tags."""
        await self.connmgr.tag_peer(peer_id, tag, weight, timeout=timeout)

    async def connmgr_untag_peer(
        self, peer_id: PeerIDLike, tag: str, *, timeout: float | None = None
    ) -> None:
        """Removes a tag from a peer."""
        await self.connmgr.untag_peer(peer_id, tag, timeout=timeout)

    async def connmgr_trim(self, *, timeout: float | None = None) -> None:
        """Closes connections until the low-water mark is reached."""
        await self.connmgr.trim(timeout=timeout)

    # --- peerstore ---

    async def peerstore_get_protocols(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> tuple[str, ...]:
        """Returns the protocols that a peer is known to support (JavaScript daemon). See
        ``PeerstoreClient.get_protocols``."""
        return await self.peerstore.get_protocols(peer_id, timeout=timeout)

    async def peerstore_get_peer_info(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PeerInfo:
        """Returns the known addresses of a peer (JavaScript daemon). See
        ``PeerstoreClient.get_peer_info``."""
        return await self.peerstore.get_peer_info(peer_id, timeout=timeout)

    # --- DHT ---

    async def dht_find_peer(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """Finds the addresses of a peer. See ``DHTClient.find_peer``."""
        return await self.dht.find_peer(peer_id, timeout=timeout)

    def dht_find_peers_connected_to_peer(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """Finds the peers connected to a peer. No current daemon supports it (``NotSupported``)."""
        return self.dht.find_peers_connected_to_peer(peer_id, timeout=timeout)

    def dht_find_providers(
        self, content_id_bytes: bytes, count: int, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """Finds the providers of a CID. See ``DHTClient.find_providers``.

        Example:
            providers = await client.dht_find_providers(cid, 20)  # all at once
            async for provider in client.dht_find_providers(cid, 20):  # as they are found
                print(provider.peer_id, provider.addrs)
        """
        return self.dht.find_providers(content_id_bytes, count, timeout=timeout)

    def dht_get_closest_peers(self, key: bytes, *, timeout: float | None = None) -> Results[PeerID]:
        """Finds the peers closest to a key. See ``DHTClient.get_closest_peers``."""
        return self.dht.get_closest_peers(key, timeout=timeout)

    async def dht_get_public_key(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PublicKey:
        """Finds the public key of a peer. See ``DHTClient.get_public_key``."""
        return await self.dht.get_public_key(peer_id, timeout=timeout)

    async def dht_get_value(self, key: bytes, *, timeout: float | None = None) -> bytes:
        """Finds the best value for a key. See ``DHTClient.get_value``."""
        return await self.dht.get_value(key, timeout=timeout)

    def dht_search_value(self, key: bytes, *, timeout: float | None = None) -> Results[bytes]:
        """Finds values for a key, each better than the one before. See
        ``DHTClient.search_value``."""
        return self.dht.search_value(key, timeout=timeout)

    async def dht_put_value(
        self, key: bytes, value: bytes, *, timeout: float | None = None
    ) -> None:
        """Stores a record. See ``DHTClient.put_value``."""
        await self.dht.put_value(key, value, timeout=timeout)

    async def dht_provide(self, cid: bytes, *, timeout: float | None = None) -> None:
        """Announces the daemon's peer as a provider of a CID. See ``DHTClient.provide``."""
        await self.dht.provide(cid, timeout=timeout)

    # --- pubsub ---

    async def pubsub_get_topics(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """Returns the topics that the daemon is subscribed to."""
        return await self.pubsub.get_topics(timeout=timeout)

    async def pubsub_list_peers(
        self, topic: str, *, timeout: float | None = None
    ) -> tuple[PeerID, ...]:
        """Returns the peers known to be subscribed to a topic."""
        return await self.pubsub.list_peers(topic, timeout=timeout)

    async def pubsub_publish(
        self, topic: str, data: bytes, *, timeout: float | None = None
    ) -> None:
        """Publishes data on a topic. See ``PubSubClient.publish``."""
        await self.pubsub.publish(topic, data, timeout=timeout)

    async def pubsub_subscribe(self, topic: str, *, timeout: float | None = None) -> Subscription:
        """Subscribes to a topic. See ``PubSubClient.subscribe``.

        Example:
            async with await client.pubsub_subscribe("news") as subscription:
                async for message in subscription:
                    print(message.peer_id, message.data)
                    break
        """
        return await self.pubsub.subscribe(topic, timeout=timeout)
