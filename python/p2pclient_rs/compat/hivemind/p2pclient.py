"""The client of one daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from .control import (
    _DEFAULT,
    DEFAULT_MAX_MSG_SIZE,
    ControlClient,
    DaemonConnector,
    StreamHandler,
    TUnaryHandler,
    _Default,
)
from .datastructures import Multiaddr, PeerID, PeerInfo, StreamInfo
from .streams import StreamReader, StreamWriter

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = [
    "DEFAULT_MAX_MSG_SIZE",
    "Client",
    "ControlClient",
    "DaemonConnector",
    "Multiaddr",
    "PeerID",
    "PeerInfo",
    "StreamHandler",
    "StreamInfo",
    "TUnaryHandler",
]


class Client:
    """A client of one daemon. Make one with ``create``. See ``ControlClient`` for its methods.

    Attributes:
        control: The control client, which does the work.
    """

    control: ControlClient

    def __init__(self, *, _initialized_with_create: bool = False) -> None:
        assert _initialized_with_create, (
            "Please use Client.create coroutine to spawn new client instances"
        )

    @classmethod
    async def create(
        cls,
        control_maddr: Multiaddr | str | None = None,
        listen_maddr: Multiaddr | str | None = None,
        *,
        persistent_conn_max_msg_size: int | None = None,
        max_unanswered: int | None | _Default = _DEFAULT,
        max_unanswered_bytes: int | None | _Default = _DEFAULT,
        hold: float | None | _Default = _DEFAULT,
    ) -> Self:
        """Makes a client, and opens its persistent connection to the daemon.

        Args:
            control_maddr: The address of the daemon's control socket; ``/unix/tmp/p2pd.sock`` if
                None.
            listen_maddr: The address of the listener for inbound streams;
                ``/unix/tmp/p2pclient.sock`` if None.
            persistent_conn_max_msg_size: The size of the largest message of a unary call to send,
                in bytes. None means the daemon's limit if it can be determined, or else 4 MiB.
            max_unanswered, max_unanswered_bytes, hold: Limits on incoming calls in progress, by
                default none. See ``ControlClient.create``.

        Raises:
            ControlFailure: There is no daemon at the address, or it is not hivemind's.
        """
        client = cls(_initialized_with_create=True)
        client.control = await ControlClient.create(
            DaemonConnector(control_maddr),
            listen_maddr,
            persistent_conn_max_msg_size=persistent_conn_max_msg_size,
            max_unanswered=max_unanswered,
            max_unanswered_bytes=max_unanswered_bytes,
            hold=hold,
            _fallback=DEFAULT_MAX_MSG_SIZE,
        )
        return client

    def close(self) -> None:
        """Closes the connections to the daemon; see ``ControlClient.close``."""
        control = getattr(self, "control", None)
        if control is not None:
            control.close()

    def __del__(self) -> None:
        self.close()

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[Self]:
        """Accepts inbound streams and runs their handlers until the context is left."""
        async with self.control.listen():
            yield self

    async def add_unary_handler(
        self, proto: str, handler: TUnaryHandler, balanced: bool = False
    ) -> None:
        """Serves peers' unary calls of a protocol.

        Raises:
            P2PDaemonError: This client or another one already serves the protocol.
        """
        await self.control.add_unary_handler(proto, handler, balanced=balanced)

    async def remove_unary_handler(self, proto: str) -> None:
        """Undoes ``add_unary_handler``.

        Raises:
            P2PDaemonError: This client does not serve the protocol.
        """
        await self.control.remove_unary_handler(proto)

    def call_unary_handler(self, peer_id: PeerID, proto: str, data: Buffer) -> Awaitable[bytes]:
        """Calls a peer's unary handler. Await the result for the reply.

        Raises:
            P2PHandlerError: The peer's handler failed, or it has no handler for the protocol.
            P2PDaemonError: The call did not reach the peer, or the connection to the daemon was
                lost.
        """
        return self.control.call_unary_handler(peer_id, proto, data)

    async def identify(self) -> tuple[PeerID, tuple[Multiaddr, ...]]:
        """Returns the daemon's peer id and addresses."""
        peer_id, maddrs = await self.control.identify()
        return peer_id, maddrs

    async def connect(self, peer_id: PeerID, maddrs: Iterable[Multiaddr]) -> None:
        """Connects to a peer, at one of these addresses or one that the daemon already knows."""
        await self.control.connect(peer_id, maddrs)

    async def list_peers(self) -> tuple[PeerInfo, ...]:
        """Returns the connected peers, one entry for each connection."""
        return await self.control.list_peers()

    async def disconnect(self, peer_id: PeerID) -> None:
        """Closes every connection to a peer, if there are any."""
        await self.control.disconnect(peer_id)

    async def stream_open(
        self, peer_id: PeerID, protocols: Sequence[str]
    ) -> tuple[StreamInfo, StreamReader, StreamWriter]:
        """Opens a stream to a peer, with the first of the protocols that the peer supports."""
        return await self.control.stream_open(peer_id, protocols)

    async def stream_handler(
        self, proto: str, handler_cb: StreamHandler, balanced: bool = False
    ) -> None:
        """Serves inbound streams of a protocol while this client listens."""
        await self.control.stream_handler(proto, handler_cb, balanced=balanced)

    async def remove_stream_handler(self, proto: str) -> None:
        """Undoes ``stream_handler``."""
        await self.control.remove_stream_handler(proto)
