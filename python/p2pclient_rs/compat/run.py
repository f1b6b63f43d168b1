"""Runs a Python program after ``install()``, as the interpreter would run it."""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType

__all__ = ["ScriptNotFound", "run"]


class ScriptNotFound(Exception):
    """The script cannot be opened. ``args`` are the path and the operating system's reason."""


def run(program: str, args: list[str], *, is_module: bool = False) -> None:
    """Runs a program in a new ``__main__`` module.

    Args:
        program: A script, a directory or a zip file; or the name of a module.
        args: The program's arguments.
        is_module: Whether ``program`` is the name of a module.

    Raises:
        ScriptNotFound: The script cannot be opened.
        BaseException: Whatever the program raises.
    """
    # A new module, because code of the old one is still running and uses its globals.
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    try:
        if is_module:
            # As the interpreter does for `-m`. sys.path[0] is already right.
            sys.argv = ["-m", *args]
            runpy._run_module_as_main(program)  # type: ignore[attr-defined]
        elif pkgutil.get_importer(program) is not None:
            sys.path[: 0 if _safe_path() else 1] = [os.path.abspath(program)]
            sys.argv = [program, *args]
            runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        else:
            code = _read_script(program)
            if not _safe_path():
                sys.path[0] = os.path.dirname(os.path.realpath(program))
            sys.argv = [program, *args]
            main_module.__file__ = code.co_filename
            main_module.__loader__ = SourceFileLoader("__main__", code.co_filename)
            if sys.version_info < (3, 15):
                main_module.__dict__["__cached__"] = None
            exec(code, main_module.__dict__)
    except (SystemExit, ScriptNotFound):
        raise
    except BaseException:
        _hide_own_frames()
        raise


def _read_script(path: str) -> CodeType:
    absolute = os.path.join(os.getcwd(), path)
    try:
        with io.open_code(absolute) as file:
            compiled = pkgutil.read_code(file)
            if isinstance(compiled, CodeType):
                return compiled
            file.seek(0)
            return compile(file.read(), absolute, "exec", dont_inherit=True)
    except OSError as error:
        raise ScriptNotFound(path, error.strerror) from None


def _safe_path() -> bool:
    """Returns whether ``sys.path`` lacks the program's folder, because of ``-P`` or ``-I``."""
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))


def _hide_own_frames() -> None:
    """Removes this package's frames from the traceback of an uncaught exception.

    Wraps the exception hook, so that the rest of the output remains the interpreter's.
    """
    package = os.path.dirname(os.path.dirname(__file__))
    main_file = os.path.join(package, "__main__.py")
    own = {__file__, main_file, runpy.run_module.__code__.co_filename}
    program_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in own:
            trace = trace.tb_next
        program_hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook
