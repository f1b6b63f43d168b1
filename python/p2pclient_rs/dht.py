"""DHT requests: peers, providers and records."""

from __future__ import annotations

from p2pclient_rs._native import PeerID, PeerInfo, PublicKey, Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike
from p2pclient_rs.exceptions import ProtocolViolation
from p2pclient_rs.results import Results

__all__ = ["DHTClient"]


class DHTClient:
    """The Kademlia DHT of a daemon that was started with one.

    Queries that can have several results return ``Results``: ``await`` it for all results as a
    tuple, or use ``async for`` to get each result as soon as it is found.

    Every ``timeout`` is in seconds, and is passed on to the daemon in whole seconds. Without one
    the daemon gives up after 60 s. All requests raise subclasses of ``ControlFailure``:
    ``DaemonRefused`` if nothing was found, ``NotSupported`` if the daemon has no DHT,
    ``ControlTimeout``.

    Args:
        daemon_connector: The connections to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def find_peer(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """FIND_PEER: finds the addresses of a peer.

        Raises:
            DaemonRefused: The peer was not found.

        Example:
            info = await client.dht.find_peer(peer_id, timeout=10)
            await client.connect(info.peer_id, info.addrs)
        """
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
        """FIND_PEERS_CONNECTED_TO_PEER: finds the peers connected to a peer.

        Raises:
            NotSupported: No current daemon supports it.
        """
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
        """FIND_PROVIDERS: finds the providers of a CID.

        Args:
            content_id_bytes: The CID, in binary.
            count: The maximum number of providers; 0 means the daemon's default of 20.
            timeout: In seconds.

        Raises:
            DaemonRefused: ``content_id_bytes`` is not a CID.

        Example:
            async for provider in client.dht.find_providers(cid, 20):
                print(provider.peer_id, provider.addrs)
        """
        return Results(
            self.daemon_connector,
            "DHT FIND_PROVIDERS",
            lambda: Request.dht_find_providers(content_id_bytes, count, timeout),
            timeout=timeout,
            convert=self.daemon_connector.types.peer_info,
        )

    def get_closest_peers(self, key: bytes, *, timeout: float | None = None) -> Results[PeerID]:
        """GET_CLOSEST_PEERS: finds the peers closest to a key.

        Example:
            peers = await client.dht.get_closest_peers(b"some key")
        """
        return Results(
            self.daemon_connector,
            "DHT GET_CLOSEST_PEERS",
            lambda: Request.dht_get_closest_peers(key, timeout),
            timeout=timeout,
        )

    async def get_public_key(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> PublicKey:
        """GET_PUBLIC_KEY: finds the public key of a peer.

        Raises:
            DaemonRefused: The key was not found.
            ProtocolViolation: The daemon returned an invalid public key.
        """
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
            violation = ProtocolViolation(f"the daemon's reply is {error}")
            raise self.daemon_connector.describe(violation, name, peer_id) from error
        return self.daemon_connector.types.public_key(key)

    async def get_value(self, key: bytes, *, timeout: float | None = None) -> bytes:
        """GET_VALUE: finds the best value for a key.

        Raises:
            DaemonRefused: No value was found.

        Example:
            record = await client.dht.get_value(b"/pk/" + peer_id.to_bytes())
        """
        return await self.daemon_connector.request(
            "DHT GET_VALUE", Request.dht_get_value(key, timeout), timeout=timeout
        )

    def search_value(self, key: bytes, *, timeout: float | None = None) -> Results[bytes]:
        """SEARCH_VALUE: finds values for a key, each better than the one before.

        Example:
            async for record in client.dht.search_value(b"/pk/" + peer_id.to_bytes()):
                print(len(record))
        """
        return Results(
            self.daemon_connector,
            "DHT SEARCH_VALUE",
            lambda: Request.dht_search_value(key, timeout),
            timeout=timeout,
        )

    async def put_value(self, key: bytes, value: bytes, *, timeout: float | None = None) -> None:
        """PUT_VALUE: stores a record.

        Args:
            key: A key that begins with ``/pk/`` or ``/ipns/``; the daemons accept no others.
            value: A value that is valid for this key.
            timeout: In seconds.

        Raises:
            DaemonRefused: The record is invalid, or no peer accepted it.

        Example:
            key = await client.dht.get_public_key(peer_id)
            await client.dht.put_value(b"/pk/" + peer_id.to_bytes(), key.serialize())
        """
        await self.daemon_connector.request(
            "DHT PUT_VALUE", Request.dht_put_value(key, value, timeout), timeout=timeout
        )

    async def provide(self, cid: bytes, *, timeout: float | None = None) -> None:
        """PROVIDE: announces the daemon's peer as a provider of a CID.

        Args:
            cid: The CID, in binary.
            timeout: In seconds.

        Raises:
            DaemonRefused: ``cid`` is not a CID, or the daemon found no peer to announce it to.

        Example:
            await client.dht.provide(cid)
        """
        await self.daemon_connector.request(
            "DHT PROVIDE", Request.dht_provide(cid, timeout), timeout=timeout
        )
