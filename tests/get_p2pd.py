"""Prints the path of hivemind's p2pd, a Go daemon taken from hivemind's wheel on PyPI.

Keeps only the binary.
"""

import zipfile
from pathlib import Path

from downloads import HIVEMIND_VERSION, cache_dir, hivemind_wheel

MEMBER = "hivemind/hivemind_cli/p2pd"


def fetch() -> Path:
    """Returns the path of the binary, downloaded if necessary."""
    binary = cache_dir() / f"hivemind-{HIVEMIND_VERSION}" / "p2pd"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        with hivemind_wheel() as wheel:
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(MEMBER, wheel.parent))
            extracted.chmod(0o755)
            extracted.rename(binary)
    return binary


if __name__ == "__main__":
    print(fetch())
