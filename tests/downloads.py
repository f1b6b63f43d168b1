"""Pinned downloads from PyPI for tests and benches, kept in the user's cache directory."""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HIVEMIND_VERSION = "1.1.12"
HIVEMIND_SHA256 = "acb8f0cf2cdb085259feb1c0a092c530f1953287cbfa4a1ab5e14e8c65359a2c"


def cache_dir() -> Path:
    """The cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "p2pclient-rs"


@contextmanager
def download(requirement: str, sha256: str, *options: str) -> Iterator[Path]:
    """Downloads a distribution into a temporary folder of the cache and checks it.

    The caller moves the files from there into place. Renaming is atomic, so concurrent downloads do
    no harm.

    Args:
        requirement: Name and version, for example ``"p2pclient==0.3.0"``.
        sha256: Checksum of the file.
        options: Options for ``pip download``.
    """
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [*options, "--dest", folder, requirement]
        subprocess.run(command, check=True, stdout=sys.stderr)
        (archive,) = Path(folder).iterdir()
        if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
            sys.exit(f"{archive.name} is not the file that was expected")
        yield archive


@contextmanager
def hivemind_wheel() -> Iterator[Path]:
    """Downloads hivemind's wheel, which has its bindings and its daemon."""
    # The same platform for every interpreter, since the wheel has no compiled Python code.
    options = ("--only-binary=:all:", "--platform=manylinux2014_x86_64")
    with download(f"hivemind=={HIVEMIND_VERSION}", HIVEMIND_SHA256, *options) as wheel:
        yield wheel
