"""The hivemind that these modules replace, if it can be imported."""

from __future__ import annotations

import importlib
from types import ModuleType

from p2pclient_rs.compat.hivemind_copies import package_of

__all__ = ["PACKAGE", "import_bindings"]

#: The import name of that hivemind: ``hivemind``, or the name of a copy.
PACKAGE = package_of(__name__.rpartition(".")[0])


def import_bindings(module: str) -> ModuleType | None:
    """Imports a module of hivemind's bindings; returns None if it or torch is not installed."""
    try:
        return importlib.import_module(f"{PACKAGE}.p2p.p2p_daemon_bindings.{module}")
    except ImportError:
        return None
