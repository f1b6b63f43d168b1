"""Requests to the connection manager."""

from p2pclient_rs.compat.p2pclient.control import DaemonConnector
from p2pclient_rs.compat.p2pclient.libp2p_stubs.peer.id import ID
from p2pclient_rs.compat.p2pclient.pb import p2pd_pb2 as p2pd_pb
from p2pclient_rs.compat.p2pclient.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
from p2pclient_rs.connmgr import ConnectionManagerClient

__all__ = [
    "ID",
    "ConnectionManagerClient",
    "DaemonConnector",
    "p2pd_pb",
    "raise_if_failed",
    "read_pbmsg_safe",
    "write_pbmsg",
]
