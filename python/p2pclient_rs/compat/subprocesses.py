"""The swap in Python processes that this one starts.

Processes that ``multiprocessing`` starts afresh get it with the first data that they are sent. All
others get it only below ``python -m p2pclient_rs run``, from the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = [
    "SPAWN",
    "VARIABLE",
    "forget_children",
    "options",
    "parse_options",
    "set_environment",
    "tell_children",
]

#: The module of ``multiprocessing`` that prepares what a new process is sent.
SPAWN = "multiprocessing.spawn"

#: The options of ``python -m p2pclient_rs run``, for the Python processes below it.
VARIABLE = "P2PCLIENT_RS_RUN"

_PACKAGE, _FORCE, _RECONNECT = "--hivemind-package", "--force", "--reconnect"


class _Install:
    """Something that, unpickled, calls ``install()``."""

    def __init__(self, calls: list[dict[str, Any]], sys_path: list[str]) -> None:
        self._calls = calls
        self._sys_path = sys_path

    def __reduce__(self) -> tuple[Any, tuple[str, dict[str, Any]]]:
        # The path that the child is about to be given anyway: we may be found by it alone.
        code = f"import sys; sys.path = {self._sys_path!r}; "
        code += f"from p2pclient_rs.compat.install import adopt; adopt({self._calls!r})"
        return exec, (code, {})


def tell_children(module: ModuleType, calls: Callable[[], list[dict[str, Any]]]) -> None:
    """Has children that are started afresh, by spawn or forkserver, call ``install()`` before they
    import anything of the program's.

    Args:
        module: ``multiprocessing.spawn``.
        calls: Returns the arguments of the calls; none if the swap is off.
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


def forget_children(module: ModuleType) -> None:
    """Undoes `tell_children`."""
    before = getattr(module.get_preparation_data, "_before", None)
    # If other code has wrapped ours meanwhile, it stays, and does nothing.
    if before is not None:
        module.get_preparation_data = before  # type: ignore[attr-defined]


def parse_options(arguments: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Takes the options of ``run`` off its arguments.

    Returns:
        The arguments of the calls of ``install()``, and the arguments that follow the options.

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


def options(calls: Sequence[dict[str, Any]]) -> str:
    """The options of ``run`` for these calls, as one text; empty without options."""
    found = [f"{_PACKAGE}={c['hivemind_package']}" for c in calls if "hivemind_package" in c]
    found += [option for option in (_FORCE, _RECONNECT) if any(c.get(option[2:]) for c in calls)]
    return " ".join(found)


def set_environment(calls: Sequence[dict[str, Any]]) -> None:
    """Makes Python processes started from here run ``pythonpath/sitecustomize.py``.

    Args:
        calls: The arguments of the calls of ``install()``.
    """
    folder = str(Path(__file__).parent / "pythonpath")
    others = os.environ.get("PYTHONPATH")
    # An empty entry is the current directory, but an empty variable is none.
    paths = [path for path in others.split(os.pathsep) if path != folder] if others else []
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *paths])
    text = options(calls)
    if text:
        os.environ[VARIABLE] = text
    else:
        os.environ.pop(VARIABLE, None)
