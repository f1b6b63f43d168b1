"""Connection manager requests."""

from __future__ import annotations

from p2pclient_rs._native import Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike

__all__ = ["ConnectionManagerClient"]


class ConnectionManagerClient:
    """Which connections the daemon keeps, if its connection manager is on.

    Every ``timeout`` is in seconds. All raise subclasses of ``ControlFailure``.

    Args:
        daemon_connector: The way to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def tag_peer(
        self, peer_id: PeerIDLike, tag: str, weight: int, *, timeout: float | None = None
    ) -> None:
        """TAG_PEER: gives a peer a tag; connections to peers with more weight are kept longer."""
        await self.daemon_connector.request(
            "CONNMANAGER TAG_PEER",
            Request.connmgr_tag_peer(peer_id, tag, weight),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def untag_peer(
        self, peer_id: PeerIDLike, tag: str, *, timeout: float | None = None
    ) -> None:
        """UNTAG_PEER: takes a tag off a peer."""
        await self.daemon_connector.request(
            "CONNMANAGER UNTAG_PEER",
            Request.connmgr_untag_peer(peer_id, tag),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def trim(self, *, timeout: float | None = None) -> None:
        """TRIM: closes connections down to the low-water mark."""
        await self.daemon_connector.request(
            "CONNMANAGER TRIM", Request.connmgr_trim(), timeout=timeout
        )
