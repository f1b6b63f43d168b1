"""Makes a hivemind that can be imported without torch: its bindings and `P2P`, from the wheel.

Everything is the original, but for the `__init__`s above it, which would import the rest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benches"))
from incumbents import HIVEMIND, fetch  # noqa: E402


def make(directory: Path, version: str = "1.1.12") -> Path:
    """A directory to import hivemind from.

    Args:
        directory: Where to make it.
        version: What hivemind says that it is.
    """
    wheel = fetch(HIVEMIND) / "hivemind"
    package = directory / "hivemind"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f'import hivemind.p2p\n\n__version__ = "{version}"\n')
    for name in ("p2p", "proto", "hivemind_cli"):
        (package / name).symlink_to(wheel / name)
    (package / "utils").mkdir()
    (package / "utils" / "__init__.py").write_text("")
    for file in (wheel / "utils").iterdir():
        if file.name not in ("__init__.py", "__pycache__"):
            (package / "utils" / file.name).symlink_to(file)
    return directory
