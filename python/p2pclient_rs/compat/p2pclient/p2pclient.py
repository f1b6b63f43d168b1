"""The client: every request of the protocol, and the listener for inbound streams."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2pclient_rs import OpenedStream, client
from p2pclient_rs.compat.p2pclient._multiaddr import Multiaddr
from p2pclient_rs.compat.p2pclient.connmgr import ConnectionManagerClient
from p2pclient_rs.compat.p2pclient.control import ControlClient, DaemonConnector, StreamHandler
from p2pclient_rs.compat.p2pclient.datastructures import PeerInfo, StreamInfo
from p2pclient_rs.compat.p2pclient.dht import DHTClient
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as crypto_pb
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.peerinfo import PeerInfo as PeerInfoLibP2P
from p2pclient_rs.compat.p2pclient.pubsub import PubSubClient
from p2pclient_rs.handlers import DEFAULT_LINGER
from p2pclient_rs.results import Results
from p2pclient_rs.unary import UnaryClient

__all__ = [
    "ID",
    "Client",
    "ConnectionManagerClient",
    "ControlClient",
    "DHTClient",
    "DaemonConnector",
    "PeerInfo",
    "PubSubClient",
    "StreamHandler",
    "StreamInfo",
    "crypto_pb",
]


class Client(client.Client):
    """A client of one daemon.

    Args:
        control_maddr: The address of the daemon's control socket; ``config.control_maddr_str`` if
            None.
        listen_maddr: The address of the listener for inbound streams;
            ``config.listen_maddr_str`` if None.
    """

    control: ControlClient
    dht: DHTClient
    connmgr: ConnectionManagerClient
    pubsub: PubSubClient
    unary: UnaryClient

    def __init__(
        self,
        control_maddr: Multiaddr | str | None = None,
        listen_maddr: Multiaddr | str | None = None,
    ) -> None:
        connector = DaemonConnector(control_maddr)
        self.control = ControlClient(connector, listen_maddr)
        self.connmgr = ConnectionManagerClient(connector)
        self.dht = DHTClient(connector)
        self.pubsub = PubSubClient(connector)
        # p2pclient's client has no such attribute, but inherited methods use it.
        self.unary = UnaryClient(connector)

    if TYPE_CHECKING:
        # The connector's types determine what these return.

        @property
        def control_maddr(self) -> Multiaddr: ...  # type: ignore[override]

        @property
        def listen_maddr(self) -> Multiaddr: ...  # type: ignore[override]

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

        async def dht_find_peer(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> PeerInfoLibP2P: ...

        def dht_find_peers_connected_to_peer(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> Results[PeerInfoLibP2P]: ...

        def dht_find_providers(  # type: ignore[override]
            self, content_id_bytes: bytes, count: int, *, timeout: float | None = None
        ) -> Results[PeerInfoLibP2P]: ...

        async def dht_get_public_key(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> crypto_pb.PublicKey: ...
