"""The import hook: gives p2pclient's name to another package, and wraps other imports."""

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
from p2pclient_rs.compat.versions import ReplacingFinder, find_spec

__all__ = ["P2PCLIENT", "P2PCLIENT_LAYER", "Finder", "in_p2pclient"]

#: The package that is replaced as a whole, and the package that replaces it.
P2PCLIENT, P2PCLIENT_LAYER = "p2pclient", "p2pclient_rs.compat.p2pclient"


def in_p2pclient(name: str) -> bool:
    """Returns whether a module's name is p2pclient or below it."""
    return name.partition(".")[0] == P2PCLIENT


class Finder(ReplacingFinder):
    """The import hook, the first of ``sys.meta_path``."""

    def __init__(self) -> None:
        self._before_p2pclient: Callable[[], object] | None = None
        self._hooks: dict[str, tuple[Callable[[], object], Callable[[ModuleType], object]]] = {}

    def replace_p2pclient(self, before: Callable[[], object]) -> None:
        """Gives p2pclient's name to this package's modules from now on.

        Args:
            before: Called before each import of p2pclient. If it raises an exception, the import
                fails with that.
        """
        self._before_p2pclient = before

    def add_hook(
        self,
        name: str,
        after: Callable[[ModuleType], object],
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Calls functions before and after each import of a module.

        Args:
            name: The module's name.
            after: Called with the module when its code has run.
            before: Called before each import. If it raises an exception, the import fails with
                that.
        """
        self._hooks[name] = before, after

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._before_p2pclient is not None and in_p2pclient(fullname):
            if fullname == P2PCLIENT:
                self._before_p2pclient()
            return self._alias(fullname)
        if fullname not in self._hooks:
            return None
        before, after = self._hooks[fullname]
        before()
        spec = find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HookedLoader(spec.loader, after)
        return spec

    def _alias(self, fullname: str) -> ModuleSpec | None:
        # find_spec imports the parent at most, and that is already imported under its real name.
        real = importlib.util.find_spec(P2PCLIENT_LAYER + fullname[len(P2PCLIENT) :])
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        return ModuleSpec(
            fullname, _AliasLoader(fullname, real.name), origin=real.origin, is_package=is_package
        )


class _AliasLoader(Loader):
    """Loads a module by returning the module object of another name."""

    def __init__(self, alias: str, real_name: str) -> None:
        self._alias = alias
        self._real_name = real_name
        self._real_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._real_name)
        self._real_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just set the alias's spec, but reload() needs the real one.
        module.__spec__ = self._real_spec
        # Importing a package adds the submodules that it imports to sys.modules. Add them under the
        # alias, too.
        for name, loaded in list(sys.modules.items()):
            if name.startswith(f"{self._real_name}.") and not is_being_imported(loaded):
                sys.modules.setdefault(self._alias + name[len(self._real_name) :], loaded)


class _HookedLoader(Loader):
    """Loads a module with its own loader, and then calls a function with it."""

    def __init__(self, loader: Any, after: Callable[[ModuleType], object]) -> None:
        self._loader = loader
        self._after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Show the module's own loader, as without the hook.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module)
