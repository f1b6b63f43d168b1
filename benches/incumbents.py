"""The clients to compare with: PyPI's p2pclient, and hivemind's bindings.

Downloads them from PyPI into the cache directory, and loads them from there, unchanged.
"""

import sys
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import without_torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from downloads import HIVEMIND_VERSION, cache_dir, download, hivemind_wheel  # noqa: E402

HIVEMIND = f"hivemind-{HIVEMIND_VERSION}"
P2PCLIENT = "p2pclient-0.3.0"
P2PCLIENT_SHA256 = "430f4aba54194ed467dcf961babcaccfd7a278271be0574bb2aa2a6606b10f85"


def p2pclient_wheel() -> AbstractContextManager[Path]:
    return download("p2pclient==0.3.0", P2PCLIENT_SHA256, "--only-binary=:all:")


WHEELS: dict[str, Callable[[], AbstractContextManager[Path]]] = {
    P2PCLIENT: p2pclient_wheel,
    HIVEMIND: hivemind_wheel,
}


def fetch(name: str) -> Path:
    """Returns the folder of an unpacked wheel, downloaded if necessary, without its
    dependencies."""
    folder = cache_dir() / "incumbents" / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WHEELS[name]() as wheel, zipfile.ZipFile(wheel) as archive:
            unpacked = wheel.with_suffix("")
            archive.extractall(unpacked)
            for daemon in unpacked.glob("*/hivemind_cli/p2pd"):
                daemon.chmod(0o755)  # zipfile does not set it
            unpacked.rename(folder)
    return folder


def load_p2pclient() -> None:
    """Makes `import p2pclient` find the original."""
    sys.path.insert(0, str(fetch(P2PCLIENT)))


def load_hivemind() -> None:
    """Makes `import hivemind.p2p.p2p_daemon_bindings` find the original."""
    without_torch.load_hivemind(str(fetch(HIVEMIND)))


if __name__ == "__main__":
    for wheel in WHEELS:
        print(fetch(wheel))
