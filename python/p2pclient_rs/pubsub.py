"""Pubsub requests: topics, publishing and subscribing."""

from __future__ import annotations

from p2pclient_rs._native import PeerID, Request
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.subscription import Subscription

__all__ = ["PubSubClient"]


class PubSubClient:
    """Topics: publishing and subscribing. Requires a daemon that was started with pubsub.

    Every ``timeout`` is in seconds. All requests raise subclasses of ``ControlFailure``:
    ``NotSupported`` if the daemon was started without pubsub.

    Args:
        daemon_connector: The connections to the daemon.
    """

    def __init__(self, daemon_connector: DaemonConnector) -> None:
        self.daemon_connector = daemon_connector

    async def get_topics(self, *, timeout: float | None = None) -> tuple[str, ...]:
        """GET_TOPICS: returns the topics that the daemon is subscribed to."""
        return await self.daemon_connector.request(
            "PUBSUB GET_TOPICS", Request.pubsub_get_topics(), timeout=timeout
        )

    async def list_peers(self, topic: str, *, timeout: float | None = None) -> tuple[PeerID, ...]:
        """LIST_PEERS: returns the peers known to be subscribed to a topic."""
        return await self.daemon_connector.request(
            "PUBSUB LIST_PEERS", Request.pubsub_list_peers(topic), timeout=timeout
        )

    async def publish(self, topic: str, data: bytes, *, timeout: float | None = None) -> None:
        """PUBLISH: publishes data on a topic.

        A message reaches only the peers that the daemon knows to be subscribed; see
        ``list_peers``.

        Args:
            topic: The topic.
            data: The data. The Go daemons drop messages over 1 MiB, envelope included.
            timeout: In seconds.

        Example:
            await client.pubsub.publish("news", b"hello, subscribers")
        """
        await self.daemon_connector.request(
            "PUBSUB PUBLISH", Request.pubsub_publish(topic, data), timeout=timeout
        )

    async def subscribe(self, topic: str, *, timeout: float | None = None) -> Subscription:
        """SUBSCRIBE: subscribes to a topic.

        Returns:
            The messages from now on, including those published through this daemon: an async
            iterator of ``PubsubMessage``. Closing it unsubscribes.

        Example:
            async with await client.pubsub.subscribe("news") as subscription:
                async for message in subscription:
                    print(message.peer_id, message.data)
                    break
        """
        _, subscription = await self.daemon_connector.request_stream(
            Subscription, "PUBSUB SUBSCRIBE", Request.pubsub_subscribe(topic), timeout=timeout
        )
        return subscription
