"""The bindings that are measured against: PyPI p2pclient, and those inside hivemind.

Both are fetched from PyPI into the cache folder and loaded from there, unchanged. Importing
hivemind itself would need torch; its bindings do not, so its packages above them are given empty
`__init__`s.
"""

import subprocess
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from get_p2pd import cache_dir  # noqa: E402

WHEELS = {"p2pclient": "0.3.0", "hivemind": "1.1.12"}


def fetch(name: str) -> Path:
    """The folder that has the unpacked wheel, and nothing that it depends on."""
    folder = cache_dir() / "incumbents" / f"{name}-{WHEELS[name]}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run(
            [*command, "--target", str(folder), f"{name}=={WHEELS[name]}"],
            check=True,
            stdout=sys.stderr,
        )
    return folder


def load_p2pclient() -> None:
    """Makes `import p2pclient` find the original."""
    sys.path.insert(0, str(fetch("p2pclient")))


def load_hivemind() -> None:
    """Makes `import hivemind.p2p.p2p_daemon_bindings` find the original."""
    root = fetch("hivemind") / "hivemind"
    for name in ("", "p2p", "utils"):
        module = types.ModuleType(f"hivemind.{name}".rstrip("."))
        module.__path__ = [str(root / name)]
        sys.modules[module.__name__] = module


if __name__ == "__main__":
    for wheel in WHEELS:
        print(fetch(wheel))
