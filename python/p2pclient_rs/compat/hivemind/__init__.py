"""hivemind's ``p2p_daemon_bindings``, module for module, on this package's classes.

What goes in and comes out is hivemind's own: its ``PeerID``, ``PeerInfo``, ``StreamInfo`` and
``Multiaddr``, and exceptions that are both its and this package's. Where hivemind cannot be
imported, for want of itself or of torch, they are this package's alone. Import it as it is, or
call `p2pclient_rs.install` to have hivemind use it.

The modules import each other by relative names only: `p2pclient_rs.compat.hivemind_copies` imports
the same files a second time for a copy of hivemind under another name.
"""

from .original import import_bindings

# Imports all of hivemind before a module here imports a part of it. If hivemind is importing this
# package, that part is loaded already.
import_bindings("datastructures")

from .datastructures import PeerID, PeerInfo  # noqa: E402
from .p2pclient import Client  # noqa: E402
from .utils import P2PDaemonError, P2PHandlerError  # noqa: E402

__all__ = ["Client", "P2PDaemonError", "P2PHandlerError", "PeerID", "PeerInfo"]
