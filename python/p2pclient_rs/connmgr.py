"""Connection manager requests: which connections the daemon keeps."""

from __future__ import annotations

from p2pclient_rs._native import Request
from p2pclient_rs.connector import DaemonConnector, PeerIDLike

__all__ = ["ConnectionManagerClient"]


class ConnectionManagerClient:
    """The connection manager of a Go daemon that was started with one.

    Every ``timeout`` is in seconds. All requests raise subclasses of ``ControlFailure``:
    ``NotSupported`` from the JavaScript daemon.

    Args:
        daemon_connector: The connections to the daemon.

    Example:
        await client.connmgr.tag_peer(peer_id, "favourite", 100)
        await client.connmgr.trim()  # closes connections to other peers first
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def tag_peer(
        self, peer_id: PeerIDLike, tag: str, weight: int, *, timeout: float | None = None
    ) -> None:
        """TAG_PEER: tags a peer.

        Args:
            peer_id: The peer.
            tag: The name of the tag. Tagging again with the same name sets its weight.
            weight: The higher the total weight of a peer's tags, the longer the daemon keeps its
                connections.
            timeout: In seconds.
        """
        await self.daemon_connector.request(
            "CONNMANAGER TAG_PEER",
            Request.connmgr_tag_peer(peer_id, tag, weight),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def untag_peer(
        self, peer_id: PeerIDLike, tag: str, *, timeout: float | None = None
    ) -> None:
        """UNTAG_PEER: removes a tag from a peer."""
        await self.daemon_connector.request(
            "CONNMANAGER UNTAG_PEER",
            Request.connmgr_untag_peer(peer_id, tag),
            timeout=timeout,
            peer_id=peer_id,
        )

    async def trim(self, *, timeout: float | None = None) -> None:
        """TRIM: closes connections until the low-water mark is reached."""
        await self.daemon_connector.request(
            "CONNMANAGER TRIM", Request.connmgr_trim(), timeout=timeout
        )
