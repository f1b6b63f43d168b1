"""Loads hivemind's bindings without the rest of hivemind, which needs torch. Imports nothing else,
so that importing.py measures only the bindings."""

import sys
from types import ModuleType


def load_hivemind(folder: str) -> None:
    """Makes `import hivemind.p2p.p2p_daemon_bindings` find the unpacked files, by replacing the
    packages above it with empty ones."""
    for name in ("hivemind", "hivemind.p2p", "hivemind.utils"):
        module = ModuleType(name)
        module.__path__ = ["/".join((folder, *name.split(".")))]
        sys.modules[name] = module
