"""Peerstore requests."""

from __future__ import annotations

from p2pclient_rs._native import PeerInfo, Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike

__all__ = ["PeerstoreClient"]


class PeerstoreClient:
    """What the JavaScript daemon knows of a peer. The Go daemons have no such requests.

    Every ``timeout`` is in seconds. All raise subclasses of ``ControlFailure``: ``NotSupported``
    where the daemon is another.

    Args:
        daemon_connector: The way to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def get_protocols(
        self, peer_id: PeerIDLike, *, timeout: float | None = None
    ) -> tuple[str, ...]:
        """GET_PROTOCOLS: the protocols that a peer is known to speak.

        jsp2pd 0.10.2 crashes when it is asked about a peer it has not heard of, which shows as
        ``ConnectionLost``.
        """
        return await self.daemon_connector.request_peerstore(
            "PEERSTORE GET_PROTOCOLS",
            Request.peerstore_get_protocols(peer_id),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def get_peer_info(self, peer_id: PeerIDLike, *, timeout: float | None = None) -> PeerInfo:
        """GET_PEER_INFO: the ``PeerInfo`` of a peer, with the addresses that are known. jsp2pd
        0.10.2 refuses it as not implemented, which is ``NotSupported``."""
        info = await self.daemon_connector.request_peerstore(
            "PEERSTORE GET_PEER_INFO",
            Request.peerstore_get_peer_info(peer_id),
            timeout=timeout,
            peer_id=peer_id,
        )
        return self.daemon_connector.types.peer_info(info)
