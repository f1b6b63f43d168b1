"""The bindings of one hivemind in this process, and the replacement of their classes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib import _bootstrap
from types import ModuleType
from typing import Any

from p2pclient_rs.compat import hivemind_copies
from p2pclient_rs.compat.versions import UnsupportedVersion, missing_names

__all__ = ["Bindings", "bindings_of", "is_being_imported"]

#: Packages whose modules import names from the bindings.
_USERS = ("hivemind", "petals")

#: Class attributes of the layer's ``ControlClient`` that ``install()`` sets from its arguments.
LIMITS = ("DEFAULT_MAX_UNANSWERED", "DEFAULT_MAX_UNANSWERED_BYTES")

_all: dict[str, Bindings] = {}


def bindings_of(package: str) -> Bindings:
    """Returns the ``Bindings`` of a package, the same object on each call.

    Caller must hold the lock of ``install()``.
    """
    if package not in _all:
        _all[package] = Bindings(package)
    return _all[package]


class Bindings:
    """The modules of hivemind's bindings, and the classes that replace those in them.

    Args:
        package: The import name of hivemind, or of a copy.

    Attributes:
        package: The import name, as given.
        modules: The names of the modules in which classes are replaced.
        p2p_daemon: The name of the module that defines hivemind's ``P2P``.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.p2p_daemon: str = f"{package}.p2p.p2p_daemon"
        folder = f"{package}.p2p.p2p_daemon_bindings"
        self._replaced = {
            f"{folder}.control": ("control", ("ControlClient", "DaemonConnector")),
            f"{folder}.p2pclient": ("p2pclient", ("Client",)),
        }
        self.modules: tuple[str, ...] = tuple(self._replaced)
        # Map original classes to ours, and ours to the originals.
        self._ours: dict[type, type] = {}
        self._originals: dict[type, type] = {}
        self._limits: dict[str, Any] = {}
        self._limits_before: dict[str, Any] = {}

    def load_layer(self) -> None:
        """Imports our counterpart of each module of the bindings that is already imported.

        If another thread is importing one of them, waits for that thread. Caller must not hold the
        lock of ``install()``, since the other thread may need it to finish its import.
        """
        _bootstrap._lock_unlock_module(self.p2p_daemon)  # type: ignore[attr-defined]
        for name, (module, _) in self._replaced.items():
            _bootstrap._lock_unlock_module(name)  # type: ignore[attr-defined]
            if name in sys.modules:
                hivemind_copies.load(self.package, module)

    def check_loaded(self) -> None:
        """Raises UnsupportedVersion if an imported module lacks a class to replace."""
        for name in self.modules:
            module = sys.modules.get(name)
            if module is not None and not is_being_imported(module):
                _check(module, name)

    def record_originals(self, module: ModuleType, name: str) -> None:
        """Records the original classes of a module of the bindings.

        Args:
            module: The module, after its code has run.
            name: Its import name.

        Raises:
            UnsupportedVersion: The module lacks one of the classes.
        """
        _check(module, name)
        own_module, classes = self._replaced[name]
        layer = hivemind_copies.load(self.package, own_module)
        self._set_limits()
        for attribute in classes:
            original, ours = getattr(module, attribute), getattr(layer, attribute)
            if original is not ours:
                self._ours[original], self._originals[ours] = ours, original

    def replace_in(self, module: ModuleType) -> None:
        """Puts our classes into a module."""
        _replace_values(module, self._ours)

    def replace_everywhere(self) -> list[str]:
        """Puts our classes into every module of hivemind and its users.

        Skips modules of the bindings that are still being imported: the import hook replaces
        their classes later.

        Returns:
            The names of the modules that changed.
        """
        for name in self.modules:
            module = sys.modules.get(name)
            if module is not None and not is_being_imported(module):
                self.record_originals(module, name)
        return self._replace_in_users(self._ours)

    def restore_everywhere(self) -> None:
        """Undoes `replace_everywhere` and `limit`."""
        self._replace_in_users(self._originals)
        self._limits = {}
        self._set_limits()

    def limit(self, calls: int | None, size: int | None) -> None:
        """Sets the default limits of the layer's clients; None leaves a limit as it is."""
        given = dict(zip(LIMITS, (calls, size), strict=True))
        self._limits |= {name: value for name, value in given.items() if value is not None}
        self._set_limits()

    def _set_limits(self) -> None:
        layer: Any = sys.modules.get(f"{hivemind_copies.layer_of(self.package)}.control")
        client = getattr(layer, "ControlClient", None)
        if client is None:
            return  # record_originals() calls this again once the layer is imported.
        for name in LIMITS:
            if name in self._limits:
                self._limits_before.setdefault(name, client.__dict__.get(name, client))
                setattr(client, name, self._limits[name])
            elif name in self._limits_before:
                before = self._limits_before.pop(name)
                if before is client:  # The class inherited it.
                    delattr(client, name)
                else:
                    setattr(client, name, before)

    def _replace_in_users(self, classes: dict[type, type]) -> list[str]:
        users = {*_USERS, self.package.partition(".")[0]}
        return [name for name, module in _loaded(users) if _replace_values(module, classes)]


def is_being_imported(module: ModuleType) -> bool:
    """Returns whether the code of a module in ``sys.modules`` is still running."""
    # It may run in another thread, and looking up an alias in sys.modules does not wait for that.
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _check(module: ModuleType, name: str) -> None:
    file = f"{name.rpartition('.')[2]}.py"
    missing = missing_names(module, file)
    if missing:
        raise UnsupportedVersion(
            f"p2pclient_rs cannot replace {name}: it has no {' and no '.join(missing)}", name=name
        )


def _loaded(packages: Iterable[str]) -> Iterator[tuple[str, ModuleType]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in packages and isinstance(module, ModuleType):
            yield name, module


def _replace_values(module: ModuleType, classes: dict[type, type]) -> bool:
    """Replaces classes in a module's globals. Returns whether it replaced any."""
    changed = False
    for name, value in list(vars(module).items()):
        for old, new in list(classes.items()):
            if value is old:
                setattr(module, name, new)
                changed = True
    return changed
