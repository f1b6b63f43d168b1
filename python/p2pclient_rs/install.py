"""The swap: after ``install()``, p2pclient and hivemind are this package's dialects of them.

One finder in front of ``sys.meta_path`` does all of it, and imports nothing ahead of time. The name
``p2pclient`` it answers for with the dialect's own module objects, so that a class is one class
under both names. hivemind stays itself: when its bindings are imported, and have run, their clients
are replaced in them. Processes that ``multiprocessing`` starts afresh know nothing of it: they are
sent word with the first thing that they are sent.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import _bootstrap
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = [
    "KNOWN_HIVEMIND",
    "InstallReport",
    "Replacement",
    "UnsupportedVersion",
    "install",
    "uninstall",
]

#: The hivemind releases whose bindings are the ones that this package stands in for.
KNOWN_HIVEMIND = ("1.1.10.post2", "1.1.11", "1.1.12")

# Checkouts of its repository say that they are 1.2.0.dev0, whatever is in them. These are the
# SHA-256 of control.py in all of them from the tag 1.1.10 to the tag 1.1.12.
_KNOWN_BINDINGS = (
    "a225696f1607e90ab785b9fc6e7e63ce02e2c96b1c3346bf7a1042c4eb46a79c",
    "785c696a036aa4b7f4082a952cb240c1f5c20674aed0ff23291c3c262da6905b",
    "669eacd31c67dfcc0ba500c98d10199adc0eff17170af65dfeec63291ccd7d4d",
    "e75429a88b5ee44391f7c25e593532b72cd7aace1d27abda878e88d8e4c6dbcf",
    "526366fef4a6a2c00ba5bceab3c3be7bbd1930e72a5bc53454cb9c12c4837255",
)

# The package taken over, and the one that stands in for it.
_ALIAS, _DIALECT = "p2pclient", "p2pclient_rs.p2pclient"
# The package with something to replace in it.
_HIVEMIND = "hivemind"

# The modules of hivemind with something to replace, and what stands in for them.
_BINDINGS = "hivemind.p2p.p2p_daemon_bindings"
_REPLACED = {
    f"{_BINDINGS}.control": ("p2pclient_rs.hivemind.control", ("ControlClient", "DaemonConnector")),
    f"{_BINDINGS}.p2pclient": ("p2pclient_rs.hivemind.p2pclient", ("Client",)),
}
# Where they may be known under names of their own.
_USERS = ("hivemind", "petals")

_SPAWN = "multiprocessing.spawn"


class UnsupportedVersion(ImportError):
    """hivemind is of a version whose bindings this package does not know how to replace.

    Raised by whatever imports its bindings while the swap is on, or by `install` if they were
    imported before.
    """


@dataclass(frozen=True)
class Replacement:
    """One package taken over by ``install()``.

    Attributes:
        name: The package's import name.
        dialect: The package that stands in for it.
        original: The file of the original; None if it is not installed.
        imported: Its modules that were already imported. Of p2pclient, whoever holds objects of
            theirs keeps the original's: call ``install()`` before such imports. Of hivemind, and of
            petals, those in which something was replaced; clients made before stay what they are.
        version: The version of the original, where that matters: hivemind's.
        refused: Why it is not replaced; None if it is. Importing its bindings fails for that
            reason.
    """

    name: str
    dialect: str
    original: str | None
    imported: tuple[str, ...]
    version: str | None = None
    refused: str | None = None

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        notes = [f"original: {self.original}" if self.original else "original not installed"]
        if self.imported:
            notes.append(f"already imported: {', '.join(self.imported)}")
        if self.refused:
            notes.append(f"refused: {self.refused}")
        return f"{self.name}{version} -> {self.dialect} ({'; '.join(notes)})"


@dataclass(frozen=True, repr=False)
class InstallReport:
    """What ``install()`` replaced, one entry a package."""

    replaced: tuple[Replacement, ...]

    def __repr__(self) -> str:
        return f"<InstallReport {', '.join(map(str, self.replaced))}>"


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._p2pclient = False
        self._after: dict[str, Callable[[ModuleType], object]] = {_SPAWN: _tell_children}

    def take_over(self, packages: set[str]) -> None:
        if _ALIAS in packages:
            self._p2pclient = True
        if _HIVEMIND in packages:
            self._after |= dict.fromkeys(_REPLACED, _replace_in)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._p2pclient and _is_taken_over(fullname):
            return self._alias(fullname)
        after = self._after.get(fullname)
        if after is None:
            return None
        if fullname in _REPLACED:
            refusal = _refusal(_folder_of(_HIVEMIND))
            if refusal:
                raise UnsupportedVersion(refusal, name=fullname)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None
            if find is not None and not isinstance(finder, _Finder):
                spec = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _LoaderWithSequel(spec.loader, after)
                return spec
        return None

    def _alias(self, fullname: str) -> ModuleSpec | None:
        # Imports at most the parent, which has been imported under its other name already.
        real = importlib.util.find_spec(_DIALECT + fullname[len(_ALIAS) :])
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


class _LoaderWithSequel(Loader):
    """Another loader, and something to do once it has loaded the module."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], object]) -> None:
        self._loader = loader
        self._after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module is to look as it would without us, to itself and to others.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module)


@dataclass
class _State:
    report: InstallReport
    finder: _Finder
    originals: dict[str, ModuleType]


_lock = threading.RLock()
_state: _State | None = None
# hivemind's classes and ours, both ways; they are the same ones as long as the process lives.
_ours: dict[type, type] = {}
_theirs: dict[type, type] = {}


def install(*, p2pclient: bool = True, hivemind: bool = True) -> InstallReport:
    """Makes p2pclient and hivemind use this package.

    From then on ``import p2pclient``, and every submodule of it, gives this package's dialect; and
    hivemind, and what is built on it as Petals is, talks to its daemons through the clients of
    `p2pclient_rs.hivemind`.

    It does not matter whether the originals are installed or were imported before; `uninstall`
    undoes it. It holds for this process, for those forked from it, and for those that
    ``multiprocessing`` starts from it by ``spawn`` or ``forkserver``. Other processes have to call
    it too, or be started below ``python -m p2pclient_rs run``. Calling it again does nothing, or
    adds what was not asked for before.

    Args:
        p2pclient: Whether p2pclient is replaced.
        hivemind: Whether hivemind's bindings are.

    Returns:
        What is replaced, by this call and those before.

    Raises:
        UnsupportedVersion: hivemind's bindings were imported before, and are not of a version in
            `KNOWN_HIVEMIND`. Nothing is changed then. If they were not, the report says so, and it
            is their import that raises this.
    """
    asked_for = {name for name, asked in ((_ALIAS, p2pclient), (_HIVEMIND, hivemind)) if asked}
    while (state := _install(asked_for)) is None:
        pass
    if hivemind:
        _replace_in_loaded(state)
    return state.report


def _install(packages: set[str]) -> _State | None:
    """Has the finder see to the packages; None if another thread came in between."""
    global _state
    # Before the lock is held: finding modules takes locks of the import system, and whoever has
    # those may call install().
    found = {name: _describe(name) for name in _missing(packages)}
    with _lock:
        new = _missing(packages)
        if not new <= found.keys():
            return None
        refused = found[_HIVEMIND].refused if _HIVEMIND in new else None
        if refused and not _REPLACED.keys().isdisjoint(sys.modules):
            raise UnsupportedVersion(refused, name=_BINDINGS)
        state = _state or _State(InstallReport(()), _Finder(), {})
        if _ALIAS in new:
            state.originals = {n: m for n, m in list(sys.modules.items()) if _is_taken_over(n)}
            imported = tuple(sorted(state.originals))
            found[_ALIAS] = replace(found[_ALIAS], imported=imported)
        if new:
            entries = {entry.name: entry for entry in state.report.replaced}
            entries |= {name: found[name] for name in new}
            names = (_ALIAS, _HIVEMIND)
            state.report = InstallReport(tuple(entries[n] for n in names if n in entries))
        state.finder.take_over(new)
        if _state is None:
            _state = state
            sys.meta_path.insert(0, state.finder)
            if _SPAWN in sys.modules:
                _tell_children(sys.modules[_SPAWN])
        if _ALIAS in new:
            for name in state.originals:
                sys.modules.pop(name, None)
        return state


def _missing(packages: set[str]) -> set[str]:
    """Those that are not replaced yet."""
    state = _state
    return packages - {entry.name for entry in (state.report.replaced if state else ())}


def _describe(name: str) -> Replacement:
    if name == _ALIAS:
        return Replacement(_ALIAS, _DIALECT, _origin(_ALIAS), ())
    folder = _folder_of(_HIVEMIND)
    origin = os.path.join(folder, "__init__.py") if folder else None
    refused = _refusal(folder) if folder else None
    version = _version_in(folder)
    return Replacement(_HIVEMIND, "p2pclient_rs.hivemind", origin, (), version, refused)


def uninstall() -> None:
    """Undoes `install`: from then on the names mean what they meant before.

    Modules of p2pclient that had been imported before `install` are put back as they were, and
    hivemind's bindings get their own clients back; clients made in between stay what they are.
    Without an `install` before, does nothing.
    """
    global _state
    with _lock:
        if _state is None:
            return
        state, _state = _state, None
        sys.meta_path.remove(state.finder)
        if any(replacement.name == _ALIAS for replacement in state.report.replaced):
            for name in list(sys.modules):
                if _is_taken_over(name):
                    del sys.modules[name]
            sys.modules.update(state.originals)
        _exchange(_theirs)
        if _SPAWN in sys.modules:
            _tell_children_no_more(sys.modules[_SPAWN])


# --- hivemind ---


def _replace_in_loaded(state: _State) -> None:
    """Replaces the clients in what was imported, or half imported, before the finder was there."""
    # Before the lock is held, since importing can make other threads call install().
    for name, (dialect, _) in _REPLACED.items():
        # Waits for a thread that is importing it.
        _bootstrap._lock_unlock_module(name)  # type: ignore[attr-defined]
        if name in sys.modules and not _refused(state):
            importlib.import_module(dialect)
    with _lock:
        if _state is not state or _refused(state):
            return
        for name in _REPLACED:
            module = sys.modules.get(name)
            # If it is being imported, that began after the finder was there, which sees to it.
            if module is not None and not _is_being_imported(module):
                _learn(module)
        changed = _exchange(_ours)
        if changed:
            state.report = InstallReport(
                tuple(
                    replace(entry, imported=tuple(sorted({*entry.imported, *changed})))
                    if entry.name == _HIVEMIND
                    else entry
                    for entry in state.report.replaced
                )
            )


def _refused(state: _State) -> bool:
    return any(entry.refused for entry in state.report.replaced)


def _replace_in(module: ModuleType) -> None:
    """Puts our classes in the place of those that a module of hivemind has just defined."""
    _learn(module)
    _exchange_in(module, _ours)


def _learn(module: ModuleType) -> None:
    dialect, names = _REPLACED[module.__name__]
    stand_in = importlib.import_module(dialect)
    for name in names:
        original, ours = getattr(module, name), getattr(stand_in, name)
        if original is not ours:
            _ours[original], _theirs[ours] = ours, original


def _exchange(exchanged: dict[type, type]) -> list[str]:
    """Replaces classes wherever hivemind and its users have them; says in which modules."""
    users = [item for item in list(sys.modules.items()) if item[0].partition(".")[0] in _USERS]
    return [name for name, module in users if _exchange_in(module, exchanged)]


def _exchange_in(module: ModuleType, exchanged: dict[type, type]) -> bool:
    changed = False
    for name, value in list(vars(module).items()) if isinstance(module, ModuleType) else ():
        for old, new in list(exchanged.items()):
            if value is old:
                setattr(module, name, new)
                changed = True
    return changed


def _refusal(folder: str | None) -> str | None:
    """Why the hivemind in a folder cannot be served; None if it can."""
    version = _version_in(folder)
    if version in KNOWN_HIVEMIND or _has_known_bindings(folder):
        return None
    return (
        f"p2pclient_rs does not know the bindings of hivemind {version or '(unknown version)'} "
        f"at {folder}, only those of {', '.join(KNOWN_HIVEMIND)}; to use hivemind with its own "
        "bindings, call install(hivemind=False) or do not call it"
    )


def _version_in(folder: str | None) -> str | None:
    """What the package in a folder says of its version, without importing it."""
    try:
        with open(os.path.join(folder or "", "__init__.py"), encoding="utf-8") as file:
            found = re.search(r"^__version__\s*=\s*[\"']([^\"']+)", file.read(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def _has_known_bindings(folder: str | None) -> bool:
    import hashlib

    try:
        with open(os.path.join(folder or "", "p2p/p2p_daemon_bindings/control.py"), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() in _KNOWN_BINDINGS
    except OSError:
        return False


def _folder_of(name: str) -> str | None:
    """Where a package is, or would be imported from."""
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.find_spec(name)
        folders = spec.submodule_search_locations if spec else None
    else:
        folders = getattr(module, "__path__", None)
    return next(iter(folders), None) if folders else None


# --- processes started afresh ---


class _Install:
    """Something that, unpickled, calls ``install()``."""

    def __init__(self, sys_path: list[str]) -> None:
        self._sys_path = sys_path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        packages = {} if _state is None else {r.name for r in _state.report.replaced}
        arguments = f"p2pclient={_ALIAS in packages}, hivemind={_HIVEMIND in packages}"
        # The path that the child is about to be given anyway: we may be found by it alone.
        code = f"import sys; sys.path = {self._sys_path!r}; import p2pclient_rs; "
        return exec, (f"{code}p2pclient_rs.install({arguments})",)


def _tell_children(module: ModuleType) -> None:
    """Has children that are started afresh, by spawn or forkserver, call ``install()`` before they
    import anything of the program's."""
    prepare = module.get_preparation_data
    if getattr(prepare, "_before", None) is not None:
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = prepare(name)
        if _state is not None:
            data["p2pclient_rs"] = _Install(data.get("sys_path", sys.path))
        return data

    get_preparation_data._before = prepare  # type: ignore[attr-defined]
    module.get_preparation_data = get_preparation_data  # type: ignore[attr-defined]


def _tell_children_no_more(module: ModuleType) -> None:
    before = getattr(module.get_preparation_data, "_before", None)
    # If somebody has wrapped ours meanwhile it stays, and does nothing.
    if before is not None:
        module.get_preparation_data = before  # type: ignore[attr-defined]


# --- p2pclient ---


def _is_taken_over(name: str) -> bool:
    return name.partition(".")[0] == _ALIAS


def _is_being_imported(module: ModuleType) -> bool:
    # By another thread: whoever finds it in sys.modules under another name would not wait.
    return bool(getattr(module.__spec__, "_initializing", False))


def _origin(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # imported, but by something that gave it no spec
        return None
    return spec.origin if spec else None
