"""Pubsub requests."""

from __future__ import annotations

from p2pclient_rs._native import PeerID, Request
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.subscription import Subscription

__all__ = ["PubSubClient"]


class PubSubClient:
    """The daemon's pubsub, if it was started with it.

    Every ``timeout`` is in seconds. All raise subclasses of ``ControlFailure``.

    Args:
        daemon_connector: The way to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def get_topics(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """GET_TOPICS: the topics that the daemon is subscribed to."""
        return await self.daemon_connector.request(
            "PUBSUB GET_TOPICS", Request.pubsub_get_topics(), timeout=timeout
        )

    async def list_peers(self, topic: str, *, timeout: float | None = None) -> tuple[PeerID, ...]:
        """LIST_PEERS: the peers known to be subscribed to a topic."""
        return await self.daemon_connector.request(
            "PUBSUB LIST_PEERS", Request.pubsub_list_peers(topic), timeout=timeout
        )

    async def publish(self, topic: str, data: bytes, *, timeout: float | None = None) -> None:
        """PUBLISH: sends data to the subscribers of a topic."""
        await self.daemon_connector.request(
            "PUBSUB PUBLISH", Request.pubsub_publish(topic, data), timeout=timeout
        )

    async def subscribe(self, topic: str, *, timeout: float | None = None) -> Subscription:
        """SUBSCRIBE: the messages published to a topic from now on, until it is closed."""
        _, subscription = await self.daemon_connector.request_stream(
            Subscription, "PUBSUB SUBSCRIBE", Request.pubsub_subscribe(topic), timeout=timeout
        )
        return subscription
