"""The swap: after ``install()``, p2pclient and hivemind are this package's layers for them.

One import hook does all of it, and imports nothing ahead of time. For the name ``p2pclient`` it
returns this package's own module objects, so that a class is one class under both names. hivemind
stays itself: once its bindings are imported, their clients are replaced in them.

The parts are in ``swap``: the check of versions, the import hook, the exchange of classes, the
reconnection of hivemind's ``P2P``, and the data for processes started from here.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from p2pclient_rs.compat import hivemind_copies, reconnect as reconnection, subprocesses
from p2pclient_rs.compat.bindings import Bindings, bindings_of
from p2pclient_rs.compat.finder import ALIAS, REAL, Finder, is_alias
from p2pclient_rs.compat.versions import (
    KNOWN_HIVEMIND,
    KNOWN_P2PCLIENT,
    CompatibilityWarning,
    Original,
    UnknownVersionWarning,
    UnsupportedVersion,
    examine_hivemind,
    examine_p2pclient,
)

__all__ = [
    "KNOWN_HIVEMIND",
    "KNOWN_P2PCLIENT",
    "CompatibilityWarning",
    "InstallReport",
    "Replacement",
    "UnknownVersionWarning",
    "UnsupportedVersion",
    "install",
    "uninstall",
]

_HIVEMIND = "hivemind"


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
        version: The version of the original, if it is installed and says so.
        refused: Why it is not replaced; None if it is. Importing p2pclient, or hivemind's bindings,
            fails for that reason.
        warning: What a program may notice of the replacement: differences of p2pclient 0.2, or that
            the version is unknown and replaced because of ``force``. None if nothing.
        differs: The files of hivemind's bindings that are not those of a known version.
    """

    name: str
    dialect: str
    original: str | None
    imported: tuple[str, ...]
    version: str | None = None
    refused: str | None = None
    warning: str | None = None
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        notes = [f"original: {self.original}" if self.original else "original not installed"]
        if self.imported:
            notes.append(f"already imported: {', '.join(self.imported)}")
        if self.refused:
            notes.append(f"refused: {self.refused}")
        if self.warning:
            notes.append(f"warning: {self.warning}")
        return f"{self.name}{version} -> {self.dialect} ({'; '.join(notes)})"


@dataclass(frozen=True, repr=False)
class InstallReport:
    """What ``install()`` replaced, one entry a package."""

    replaced: tuple[Replacement, ...]

    def __repr__(self) -> str:
        return f"<InstallReport {', '.join(map(str, self.replaced))}>"


@dataclass(frozen=True)
class _Wish:
    """The options of a package, of one call of ``install()`` or several."""

    force: bool = False
    reconnect: bool = False
    max_unanswered_calls: int | None = None
    max_unanswered_bytes: int | None = None

    def and_then(self, later: _Wish) -> _Wish:
        calls, size = later.max_unanswered_calls, later.max_unanswered_bytes
        return _Wish(
            self.force or later.force,
            self.reconnect or later.reconnect,
            self.max_unanswered_calls if calls is None else calls,
            self.max_unanswered_bytes if size is None else size,
        )


@dataclass
class _State:
    report: InstallReport = InstallReport(())
    finder: Finder = field(default_factory=Finder)
    wishes: dict[str, _Wish] = field(default_factory=dict)
    # The modules of p2pclient that were imported before.
    originals: dict[str, ModuleType] = field(default_factory=dict)
    # The packages as they were found; and the warnings that were given.
    found: dict[str, Original] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def bindings(self) -> list[Bindings]:
        """Those of hivemind and its copies that were asked for."""
        return [bindings_of(name) for name in self.wishes if name != ALIAS]

    def entry(self, name: str) -> Replacement | None:
        return next((entry for entry in self.report.replaced if entry.name == name), None)

    def set_entry(self, entry: Replacement) -> None:
        entries = {**{each.name: each for each in self.report.replaced}, entry.name: entry}
        # p2pclient first, then hivemind, then its copies.
        names = sorted(entries, key=lambda name: (name != ALIAS, name != _HIVEMIND))
        self.report = InstallReport(tuple(entries[name] for name in names))


_lock = threading.RLock()
_state: _State | None = None


def install(
    *,
    p2pclient: bool = True,
    hivemind: bool = True,
    hivemind_package: str = _HIVEMIND,
    force: bool = False,
    reconnect: bool = False,
    max_unanswered_calls: int | None = None,
    max_unanswered_bytes: int | None = None,
) -> InstallReport:
    """Makes p2pclient and hivemind use this package.

    From then on ``import p2pclient``, and every submodule of it, gives this package's layer; and
    hivemind, and what is built on it as Petals is, talks to its daemons through the clients of
    `p2pclient_rs.compat.hivemind`.

    It does not matter whether the originals are installed or were imported before; `uninstall`
    undoes it. It holds for this process, for those forked from it, and for those that
    ``multiprocessing`` starts from it by ``spawn`` or ``forkserver``. Other processes have to call
    it too, or be started below ``python -m p2pclient_rs run``. Calling it again does nothing, or
    adds what was not asked for before.

    Args:
        p2pclient: Whether p2pclient is replaced.
        hivemind: Whether hivemind's bindings are.
        hivemind_package: The import name of hivemind, such as ``"fork.vendor.hivemind"`` for a copy
            in another package. Call ``install()`` once for each copy that a process uses.
        force: Replaces unknown versions as well, with an `UnknownVersionWarning` that names what
            differs. hivemind's bindings are refused all the same if they lack a class that is
            replaced or that the replacement uses.
        reconnect: Reconnects each ``P2P`` that is created from now on to its ``initial_peers`` when
            it has lost all of its peers. Its connections are looked at every 15 seconds; attempts
            are repeated after pauses that grow from 1 to 60 seconds, and are logged to
            ``p2pclient_rs.compat.hivemind``. Not for those made by ``P2P.replicate``.
        max_unanswered_calls: How many incoming unary calls each client of hivemind's handles at
            once; None leaves the default.
        max_unanswered_bytes: How many bytes the payloads of those calls may have together; None
            leaves the default.

    Returns:
        What is replaced, by this call and those before.

    Raises:
        UnsupportedVersion: p2pclient, or hivemind's bindings, were imported before, and are not of
            a version in `KNOWN_P2PCLIENT` or `KNOWN_HIVEMIND`. Nothing is changed then. If they
            were not, the report says so, and it is their import that raises this.
        ValueError: ``hivemind_package`` cannot be the name of a package, or is given together with
            ``hivemind=False``; a limit is negative.
    """
    _check_package(hivemind_package, hivemind)
    _check_limit("max_unanswered_calls", max_unanswered_calls)
    _check_limit("max_unanswered_bytes", max_unanswered_bytes)
    wishes: dict[str, _Wish] = {}
    if p2pclient:
        wishes[ALIAS] = _Wish(force)
    if hivemind:
        wishes[hivemind_package] = _Wish(
            force, reconnect, max_unanswered_calls, max_unanswered_bytes
        )
    state = _install(wishes)
    _warn(state, wishes, stacklevel=3)
    return state.report


def adopt(calls: Iterable[dict[str, Any]]) -> None:
    """Calls ``install()`` in a process whose parent did, and has seen the warnings.

    Args:
        calls: The arguments of the calls.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompatibilityWarning)
        for arguments in calls:
            install(**arguments)


def _check_package(name: str, hivemind: bool) -> None:
    if not isinstance(name, str):
        raise TypeError(f"hivemind_package is the name of a package, not {name!r}")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"hivemind_package cannot be {name!r}")
    if name.partition(".")[0] in (ALIAS, "p2pclient_rs"):
        raise ValueError(f"hivemind_package cannot be in {name.partition('.')[0]}")
    if not hivemind and name != _HIVEMIND:
        raise ValueError("hivemind_package is given, but hivemind=False")


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and not limit >= 0:  # NaN, too
        raise ValueError(f"{name} cannot be {limit}")


def _install(wishes: dict[str, _Wish]) -> _State:
    while (state := _add(wishes)) is None:
        pass
    for name in wishes:
        if name != ALIAS:
            _replace_in_loaded(state, name)
    return state


def _add(wishes: dict[str, _Wish]) -> _State | None:
    """Adds the wishes to the state, and to the import hook; None if another thread came between."""
    global _state
    # Before the lock is held: finding modules takes locks of the import system, and whoever has
    # those may call install().
    found = {name: _examine(name, wish) for name, wish in _new(wishes).items()}
    with _lock:
        new = _new(wishes)
        if not new.keys() <= found.keys():
            return None
        for name in new:
            _check_imported(name, found[name])
        state = _state or _State()
        for name in new:
            state.found[name] = found[name]
            if name == ALIAS:
                state.originals = {n: m for n, m in list(sys.modules.items()) if is_alias(n)}
            imported = tuple(sorted(state.originals)) if name == ALIAS else ()
            state.set_entry(_entry(found[name], imported))
        for name, wish in wishes.items():
            state.wishes[name] = state.wishes.get(name, _Wish()).and_then(wish)
            _set_hooks(state, name)
        if _state is None:
            _state = state
            sys.meta_path.insert(0, state.finder)
            if subprocesses.SPAWN in sys.modules:
                subprocesses.tell_children(sys.modules[subprocesses.SPAWN], _calls)
        if ALIAS in new:
            for name in state.originals:
                sys.modules.pop(name, None)
        return state


def _new(wishes: dict[str, _Wish]) -> dict[str, _Wish]:
    """The packages that are not replaced yet, or were refused and are now forced."""
    state = _state
    new = {}
    for name, wish in wishes.items():
        entry = state.entry(name) if state else None
        if entry is None or (entry.refused and wish.force):
            new[name] = wish
    return new


def _examine(name: str, wish: _Wish) -> Original:
    return examine_p2pclient(wish.force) if name == ALIAS else examine_hivemind(name, wish.force)


def _check_imported(name: str, found: Original) -> None:
    """Raises UnsupportedVersion if a package is imported already and cannot be replaced."""
    modules = (ALIAS,) if name == ALIAS else bindings_of(name).modules
    if found.refused and not set(modules).isdisjoint(sys.modules):
        raise UnsupportedVersion(found.refused, name=name)
    if name != ALIAS:
        bindings_of(name).check_loaded()


def _entry(found: Original, imported: tuple[str, ...]) -> Replacement:
    layer = REAL if found.name == ALIAS else hivemind_copies.layer_of(found.name)
    return Replacement(
        found.name,
        layer,
        found.file,
        imported,
        found.version,
        found.refused,
        found.warning,
        found.differs,
    )


def _set_hooks(state: _State, name: str) -> None:
    finder = state.finder
    finder.hook(subprocesses.SPAWN, lambda module: subprocesses.tell_children(module, _calls))
    if name == ALIAS:
        finder.replace_p2pclient(partial(_check_at_import, state, name))
        return
    bindings, wish = bindings_of(name), state.wishes[name]
    for module in bindings.modules:
        finder.hook(
            module,
            partial(_replace_in, bindings, module),
            before=partial(_check_at_import, state, name),
        )
    if wish.reconnect:
        finder.hook(bindings.p2p_daemon, _reconnect)
    bindings.limit(wish.max_unanswered_calls, wish.max_unanswered_bytes)


def _check_at_import(state: _State, name: str) -> None:
    """Raises UnsupportedVersion if the package about to be imported cannot be replaced."""
    # Again, since it may be found elsewhere than when install() was called.
    found = _examine(name, state.wishes[name])
    if found.refused:
        raise UnsupportedVersion(found.refused, name=name)
    _warn_once(state, found, stacklevel=3)


def _replace_in(bindings: Bindings, name: str, module: ModuleType) -> None:
    """Puts our classes in the place of those that a module of hivemind has just defined."""
    bindings.learn(module, name)
    bindings.replace_in(module)


def _reconnect(module: ModuleType) -> None:
    try:
        reconnection.wrap(module)
    except AttributeError as error:
        warnings.warn(
            f"{module.__name__} is not as in hivemind, so that its P2P is not reconnected: {error}",
            UnknownVersionWarning,
            stacklevel=2,
        )


def _replace_in_loaded(state: _State, name: str) -> None:
    """Replaces the clients in modules that were imported, at least in part, before the hook."""
    entry = state.entry(name)
    if entry is None or entry.refused:
        return
    # Before the lock is held, since importing can make other threads call install().
    bindings = bindings_of(name)
    bindings.load_layer()
    with _lock:
        if _state is not state:
            return
        changed = bindings.replace_everywhere()
        entry = state.entry(name)
        if changed and entry is not None:
            imported = tuple(sorted({*entry.imported, *changed}))
            state.set_entry(replace(entry, imported=imported))
        p2p_daemon = sys.modules.get(bindings.p2p_daemon)
        if state.wishes[name].reconnect and hasattr(p2p_daemon, "P2P"):
            _reconnect(sys.modules[bindings.p2p_daemon])


def _warn(state: _State, wishes: Iterable[str], stacklevel: int) -> None:
    for name in wishes:
        _warn_once(state, state.found[name], stacklevel + 1)


def _warn_once(state: _State, found: Original, stacklevel: int) -> None:
    if found.warning and not found.refused and found.warning not in state.warned:
        state.warned.add(found.warning)
        category = UnknownVersionWarning if found.unknown else CompatibilityWarning
        warnings.warn(found.warning, category, stacklevel=stacklevel)


def _calls() -> list[dict[str, Any]]:
    """The arguments of the calls of ``install()`` that give a new process the same swap."""
    state = _state
    if state is None:
        return []
    calls: list[dict[str, Any]] = []
    for name, wish in list(state.wishes.items()):
        if name == ALIAS:
            calls.append({"hivemind": False, "force": wish.force})
            continue
        # Options that were not given are left out; a limit of 0 was given.
        options = {
            option: value
            for option, value in vars(wish).items()
            if value is not None and value is not False
        }
        calls.append({"p2pclient": False, "hivemind_package": name, **options})
    return calls


def uninstall() -> None:
    """Undoes `install`: from then on the names mean what they meant before.

    Modules of p2pclient that had been imported before `install` are put back as they were, and
    hivemind's bindings get their own clients back; clients made in between stay what they are, and
    are no longer reconnected. Without an `install` before, does nothing.
    """
    global _state
    with _lock:
        if _state is None:
            return
        state, _state = _state, None
        sys.meta_path.remove(state.finder)
        if ALIAS in state.wishes:
            for name in list(sys.modules):
                if is_alias(name):
                    del sys.modules[name]
            sys.modules.update(state.originals)
        for bindings in state.bindings():
            bindings.restore_everywhere()
        reconnection.restore()
        if subprocesses.SPAWN in sys.modules:
            subprocesses.forget_children(sys.modules[subprocesses.SPAWN])
