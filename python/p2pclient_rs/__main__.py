"""The command line: ``python -m p2pclient_rs run PROGRAM`` runs a program after ``install()``."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

from p2pclient_rs import __version__
from p2pclient_rs.compat import subprocesses
from p2pclient_rs.compat.install import install
from p2pclient_rs.compat.run import ScriptNotFound, run

_NAME = "python -m p2pclient_rs"
_USAGE = f"usage: {_NAME} [-h] [--version] run [OPTIONS] [-m] PROGRAM [ARGS ...]"
_HELP = f"""{_USAGE}

Runs a Python program with `p2pclient`, and the daemon's bindings in `hivemind`, replaced by
p2pclient_rs, as `python PROGRAM ARGS ...` or `python -m PROGRAM ARGS ...` would run it. They are
also replaced in Python processes that the program starts.

  PROGRAM      a script, or a directory or zip file with a __main__.py; with -m, a module
  ARGS         the program's arguments
  -h, --help   show this and exit
  --version    show the version and exit

Options of run, which Python processes below it inherit:

  --hivemind-package=NAME  the import name of hivemind, if it is a copy in another package;
                           may be repeated
  --force                  replace unknown versions as well, with a warning
  --reconnect              reconnect hivemind's P2P to its initial peers when it has lost all peers
"""


def main(argv: list[str]) -> None:
    """Executes a command line; returns or exits as the program does.

    Args:
        argv: The arguments after ``python -m p2pclient_rs``.
    """
    # Not argparse: everything after PROGRAM belongs to the program, including options and `--`.
    calls: list[dict[str, Any]] = []
    if argv[:1] == ["run"]:
        try:
            # Without options, this `run` takes those of the `run` that started it, if any.
            above = os.environ.get(subprocesses.OPTIONS_VARIABLE, "").split()
            inherited, _ = subprocesses.parse_options(above)
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
            _run(module, args, calls, is_module=True)
        case ["run", "--", program, *args]:
            _run(program, args, calls)
        case ["run", program, *args] if not program.startswith("-"):
            _run(program, args, calls)
        case ["run"] | ["run", "-m" | "--"]:
            _usage_error("run: no program given")
        case ["run", "-m", option, *_] | ["run", option, *_]:
            _usage_error(f"run: unknown option {option}")
        case [command, *_]:
            _usage_error(f"unknown command or option {command!r}")
        case _:
            _usage_error("which command?")


def _run(
    program: str, args: list[str], calls: list[dict[str, Any]], *, is_module: bool = False
) -> None:
    try:
        for arguments in calls:
            install(**arguments)
    except ValueError as error:
        _usage_error(f"run: {error}")
    subprocesses.set_environment(calls)
    try:
        run(program, args, is_module=is_module)
    except ScriptNotFound as error:
        path, reason = error.args
        print(f"{_NAME}: can't open {path!r}: {reason}", file=sys.stderr)
        sys.exit(2)


def _usage_error(message: str) -> NoReturn:
    print(f"{_USAGE}\n{_NAME}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
