"""The client: everything that can be asked of a daemon, in one object."""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from p2pclient_rs._native import Identity, PeerID, PeerInfo, PublicKey, StreamInfo
from p2pclient_rs.connector import DaemonConnector, MultiaddrLike, PeerIDLike
from p2pclient_rs.connmgr import ConnectionManagerClient
from p2pclient_rs.control import ControlClient, StreamHandler
from p2pclient_rs.dht import DHTClient
from p2pclient_rs.handlers import DEFAULT_LINGER
from p2pclient_rs.listening import Listening
from p2pclient_rs.opened import OpenedStream
from p2pclient_rs.peerstore import PeerstoreClient
from p2pclient_rs.pubsub import PubSubClient
from p2pclient_rs.results import Results
from p2pclient_rs.streams import Subscription
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

    Connections are made when needed and kept for the next request. Peer ids and addresses may be
    given as text. Every ``timeout`` is in seconds and bounds the whole call; none means the
    daemon's own, which is 60 s where it has one. What goes wrong is a subclass of
    ``ControlFailure``; see ``p2pclient_rs.exceptions``.

    Args:
        control_maddr: The daemon's control socket: ``/unix/PATH`` or
            ``/ip4|ip6|dns|dns4|dns6/HOST/tcp/PORT``; ``/unix/tmp/p2pd.sock`` if none.
        listen_maddr: Where the daemon is to connect to for inbound streams, likewise. If none, a
            unix socket in a new directory that only this user can look into; a daemon that runs as
            another user, or on another machine, needs an address that it can reach.
        persistent_conn_max_msg_size: The largest message of a unary call, in bytes; what the
            daemon was started with. None takes the daemon's limit if it can be found out, and
            4 MiB otherwise.
        max_unanswered, max_unanswered_bytes, hold: The bounds of peers' unary calls in progress,
            and how long, in seconds, peers wait before the calls over them are refused; see
            ``UnaryClient``.

    Attributes:
        control: Peers, connections and streams.
        dht: The DHT.
        connmgr: The connection manager.
        peerstore: What the JavaScript daemon knows of peers.
        pubsub: Pubsub.
        unary: Unary calls, which hivemind's daemon has.

    Raises:
        InvalidMultiaddr: An address is no multiaddr (a ValueError).

    A client belongs to the process that made it: used in a forked child it raises
    ``ForkedClientError``.
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
        """Accepts inbound streams, and has them handled: within ``async with client.listen():``, or
        from ``await client.listen()`` on until ``close()``; see ``ControlClient.listen``."""
        return Listening(self._listen_within, self._listen_from_now_on)

    @asynccontextmanager
    async def _listen_within(self) -> AsyncIterator[Self]:
        async with self.control.listen():
            yield self

    async def _listen_from_now_on(self) -> Self:
        await self.control.listen()
        return self

    async def close(self) -> None:
        """Stops listening and serving unary calls, cancels the handlers at work and closes the idle
        connections and the persistent one.

        Streams and subscriptions stay open. A later call opens connections again.
        """
        self.unary.close()
        await self.control.close()

    # --- control ---

    async def identify(self, *, timeout: float | None = None) -> Identity:
        """The daemon's peer id and addresses: unpacks as ``(peer_id, addrs)``."""
        return await self.control.identify(timeout=timeout)

    async def connect(
        self,
        peer_id: PeerIDLike,
        maddrs: Iterable[MultiaddrLike],
        *,
        timeout: float | None = None,
    ) -> None:
        """Connects to a peer at any of its addresses; see ``ControlClient.connect``."""
        await self.control.connect(peer_id, maddrs, timeout=timeout)

    async def disconnect(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> None:
        """Closes every connection to a peer; there need be none."""
        await self.control.disconnect(peer_id, timeout=timeout)

    async def list_peers(self, *, timeout: float | None = None) -> tuple[PeerInfo, ...]:
        """The connected peers: one entry for each connection, so a peer can be there twice."""
        return await self.control.list_peers(timeout=timeout)

    async def stream_open(
        self, peer_id: PeerIDLike, protocols: Sequence[str], *, timeout: float | None = None
    ) -> OpenedStream[StreamInfo]:
        """Opens a stream to a peer. The result is used as the stream, or unpacked as
        ``(info, stream)``; see ``ControlClient.stream_open``."""
        return await self.control.stream_open(peer_id, protocols, timeout=timeout)

    async def stream_handler(
        self,
        proto: str,
        handler_cb: StreamHandler,
        *,
        balanced: bool = False,
        linger: float | None = DEFAULT_LINGER,
        timeout: float | None = None,
    ) -> None:
        """Has inbound streams of a protocol handled while this client listens; see
        ``ControlClient.stream_handler``."""
        await self.control.stream_handler(
            proto, handler_cb, balanced=balanced, linger=linger, timeout=timeout
        )

    async def remove_stream_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Takes back ``stream_handler``; see ``ControlClient.remove_stream_handler``."""
        await self.control.remove_stream_handler(proto, timeout=timeout)

    # --- unary calls ---

    def call_unary(
        self, peer_id: PeerIDLike, proto: str, data: Buffer, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, bytes]:
        """Calls a peer's unary handler; the reply is to be awaited. See ``UnaryClient.call``."""
        return self.unary.call(peer_id, proto, data, timeout=timeout)

    async def add_unary_handler(
        self,
        proto: str,
        handler: UnaryHandler,
        *,
        balanced: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Serves the peers' unary calls of a name; see ``UnaryClient.add_handler``."""
        await self.unary.add_handler(proto, handler, balanced=balanced, timeout=timeout)

    async def remove_unary_handler(self, proto: str, *, timeout: float | None = None) -> None:
        """Takes back ``add_unary_handler``; see ``UnaryClient.remove_handler``."""
        await self.unary.remove_handler(proto, timeout=timeout)

    # --- connection manager ---

    async def connmgr_tag_peer(
        self, peer_id: PeerIDLike, tag: str, weight: int, *, timeout: float | None = None
    ) -> None:
        """Gives a peer a tag; connections to peers with more weight are kept longer."""
        await self.connmgr.tag_peer(peer_id, tag, weight, timeout=timeout)

    async def connmgr_untag_peer(
        self, peer_id: PeerIDLike, tag: str, *, timeout: float | None = None
    ) -> None:
        """Takes a tag off a peer."""
        await self.connmgr.untag_peer(peer_id, tag, timeout=timeout)

    async def connmgr_trim(self, *, timeout: float | None = None) -> None:
        """Closes connections down to the low-water mark."""
        await self.connmgr.trim(timeout=timeout)

    # --- peerstore ---

    async def peerstore_get_protocols(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> tuple[str, ...]:
        """The protocols that a peer is known to speak (JavaScript daemon); see
        ``PeerstoreClient.get_protocols``."""
        return await self.peerstore.get_protocols(peer_id, timeout=timeout)

    async def peerstore_get_peer_info(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PeerInfo:
        """The addresses that a peer is known to have (JavaScript daemon); see
        ``PeerstoreClient.get_peer_info``."""
        return await self.peerstore.get_peer_info(peer_id, timeout=timeout)

    # --- DHT ---

    async def dht_find_peer(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """The addresses of a peer."""
        return await self.dht.find_peer(peer_id, timeout=timeout)

    def dht_find_peers_connected_to_peer(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """The peers connected to a peer. Today's Go daemons refuse it as not supported."""
        return self.dht.find_peers_connected_to_peer(peer_id, timeout=timeout)

    def dht_find_providers(
        self, content_id_bytes: bytes, count: int, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """At most ``count`` providers of the content with a binary CID."""
        return self.dht.find_providers(content_id_bytes, count, timeout=timeout)

    def dht_get_closest_peers(self, key: bytes, *, timeout: float | None = None) -> Results[PeerID]:
        """The peers closest to a key."""
        return self.dht.get_closest_peers(key, timeout=timeout)

    async def dht_get_public_key(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PublicKey:
        """The public key of a peer."""
        return await self.dht.get_public_key(peer_id, timeout=timeout)

    async def dht_get_value(self, key: bytes, *, timeout: float | None = None) -> bytes:
        """The best value found for a key."""
        return await self.dht.get_value(key, timeout=timeout)

    def dht_search_value(self, key: bytes, *, timeout: float | None = None) -> Results[bytes]:
        """The values found for a key, each better than the one before."""
        return self.dht.search_value(key, timeout=timeout)

    async def dht_put_value(
        self, key: bytes, value: bytes, *, timeout: float | None = None
    ) -> None:
        """Stores a record: only ``/pk/…`` and ``/ipns/…`` keys with valid values will do."""
        await self.dht.put_value(key, value, timeout=timeout)

    async def dht_provide(self, cid: bytes, *, timeout: float | None = None) -> None:
        """Announces that this peer has the content with a binary CID."""
        await self.dht.provide(cid, timeout=timeout)

    # --- pubsub ---

    async def pubsub_get_topics(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """The topics that the daemon is subscribed to."""
        return await self.pubsub.get_topics(timeout=timeout)

    async def pubsub_list_peers(
        self, topic: str, *, timeout: float | None = None
    ) -> tuple[PeerID, ...]:
        """The peers known to be subscribed to a topic."""
        return await self.pubsub.list_peers(topic, timeout=timeout)

    async def pubsub_publish(
        self, topic: str, data: bytes, *, timeout: float | None = None
    ) -> None:
        """Sends data to the subscribers of a topic."""
        await self.pubsub.publish(topic, data, timeout=timeout)

    async def pubsub_subscribe(self, topic: str, *, timeout: float | None = None) -> Subscription:
        """The messages published to a topic from now on: an async iterator of
        ``PubsubMessage``, and a stream of the messages as the daemon sends them."""
        return await self.pubsub.subscribe(topic, timeout=timeout)
