"""Activates the layers in the Python processes that this one starts.

A process that ``multiprocessing`` starts by ``spawn`` or ``forkserver`` calls ``install()`` when it
unpickles the first data sent to it. Other processes call it only below
``python -m p2pclient_rs run``, which sets their environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "OPTIONS_VARIABLE",
    "SPAWN",
    "format_options",
    "parse_options",
    "patch_spawn",
    "set_environment",
    "unpatch_spawn",
]

#: The module of ``multiprocessing`` that prepares the data for a new process.
SPAWN = "multiprocessing.spawn"

#: The environment variable that passes the options of ``python -m p2pclient_rs run`` to children.
OPTIONS_VARIABLE = "P2PCLIENT_RS_RUN"

_PACKAGE, _FORCE, _RECONNECT = "--hivemind-package", "--force", "--reconnect"


class _Install:
    """An object that calls ``install()`` when it is unpickled."""

    def __init__(self, calls: list[dict[str, Any]], sys_path: list[str]) -> None:
        self._calls = calls
        self._sys_path = sys_path

    def __reduce__(self) -> tuple[Any, tuple[str, dict[str, Any]]]:
        # The child sets this path itself only later, but may need it to find p2pclient_rs.
        code = f"import sys; sys.path = {self._sys_path!r}; "
        code += "from p2pclient_rs.compat.install import install_in_child; "
        code += f"install_in_child({self._calls!r})"
        return exec, (code, {})


def patch_spawn(module: ModuleType, calls: Callable[[], list[dict[str, Any]]]) -> None:
    """Makes children started by spawn or forkserver call ``install()``.

    They do so before they import any of the program's modules.

    Args:
        module: ``multiprocessing.spawn``.
        calls: Returns the keyword arguments of each call; an empty list if nothing is replaced.
    """
    prepare = module.get_preparation_data
    if getattr(prepare, "_before", None) is not None:
        return

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = prepare(name)
        if arguments := calls():
            data["p2pclient_rs"] = _Install(arguments, data.get("sys_path", sys.path))
        return data

    get_preparation_data._before = prepare  # type: ignore[attr-defined]
    module.get_preparation_data = get_preparation_data  # type: ignore[attr-defined]


def unpatch_spawn(module: ModuleType) -> None:
    """Undoes `patch_spawn`."""
    before = getattr(module.get_preparation_data, "_before", None)
    # If other code has wrapped our function, ours stays in place and adds nothing.
    if before is not None:
        module.get_preparation_data = before  # type: ignore[attr-defined]


def parse_options(arguments: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Parses the options of ``run``.

    Returns:
        The keyword arguments of each call of ``install()``, and the arguments after the options.

    Raises:
        ValueError: An option has no value.
    """
    packages: list[str] = []
    common: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest[0].partition("=")
        if option == _PACKAGE:
            rest.pop(0)
            if not equals:
                value = rest.pop(0) if rest else ""
            if not value or value.startswith("-"):
                raise ValueError(f"{_PACKAGE} needs the name of a package")
            packages.append(value)
        elif rest[0] in (_FORCE, _RECONNECT):
            common[rest.pop(0)[2:]] = True
        else:
            break
    calls = [{"hivemind_package": package, **common} for package in packages]
    return calls or [common], rest


def format_options(calls: Sequence[dict[str, Any]]) -> str:
    """Returns the options of ``run`` for calls of ``install()``, separated by spaces."""
    found = [f"{_PACKAGE}={c['hivemind_package']}" for c in calls if "hivemind_package" in c]
    found += [option for option in (_FORCE, _RECONNECT) if any(c.get(option[2:]) for c in calls)]
    return " ".join(found)


def set_environment(calls: Sequence[dict[str, Any]]) -> None:
    """Makes Python processes started from here run ``pythonpath/sitecustomize.py``.

    Args:
        calls: The keyword arguments of each call of ``install()``.
    """
    folder = str(Path(__file__).parent / "pythonpath")
    others = os.environ.get("PYTHONPATH")
    # An empty entry means the current directory, but an empty variable has no entries.
    paths = [path for path in others.split(os.pathsep) if path != folder] if others else []
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *paths])
    text = format_options(calls)
    if text:
        os.environ[OPTIONS_VARIABLE] = text
    else:
        os.environ.pop(OPTIONS_VARIABLE, None)
