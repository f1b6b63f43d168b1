"""The hivemind compatibility layer for a copy of hivemind under another import name.

Some forks ship hivemind inside their own package, such as ``fork.hivemind``. The modules of
`p2pclient_rs.compat.hivemind` take and return the classes of the package ``hivemind``. So each copy
gets its own modules: the same files, imported again under a name such as
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

__all__ = ["layer_of", "load", "package_of", "reduce_exception"]

_LAYER = "p2pclient_rs.compat.hivemind"
_FOLDER = Path(__file__).with_name("hivemind")


def layer_of(package: str) -> str:
    """Returns the name of the layer for a package.

    Args:
        package: ``hivemind``, or the name of a copy.
    """
    # With dots instead of colons, the import system would look for packages in between.
    return _LAYER if package == "hivemind" else f"{_LAYER}:{package.replace('.', ':')}"


def package_of(layer: str) -> str:
    """Returns the name of the package that the layer of this name replaces."""
    return layer.partition(":")[2].replace(":", ".") or "hivemind"


def load(package: str, module: str) -> Any:
    """Imports a module of the layer for a package.

    Args:
        package: ``hivemind``, or the name of a copy.
        module: The module's name within the layer, such as ``control``.
    """
    layer = layer_of(package)
    if layer != _LAYER and layer not in sys.modules:
        finder = _Finder()
        sys.meta_path.append(finder)
        try:
            importlib.import_module(layer)
        finally:
            sys.meta_path.remove(finder)
    # The import system finds the layer's modules by the layer's __path__, without _Finder.
    return importlib.import_module(f"{layer}.{module}")


class _Finder(MetaPathFinder):
    """Finds the layers of copies."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: Any = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{_LAYER}:") or "." in fullname[len(_LAYER) :]:
            return None
        return spec_from_file_location(
            fullname, _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )


def reduce_exception(
    package: str, load: Callable[..., Any], cls: type, *args: Any
) -> tuple[Any, ...]:
    """Returns the value of ``__reduce__`` for an exception of a layer.

    Args:
        package: The package that the layer replaces.
        load: The function in the layer's module ``exceptions`` that makes the exception from
            ``cls`` and ``args``.
        cls: The exception's class in that module.
        args: The remaining arguments of ``load``.
    """
    if package == "hivemind":
        return load, (cls, *args)
    # pickle imports modules by name, and the import system does not find a copy's layer.
    return _rebuild, (package, load.__qualname__, cls.__qualname__, *args)


def _rebuild(package: str, load_name: str, class_name: str, *args: Any) -> Any:
    exceptions = load(package, "exceptions")
    return getattr(exceptions, load_name)(getattr(exceptions, class_name), *args)
