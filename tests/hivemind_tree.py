"""Makes a hivemind that can be imported without torch: its bindings and `P2P`, from the wheel.

All files are the originals, except for the `__init__` modules, which would import the rest.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benches"))
from incumbents import HIVEMIND, fetch  # noqa: E402


def make(directory: Path, version: str = "1.1.12") -> Path:
    """Makes a hivemind.

    Args:
        directory: The directory to import it from.
        version: Its ``__version__``.

    Returns:
        ``directory``.
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


def make_copy(
    directory: Path, name: str = "fork.vendor.hivemind", version: str = "1.1.12+fork"
) -> Path:
    """Makes a copy of hivemind under another name, by which its modules import each other.

    Args:
        directory: The directory to import it from.
        name: The copy's import name.
        version: The copy's ``__version__``.

    Returns:
        The folder of the copy.
    """
    source = make(directory / "of_copy") / "hivemind"
    *parents, last = name.split(".")
    folder = directory
    for parent in parents:
        folder /= parent
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    folder /= last
    shutil.copytree(source, folder)
    for file in folder.rglob("*.py"):
        text = file.read_text()
        text = re.sub(r"^(\s*(?:from|import) )hivemind\b", rf"\g<1>{name}", text, flags=re.M)
        file.write_text(text)
    init = folder / "__init__.py"
    init.write_text(f'import {name}.p2p\n\n__version__ = "{version}"\n')
    shutil.rmtree(directory / "of_copy")
    return folder
