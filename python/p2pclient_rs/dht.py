"""DHT requests."""

from __future__ import annotations

from p2pclient_rs._native import PeerID, PeerInfo, PublicKey, Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike
from p2pclient_rs.exceptions import ProtocolViolation
from p2pclient_rs.results import Results

__all__ = ["DHTClient"]


class DHTClient:
    """The daemon's Kademlia DHT, if it was started with one.

    Every ``timeout`` is in seconds; the daemon gets it too, in whole seconds, and gives up by
    itself after 60 s if there is none. All raise subclasses of ``ControlFailure``:
    ``DaemonRefused`` where nothing was found, ``NotSupported`` where the daemon has no DHT,
    ``ControlTimeout``.

    Args:
        daemon_connector: The way to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def find_peer(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """FIND_PEER: the ``PeerInfo`` of a peer."""
        info = await self.daemon_connector.request(
            "DHT FIND_PEER",
            Request.dht_find_peer(peer_id, timeout),
            timeout=timeout,
            peer_id=peer_id,
        )
        return self.daemon_connector.types.peer_info(info)

    def find_peers_connected_to_peer(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """FIND_PEERS_CONNECTED_TO_PEER: a ``PeerInfo`` of each. Today's Go daemons refuse it as
        not supported."""
        return Results(
            self.daemon_connector,
            "DHT FIND_PEERS_CONNECTED_TO_PEER",
            lambda: Request.dht_find_peers_connected_to_peer(peer_id, timeout),
            timeout=timeout,
            peer_id=peer_id,
            convert=self.daemon_connector.types.peer_info,
        )

    def find_providers(
        self, content_id_bytes: bytes, count: int, *, timeout: float | None = None
    ) -> Results[PeerInfo]:
        """FIND_PROVIDERS: a ``PeerInfo`` of each provider of a content.

        Args:
            content_id_bytes: The content's CID in binary.
            count: How many providers at the most; 0 for the daemon's default.
        """
        return Results(
            self.daemon_connector,
            "DHT FIND_PROVIDERS",
            lambda: Request.dht_find_providers(content_id_bytes, count, timeout),
            timeout=timeout,
            convert=self.daemon_connector.types.peer_info,
        )

    def get_closest_peers(self, key: bytes, *, timeout: float | None = None) -> Results[PeerID]:
        """GET_CLOSEST_PEERS: the peers closest to a key."""
        return Results(
            self.daemon_connector,
            "DHT GET_CLOSEST_PEERS",
            lambda: Request.dht_get_closest_peers(key, timeout),
            timeout=timeout,
        )

    async def get_public_key(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PublicKey:
        """GET_PUBLIC_KEY: the ``PublicKey`` of a peer."""
        name = "DHT GET_PUBLIC_KEY"
        serialized = await self.daemon_connector.request(
            name,
            Request.dht_get_public_key(peer_id, timeout),
            timeout=timeout,
            peer_id=peer_id,
        )
        try:
            key = PublicKey.from_bytes(serialized)
        except ValueError as error:
            violation = ProtocolViolation(f"the daemon sent what is {error}")
            raise self.daemon_connector.describe(violation, name, peer_id) from error
        return self.daemon_connector.types.public_key(key)

    async def get_value(self, key: bytes, *, timeout: float | None = None) -> bytes:
        """GET_VALUE: the best value found for a key."""
        return await self.daemon_connector.request(
            "DHT GET_VALUE", Request.dht_get_value(key, timeout), timeout=timeout
        )

    def search_value(self, key: bytes, *, timeout: float | None = None) -> Results[bytes]:
        """SEARCH_VALUE: the values found for a key, each better than the one before."""
        return Results(
            self.daemon_connector,
            "DHT SEARCH_VALUE",
            lambda: Request.dht_search_value(key, timeout),
            timeout=timeout,
        )

    async def put_value(self, key: bytes, value: bytes, *, timeout: float | None = None) -> None:
        """PUT_VALUE: stores a record, which the daemons validate: only ``/pk/…`` and ``/ipns/…``
        keys will do."""
        await self.daemon_connector.request(
            "DHT PUT_VALUE", Request.dht_put_value(key, value, timeout), timeout=timeout
        )

    async def provide(self, cid: bytes, *, timeout: float | None = None) -> None:
        """PROVIDE: announces that this peer has the content with the binary CID ``cid``."""
        await self.daemon_connector.request(
            "DHT PROVIDE", Request.dht_provide(cid, timeout), timeout=timeout
        )
