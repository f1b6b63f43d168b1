"""hivemind's ``p2p_daemon_bindings``, module for module, on this package's classes.

What goes in and comes out is hivemind's own: its ``PeerID``, ``PeerInfo``, ``StreamInfo`` and
``Multiaddr``, and exceptions that are both its and this package's. Where hivemind cannot be
imported, for want of itself or of torch, they are this package's alone. Import it as it is, or
call `p2pclient_rs.install` to have hivemind use it.
"""

try:
    # All of hivemind, before any module here asks for a part of it. If it is what imports this
    # package, that part is there already.
    import hivemind.p2p.p2p_daemon_bindings.datastructures  # noqa: F401
except ImportError:
    pass

from p2pclient_rs.hivemind.datastructures import PeerID, PeerInfo
from p2pclient_rs.hivemind.p2pclient import Client
from p2pclient_rs.hivemind.utils import P2PDaemonError, P2PHandlerError

__all__ = ["Client", "P2PDaemonError", "P2PHandlerError", "PeerID", "PeerInfo"]
