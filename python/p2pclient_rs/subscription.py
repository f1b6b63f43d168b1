"""Subscriptions: the messages published to a topic."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import anyio
from anyio.lowlevel import checkpoint_if_cancelled

from p2pclient_rs._native import PubsubMessage, decode_pubsub_message
from p2pclient_rs.stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Subscription"]

#: How long to wait for the daemon to unsubscribe, in seconds.
_UNSUBSCRIBE_TIMEOUT = 1.0


class Subscription(Stream):
    """The messages published to a topic: an async iterator of ``PubsubMessage``.

    Closing it unsubscribes. Programs that read the bytes of the stream themselves get the daemon's
    PSMessages, each after its length.

    Example:
        subscription = await client.pubsub_subscribe("news")
        async for message in subscription:
            print(message.peer_id, message.data)
            break
        await subscription.aclose()
    """

    _max_message_size = (4 << 20) + (64 << 10)

    async def aclose(self) -> None:
        """Unsubscribes. Afterwards the daemon no longer lists the topic in ``get_topics``.

        Waits up to a second for the daemon. If cancelled, or while another task receives, it closes
        the connection at once.
        """
        if not self._raw.closed and not self._reading and os.getpid() == self._pid:
            with anyio.move_on_after(_UNSUBSCRIBE_TIMEOUT):
                try:
                    await self.send_eof()
                    # The daemon ends its side once it has unsubscribed.
                    while await self.read(65536):
                        pass
                except (
                    anyio.BrokenResourceError,
                    anyio.ClosedResourceError,
                    anyio.BusyResourceError,
                ):
                    pass
                except BaseException:
                    self._close()
                    raise
        await super().aclose()

    async def receive_message(self) -> PubsubMessage:
        """Returns the next message.

        Raises:
            anyio.EndOfStream: The daemon has ended the subscription.
            ProtocolViolation: The daemon sent something else.
        """
        await checkpoint_if_cancelled()
        return decode_pubsub_message(await self.receive_frame(self._max_message_size))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> PubsubMessage:  # type: ignore[override]
        try:
            return await self.receive_message()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None
