"""The client: every request of the protocol, and the listener for inbound streams."""

from multiaddr import Multiaddr

from p2pclient_rs import client
from p2pclient_rs.p2pclient.connmgr import ConnectionManagerClient
from p2pclient_rs.p2pclient.control import ControlClient, DaemonConnector, StreamHandler
from p2pclient_rs.p2pclient.datastructures import PeerInfo, StreamInfo
from p2pclient_rs.p2pclient.dht import DHTClient
from p2pclient_rs.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as crypto_pb
from p2pclient_rs.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.p2pclient.pubsub import PubSubClient

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
        control_maddr: The daemon's control socket; ``config.control_maddr_str`` if None.
        listen_maddr: Where inbound streams come in; ``config.listen_maddr_str`` if None.
    """

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
