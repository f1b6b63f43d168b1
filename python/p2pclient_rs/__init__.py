"""The libp2p daemon's client and manager for asyncio, uvloop and trio, on a Rust core."""

import warnings as _warnings

from p2pclient_rs._native import (
    DEBUG_BUILD as _DEBUG_BUILD,
    Identity,
    InvalidMultiaddr,
    InvalidPeerID,
    Multiaddr,
    PeerID,
    PeerInfo,
    Protocol,
    ProtocolLookupError,
    PublicKey,
    PubsubMessage,
    StreamInfo,
    __version__,
    set_inplace_wake,
)
from p2pclient_rs.client import Client
from p2pclient_rs.compat.install import (
    CompatibilityWarning,
    InstallReport,
    UnknownVersionWarning,
    UnsupportedVersion,
    install,
    uninstall,
)
from p2pclient_rs.connector import DaemonConnector
from p2pclient_rs.connmgr import ConnectionManagerClient
from p2pclient_rs.control import ControlClient
from p2pclient_rs.daemon import Daemon
from p2pclient_rs.dht import DHTClient
from p2pclient_rs.exceptions import (
    AlreadyRegistered,
    ConnectionLost,
    ControlFailure,
    ControlTimeout,
    DaemonNotFound,
    DaemonRefused,
    DaemonStartError,
    DaemonUnreachable,
    DispatchFailure,
    ForkedClientError,
    MessageTooLarge,
    NotRegistered,
    NotSupported,
    P2PDaemonError,
    P2PHandlerError,
    ProtocolViolation,
)
from p2pclient_rs.opened_stream import OpenedStream
from p2pclient_rs.peerstore import PeerstoreClient
from p2pclient_rs.pubsub import PubSubClient
from p2pclient_rs.results import Results
from p2pclient_rs.stream import IncompleteRead, Stream, StreamAttribute
from p2pclient_rs.subscription import Subscription
from p2pclient_rs.unary import UnaryClient

if _DEBUG_BUILD:
    _warnings.warn(
        "p2pclient_rs was built without optimisation: do not measure it",
        RuntimeWarning,
        stacklevel=2,
    )

#: p2pclient's name for ``PeerID``.
ID = PeerID

__all__ = [
    "ID",
    "AlreadyRegistered",
    "Client",
    "CompatibilityWarning",
    "ConnectionLost",
    "ConnectionManagerClient",
    "ControlClient",
    "ControlFailure",
    "ControlTimeout",
    "DHTClient",
    "Daemon",
    "DaemonConnector",
    "DaemonNotFound",
    "DaemonRefused",
    "DaemonStartError",
    "DaemonUnreachable",
    "DispatchFailure",
    "ForkedClientError",
    "Identity",
    "IncompleteRead",
    "InstallReport",
    "InvalidMultiaddr",
    "InvalidPeerID",
    "MessageTooLarge",
    "Multiaddr",
    "NotRegistered",
    "NotSupported",
    "OpenedStream",
    "P2PDaemonError",
    "P2PHandlerError",
    "PeerID",
    "PeerInfo",
    "PeerstoreClient",
    "Protocol",
    "ProtocolLookupError",
    "ProtocolViolation",
    "PubSubClient",
    "PublicKey",
    "PubsubMessage",
    "Results",
    "Stream",
    "StreamAttribute",
    "StreamInfo",
    "Subscription",
    "UnaryClient",
    "UnknownVersionWarning",
    "UnsupportedVersion",
    "__version__",
    "install",
    "set_inplace_wake",
    "uninstall",
]
