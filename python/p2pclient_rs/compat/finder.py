"""The import hook: gives p2pclient another package, and does something after hivemind's imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from p2pclient_rs.compat.bindings import is_being_imported
from p2pclient_rs.compat.versions import SwapFinder, find_spec

__all__ = ["ALIAS", "REAL", "Finder", "is_alias"]

#: The package that is replaced as a whole, and the one that takes its place.
ALIAS, REAL = "p2pclient", "p2pclient_rs.compat.p2pclient"


def is_alias(name: str) -> bool:
    """Whether a module's name is in the package that is replaced as a whole."""
    return name.partition(".")[0] == ALIAS


class Finder(SwapFinder):
    """The import hook, the first of ``sys.meta_path``."""

    def __init__(self) -> None:
        self._before_alias: Callable[[], object] | None = None
        self._hooks: dict[str, tuple[Callable[[], object], Callable[[ModuleType], object]]] = {}

    def replace_p2pclient(self, before: Callable[[], object]) -> None:
        """Gives p2pclient's name to this package's modules from now on.

        Args:
            before: Called before each such import, which fails with the exception that it raises.
        """
        self._before_alias = before

    def hook(
        self,
        name: str,
        after: Callable[[ModuleType], object],
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Calls functions before and after each import of a module.

        Args:
            name: The module's name.
            after: Called with the module when it has run.
            before: Called before each import, which fails with the exception that it raises.
        """
        self._hooks[name] = before, after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._before_alias is not None and is_alias(fullname):
            if fullname == ALIAS:
                self._before_alias()
            return self._alias(fullname)
        if fullname not in self._hooks:
            return None
        before, after = self._hooks[fullname]
        before()
        spec = find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithSequel(spec.loader, after)
        return spec

    def _alias(self, fullname: str) -> ModuleSpec | None:
        # Imports at most the parent, which has been imported under its other name already.
        real = importlib.util.find_spec(REAL + fullname[len(ALIAS) :])
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
        # As the original, a package leaves the modules that it imports in sys.modules.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(f"{self._real_name}.") and not is_being_imported(loaded):
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
