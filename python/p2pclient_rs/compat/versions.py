"""Finds the originals, and decides by version and file contents whether to replace them.

Imports no original: reads its version and its files where an import would find them.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__all__ = [
    "KNOWN_HIVEMIND",
    "KNOWN_P2PCLIENT",
    "CompatibilityWarning",
    "Original",
    "ReplacingFinder",
    "UnknownVersionWarning",
    "UnsupportedVersion",
    "examine_hivemind",
    "examine_p2pclient",
    "find_spec",
    "missing_names",
]

#: The hivemind releases whose bindings this package can replace.
KNOWN_HIVEMIND = ("1.1.10.post2", "1.1.11", "1.1.12")
#: The p2pclient releases that this package can replace.
KNOWN_P2PCLIENT = ("0.2.0", "0.2.1", "0.3.0")

#: The folder of the bindings within hivemind.
_BINDINGS = "p2p/p2p_daemon_bindings"

# The SHA-256 of the bindings' files in every commit of hivemind's main branch between the tags
# 1.1.10 and 1.1.12. Checkouts of these commits have the version 1.2.0.dev0.
_KNOWN_FILES = {
    "control.py": (
        "a225696f1607e90ab785b9fc6e7e63ce02e2c96b1c3346bf7a1042c4eb46a79c",
        "785c696a036aa4b7f4082a952cb240c1f5c20674aed0ff23291c3c262da6905b",
        "669eacd31c67dfcc0ba500c98d10199adc0eff17170af65dfeec63291ccd7d4d",
        "e75429a88b5ee44391f7c25e593532b72cd7aace1d27abda878e88d8e4c6dbcf",
        "526366fef4a6a2c00ba5bceab3c3be7bbd1930e72a5bc53454cb9c12c4837255",
    ),
    "p2pclient.py": (
        "896d93fe6b566e1b1993e58a9ad624c3f600a1243a2bc4e54d488810f99f8786",
        "8070bb3ae6f68a2c5fc217a6dd637b86e6d2e4bad2e4dd46371d75ad893a7251",
    ),
    "datastructures.py": (
        "d7a4e7946a35fac56b332fec2cdc253b0d50a57f2db330a09066d95025942656",
        "8eafcff7d526df90eb3cbc0ad528fef09acd94d34ca7213b22e5fe4efe7eddf0",
        "889cd1dfa41b0193c49618acf177f5fd5aaf9cbdfd812716637c682e387ab3a9",
        "20040a1ad5a7d564cd61e1a74d5458d2b4b10f710f10f0118a6eee7744ac5e30",
    ),
    "utils.py": (
        "19498ef5b9e84534d4bbccf67a5f33bffcf79652f49bc07202565c71126dc7ab",
        "7849c0d632de455312d0e2e2f99791733778fffc05cfd90a20306c227f5c5ccc",
    ),
}

# Names that those files must define: the classes that are replaced or that the replacements use.
_NEEDED = {
    "control.py": ("ControlClient", "DaemonConnector"),
    "p2pclient.py": ("Client",),
    "datastructures.py": ("Multiaddr", "PeerID", "PeerInfo", "StreamInfo"),
    "utils.py": ("ControlFailure", "DispatchFailure", "P2PDaemonError", "P2PHandlerError"),
}

# How p2pclient 0.2 differs from 0.3, and so from the replacement.
_DIFFERENCES_OF_0_2 = (
    "GoDaemon listens for peers on the loopback interface alone, and its DHT is a server",
    "what the program imports of anyio is the installed anyio's, not anyio 1's",
)


class UnsupportedVersion(ImportError):
    """This package does not know how to replace this version of p2pclient or hivemind.

    Raised by the import of p2pclient, or of hivemind's bindings, after `p2pclient_rs.install`; or
    by `p2pclient_rs.install` itself if they were imported before.
    """


class CompatibilityWarning(RuntimeWarning):
    """The replacement differs from the original package in ways that a program may notice."""


class UnknownVersionWarning(CompatibilityWarning):
    """An unknown version of p2pclient or hivemind is replaced.

    The message names the files of hivemind's bindings that differ from those of known versions.
    """


class ReplacingFinder(MetaPathFinder):
    """The base class of the import hook. `find_spec` skips the hook to find the originals."""


@dataclass(frozen=True)
class Original:
    """A package to replace, as found on the import path.

    Attributes:
        name: Its import name.
        file: Its file; None if it is not installed.
        version: Its version, if it states one.
        refused: Why it is not replaced; None if it is.
        warning: Differences of its replacement that a program may notice, if any.
        unknown: Whether the warning is about an unknown version.
        differs: The files of hivemind's bindings whose contents are not those of a known version.
    """

    name: str
    file: str | None = None
    version: str | None = None
    refused: str | None = None
    warning: str | None = None
    unknown: bool = False
    differs: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Package:
    """A package's directory, which may be in an archive; None for a package without files."""

    name: str
    folder: str | None
    file: str | None
    loader: Any
    module: Any = None

    def read(self, *path: str) -> bytes | None:
        """Returns the contents of a file of the package; None if there is no such file."""
        if self.folder is None:
            return None
        path = (self.folder, *path)
        try:
            with open(os.path.join(*path), "rb") as file:
                return file.read()
        except OSError:
            pass
        try:
            data: bytes = self.loader.get_data(os.path.join(*path))
        except (AttributeError, OSError):
            return None
        return data


def examine_p2pclient(force: bool = False) -> Original:
    """Finds the installed p2pclient, and decides whether to replace it.

    Args:
        force: Whether to accept unknown versions.
    """
    package = _locate("p2pclient")
    if package is None or package.file is None and package.module is None:
        # A directory of that name without an __init__.py, such as a checkout, is not p2pclient.
        return Original("p2pclient")
    version = _version_of(package)
    found = Original("p2pclient", package.file, version)
    if version is None and package.read("p2pclient.py") is None:
        return found  # An unrelated package of that name, which the replacement hides.
    at = f" at {package.folder}" if package.folder else ""
    what = f"p2pclient {version or '(unknown version)'}{at}"
    if version not in KNOWN_P2PCLIENT:
        if force:
            warning = f"{what} is not known to p2pclient_rs; its replacement is that of 0.3.0"
            return replace(found, warning=warning, unknown=True)
        return replace(
            found,
            refused=f"p2pclient_rs does not know {what}, only {', '.join(KNOWN_P2PCLIENT)}; to use "
            "p2pclient as it is, call install(p2pclient=False), or, to replace it all the same, "
            "install(force=True)",
        )
    if version.startswith("0.2."):
        differences = "; ".join(_DIFFERENCES_OF_0_2)
        warning = f"p2pclient {version} is replaced by the API of 0.3.0: {differences}"
        return replace(found, warning=warning)
    return found


def examine_hivemind(name: str, force: bool = False) -> Original:
    """Finds an installed hivemind, or a copy of it, and decides whether to replace its bindings.

    Args:
        name: Its import name.
        force: Whether to accept unknown bindings that define the needed classes.
    """
    package = _locate(name)
    if package is None:
        return Original(name)
    version = _version_of(package)
    sources = {file: package.read(*_BINDINGS.split("/"), file) for file in _KNOWN_FILES}
    unknown = {
        file: source
        for file, source in sources.items()
        if source is not None and _digest(source, name) not in _KNOWN_FILES[file]
    }
    found = Original(name, package.file, version, differs=tuple(unknown))
    what = f"the bindings of {name} {version or '(unknown version)'} at {package.folder}"
    has_known = sources["control.py"] is not None and "control.py" not in unknown
    if not (force or version in KNOWN_HIVEMIND or has_known):
        differs = f" ({', '.join(unknown)} differ)" if unknown else ""
        return replace(
            found,
            refused=f"p2pclient_rs does not know {what}{differs}, only those of hivemind "
            f"{', '.join(KNOWN_HIVEMIND)}; to use {name} with its own bindings, call "
            "install(hivemind=False) or do not call it; to replace them all the same, call "
            "install(force=True)",
        )
    # Without sources, for example if only .pyc files are installed, the version number decides.
    absent = [file for file, source in sources.items() if source is None]
    if absent and not (version in KNOWN_HIVEMIND and len(absent) == len(sources)):
        reason = f"there is no {_BINDINGS}/{absent[0]}"
        return replace(found, refused=f"p2pclient_rs cannot replace {what}: {reason}")
    for file, source in unknown.items():
        problem = _problem(file, source)
        if problem:
            return replace(found, refused=f"p2pclient_rs cannot replace {what}: {problem}")
    if unknown:
        warning = (
            f"p2pclient_rs replaces {what} without knowing them: {', '.join(unknown)} "
            f"{'differs' if len(unknown) == 1 else 'differ'} from those of hivemind "
            f"{', '.join(KNOWN_HIVEMIND)}"
        )
        return replace(found, warning=warning, unknown=True)
    return found


def _digest(source: bytes, package: str) -> str:
    """Returns the SHA-256 of a copy's file, as if the file were in hivemind itself."""
    import hashlib

    # Undo two differences: line endings, which git may have changed, and the name by which a copy
    # imports its own modules.
    source = source.replace(b"\r\n", b"\n")
    if package != "hivemind":
        source = re.sub(rb"\b%s\b" % re.escape(package).encode(), b"hivemind", source)
    return hashlib.sha256(source).hexdigest()


def _problem(file: str, source: bytes) -> str | None:
    """Returns why an unknown file of the bindings cannot be replaced; None if it can."""
    import ast

    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        return f"{file} is not valid Python: {error}"
    names = set(_names(tree.body))
    if "*" in names:
        return None  # Only importing it can tell.
    missing = [name for name in _NEEDED[file] if name not in names]
    return f"{file} has no {' and no '.join(missing)}" if missing else None


def _names(body: Sequence[Any]) -> Iterator[str]:
    """Yields the names that a module's statements bind, including those in branches."""
    import ast

    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0]
        else:
            for child in ast.walk(node) if isinstance(node, (ast.Assign, ast.AnnAssign)) else ():
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    yield child.id
            for block in ("body", "orelse", "finalbody", "handlers"):
                yield from _names(getattr(node, block, ()))


def missing_names(module: Any, file: str) -> list[str]:
    """Returns the needed names that an imported module of the bindings lacks."""
    return [name for name in _NEEDED[file] if not hasattr(module, name)]


def _version_of(package: _Package) -> str | None:
    """Returns the version that a package, or the distribution next to it, states."""
    for file in ("__init__.py", "_version.py"):
        source = (package.read(file) or b"").decode(errors="replace")
        found = re.search(r"^__version__\s*(?::[^=]+)?=\s*[\"']([^\"']+)", source, re.MULTILINE)
        if found:
            return found[1]
    if package.folder is not None and "." not in package.name:
        # Search only the package's own directory, since another copy may be installed elsewhere.
        from importlib.metadata import distributions

        parent = os.path.dirname(os.path.abspath(package.folder))
        for distribution in distributions(name=package.name, path=[parent]):
            return str(distribution.version)
    version = getattr(package.module, "__version__", None)
    return version if isinstance(version, str) else None


def _locate(name: str) -> _Package | None:
    """Finds the directory from which a package is or would be imported, without importing it."""
    module: Any = sys.modules.get(name)
    if module is not None:
        spec = getattr(module, "__spec__", None)
        path = getattr(module, "__path__", None)
        file = getattr(module, "__file__", None)
        folder = next(iter(path), None) if path else None
        return _Package(name, folder, file, spec.loader if spec else None, module)
    spec = _find(name)
    if spec is None:
        return None
    folder = next(iter(spec.submodule_search_locations or ()), None)
    return _Package(name, folder, spec.origin if spec.has_location else None, spec.loader)


def _find(name: str) -> ModuleSpec | None:
    """Like ``importlib.util.find_spec``, but does not import the packages above ``name``."""
    parent, _, _ = name.rpartition(".")
    path: Any = None
    if parent:
        above: Any = sys.modules.get(parent)
        if above is not None:
            path = getattr(above, "__path__", None)
        else:
            spec = _find(parent)
            path = spec.submodule_search_locations if spec else None
        if path is None:
            return None
    return find_spec(name, path)


def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
    """Returns the spec that the import system would find without the import hook."""
    for finder in list(sys.meta_path):
        find: Callable[..., ModuleSpec | None] | None = getattr(finder, "find_spec", None)
        if find is not None and not isinstance(finder, ReplacingFinder):
            spec = find(name, path, target)
            if spec is not None:
                return spec
    return None
