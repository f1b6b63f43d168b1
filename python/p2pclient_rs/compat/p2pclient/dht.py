"""Requests to the DHT."""

from typing import TYPE_CHECKING

from p2pclient_rs import dht
from p2pclient_rs.compat.p2pclient.control import DaemonConnector
from p2pclient_rs.compat.p2pclient.datastructures import PeerInfo, PeerInfoLibP2P
from p2pclient_rs.compat.p2pclient.exceptions import ControlFailure
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as crypto_pb
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2 as p2pd_pb
from p2pclient_rs.compat.p2pclient.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from p2pclient_rs.results import Results

__all__ = [
    "ID",
    "ControlFailure",
    "DHTClient",
    "DaemonConnector",
    "PeerInfo",
    "crypto_pb",
    "p2pd_pb",
    "raise_if_failed",
    "read_pbmsg_safe",
    "write_pbmsg",
]


class DHTClient(dht.DHTClient):
    """Requests to the DHT.

    Args:
        daemon_connector: Connects to the daemon.
    """

    if TYPE_CHECKING:
        # The connector's types determine what these return.

        async def find_peer(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> PeerInfoLibP2P: ...

        def find_peers_connected_to_peer(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> Results[PeerInfoLibP2P]: ...

        def find_providers(  # type: ignore[override]
            self, content_id_bytes: bytes, count: int, *, timeout: float | None = None
        ) -> Results[PeerInfoLibP2P]: ...

        async def get_public_key(  # type: ignore[override]
            self, peer_id: ID, *, timeout: float | None = None
        ) -> crypto_pb.PublicKey: ...
