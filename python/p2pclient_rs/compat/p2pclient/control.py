"""The control client: requests about the daemon, its peers and streams; and the listener."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from anyio.abc import TaskGroup

import p2pclient_rs
from p2pclient_rs import connector, control
from p2pclient_rs._native import RawListener
from p2pclient_rs.compat.p2pclient import config
from p2pclient_rs.compat.p2pclient._multiaddr import Multiaddr
from p2pclient_rs.compat.p2pclient.datastructures import PeerInfo, StreamInfo
from p2pclient_rs.compat.p2pclient.exceptions import ControlFailure, DispatchFailure
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.peerinfo import PeerInfo as PeerInfoLibP2P
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2 as p2pd_pb
from p2pclient_rs.compat.p2pclient.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from p2pclient_rs.compat.values import ConvertedTypes, connection_protocol
from p2pclient_rs.handlers import DEFAULT_LINGER
from p2pclient_rs.opened_stream import OpenedStream
from p2pclient_rs.stream import Stream

__all__ = [
    "ID",
    "ControlClient",
    "ControlFailure",
    "DaemonConnector",
    "DispatchFailure",
    "PeerInfo",
    "StreamHandler",
    "StreamInfo",
    "config",
    "p2pd_pb",
    "parse_conn_protocol",
    "raise_if_failed",
    "read_pbmsg_safe",
    "write_pbmsg",
]

StreamHandler: TypeAlias = Callable[[StreamInfo, Stream], Awaitable[None]]


def parse_conn_protocol(maddr: Multiaddr) -> int:
    """Returns the code of the protocol for connecting to a control or listen address.

    Args:
        maddr: The address.

    Returns:
        The code of the only protocol in the address out of ip4, ip6, dns, dns4, dns6 and unix.

    Raises:
        ValueError: The address has no such protocol, or several.
    """
    code = connection_protocol(maddr)
    if code is None:
        raise ValueError(f"neither a TCP nor a unix socket's address: {maddr}")
    return code


class _Types(ConvertedTypes):
    """Converts the results of requests into p2pclient's types."""

    def __init__(self) -> None:
        super().__init__(Multiaddr, PeerInfoLibP2P, StreamInfo)

    def public_key(  # type: ignore[override]
        self, key: p2pclient_rs.PublicKey
    ) -> crypto_pb2.PublicKey:
        return crypto_pb2.PublicKey.FromString(key.serialize())


class DaemonConnector(connector.DaemonConnector):
    """Connects to a daemon's control socket.

    Args:
        control_maddr: The socket's address; ``config.control_maddr_str`` if None.
    """

    #: Logs each new connection, as in p2pclient.
    logger: logging.Logger = logging.getLogger("p2pclient.DaemonConnector")

    def __init__(self, control_maddr: Multiaddr | str | None = None) -> None:
        maddr = config.control_maddr_str if control_maddr is None else control_maddr
        super().__init__(maddr, types=_Types())

    def _parse(self, control_maddr: Any) -> tuple[p2pclient_rs.Multiaddr, Any]:
        # Not converted through text: /unix has two binary forms, and Go's includes the path's
        # leading slash.
        maddr = Multiaddr(control_maddr) if isinstance(control_maddr, str) else control_maddr
        return p2pclient_rs.Multiaddr(maddr), maddr

    async def _connect(self) -> Any:
        self.logger.debug("DaemonConnector %s opens connection to %s", self, self.control_maddr)
        return await super()._connect()


class ControlClient(control.ControlClient):
    """Requests about the daemon, its peers and streams; and the listener for inbound streams.

    Args:
        daemon_connector: Connects to the daemon.
        listen_maddr: The listener's address; ``config.listen_maddr_str`` if None.
    """

    #: Logs this client's messages, as in p2pclient.
    logger: logging.Logger = logging.getLogger("p2pclient.ControlClient")
    handlers: dict[str, StreamHandler]  # type: ignore[assignment]

    def __init__(
        self,
        daemon_connector: connector.DaemonConnector,
        listen_maddr: Multiaddr | str | None = None,
    ) -> None:
        super().__init__(
            daemon_connector, config.listen_maddr_str if listen_maddr is None else listen_maddr
        )

    def _parse(self, listen_maddr: Any) -> Multiaddr:  # type: ignore[override]
        return Multiaddr(listen_maddr) if isinstance(listen_maddr, str) else listen_maddr

    @property
    def listener(self) -> RawListener | None:
        """The listening socket; None while this client does not listen."""
        return self._listener

    @property
    def task_group(self) -> TaskGroup | None:
        """The handlers' task group within a ``listen()`` block; None outside of one."""
        return self._task_group

    if TYPE_CHECKING:
        # The connector's types determine what these return.

        async def identify(  # type: ignore[override]
            self, *, timeout: float | None = None
        ) -> tuple[ID, tuple[Multiaddr, ...]]: ...

        async def list_peers(  # type: ignore[override]
            self, *, timeout: float | None = None
        ) -> tuple[PeerInfoLibP2P, ...]: ...

        async def stream_open(  # type: ignore[override]
            self, peer_id: ID, protocols: Sequence[str], *, timeout: float | None = None
        ) -> OpenedStream[StreamInfo]: ...

        async def stream_handler(  # type: ignore[override]
            self,
            proto: str,
            handler_cb: StreamHandler,
            *,
            balanced: bool = False,
            linger: float | None = DEFAULT_LINGER,
            timeout: float | None = None,
        ) -> None: ...
