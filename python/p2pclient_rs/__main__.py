"""``python -m p2pclient_rs run PROGRAM``: runs a program with the swap on, without touching it."""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from p2pclient_rs import __version__
from p2pclient_rs.compat import subprocesses
from p2pclient_rs.compat.install import install

_NAME = "python -m p2pclient_rs"
_USAGE = f"usage: {_NAME} [-h] [--version] run [OPTIONS] [-m] PROGRAM [ARGS ...]"
_HELP = f"""{_USAGE}

Runs a Python program with `p2pclient`, and the daemon's bindings in `hivemind`, replaced by
p2pclient_rs, as `python PROGRAM ARGS ...` or `python -m PROGRAM ARGS ...` would run it. Python
processes that it starts have the swap on, too.

  PROGRAM      a script, or a directory or zip file with a __main__.py; with -m, a module
  ARGS         what the program finds in sys.argv
  -h, --help   show this and exit
  --version    show the version and exit

Options of run, which Python processes below it inherit:

  --hivemind-package=NAME  the import name of hivemind, if it is a copy in another package;
                           may be repeated
  --force                  replace unknown versions as well, with a warning
  --reconnect              reconnect hivemind's P2P to its initial peers when it has lost all peers
"""


def main(argv: list[str]) -> None:
    """Does what the command line says, and returns or exits as the program does.

    Args:
        argv: The arguments after ``python -m p2pclient_rs``.
    """
    # By hand, since all that follows PROGRAM is the program's, options and `--` included.
    calls: list[dict[str, Any]] = []
    if argv[:1] == ["run"]:
        try:
            # Of a `run` above this one, unless there are new ones.
            inherited, _ = subprocesses.parse_options(
                os.environ.get(subprocesses.OPTIONS_VARIABLE, "").split()
            )
            calls, rest = subprocesses.parse_options(argv[1:])
        except ValueError as error:
            _usage_error(f"run: {error}")
        argv = ["run", *rest]
        if not subprocesses.format_options(calls):
            calls = inherited
    match argv:
        case ["-h" | "--help"] | ["run", "-h" | "--help"]:
            print(_HELP, end="")
        case ["--version"]:
            print(f"p2pclient_rs {__version__}")
        case ["run", "-m", module, *args] if not module.startswith("-"):
            run(module, args, is_module=True, calls=calls)
        case ["run", "--", program, *args]:
            run(program, args, calls=calls)
        case ["run", program, *args] if not program.startswith("-"):
            run(program, args, calls=calls)
        case ["run"] | ["run", "-m" | "--"]:
            _usage_error("run: which program?")
        case ["run", "-m", option, *_] | ["run", option, *_]:
            _usage_error(f"run: unknown option {option}")
        case [command, *_]:
            _usage_error(f"unknown command or option {command!r}")
        case _:
            _usage_error("which command?")


def run(
    program: str,
    args: list[str],
    *,
    is_module: bool = False,
    calls: Sequence[dict[str, Any]] = ({},),
) -> None:
    """Runs a program in a new ``__main__``, with the swap on.

    Args:
        program: A script, a directory or a zip file; or a module's name.
        args: The program's arguments.
        is_module: Whether ``program`` is a module's name.
        calls: The arguments of the calls of ``install()``.

    Raises:
        BaseException: What the program raises.
    """
    try:
        for arguments in calls:
            install(**arguments)
    except ValueError as error:
        _usage_error(f"run: {error}")
    subprocesses.set_environment(calls)
    # Anew rather than emptied, since this function's own globals are the old one's.
    main_module = sys.modules["__main__"] = ModuleType("__main__")
    main_module.__dict__["__builtins__"] = builtins
    try:
        if is_module:
            # The interpreter's own way of doing `-m`; sys.path[0] is the same already.
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
            main_module.__dict__["__cached__"] = None
            exec(code, main_module.__dict__)
    except SystemExit:
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
        print(f"{_NAME}: can't open {path!r}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def _safe_path() -> bool:
    # -P or -I: sys.path does not begin with where the program is.
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))


def _hide_own_frames() -> None:
    """Lets the traceback begin in the program, as it would without us.

    Through the hook, so that all else about an uncaught exception stays the interpreter's.
    """
    own = {main.__code__.co_filename, runpy.run_module.__code__.co_filename}
    program_hook = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename in own:
            trace = trace.tb_next
        program_hook(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook


def _usage_error(message: str) -> NoReturn:
    print(f"{_USAGE}\n{_NAME}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
