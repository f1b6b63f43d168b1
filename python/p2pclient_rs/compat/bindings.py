"""The bindings of one hivemind in this process, and the exchange of their classes for ours."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from importlib import _bootstrap
from types import ModuleType
from typing import Any

from p2pclient_rs.compat import hivemind_copies
from p2pclient_rs.compat.versions import UnsupportedVersion, missing_names

__all__ = ["Bindings", "bindings_of", "is_being_imported"]

#: Packages that are built on hivemind, and import its bindings under names of their own.
_USERS = ("hivemind", "petals")

#: Class attributes of the layer's ``ControlClient``, set by the arguments of ``install()``.
LIMITS = ("DEFAULT_MAX_UNANSWERED", "DEFAULT_MAX_UNANSWERED_BYTES")

_all: dict[str, Bindings] = {}


def bindings_of(package: str) -> Bindings:
    """The bindings of a package, one object for as long as the process lives.

    The caller holds the lock of ``install()``.
    """
    if package not in _all:
        _all[package] = Bindings(package)
    return _all[package]


class Bindings:
    """The modules of a hivemind's bindings, and what takes the place of their classes.

    Args:
        package: The name of hivemind, or of a copy.

    Attributes:
        package: The same.
        modules: The names of the modules in which classes are replaced.
        p2p_daemon: The name of the module with hivemind's ``P2P``.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.p2p_daemon = f"{package}.p2p.p2p_daemon"
        folder = f"{package}.p2p.p2p_daemon_bindings"
        self._replaced = {
            f"{folder}.control": ("control", ("ControlClient", "DaemonConnector")),
            f"{folder}.p2pclient": ("p2pclient", ("Client",)),
        }
        self.modules = tuple(self._replaced)
        # The original classes and ours, both ways.
        self._ours: dict[type, type] = {}
        self._theirs: dict[type, type] = {}
        self._limits: dict[str, Any] = {}
        self._limits_before: dict[str, Any] = {}

    def load_layer(self) -> None:
        """Imports what replaces the modules that are imported; waits for threads that import them.

        The caller does not hold the lock: importing can make other threads call ``install()``.
        """
        _bootstrap._lock_unlock_module(self.p2p_daemon)  # type: ignore[attr-defined]
        for name, (module, _) in self._replaced.items():
            _bootstrap._lock_unlock_module(name)  # type: ignore[attr-defined]
            if name in sys.modules:
                hivemind_copies.load(self.package, module)

    def check_loaded(self) -> None:
        """Raises UnsupportedVersion if a module that is imported lacks a class to replace."""
        for name in self.modules:
            module = sys.modules.get(name)
            if module is not None and not is_being_imported(module):
                _check(module, name)

    def learn(self, module: ModuleType, name: str) -> None:
        """Notes the original classes of a module of the bindings.

        Args:
            module: The module, which has run.
            name: The name that it was imported by.

        Raises:
            UnsupportedVersion: It lacks one of the classes.
        """
        _check(module, name)
        stand_in, classes = self._replaced[name]
        layer = hivemind_copies.load(self.package, stand_in)
        self._set_limits()
        for attribute in classes:
            original, ours = getattr(module, attribute), getattr(layer, attribute)
            if original is not ours:
                self._ours[original], self._theirs[ours] = ours, original

    def replace_in(self, module: ModuleType) -> None:
        """Puts our classes into a module."""
        _exchange_in(module, self._ours)

    def replace_everywhere(self) -> list[str]:
        """Puts our classes into every module of hivemind and its users; returns which changed.

        Those that are being imported are left alone if they run after the import hook was there,
        which sees to them.
        """
        for name in self.modules:
            module = sys.modules.get(name)
            if module is not None and not is_being_imported(module):
                self.learn(module, name)
        return self._exchange(self._ours)

    def restore_everywhere(self) -> None:
        """Undoes `replace_everywhere`, and `limit`."""
        self._exchange(self._theirs)
        self._limits = {}
        self._set_limits()

    def limit(self, calls: int | None, size: int | None) -> None:
        """Sets the default limits of the layer's clients; None leaves one as it is."""
        wanted = dict(zip(LIMITS, (calls, size), strict=True))
        self._limits |= {name: value for name, value in wanted.items() if value is not None}
        self._set_limits()

    def _set_limits(self) -> None:
        layer: Any = sys.modules.get(f"{hivemind_copies.layer_of(self.package)}.control")
        client = getattr(layer, "ControlClient", None)
        if client is None:
            return  # once it is imported
        for name in LIMITS:
            if name in self._limits:
                self._limits_before.setdefault(name, client.__dict__.get(name, client))
                setattr(client, name, self._limits[name])
            elif name in self._limits_before:
                before = self._limits_before.pop(name)
                if before is client:  # it had none
                    delattr(client, name)
                else:
                    setattr(client, name, before)

    def _exchange(self, classes: dict[type, type]) -> list[str]:
        users = {*_USERS, self.package.partition(".")[0]}
        return [name for name, module in _loaded(users) if _exchange_in(module, classes)]


def is_being_imported(module: ModuleType) -> bool:
    """Whether a module of ``sys.modules`` has not run to its end yet."""
    # By another thread: a lookup in sys.modules under another name would not wait for it.
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


def _exchange_in(module: ModuleType, classes: dict[type, type]) -> bool:
    changed = False
    for name, value in list(vars(module).items()):
        for old, new in list(classes.items()):
            if value is old:
                setattr(module, name, new)
                changed = True
    return changed
