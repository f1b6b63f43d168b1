"""p2pclient 0.3.0's API, module for module, on this package's classes.

Unlike `p2pclient_rs.Client`, it returns the ecosystem's types: ``multiaddr.Multiaddr``, protobuf
messages, and p2pclient's ``PeerInfo`` and ``StreamInfo``. Import it directly, or call
`p2pclient_rs.install` to import it under p2pclient's name.
"""

from p2pclient_rs.compat.p2pclient._extra import missing_dependency

try:
    import google.protobuf  # noqa: F401
    import multiaddr  # noqa: F401
except ImportError as _error:
    raise missing_dependency(_error) from _error

from p2pclient_rs.compat.p2pclient._version import __version__
from p2pclient_rs.compat.p2pclient.exceptions import ControlFailure, DispatchFailure
from p2pclient_rs.compat.p2pclient.p2pclient import Client

__all__ = ["Client", "ControlFailure", "DispatchFailure", "__version__", "name"]

name = "p2pclient"
