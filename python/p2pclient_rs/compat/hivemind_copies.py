"""The hivemind compatibility layer for a copy of hivemind that has another name.

Forks ship hivemind as a package of their own, such as ``fork.hivemind``. The modules of
`p2pclient_rs.compat.hivemind` take and return the classes of the package ``hivemind``, so each copy
gets modules of its own: the same files, imported again under the name
``p2pclient_rs.compat.hivemind:fork:hivemind``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

__all__ = ["layer_of", "load", "package_of", "reduction"]

_LAYER = "p2pclient_rs.compat.hivemind"
_FOLDER = Path(__file__).with_name("hivemind")


def layer_of(package: str) -> str:
    """The name of the layer for a package.

    Args:
        package: ``hivemind``, or the name of a copy.
    """
    # A colon, because a dot would make the import system look for a package in between.
    return _LAYER if package == "hivemind" else f"{_LAYER}:{package.replace('.', ':')}"


def package_of(layer: str) -> str:
    """The package that a layer, given by its name, is for."""
    return layer.partition(":")[2].replace(":", ".") or "hivemind"


def load(package: str, module: str) -> Any:
    """Imports a module of the layer for a package.

    Args:
        package: ``hivemind``, or the name of a copy.
        module: The module's name in the layer: ``control``, ``p2pclient``...
    """
    layer = layer_of(package)
    if layer != _LAYER and layer not in sys.modules:
        finder = _Finder()
        sys.meta_path.append(finder)
        try:
            importlib.import_module(layer)
        finally:
            sys.meta_path.remove(finder)
    # The layer's own __path__ is enough for its modules.
    return importlib.import_module(f"{layer}.{module}")


class _Finder(MetaPathFinder):
    """Finds the layers of copies, while one is loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{_LAYER}:") or "." in fullname[len(_LAYER) :]:
            return None
        return spec_from_file_location(
            fullname, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )


def reduction(package: str, load: Callable[..., Any], cls: type, *args: Any) -> tuple[Any, ...]:
    """What ``__reduce__`` of an exception of a layer returns.

    Args:
        package: The package that the layer is for.
        load: The function of the layer's ``exceptions`` that makes it of ``cls`` and ``args``.
        cls: The exception's class in there.
        args: What else ``load`` takes.
    """
    if package == "hivemind":
        return load, (cls, *args)
    # pickle would import the layer by its name, which the import system does not find.
    return _rebuild, (package, load.__qualname__, cls.__qualname__, *args)


def _rebuild(package: str, load_name: str, class_name: str, *args: Any) -> Any:
    exceptions = load(package, "exceptions")
    return getattr(exceptions, load_name)(getattr(exceptions, class_name), *args)
