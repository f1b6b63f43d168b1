"""Prints the path of a daemon to test on, which is fetched and built if it is not there yet.

    python tests/get_daemon.py hivemind|go|js

Go's and npm's own clients do the work, from the versions and checksums committed in ``daemons/``.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import get_p2pd
from downloads import cache_dir

_PINS = Path(__file__).parent / "daemons"

#: The kinds of daemon, each with the variable that names a binary of the user's own.
KINDS = {"hivemind": "P2PD_PATH", "go": "GO_P2PD_PATH", "js": "JSP2PD_PATH"}


@functools.cache
def fetch(kind: str) -> Path:
    """The executable of a daemon: the one the environment names, else the pinned one."""
    if own := os.environ.get(KINDS[kind]):
        if not os.access(own, os.X_OK) or not os.path.isfile(own):
            raise SystemExit(f"{KINDS[kind]} must name an executable file, not {own!r}")
        return Path(own)
    return {"hivemind": get_p2pd.fetch, "go": _go, "js": _js}[kind]()


def _go() -> Path:
    """Upstream's p2pd, built as a requirement of an empty module: the checksums hold for it and
    for all that it is made of, as they do not with ``go install …@version``."""
    package = "github.com/libp2p/go-libp2p-daemon/p2pd"
    build = ["go", "build", "-mod=readonly", "-o", "p2pd", package]
    return _made("go-p2pd-0.9.2", "go", ["go.mod", "go.sum", "tools.go"], build) / "p2pd"


def _js() -> Path:
    """jsp2pd with what it needs, and without what its packages would run at installation."""
    _tool("node")  # which runs it, too
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    made = _made("jsp2pd-0.10.2", "js", ["package.json", "package-lock.json"], install)
    return made / "node_modules" / ".bin" / "jsp2pd"


def _made(name: str, kind: str, pins: list[str], command: list[str]) -> Path:
    """The folder that a command made a daemon in, from the files that pin it: another one once
    any of them has changed."""
    contents = [(_PINS / kind / pin).read_bytes() for pin in pins]
    kept = cache_dir() / f"{name}-{hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"
    if kept.exists():
        return kept
    program = _tool(command[0])
    cache_dir().mkdir(parents=True, exist_ok=True)
    # What is moved from there into place is there whole or not at all, should two fetch at once.
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        folder = Path(temporary) / "made"
        folder.mkdir()
        for pin, content in zip(pins, contents, strict=True):
            (folder / pin).write_bytes(content)
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            words = f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}"
            raise SystemExit(words)
        try:
            folder.rename(kept)
        except OSError:
            if not kept.exists():  # else another was quicker
                raise
    return kept


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"`{name}` is not on PATH: the tests on this daemon need it")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: get_daemon.py {'|'.join(KINDS)}")
    print(fetch(sys.argv[1]))
