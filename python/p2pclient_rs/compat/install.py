"""``install()``: replaces p2pclient and hivemind's bindings by the API compatibility layers.

``install()`` adds an import hook, which imports nothing ahead of time. For the name ``p2pclient``,
the hook returns this package's own module objects, so that a class is the same under both names.
It imports hivemind unchanged, and then replaces the clients in hivemind's bindings.

The other modules of this folder check versions (``versions``), hook imports (``finder``), replace
classes (``bindings``), reconnect hivemind's ``P2P`` (``reconnect``), and activate the layers in
child processes (``subprocesses``).
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
from p2pclient_rs.compat.finder import P2PCLIENT, P2PCLIENT_LAYER, Finder, in_p2pclient
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
    """A package that ``install()`` replaces.

    Attributes:
        name: The package's import name.
        layer: The name of the API compatibility layer that replaces it.
        original: The original's file; None if it is not installed.
        imported: Modules that were imported before ``install()``. For p2pclient, all of its
            modules; code that imported names from them keeps the original's objects. For hivemind,
            the modules of hivemind and petals in which a class was replaced; existing clients do
            not change.
        version: The original's version, if it is installed and states one.
        refused: Why the package is not replaced; None if it is. Importing p2pclient, or hivemind's
            bindings, fails for this reason.
        warning: Differences that a program may notice: how the replacement differs from p2pclient
            0.2, or that ``force`` replaces an unknown version. None otherwise.
        differs: The files of hivemind's bindings whose contents are not those of a known version.
    """

    name: str
    layer: str
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
        return f"{self.name}{version} -> {self.layer} ({'; '.join(notes)})"


@dataclass(frozen=True, repr=False)
class InstallReport:
    """What ``install()`` replaces, with one entry for each package."""

    replaced: tuple[Replacement, ...]

    def __repr__(self) -> str:
        return f"<InstallReport {', '.join(map(str, self.replaced))}>"


@dataclass(frozen=True)
class _Options:
    """The options for one package, merged from all calls of ``install()``."""

    force: bool = False
    reconnect: bool = False
    max_unanswered_calls: int | None = None
    max_unanswered_bytes: int | None = None

    def merged_with(self, later: _Options) -> _Options:
        calls, size = later.max_unanswered_calls, later.max_unanswered_bytes
        return _Options(
            self.force or later.force,
            self.reconnect or later.reconnect,
            self.max_unanswered_calls if calls is None else calls,
            self.max_unanswered_bytes if size is None else size,
        )


@dataclass
class _State:
    report: InstallReport = InstallReport(())
    finder: Finder = field(default_factory=Finder)
    #: The packages to replace.
    requested: dict[str, _Options] = field(default_factory=dict)
    #: The modules of p2pclient that were imported before ``install()``.
    originals: dict[str, ModuleType] = field(default_factory=dict)
    found: dict[str, Original] = field(default_factory=dict)
    #: The warnings issued so far.
    warned: set[str] = field(default_factory=set)

    def bindings(self) -> list[Bindings]:
        """Returns the bindings to replace: hivemind's, and those of its copies."""
        return [bindings_of(name) for name in self.requested if name != P2PCLIENT]

    def entry(self, name: str) -> Replacement | None:
        return next((entry for entry in self.report.replaced if entry.name == name), None)

    def set_entry(self, entry: Replacement) -> None:
        entries = {**{each.name: each for each in self.report.replaced}, entry.name: entry}
        # p2pclient first, then hivemind, then its copies.
        names = sorted(entries, key=lambda name: (name != P2PCLIENT, name != _HIVEMIND))
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

    From then on, ``import p2pclient``, or of any submodule, imports this package's layer. hivemind,
    and programs built on it such as Petals, talk to their daemons through the clients of
    `p2pclient_rs.compat.hivemind`.

    The originals need not be installed, and may already have been imported. `uninstall` undoes
    ``install``.

    ``install`` affects this process, processes forked from it, and those that ``multiprocessing``
    starts from it by ``spawn`` or ``forkserver``. Other processes must call it too, or be started
    below ``python -m p2pclient_rs run``. Another call adds packages and options to those of earlier
    calls.

    Args:
        p2pclient: Whether to replace p2pclient.
        hivemind: Whether to replace hivemind's bindings.
        hivemind_package: The import name of hivemind, such as ``"fork.vendor.hivemind"`` for a copy
            in another package. Call ``install()`` once for each copy that a process uses.
        force: Replaces unknown versions too, with an `UnknownVersionWarning` that names the files
            that differ. Still refuses bindings that lack a class that is replaced or that the
            replacement uses.
        reconnect: Reconnects each ``P2P`` created from now on to its ``initial_peers`` when it has
            lost all of its peers. Checks its connections every 15 seconds, backs off from 1 to 60
            seconds after failures, and logs to ``p2pclient_rs.compat.hivemind``. Does not affect
            a ``P2P`` made by ``P2P.replicate``.
        max_unanswered_calls: How many incoming unary calls each of hivemind's clients handles at
            once; None leaves the default.
        max_unanswered_bytes: The maximum total size of these calls' payloads, in bytes; None leaves
            the default.

    Returns:
        A report of all packages that this call and earlier ones replace.

    Raises:
        UnsupportedVersion: An unknown version of p2pclient or hivemind's bindings, one not in
            `KNOWN_P2PCLIENT` or `KNOWN_HIVEMIND`, is already imported. Nothing is changed. If it
            is not imported yet, the report says so, and importing it raises this exception.
        ValueError: ``hivemind_package`` cannot be a package's name, or is given with
            ``hivemind=False``; or a limit is negative.

    Example:
        >>> import p2pclient_rs
        >>> report = p2pclient_rs.install(p2pclient=False, reconnect=True)
        >>> report.replaced[0].layer
        'p2pclient_rs.compat.hivemind'
    """
    _check_package(hivemind_package, hivemind)
    _check_limit("max_unanswered_calls", max_unanswered_calls)
    _check_limit("max_unanswered_bytes", max_unanswered_bytes)
    requested: dict[str, _Options] = {}
    if p2pclient:
        requested[P2PCLIENT] = _Options(force)
    if hivemind:
        requested[hivemind_package] = _Options(
            force, reconnect, max_unanswered_calls, max_unanswered_bytes
        )
    state = _install(requested)
    _warn(state, requested, stacklevel=3)
    return state.report


def install_in_child(calls: Iterable[dict[str, Any]]) -> None:
    """Repeats the parent's calls of ``install()`` in a child process, without their warnings.

    Args:
        calls: The keyword arguments of each call.
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
    if name.partition(".")[0] in (P2PCLIENT, "p2pclient_rs"):
        raise ValueError(f"hivemind_package cannot be in {name.partition('.')[0]}")
    if not hivemind and name != _HIVEMIND:
        raise ValueError("hivemind_package is given, but hivemind=False")


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and not limit >= 0:  # also rejects NaN
        raise ValueError(f"{name} cannot be {limit}")


def _install(requested: dict[str, _Options]) -> _State:
    while (state := _add(requested)) is None:
        pass
    for name in requested:
        if name != P2PCLIENT:
            _replace_in_loaded(state, name)
    return state


def _add(requested: dict[str, _Options]) -> _State | None:
    """Adds packages to the state and to the import hook.

    Returns:
        The state. None if another thread has changed it meanwhile: the caller must call again.
    """
    global _state
    # Without the lock: finding modules takes locks of the import system, and a thread that holds
    # one may call install().
    found = {name: _examine(name, options) for name, options in _new(requested).items()}
    with _lock:
        new = _new(requested)
        if not new.keys() <= found.keys():
            return None
        for name in new:
            _check_imported(name, found[name])
        state = _state or _State()
        for name in new:
            state.found[name] = found[name]
            if name == P2PCLIENT:
                modules = list(sys.modules.items())
                state.originals = {name: m for name, m in modules if in_p2pclient(name)}
            imported = tuple(sorted(state.originals)) if name == P2PCLIENT else ()
            state.set_entry(_entry(found[name], imported))
        for name, options in requested.items():
            state.requested[name] = state.requested.get(name, _Options()).merged_with(options)
            _add_hooks(state, name)
        if _state is None:
            _state = state
            sys.meta_path.insert(0, state.finder)
            if subprocesses.SPAWN in sys.modules:
                subprocesses.patch_spawn(sys.modules[subprocesses.SPAWN], _calls)
        if P2PCLIENT in new:
            for name in state.originals:
                sys.modules.pop(name, None)
        return state


def _new(requested: dict[str, _Options]) -> dict[str, _Options]:
    """Returns the packages that are not replaced yet, or were refused without ``force``."""
    state = _state
    new = {}
    for name, options in requested.items():
        entry = state.entry(name) if state else None
        if entry is None or (entry.refused and options.force):
            new[name] = options
    return new


def _examine(name: str, options: _Options) -> Original:
    return (
        examine_p2pclient(options.force)
        if name == P2PCLIENT
        else examine_hivemind(name, options.force)
    )


def _check_imported(name: str, found: Original) -> None:
    """Raises UnsupportedVersion if the package is already imported and cannot be replaced."""
    modules = (P2PCLIENT,) if name == P2PCLIENT else bindings_of(name).modules
    if found.refused and not set(modules).isdisjoint(sys.modules):
        raise UnsupportedVersion(found.refused, name=name)
    if name != P2PCLIENT:
        bindings_of(name).check_loaded()


def _entry(found: Original, imported: tuple[str, ...]) -> Replacement:
    layer = P2PCLIENT_LAYER if found.name == P2PCLIENT else hivemind_copies.layer_of(found.name)
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


def _add_hooks(state: _State, name: str) -> None:
    finder = state.finder
    finder.add_hook(subprocesses.SPAWN, lambda module: subprocesses.patch_spawn(module, _calls))
    if name == P2PCLIENT:
        finder.replace_p2pclient(partial(_check_at_import, state, name))
        return
    bindings, options = bindings_of(name), state.requested[name]
    for module in bindings.modules:
        finder.add_hook(
            module,
            partial(_replace_in, bindings, module),
            before=partial(_check_at_import, state, name),
        )
    if options.reconnect:
        finder.add_hook(bindings.p2p_daemon, _reconnect)
    bindings.limit(options.max_unanswered_calls, options.max_unanswered_bytes)


def _check_at_import(state: _State, name: str) -> None:
    """Raises UnsupportedVersion if the package about to be imported cannot be replaced."""
    # Examine it again, since the import path may have changed after install().
    found = _examine(name, state.requested[name])
    if found.refused:
        raise UnsupportedVersion(found.refused, name=name)
    _warn_once(state, found, stacklevel=3)


def _replace_in(bindings: Bindings, name: str, module: ModuleType) -> None:
    """Replaces the classes that a module of hivemind has just defined."""
    bindings.record_originals(module, name)
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
    """Replaces the clients in modules whose import began before the hook was added."""
    entry = state.entry(name)
    if entry is None or entry.refused:
        return
    # Without the lock: this imports modules, and may wait for a thread that calls install().
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
        if state.requested[name].reconnect and hasattr(p2p_daemon, "P2P"):
            _reconnect(sys.modules[bindings.p2p_daemon])


def _warn(state: _State, names: Iterable[str], stacklevel: int) -> None:
    for name in names:
        _warn_once(state, state.found[name], stacklevel + 1)


def _warn_once(state: _State, found: Original, stacklevel: int) -> None:
    if found.warning and not found.refused and found.warning not in state.warned:
        state.warned.add(found.warning)
        category = UnknownVersionWarning if found.unknown else CompatibilityWarning
        warnings.warn(found.warning, category, stacklevel=stacklevel)


def _calls() -> list[dict[str, Any]]:
    """Returns the arguments of the ``install()`` calls that reproduce the state in a child."""
    state = _state
    if state is None:
        return []
    calls: list[dict[str, Any]] = []
    for name, options in list(state.requested.items()):
        if name == P2PCLIENT:
            calls.append({"hivemind": False, "force": options.force})
            continue
        # Leave out options that were not given. A limit of 0 was given.
        given = {
            option: value
            for option, value in vars(options).items()
            if value is not None and value is not False
        }
        calls.append({"p2pclient": False, "hivemind_package": name, **given})
    return calls


def uninstall() -> None:
    """Undoes `install`.

    Restores the modules of p2pclient that were imported before `install`, and hivemind's own
    clients in its bindings. Clients created in between do not change, but are no longer
    reconnected. Does nothing without an earlier `install`.
    """
    global _state
    with _lock:
        if _state is None:
            return
        state, _state = _state, None
        sys.meta_path.remove(state.finder)
        if P2PCLIENT in state.requested:
            for name in list(sys.modules):
                if in_p2pclient(name):
                    del sys.modules[name]
            sys.modules.update(state.originals)
        for bindings in state.bindings():
            bindings.restore_everywhere()
        reconnection.restore()
        if subprocesses.SPAWN in sys.modules:
            subprocesses.unpatch_spawn(sys.modules[subprocesses.SPAWN])
