"""Prints the path of p2pclient 0.3.0's source distribution, whose tests ours are measured by.

It is fetched once, checked, and kept in the user's cache folder.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from get_p2pd import cache_dir

NAME = "p2pclient-0.3.0.tar.gz"
SHA256 = "98ccfd75642de9d0c532f1d1f06aec0c63d115c0f3341a0f488185a6e928a087"


def fetch() -> Path:
    """The archive."""
    archive = cache_dir() / NAME
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--no-binary=:all:", "--dest", folder, "p2pclient==0.3.0"]
            subprocess.run(command, check=True, stdout=sys.stderr)
            (Path(folder) / NAME).rename(archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{archive} is not the archive that was expected")
    return archive


if __name__ == "__main__":
    print(fetch())
