"""hivemind's ``p2p_daemon_bindings``, module for module, on this package's classes.

They take and return hivemind's own ``PeerID``, ``PeerInfo``, ``StreamInfo`` and ``Multiaddr``, and
raise exceptions that are both hivemind's and this package's. Where hivemind cannot be imported,
because it or torch is not installed, these are this package's alone. Import it directly, or call
`p2pclient_rs.install` to make hivemind use it.

The modules import each other by relative names only, because
`p2pclient_rs.compat.hivemind_copies` imports the same files again for a copy of hivemind.
"""

from .original import import_bindings

# Imports all of hivemind before a module here imports a part of it. If hivemind is importing this
# package, that part is loaded already.
import_bindings("datastructures")

from .datastructures import PeerID, PeerInfo  # noqa: E402
from .p2pclient import Client  # noqa: E402
from .utils import P2PDaemonError, P2PHandlerError  # noqa: E402

__all__ = ["Client", "P2PDaemonError", "P2PHandlerError", "PeerID", "PeerInfo"]
