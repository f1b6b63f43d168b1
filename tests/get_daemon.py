"""Prints the path of a daemon to test on. Downloads or builds it first if necessary.

    python tests/get_daemon.py hivemind|go|js|native

Uses the ``go`` and ``npm`` commands, with the versions and checksums pinned in ``daemons/``, and
``cargo`` for the native daemon, which is this repository's own.
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

#: Kinds of daemon → the environment variable that can name another binary.
KINDS = {
    "hivemind": "P2PD_PATH",
    "go": "GO_P2PD_PATH",
    "js": "JSP2PD_PATH",
    "native": "P2PD_RS_PATH",
}


@functools.cache
def fetch(kind: str) -> Path:
    """Returns the executable of a daemon: from the environment variable, or else the pinned one."""
    if own := os.environ.get(KINDS[kind]):
        if not os.access(own, os.X_OK) or not os.path.isfile(own):
            raise SystemExit(f"{KINDS[kind]} must name an executable file, not {own!r}")
        return Path(own)
    return {"hivemind": get_p2pd.fetch, "go": _go, "js": _js, "native": _native}[kind]()


def _go() -> Path:
    """Builds upstream's p2pd as a requirement of an empty module.

    Unlike ``go install …@version``, this checks the checksums of the daemon and of all its
    dependencies.
    """
    package = "github.com/libp2p/go-libp2p-daemon/p2pd"
    build = ["go", "build", "-mod=readonly", "-o", "p2pd", package]
    return _build("go-p2pd-0.9.2", "go", ["go.mod", "go.sum", "tools.go"], build) / "p2pd"


def _js() -> Path:
    """Installs jsp2pd and its dependencies, without running their install scripts."""
    _tool("node")  # also needed to run it
    install = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    made = _build("jsp2pd-0.10.2", "js", ["package.json", "package-lock.json"], install)
    return made / "node_modules" / ".bin" / "jsp2pd"


def _native() -> Path:
    """Builds the native daemon of this repository."""
    root = Path(__file__).parents[1]
    command = [_tool("cargo"), "build", "--locked", "--quiet", "--package", "p2pd-node"]
    if subprocess.run(command, cwd=root).returncode:
        raise SystemExit("the native daemon could not be built")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or root / "target")
    return target / "debug" / "p2pd-rs"


def _build(name: str, kind: str, pins: list[str], command: list[str]) -> Path:
    """Returns a folder in which ``command`` has built a daemon from its pins.

    The folder's name includes a hash of the pins, so changed pins cause a new build.
    """
    contents = [(_PINS / kind / pin).read_bytes() for pin in pins]
    kept = cache_dir() / f"{name}-{hashlib.sha256(b''.join(contents)).hexdigest()[:12]}"
    if kept.exists():
        return kept
    program = _tool(command[0])
    cache_dir().mkdir(parents=True, exist_ok=True)
    # Build in a temporary folder and then rename it, so that concurrent builds do no harm.
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
            message = f"{' '.join(command)} failed with status {done.returncode}:\n{done.stdout}"
            raise SystemExit(message)
        try:
            folder.rename(kept)
        except OSError:
            if not kept.exists():  # another build was faster
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
