"""Requests to the DHT."""

from p2pclient_rs.compat.p2pclient.control import DaemonConnector
from p2pclient_rs.compat.p2pclient.datastructures import PeerInfo
from p2pclient_rs.compat.p2pclient.exceptions import ControlFailure
from p2pclient_rs.compat.p2pclient.libp2p_stubs.crypto.pb import crypto_pb2 as crypto_pb
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2 as p2pd_pb
from p2pclient_rs.compat.p2pclient.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from p2pclient_rs.dht import DHTClient

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
