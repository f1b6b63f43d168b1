"""hivemind's bindings without the rest of hivemind, which needs torch. It imports nothing more, as
the time that they take to import is measured, too."""

import sys
from types import ModuleType


def load_hivemind(folder: str) -> None:
    """Makes `import hivemind.p2p.p2p_daemon_bindings` find what is unpacked there: the packages
    above it are given empty `__init__`s."""
    for name in ("hivemind", "hivemind.p2p", "hivemind.utils"):
        module = ModuleType(name)
        module.__path__ = ["/".join((folder, *name.split(".")))]
        sys.modules[name] = module
