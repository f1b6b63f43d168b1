"""hivemind's ``p2p_daemon_bindings``, module for module, on this package's classes.

The modules take and return hivemind's own ``PeerID``, ``PeerInfo``, ``StreamInfo`` and
``Multiaddr``, and raise exceptions that are both hivemind's and this package's. If hivemind cannot
be imported, because it or torch is not installed, they use this package's types and exceptions
alone. Import this package directly, or call `p2pclient_rs.install` to make hivemind use it.

The modules import each other by relative names only, because
`p2pclient_rs.compat.hivemind_copies` imports the same files again for a copy of hivemind.
"""

from .original import import_bindings

# Import all of hivemind first, since the modules here import parts of it. If hivemind is importing
# this package, those parts are already loaded.
import_bindings("datastructures")

from .datastructures import PeerID, PeerInfo  # noqa: E402
from .p2pclient import Client  # noqa: E402
from .utils import P2PDaemonError, P2PHandlerError  # noqa: E402

__all__ = ["Client", "P2PDaemonError", "P2PHandlerError", "PeerID", "PeerInfo"]
