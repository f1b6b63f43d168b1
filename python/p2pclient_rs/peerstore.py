"""Peerstore requests: what the JavaScript daemon knows about peers."""

from __future__ import annotations

from p2pclient_rs._native import PeerInfo, Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike

__all__ = ["PeerstoreClient"]


class PeerstoreClient:
    """The peerstore of the JavaScript daemon. The Go daemons have no such requests.

    Every ``timeout`` is in seconds. All requests raise subclasses of ``ControlFailure``:
    ``NotSupported`` from a Go daemon.

    Args:
        daemon_connector: The connections to the daemon.

    Example:
        try:
            protocols = await client.peerstore.get_protocols(peer_id)
        except NotSupported:  # not the JavaScript daemon
            protocols = ()
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def get_protocols(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> tuple[str, ...]:
        """GET_PROTOCOLS: returns the protocols that a peer is known to support.

        Raises:
            NotSupported: The daemon is not the JavaScript one.
            ConnectionLost: jsp2pd 0.10.2 crashes if it has not heard of the peer.
        """
        return await self.daemon_connector.request_peerstore(
            "PEERSTORE GET_PROTOCOLS",
            Request.peerstore_get_protocols(peer_id),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def get_peer_info(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """GET_PEER_INFO: returns the known addresses of a peer.

        Raises:
            NotSupported: The daemon is not the JavaScript one, or it is jsp2pd 0.10.2, which does
                not implement the request.
        """
        info = await self.daemon_connector.request_peerstore(
            "PEERSTORE GET_PEER_INFO",
            Request.peerstore_get_peer_info(peer_id),
            timeout=timeout,
            peer_id=peer_id,
        )
        return self.daemon_connector.types.peer_info(info)
