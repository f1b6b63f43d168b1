"""The swap: after ``install()``, ``import p2pclient`` gives this package's dialect of it.

Nothing is copied, patched or imported ahead of time. A finder in front of ``sys.meta_path`` answers
for the names taken over, and what it answers with is the dialect's own module object, so that a
class is one class under both names.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["InstallReport", "Replacement", "install", "uninstall"]

# Each package taken over, and the one that stands in for it.
_TARGETS = {"p2pclient": "p2pclient_rs.p2pclient"}


@dataclass(frozen=True)
class Replacement:
    """One package taken over by ``install()``.

    Attributes:
        name: The package's import name.
        dialect: The package that stands in for it.
        original: The file of the original; None if it is not installed.
        imported: Its modules that were already imported. Whoever holds objects of theirs keeps
            the original's: call ``install()`` before such imports.
    """

    name: str
    dialect: str
    original: str | None
    imported: tuple[str, ...]

    def __str__(self) -> str:
        notes = [f"original: {self.original}" if self.original else "original not installed"]
        if self.imported:
            notes.append(f"already imported: {', '.join(self.imported)}")
        return f"{self.name} -> {self.dialect} ({'; '.join(notes)})"


@dataclass(frozen=True, repr=False)
class InstallReport:
    """What ``install()`` replaced, one entry a package."""

    replaced: tuple[Replacement, ...]

    def __repr__(self) -> str:
        return f"<InstallReport {', '.join(map(str, self.replaced))}>"


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name, dot, rest = fullname.partition(".")
        if name not in _TARGETS:
            return None
        # Imports at most the parent, which has been imported under its other name already.
        real = importlib.util.find_spec(_TARGETS[name] + dot + rest)
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return ModuleSpec(
            fullname, _AliasLoader(fullname, real.name), origin=real.origin, is_package=is_package
        )


class _AliasLoader(Loader):
    """Loads a module by giving the import system one that goes by another name."""

    def __init__(self, alias: str, real_name: str) -> None:
        self._alias = alias
        self._real_name = real_name
        self._real_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name)
        self._real_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put the alias's spec on it, with which reload() would fail.
        module.__spec__ = self._real_spec
        # Importing a package of the original leaves what it imports of itself in sys.modules.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(f"{self._real_name}.") and not _is_being_imported(loaded):
                sys.modules.setdefault(self._alias + name[len(self._real_name) :], loaded)


@dataclass(frozen=True)
class _State:
    report: InstallReport
    finder: _Finder
    originals: dict[str, ModuleType]


_lock = threading.Lock()
_state: _State | None = None


def install() -> InstallReport:
    """Makes ``import p2pclient``, and every submodule of it, give this package's dialect.

    It does not matter whether the original is installed or was imported before; `uninstall` undoes
    it. It holds for this process and for those forked from it. A process started afresh (the
    ``spawn`` and ``forkserver`` methods of ``multiprocessing``) has to call it too. Calling it
    again does nothing.

    Returns:
        What was replaced.
    """
    global _state
    with _lock:
        if _state is None:
            originals = {name: m for name, m in list(sys.modules.items()) if _is_taken_over(name)}
            report = InstallReport(
                tuple(
                    Replacement(
                        name,
                        dialect,
                        _origin(name),
                        tuple(sorted(n for n in originals if n.partition(".")[0] == name)),
                    )
                    for name, dialect in _TARGETS.items()
                )
            )
            _state = _State(report, _Finder(), originals)
            sys.meta_path.insert(0, _state.finder)
            for name in originals:
                sys.modules.pop(name, None)
        return _state.report


def uninstall() -> None:
    """Undoes `install`: from then on the names mean what they meant before.

    Modules of the original that had been imported before `install` are put back as they were.
    Without an `install` before, does nothing.
    """
    global _state
    with _lock:
        if _state is None:
            return
        sys.meta_path.remove(_state.finder)
        for name in list(sys.modules):
            if _is_taken_over(name):
                del sys.modules[name]
        sys.modules.update(_state.originals)
        _state = None


def _is_taken_over(name: str) -> bool:
    return name.partition(".")[0] in _TARGETS


def _is_being_imported(module: ModuleType) -> bool:
    # By another thread: whoever finds it in sys.modules under another name would not wait.
    return bool(getattr(module.__spec__, "_initializing", False))


def _origin(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported, but by something that gave it no spec
        return None
    return spec.origin if spec else None
